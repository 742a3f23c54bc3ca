"""Run folders read again, and grouped: one group a task and name, its runs the seeds."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from indrnn.config.checks import run_name
from indrnn.config.schema import Config
from indrnn.data import Task, make_task
from indrnn.errors import UserError
from indrnn.record import Result, read_metrics, read_result
from indrnn.record.compare import flatten, neutral_keys
from indrnn.record.folder import CONFIG, METRICS, RESULT, load_config_file

log = logging.getLogger(__name__)

# What the report reads of a configuration.
_TEXT, _WHOLE, _OPTIONAL = (str,), (int,), (str, type(None))
_KEYS: dict[str, tuple[type, ...]] = {
    "name": _TEXT, "seed": _WHOLE, "tag": _OPTIONAL, "model.name": _TEXT, "data.name": _TEXT,
    "trainer.batch_size": _WHOLE, "trainer.precision": _TEXT,
}  # fmt: skip


MODELS = {
    "indrnn": "IndRNN", "indrnn_residual": "residual IndRNN", "indrnn_dense": "dense IndRNN", "lstm": "LSTM",
    "lstm_matched": "LSTM of equal parameters", "lstm_chrono": "LSTM, chrono initialisation",
    "lstm_chrono_matched": "LSTM of equal parameters, chrono initialisation", "rnn": "RNN",
    "gru": "GRU", "mingru": "minGRU",
}  # fmt: skip
# Settings in words, those first that say most.
SETTINGS = {
    "model.num_layers": "{} layers", "model.hidden_size": "{} units", "optimizer.lr": "lr {}",
    "trainer.max_steps": "{} updates", "trainer.batch_size": "batch {}", "trainer.precision": "{}",
}  # fmt: skip


def model_name(cfg: Any) -> str:
    """The network as reports tell it from others: its class, and the LSTM's by its initialisation too."""
    chrono = cfg.model.get("bias_init") == "chrono"
    return f"{cfg.model.name}_chrono" if chrono and cfg.model.name == "lstm" else str(cfg.model.name)


@dataclass(frozen=True)
class Run:
    """One run folder, under the names that its configuration gives it. ``result`` is None while it is unfinished."""

    path: Path
    config: Config
    about: Task
    result: Result | None
    metrics: dict[str, np.ndarray]
    """Columns of metrics.csv, (rows,) each; NaN where a cell is empty."""

    @property
    def task(self) -> str:
        return self.about.folder

    @property
    def name(self) -> str:
        """With the tag."""
        return run_name(self.config)

    @property
    def seed(self) -> int:
        return self.config.seed

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration as ``{"model.name": "lstm", ...}``."""
        return flatten(OmegaConf.to_container(self.config))

    def curve(self, split: str, y: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """Columns ``x`` and ``y`` of the rows of ``split`` whose ``y`` is a number: two arrays (points,)."""
        chosen = (self.metrics["split"] == split) & np.isfinite(self.metrics[y])
        return self.metrics[x][chosen], self.metrics[y][chosen]

    @property
    def steps(self) -> int:
        """Steps done: the result's, or how far an unfinished run has come."""
        return self.result.steps if self.result else int(max(self.metrics["step"], default=0))

    @property
    def seconds(self) -> float:
        return self.result.seconds if self.result else float(max(self.metrics["seconds"], default=0.0))

    @property
    def best_validation_accuracy(self) -> float | None:
        values = self.curve("val", "accuracy")[1]
        return float(values.max()) if len(values) else None

    @property
    def best_validation_loss(self) -> float | None:
        values = self.curve("val", "loss")[1]
        return float(values.min()) if len(values) else None


@dataclass(frozen=True)
class Group:
    """The runs of one task and name, by seed."""

    task: str
    name: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.result]

    @property
    def results(self) -> list[Result]:
        return [run.result for run in self.runs if run.result]

    @property
    def unfinished(self) -> list[Run]:
        return [run for run in self.runs if not run.result]

    @property
    def drawn(self) -> list[Run]:
        """The runs that figures average: the finished ones, or all where none is finished."""
        return self.finished or list(self.runs)

    @property
    def about(self) -> Task:
        return self.runs[0].about

    @property
    def model(self) -> str:
        return model_name(self.runs[0].config)

    @property
    def measures_accuracy(self) -> bool:
        return self.about.measures_accuracy

    @property
    def mean_test_accuracy(self) -> float:
        return fmean(result.test_accuracy or 0.0 for result in self.results)

    @property
    def mean_test_loss(self) -> float:
        return fmean(result.test_loss for result in self.results)

    @property
    def test_size(self) -> int:
        return self.about.test_samples or 0

    @property
    def order(self) -> tuple[float, str]:
        """Best first; the name breaks ties, so that the order is always the same."""
        if self.measures_accuracy:
            return (-self.mean_test_accuracy, self.name)
        return (self.mean_test_loss, self.name)

    @property
    def count(self) -> str:
        """For legends: how many seeds are averaged, and what is left out of the average."""
        if not self.finished:
            return f"n = {len(self.runs)}, unfinished"
        return f"n = {len(self.finished)}{', others unfinished' if self.unfinished else ''}"

    @property
    def title(self) -> str:
        return self.about.title


def in_words(groups: Sequence[Group]) -> dict[str, str]:
    """What people call each group: its model, and where several have that, the first setting that tells them apart; the
    name of the run folders where there is no such setting."""
    by_model: dict[str, dict[str, Run]] = {}
    for group in groups:
        by_model.setdefault(group.model, {}).setdefault(group.name, group.runs[0])
    words: dict[str, str] = {}
    for model, runs in by_model.items():
        title = MODELS.get(model, model)
        for key, phrase in SETTINGS.items():
            values = {name: run.settings.get(key) for name, run in runs.items()}
            if None not in values.values() and len(set(values.values())) == len(runs) > 1:
                words |= {name: f"{title}, {phrase.format(_number(value))}" for name, value in values.items()}
                break
        else:
            words |= {name: title if len(runs) == 1 else f"{title} ({name})" for name in runs}
    return words


def _number(value: object) -> str:
    """0.0002 -> 2e-4, 4000 -> 4,000."""
    if isinstance(value, float):
        return re.sub(r"\.?0*e([-+])0*(?=\d)", lambda sign: f"e{sign[1].strip('+')}", f"{value:e}")
    return f"{value:,}" if isinstance(value, int) else str(value)


def mean_answer_level(groups: Iterable[Group], part: str) -> tuple[list[float], str]:
    """The mean squared errors that always answering the mean has on a part ("train", "validation" or "test") of the
    groups' regressions, each once, in ascending order; and in words for a legend. Empty if no task knows it."""
    errors = (group.about.mean_answer_error for group in groups)
    levels = sorted({error(part) for error in errors if error is not None})
    if not levels:
        return [], ""
    low, high = f"{levels[0]:.3f}", f"{levels[-1]:.3f}"
    return levels, f"always answering the mean: {low if low == high else f'{low} to {high}'}"


def collect(folders: Iterable[Path]) -> list[Group]:
    """All runs below ``folders``, grouped by task and name, in alphabetical order (lengths of one task by number).

    A run that cannot be used is left out with a logged warning that names it.

    Raises:
        UserError: a folder is missing, cannot be read or holds no run; or two folders hold the same task, name and
            seed, which would count one seed twice.
    """
    folders = list(folders)
    runs: dict[tuple[str, str, int], Run] = {}
    for run in (run for folder in folders for run in find_runs(folder)):
        known = runs.setdefault((run.task, run.name, run.seed), run)
        if known.path.resolve() != run.path.resolve():
            raise UserError(
                f"{known.path} and {run.path} are the same task, name and seed; report on one of them at a time"
            )
    if not runs:
        raise UserError(f"no run found in {', '.join(map(str, folders))}; train one with indrnn-train model=indrnn")
    members: dict[tuple[str, str], list[Run]] = {}
    for task, name, seed in sorted(runs):
        members.setdefault((task, name), []).append(runs[task, name, seed])
    groups = [Group(task, name, tuple(seeds)) for (task, name), seeds in members.items()]
    return sorted(
        groups, key=lambda group: (group.about.series or group.about.name, group.about.length, group.task, group.name)
    )


def find_runs(folder: Path) -> Iterator[Run]:
    """Every run folder at or below ``folder``. One that cannot be read is left out with a logged warning that names
    the file. Raises UserError if ``folder`` is none."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} to read runs from; name one that holds run folders")
    for parent, subfolders, files in os.walk(folder, onerror=_skip):
        # Hidden folders hold the configurations of other tools.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if CONFIG in files and (METRICS in files or RESULT in files):
            try:
                yield read_run(Path(parent))
            except UserError as failure:
                log.warning("left out: %s", failure)


def read_run(path: Path) -> Run:
    """The run in the folder ``path``.

    Raises:
        UserError: a file is missing or damaged, its configuration lacks what the report reads, or nothing in its
            metrics is a number.
    """
    stored = load_config_file(path / CONFIG)
    flat = flatten(stored)
    for key, kinds in _KEYS.items():
        value = flat.get(key)
        if type(value) not in kinds or "${" in str(value):
            fault = f"cannot be {str(value)[:40]!r}" if key in flat else "is missing"
            raise UserError(f"{path / CONFIG}: {key} {fault}")
    metrics = read_metrics(path / METRICS)
    if len(metrics["step"]) and not np.isfinite(metrics["loss"]).any():
        raise UserError(f"{path / METRICS}: none of its losses is a number")
    try:
        config = cast(Config, OmegaConf.create(stored))
        task = make_task(config.data)
    except (UserError, OmegaConfBaseException, ValueError, TypeError) as failure:
        raise UserError(f"{path / CONFIG}: {str(failure).splitlines()[0][:120]}") from None
    result = read_result(path / RESULT) if (path / RESULT).is_file() else None
    return Run(path, config, task, result, metrics)


def _skip(failure: OSError) -> None:
    log.warning("left out: cannot read %s: %s", failure.filename, failure.strerror)


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Keys whose values differ between runs that are averaged, the seed and what cannot change a result apart."""
    expected = neutral_keys() | {"seed", "device"}
    keys = sorted({key for run in runs for key in run.settings} - expected)
    return [key for key in keys if any(run.settings.get(key) != runs[0].settings.get(key) for run in runs)]
