"""metrics.csv: a row an evaluation and a row a log interval."""

import csv
import io
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RunError, UserError
from .files import append, csv_text, one_line, write_atomically

log = logging.getLogger(__name__)

COLUMNS = ("step", "epoch", "seconds", "split", "loss", "accuracy", "lr", "grad_norm")


class MetricsWriter:
    """Appends rows, each handed to the system before `row` returns; None makes an empty cell.

    Going on after an interruption (``resume_step``: the checkpoint's step), the rows past it are dropped, for they will
    be written again, and so is a last line that a kill cut short. Without ``resume_step`` the file starts anew. Raises
    RunError with one line if the disk is full or the file cannot be written.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self.path = Path(path)
        kept: list[list[str]] = []
        if resume_step is not None and self.path.exists():
            kept = [row for row in _rows(self.path) if int(row[0]) <= resume_step]
        elif resume_step:
            log.warning("%s is missing: its curves will begin at step %d", self.path, resume_step)
        write_atomically(self.path, csv_text([list(COLUMNS), *kept]))
        with one_line("write", self.path):
            self._descriptor: int | None = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def row(
        self,
        step: int,
        epoch: float,
        seconds: float,
        split: str,
        loss: float | None = None,
        accuracy: float | None = None,
        lr: float | None = None,
        grad_norm: float | None = None,
    ) -> None:
        """``split`` is train, val or test; seconds are counted over all interruptions."""
        if self._descriptor is None:
            raise RunError(f"{self.path} is closed: no row can follow")
        # repr keeps every bit, so that equal runs have equal files.
        cells = [repr(float(value)) if value is not None else "" for value in (loss, accuracy, lr, grad_norm)]
        line = csv_text([[str(int(step)), f"{epoch:.6g}", f"{seconds:.3f}", split, *cells]])
        with one_line("write", self.path):
            append(self._descriptor, line.encode())

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """The columns as arrays (rows,): step int64, split str, all others float64 with NaN for an empty cell.

    A last line cut short by a kill is left out. Raises UserError with one line for anything else that is wrong.
    """
    rows = _rows(Path(path))
    columns: dict[str, Any] = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)) if rows else {}
    arrays: dict[str, np.ndarray] = {}
    for name in COLUMNS:
        cells = columns.get(name, ())
        if name == "step":
            arrays[name] = np.array([int(cell) for cell in cells], dtype=np.int64)
        elif name == "split":
            arrays[name] = np.array(cells, dtype=str)
        else:
            arrays[name] = np.array([float(cell) if cell else math.nan for cell in cells], dtype=np.float64)
    return arrays


def _rows(path: Path) -> list[list[str]]:
    """The rows below the header as strings, checked."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as failure:
        raise UserError(f"cannot read {path}: {failure.strerror}") from failure
    except UnicodeDecodeError as failure:
        raise UserError(f"{path} is damaged: not text; move it away") from failure
    # A line without its end is one that a kill cut short, however whole it looks: 0.97 may have been 0.9734.
    header, *rows = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))) or [[]]
    if tuple(header) != COLUMNS:
        raise UserError(f"{path} does not begin with the line {','.join(COLUMNS)}: not a metrics file of this version")
    for number, row in enumerate(rows, start=2):
        if not _is_row(row):
            raise UserError(f"{path} is damaged in line {number} ({','.join(row)[:60]!r}); repair or move it away")
    return rows


def _is_row(row: list[str]) -> bool:
    if len(row) != len(COLUMNS) or not row[3]:
        return False
    try:
        int(row[0])
        for cell in filter(None, row[4:]):
            float(cell)
        return all(map(math.isfinite, map(float, row[1:3])))
    except ValueError:
        return False
