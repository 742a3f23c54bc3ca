"""metrics.csv: one row per evaluation and log interval."""

import csv
import logging
from pathlib import Path
from typing import Self

import numpy as np

from ..errors import UserError
from ..files import one_line, write_atomically

log = logging.getLogger(__name__)

COLUMNS = {
    "step": np.int64, "epoch": float, "seconds": float, "split": str,
    "loss": float, "accuracy": float, "lr": float, "grad_norm": float,
}  # fmt: skip


class MetricsWriter:
    """Appends rows to metrics.csv, readable at once.

    ========= ==========================================================================================
    step      updates made
    epoch     passes over the training data
    seconds   training time without evaluation, summed over all interruptions
    split     train (means since the last train row), val (one evaluation) or test (once, at the end)
    loss      mean loss: cross-entropy in nats, or squared error
    accuracy  share of correct predictions in [0, 1]; empty for a regression
    lr        learning rate of the last step; train rows only
    grad_norm norm of the whole gradient before clipping; train rows only
    ========= ==========================================================================================

    A resumed run (``resume_step``: the checkpoint's step) drops the rows after that step, which it writes again, and an
    incomplete last line. Without ``resume_step`` the file starts empty. Raises RunError with one line if the disk is
    full or the file cannot be written.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        kept: list[str] = []
        if resume_step is not None and path.exists():
            steps = read_metrics(path)["step"]
            kept = [line for line, step in zip(_lines(path)[1:], steps, strict=True) if step <= resume_step]
        elif resume_step:
            log.warning("%s is missing: its curves begin at step %d", path, resume_step)
        write_atomically(path, ",".join(COLUMNS) + "\n" + "".join(kept))
        self._path = path
        with one_line("write", path):
            self._file = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115

    def row(
        self, step: int, epoch: float, seconds: float, split: str, loss: float | None = None,
        accuracy: float | None = None, lr: float | None = None, grad_norm: float | None = None,
    ) -> None:  # fmt: skip
        """Write one row; None becomes an empty cell."""
        # repr keeps every bit: equal runs have equal files.
        cells = [repr(float(value)) if value is not None else "" for value in (loss, accuracy, lr, grad_norm)]
        with one_line("write", self._path):
            self._file.write(",".join([str(step), f"{epoch:.6g}", f"{seconds:.3f}", split, *cells]) + "\n")
            self._file.flush()

    def close(self) -> None:
        with one_line("write", self._path):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """The columns as arrays (rows,): step int64, split str, the others float64 with NaN for an empty cell.

    An incomplete last line, of a killed run, is dropped. Raises UserError with one line for any other damage.
    """
    header, *rows = list(csv.reader(_lines(path))) or [[]]
    if header != list(COLUMNS):
        raise UserError(f"{path} does not begin with the line {','.join(COLUMNS)}: not a metrics file of this version")
    try:
        cells = np.array(rows, dtype=str).reshape(len(rows), len(COLUMNS))
        return {
            name: np.where(column == "", "nan", column).astype(kind)
            for (name, kind), column in zip(COLUMNS.items(), cells.T, strict=True)
        }
    except ValueError as failure:
        reason = str(failure).splitlines()[0]
        raise UserError(f"{path} is damaged ({reason}); repair or move it away") from failure


def _lines(path: Path) -> list[str]:
    """The complete lines, which end with a line feed: the 0.97 of another may have been 0.9734."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    except OSError as failure:
        raise UserError(f"cannot read {path}: {failure.strerror}") from failure
    except UnicodeDecodeError as failure:
        raise UserError(f"{path} is damaged: not text; move it away") from failure
