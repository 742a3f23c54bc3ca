"""Training: ``train(cfg)`` makes a run, ``load_run(path)`` gives its model back."""

from .interrupt import Interrupted
from .load import load_run
from .run import train

__all__ = ["Interrupted", "load_run", "train"]
