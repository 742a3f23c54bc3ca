"""Training: ``train(cfg)`` trains and records a run, ``load_run(path)`` returns its model."""

from .checkpoint import load_run
from .loop import train
from .signals import Interrupted

__all__ = ["Interrupted", "load_run", "train"]
