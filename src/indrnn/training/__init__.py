"""Training: ``train(cfg)`` trains and records a run, ``load_run(path)`` returns its model."""

from .checkpoint import load_run
from .interrupts import Interrupted
from .loop import train

__all__ = ["Interrupted", "load_run", "train"]
