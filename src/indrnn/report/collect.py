"""Finds run folders and groups them: one group a task and name, its entries the seeds."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from indrnn.data import Task, make_task
from indrnn.errors import UserError
from indrnn.record import Result, Run, read_runs
from indrnn.record.compare import flatten, neutral_keys
from indrnn.record.folder import CONFIG, METRICS

log = logging.getLogger(__name__)

# What the report reads of a configuration.
_TEXT, _WHOLE, _OPTIONAL = (str,), (int,), (str, type(None))
_KEYS: dict[str, tuple[type, ...]] = {
    "name": _TEXT, "seed": _WHOLE, "tag": _OPTIONAL, "model.name": _TEXT, "data.name": _TEXT,
    "trainer.batch_size": _WHOLE, "trainer.precision": _TEXT,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One run, under the names that its configuration gives it."""

    task: str
    name: str
    seed: int
    run: Run
    config: DictConfig

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def result(self) -> Result | None:
        return self.run.result

    @property
    def steps(self) -> int:
        """Steps done: the result's, or how far an unfinished run has come."""
        return self.result.steps if self.result else int(max(self.run.metrics["step"], default=0))

    @property
    def seconds(self) -> float:
        return self.result.seconds if self.result else float(max(self.run.metrics["seconds"], default=0.0))

    @property
    def best_validation_accuracy(self) -> float | None:
        values = self.run.curve("val", "accuracy")[1]
        return float(values.max()) if len(values) else None

    @property
    def best_validation_loss(self) -> float | None:
        values = self.run.curve("val", "loss")[1]
        return float(values.min()) if len(values) else None


@dataclass(frozen=True)
class Group:
    """The runs of one task and name, by seed."""

    task: str
    name: str
    entries: tuple[Entry, ...]

    @property
    def finished(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.result]

    @property
    def results(self) -> list[Result]:
        return [entry.result for entry in self.entries if entry.result]

    @property
    def unfinished(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.result]

    @property
    def drawn(self) -> list[Entry]:
        """The runs that figures average: the finished ones, or all where none is finished."""
        return self.finished or list(self.entries)

    @cached_property
    def about(self) -> Task:
        return make_task(self.entries[0].config.data)

    @property
    def model(self) -> str:
        return self.entries[0].config.model.name

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
    def label(self) -> str:
        """For legends: the name, how many seeds are averaged, and what is left out of the average."""
        if not self.finished:
            return f"{self.name} (n = {len(self.entries)}, unfinished)"
        return f"{self.name} (n = {len(self.finished)}{', others unfinished' if self.unfinished else ''})"

    @property
    def title(self) -> str:
        return self.about.title


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
    entries: dict[tuple[str, str, int], Entry] = {}
    looked_in = list(folders)
    for folder in looked_in:
        for run in read_runs(folder):
            try:
                entry = as_entry(run)
            except UserError as failure:
                log.warning("left out: %s", failure)
                continue
            key = (entry.task, entry.name, entry.seed)
            known = entries.setdefault(key, entry)
            if known.path.resolve() != entry.path.resolve():
                raise UserError(
                    f"{known.path} and {entry.path} are the same task, name and seed; report on one of them at a time"
                )
    groups: dict[tuple[str, str], list[Entry]] = {}
    if not entries:
        raise UserError(f"no run found in {', '.join(map(str, looked_in))}; train one with indrnn-train model=indrnn")
    for task, name, seed in sorted(entries):
        groups.setdefault((task, name), []).append(entries[task, name, seed])
    made = [Group(task, name, tuple(runs)) for (task, name), runs in groups.items()]
    return sorted(
        made, key=lambda group: (group.about.series or group.about.name, group.about.length, group.task, group.name)
    )


def as_entry(run: Run) -> Entry:
    """The run under its task, name (with tag) and seed.

    Raises:
        UserError: its configuration lacks what the report reads, or nothing in its metrics is a number.
    """
    flat = flatten(run.config)
    for key, kinds in _KEYS.items():
        value = flat.get(key)
        if type(value) not in kinds or "${" in str(value):
            found = f"cannot be {str(value)[:40]!r}" if key in flat else "is missing"
            raise UserError(f"{run.path / CONFIG}: {key} {found}")
    if len(run.metrics["step"]) and not np.isfinite(run.metrics["loss"]).any():
        raise UserError(f"{run.path / METRICS}: none of its losses is a number")
    try:
        config = OmegaConf.create(run.config)
        task = make_task(config.data)
    except (UserError, OmegaConfBaseException, ValueError, TypeError) as failure:
        raise UserError(f"{run.path / CONFIG}: {' '.join(str(failure).split())[:120]}") from None
    name = flat["name"] if flat.get("tag") is None else f"{flat['name']}-{flat['tag']}"
    return Entry(task.folder, name, flat["seed"], run, config)


def differing_keys(entries: Sequence[Entry]) -> list[str]:
    """Keys whose values differ between runs that are averaged, the seed and what cannot change a result apart."""
    flat = [flatten(entry.run.config) for entry in entries]
    expected = neutral_keys() | {"seed", "device"}
    keys = sorted({key for one in flat for key in one} - expected)
    return [key for key in keys if any(one.get(key) != flat[0].get(key) for one in flat)]
