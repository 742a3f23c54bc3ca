"""Finding finished and unfinished runs again, for the report."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .folder import CONFIG, METRICS, RESULT, load_config_file
from .metrics import read_metrics
from .result import Result, read_result

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One run folder. ``result`` is None while the run is unfinished."""

    path: Path
    config: dict[str, Any]
    result: Result | None
    metrics: dict[str, np.ndarray]
    """Columns of metrics.csv, (rows,) each; NaN where a cell is empty."""

    def curve(self, split: str, y: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """Columns ``x`` and ``y`` of the rows of ``split`` whose ``y`` is a number: two arrays (points,)."""
        chosen = (self.metrics["split"] == split) & np.isfinite(self.metrics[y])
        return self.metrics[x][chosen], self.metrics[y][chosen]


def read_runs(folder: Path | str) -> list[Run]:
    """Every run folder at or below ``folder``, ordered by path.

    A run that cannot be read is left out with a logged warning that names the file. Raises UserError if ``folder``
    is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} to read runs from; name one that holds run folders")
    runs = []
    for parent, subfolders, files in os.walk(folder, onerror=_skip):
        # Hidden folders hold the configurations of other tools.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if CONFIG in files and (METRICS in files or RESULT in files):
            try:
                runs.append(_read(Path(parent), files))
            except UserError as failure:
                log.warning("left out: %s", failure)
    return sorted(runs, key=lambda run: run.path.parts)


def _read(path: Path, files: list[str]) -> Run:
    return Run(
        path=path,
        config=load_config_file(path / CONFIG),
        result=read_result(path / RESULT) if RESULT in files else None,
        metrics=read_metrics(path / METRICS),
    )


def _skip(failure: OSError) -> None:
    log.warning("left out: cannot read %s: %s", failure.filename, failure.strerror)
