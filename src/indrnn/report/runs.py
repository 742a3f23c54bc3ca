"""Read run folders and group them: the runs of one task and name are the seeds of one group."""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from indrnn.config.compose import flatten, run_name
from indrnn.config.schema import Config
from indrnn.data import Task, make_task
from indrnn.errors import UserError
from indrnn.record.config_diff import neutral_keys
from indrnn.record.folder import CONFIG, METRICS, RESULT, find_run_folders, load_config_file
from indrnn.record.metrics import read_metrics
from indrnn.record.result import Result, read_result

log = logging.getLogger(__name__)

MODELS = {
    "indrnn": "IndRNN", "indrnn_residual": "residual IndRNN", "indrnn_dense": "dense IndRNN", "lstm": "LSTM",
    "lstm_chrono": "LSTM (chrono)", "rnn": "RNN", "gru": "GRU", "mingru": "minGRU",
}  # fmt: skip
# Settings that tell groups of one model apart, the most telling first. A dictionary names only some values.
SETTINGS: dict[str, str | dict[Any, str]] = {
    "model.norm": {"none": "no norm"}, "model.last_layer_min": {False: "no last-layer range"},
    "model.constraint": {"none": "unbounded u"}, "model.num_layers": "{}-layer", "model.hidden_size": "{} units",
    "optimizer.name": {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "muon": "Muon"}, "optimizer.lr": "lr {}",
    "model.gamma": "gamma {}", "trainer.max_steps": "{} updates", "trainer.batch_size": "batch {}",
    "trainer.precision": "{}",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run folder. ``result`` is None while the run is unfinished."""

    path: Path
    name: str
    """With the tag."""
    seed: int
    config: Config
    task: Task
    result: Result | None
    metrics: pd.DataFrame
    """The columns of metrics.csv; NaN for an empty cell."""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration as ``{"model.name": "lstm", ...}``."""
        return flatten(OmegaConf.to_container(self.config))

    def curve(self, split: str, column: str) -> pd.DataFrame:
        """The rows of one split in which ``column`` is a finite number, in order."""
        return self.metrics[(self.metrics["split"] == split) & np.isfinite(self.metrics[column])]

    @property
    def steps(self) -> int:
        """Updates done so far."""
        return max(self.metrics["step"], default=0)

    @property
    def seconds(self) -> float:
        return self.result.seconds if self.result else max(self.metrics["seconds"], default=0.0)

    @property
    def val_accuracy(self) -> float:
        """The best of all evaluations; NaN without one."""
        return float(self.curve("val", "accuracy")["accuracy"].max())

    @property
    def val_loss(self) -> float:
        return float(self.curve("val", "loss")["loss"].min())


@dataclass(frozen=True)
class Group:
    """The runs of one task and name, by seed."""

    runs: Sequence[Run]

    @property
    def name(self) -> str:
        return self.runs[0].name

    @property
    def task(self) -> Task:
        return self.runs[0].task

    @property
    def model(self) -> str:
        return model_name(self.runs[0].config)

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.result]

    @property
    def results(self) -> list[Result]:
        return [run.result for run in self.runs if run.result]

    @property
    def drawn(self) -> Sequence[Run]:
        """The runs that figures average: the finished ones, or all if none is finished."""
        return self.finished or self.runs


def model_name(cfg: Any) -> str:
    """The model as reports name it; an LSTM with chrono initialization is a model of its own."""
    chrono = cfg.model.name == "lstm" and cfg.model.get("bias_init") == "chrono"
    return "lstm_chrono" if chrono else str(cfg.model.name)


def labels(groups: Iterable[Group]) -> dict[str, str]:
    """A label for each group of one task by name: the model, and the settings that tell it from the same model's other
    groups, or its name if no setting does."""
    settings = {group.name: group.runs[0].settings for group in groups}
    words = {group.name: MODELS.get(group.model, group.model) for group in groups}
    for key in SETTINGS:
        for label in set(words.values()):
            same = [name for name in words if words[name] == label]
            if len({str(settings[name].get(key)) for name in same}) > 1:
                words |= {name: ", ".join(filter(None, (label, _text(key, settings[name].get(key))))) for name in same}
    repeated = [label for label in words.values() if [*words.values()].count(label) > 1]
    return {name: f"{label} ({name})" if label in repeated else label for name, label in words.items()}


def _text(key: str, value: Any) -> str:
    """0.0002 -> lr 2e-4, 4000 -> 4,000 updates; empty for a value without a text."""
    text = SETTINGS[key]
    if isinstance(text, dict):
        return text.get(value, "")
    if isinstance(value, float):
        value = f"{value:g}" if value >= 0.01 else re.sub(r"\.?0*e-0*", "e-", f"{value:e}")
    return "" if value is None else text.format(f"{value:,}" if isinstance(value, int) else value)


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Keys that can affect the result and differ between runs, except the seed."""
    ignored = neutral_keys() | {"seed", "device"}
    keys = sorted({key for run in runs for key in run.settings} - ignored)
    return [key for key in keys if any(run.settings.get(key) != runs[0].settings.get(key) for run in runs)]


def baseline(groups: Iterable[Group], split: str) -> tuple[list[float], str]:
    """The mean squared errors of predicting the mean on a split ("train", "validation" or "test") of regression tasks,
    ascending, and a label for them. Empty if no task knows its error."""
    errors = (group.task.mean_answer_error for group in groups)
    levels = sorted({error(split) for error in errors if error is not None})
    ends = list(dict.fromkeys(f"{level:.3f}" for level in (levels[:1] + levels[-1:])))
    return levels, f"predict-the-mean baseline: {' to '.join(ends)}" if levels else ""


def collect(folders: Iterable[Path]) -> list[Group]:
    """All runs below ``folders`` by task and name; lengths of one task in numerical order.

    A run that cannot be read is skipped with a logged warning.

    Raises:
        UserError: a folder is missing or holds no run, or two folders hold the same task, name and seed.
    """
    folders = list(folders)
    runs: dict[tuple[Any, ...], Run] = {}
    for path in (path for folder in folders for path in find_run_folders(folder)):
        try:
            run = read_run(path)
        except UserError as failure:
            log.warning("skipped: %s", failure)
            continue
        task = run.task
        known = runs.setdefault((task.series or task.name, task.length, task.folder, run.name, run.seed), run)
        if known.path.resolve() != run.path.resolve():
            raise UserError(f"{known.path} and {run.path} are the same task, name and seed; report on one at a time")
    if not runs:
        raise UserError(f"no run found in {', '.join(map(str, folders))}; train one with indrnn-train model=indrnn")
    return [Group([runs[key] for key in keys]) for _, keys in groupby(sorted(runs), key=lambda key: key[:-1])]


def by_task(groups: Iterable[Group]) -> dict[str, list[Group]]:
    """Groups of `collect` by the folder of their task, in order."""
    return {folder: list(members) for folder, members in groupby(groups, key=lambda group: group.task.folder)}


def read_run(path: Path) -> Run:
    """The run in the folder ``path``.

    Raises:
        UserError: a file is missing or damaged, or no loss in its metrics is a number.
    """
    stored = load_config_file(path / CONFIG)
    metrics = read_metrics(path / METRICS)
    if len(metrics) and not np.isfinite(metrics["loss"]).any():
        raise UserError(f"{path / METRICS}: no loss is a finite number")
    try:
        config = cast(Config, OmegaConf.create(stored))
        task, name, seed, _ = make_task(config.data), run_name(config), int(config.seed), config.model.name
    except (UserError, OmegaConfBaseException, ValueError, TypeError) as failure:
        raise UserError(f"{path / CONFIG}: {str(failure).splitlines()[0][:120]}") from None
    result = read_result(path / RESULT) if (path / RESULT).is_file() else None
    return Run(path, name, seed, config, task, result, metrics)
