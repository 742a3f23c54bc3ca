"""Run folders read again, and grouped: one group a task and name, its runs the seeds."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar, cast

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from indrnn.config.checks import flatten, run_name
from indrnn.config.schema import Config
from indrnn.data import Task, make_task
from indrnn.errors import UserError
from indrnn.record.config_diff import neutral_keys
from indrnn.record.folder import CONFIG, METRICS, RESULT, find_run_folders, load_config_file
from indrnn.record.metrics import read_metrics
from indrnn.record.result import Result, read_result

log = logging.getLogger(__name__)
T = TypeVar("T")
K = TypeVar("K")

# What the report reads of a configuration.
_KEYS: dict[str, tuple[type, ...]] = {
    "name": (str,), "seed": (int,), "tag": (str, type(None)), "model.name": (str,), "data.name": (str,),
    "trainer.batch_size": (int,), "trainer.precision": (str,),
}  # fmt: skip
MODELS = {
    "indrnn": "IndRNN", "indrnn_residual": "residual IndRNN", "indrnn_dense": "dense IndRNN", "lstm": "LSTM",
    "lstm_matched": "LSTM of equal parameters", "lstm_chrono": "LSTM (chrono)", "rnn": "RNN", "gru": "GRU",
    "mingru": "minGRU",
}  # fmt: skip
RATE = "optimizer.lr"
# Settings in words, those first that say most. Of some a single value has words, which say what is left out.
SETTINGS: dict[str, str | dict[object, str]] = {
    "model.norm": {"none": "without norm"}, "model.last_layer_min": {False: "without the last layer's range"},
    "model.constraint": {"none": "u without bound"}, "model.num_layers": "{} layers", "model.hidden_size": "{} units",
    RATE: "lr {}", "trainer.max_steps": "up to {} updates", "trainer.batch_size": "batch {}",
    "trainer.precision": "{}",
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
        """Columns ``x`` and ``y`` of the rows of ``split`` whose ``y`` is a number, by ``x``: two arrays (points,)."""
        chosen = np.flatnonzero((self.metrics["split"] == split) & np.isfinite(self.metrics[y]))
        chosen = chosen[np.argsort(self.metrics[x][chosen], kind="stable")]
        return self.metrics[x][chosen], self.metrics[y][chosen]

    @property
    def steps(self) -> int:
        """Steps done: the result's, or how far an unfinished run has come."""
        return self.result.steps if self.result else int(max(self.metrics["step"], default=0))

    @property
    def seconds(self) -> float:
        return self.result.seconds if self.result else float(max(self.metrics["seconds"], default=0.0))

    @property
    def best_validation(self) -> dict[str, float]:
        """The highest accuracy and the lowest loss of all evaluations, as far as there are any."""
        scores = {"accuracy": self.curve("val", "accuracy")[1], "loss": self.curve("val", "loss")[1]}
        pick = {"accuracy": max, "loss": min}
        return {name: float(pick[name](values)) for name, values in scores.items() if len(values)}


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
    def unfinished(self) -> list[Run]:
        return [run for run in self.runs if not run.result]

    @property
    def results(self) -> list[Result]:
        return [run.result for run in self.runs if run.result]

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
    def score(self) -> float:
        """What tables sort by, higher first: the mean test accuracy, or the mean test error with a minus."""
        return fmean(-r.test_loss if r.test_accuracy is None else r.test_accuracy for r in self.results)

    @property
    def count(self) -> str:
        """For labels: how many seeds are averaged, and what is left out of the average."""
        others = ", unfinished" if not self.finished else ", others unfinished" if self.unfinished else ""
        return f"n = {len(self.drawn)}{others}"


def in_words(groups: Iterable[Group]) -> dict[str, str]:
    """What people call each group: its model, the learning rate unless all have the same, and where several have one
    model, the settings that tell it from those (or the name of its run folders, where none does)."""
    first = {group.name: group.runs[0] for group in groups}
    models = {name: model_name(run.config) for name, run in first.items()}
    common = {RATE} if len({run.settings.get(RATE) for run in first.values()}) > 1 else set()
    words = {}
    for name, run in first.items():
        alike = [other.settings for at, other in first.items() if models[at] == models[name] and at != name]
        telling = set(common)
        for key in SETTINGS:
            same = [settings for settings in alike if settings.get(key) == run.settings.get(key)]
            if len(same) < len(alike):
                telling.add(key)
            alike = same
        said = [_in_words(key, run.settings.get(key)) for key in SETTINGS if key in telling]
        words[name] = ", ".join([MODELS.get(models[name], models[name]), *filter(None, said)])
    return {name: text if [*words.values()].count(text) == 1 else f"{text} ({name})" for name, text in words.items()}


def _in_words(key: str, value: object) -> str:
    """The learning rate 0.0002 -> lr 2e-4, 4000 updates -> up to 4,000 updates; nothing where there is no value."""
    form = SETTINGS[key]
    if isinstance(form, dict):
        return form.get(value, "")
    if isinstance(value, float):
        value = re.sub(r"\.?0*e([-+])0*(?=\d)", lambda sign: f"e{sign[1].strip('+')}", f"{value:e}")
    return "" if value is None else form.format(f"{value:,}" if isinstance(value, int) else value)


def extent(values: Sequence[int]) -> str:
    """[41000, 60000] -> '41,000–60,000'; equal values once."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


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
    members = grouped((runs[key] for key in sorted(runs)), lambda run: (run.task, run.name))
    groups = [Group(*key, tuple(seeds)) for key, seeds in members.items()]
    return sorted(
        groups, key=lambda group: (group.about.series or group.about.name, group.about.length, group.task, group.name)
    )


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """``items`` by their ``key``, both in order of appearance."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def by_task(groups: Iterable[Group]) -> dict[str, list[Group]]:
    return grouped(groups, lambda group: group.task)


def find_runs(folder: Path) -> Iterator[Run]:
    """Every run at or below ``folder``. One that cannot be read is left out with a logged warning that names the file.
    Raises UserError if ``folder`` is none."""
    for path in find_run_folders(folder):
        try:
            yield read_run(path)
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


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Keys whose values differ between runs that are averaged, the seed and what cannot change a result apart."""
    expected = neutral_keys() | {"seed", "device"}
    keys = sorted({key for run in runs for key in run.settings} - expected)
    return [key for key in keys if any(run.settings.get(key) != runs[0].settings.get(key) for run in runs)]
