"""metrics.csv, read: one row per evaluation and log interval, written by `indrnn.record.recorder.Recorder`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {
    "step": int, "epoch": float, "seconds": float, "split": str,
    "loss": float, "accuracy": float, "lr": float, "grad_norm": float,
}  # fmt: skip


def read_metrics(path: Path) -> pd.DataFrame:
    """The rows, with NaN for an empty cell. An incomplete last line, of a killed run, is dropped.

    Raises UserError with one line for a file that cannot be read or is damaged otherwise.
    """
    import pandas as pd  # here, because a run that starts at step 0 reads no metrics

    lines = complete_lines(path)
    if lines[:1] != [",".join(COLUMNS) + "\n"]:
        raise UserError(f"{path} does not begin with the line {','.join(COLUMNS)}: not a metrics file of this version")
    try:
        rows = io.StringIO("".join(lines))
        table = pd.read_csv(rows, dtype=COLUMNS, skip_blank_lines=False)
        if any(line.count(",") != len(COLUMNS) - 1 for line in lines):
            raise ValueError("a row has too few or too many cells")
    except ValueError as failure:
        raise UserError(f"{path} is damaged ({str(failure).splitlines()[0]}); repair or move it away") from failure
    return table


def complete_lines(path: Path) -> list[str]:
    """The lines that end with a line feed: the 0.97 of another may have been 0.9734."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    except OSError as failure:
        raise UserError(f"cannot read {path}: {failure.strerror}") from failure
    except UnicodeDecodeError as failure:
        raise UserError(f"{path} is damaged: not text; move it away") from failure
