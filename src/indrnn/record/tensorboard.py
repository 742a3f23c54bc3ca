"""TensorBoard events: the same tags for every model."""

import shlex
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from ..files import one_line

if TYPE_CHECKING:
    import torch

EVENTS = "events.out.tfevents."


class TensorBoardWriter:
    """Writes scalars, histograms and texts of one run into its folder ``path``; flushed when a method returns.

    With ``resume_step`` TensorBoard drops the points of earlier event files after that step, so curves do not zigzag.
    Raises RunError with one line if the events cannot be written.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        # TensorBoard prefers TensorFlow for writing files, also one that is slow to import or partly uninstalled.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
        from torch.utils.tensorboard import SummaryWriter

        self._path = path
        with one_line("write", path):
            self._writer: Any = SummaryWriter(str(path), purge_step=None if resume_step is None else resume_step + 1)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write one point per tag; None (the accuracy of a regression) is left out."""
        with self._flushed() as writer:
            for tag, value in values.items():
                if value is not None:
                    writer.add_scalar(tag, value, step)

    def histogram(self, tag: str, tensor: "torch.Tensor", step: int) -> None:
        """Write a histogram with 30 equal bins: one of torch's default bins would have all recurrent weights near 1."""
        with self._flushed() as writer:
            writer.add_histogram(tag, tensor.detach().double(), step, bins=30)

    def text(self, tag: str, text: str) -> None:
        """Write Markdown for the TEXT page."""
        with self._flushed() as writer:
            writer.add_text(tag, text, 0)

    @contextmanager
    def _flushed(self) -> Iterator[Any]:
        # SummaryWriter writes in a thread, whose traceback must not precede our one line.
        previous, threading.excepthook = threading.excepthook, lambda failure: None
        try:
            with one_line("write TensorBoard events to", self._path):
                yield self._writer
                self._writer.flush()
        except RunError:
            with suppress(OSError):
                self._writer.file_writer.close()  # waits for the thread
            raise
        finally:
            threading.excepthook = previous

    def close(self) -> None:
        with suppress(OSError):  # what was written is flushed
            self._writer.close()


def tensorboard_command(folder: Path | str) -> str:
    """The command that shows all run folders below ``folder``."""
    return f"tensorboard --logdir {shlex.quote(str(folder))}"
