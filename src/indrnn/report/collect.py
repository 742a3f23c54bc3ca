"""Finds run folders and groups them: one group a task and name, its entries the seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

from omegaconf import DictConfig, OmegaConf

from indrnn.data import Task, make_task
from indrnn.errors import UserError
from indrnn.record import Result, Run, read_runs
from indrnn.record.compare import flatten, neutral_keys


@dataclass(frozen=True)
class Entry:
    """One run, under the names that its configuration gives it."""

    task: str
    name: str
    seed: int
    run: Run

    @property
    def path(self) -> Path:
        return self.run.path

    @cached_property
    def config(self) -> DictConfig:
        return OmegaConf.create(self.run.config)

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


def collect(folders: Iterable[Path]) -> list[Group]:
    """All runs below ``folders``, grouped by task and name, in alphabetical order (lengths of one task by number).

    Raises:
        UserError: a folder is missing, cannot be read or holds no run; or two folders hold the same task, name and
            seed, which would count one seed twice.
    """
    entries: dict[tuple[str, str, int], Entry] = {}
    looked_in = list(folders)
    for folder in looked_in:
        for run in read_runs(folder):
            entry = as_entry(run)
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
    """The run under its task, name (with tag) and seed."""
    config = OmegaConf.create(run.config)
    name = str(config.name) if config.get("tag") is None else f"{config.name}-{config.tag}"
    return Entry(make_task(config.data).folder, name, int(config.seed), run)


def differing_keys(entries: Sequence[Entry]) -> list[str]:
    """Keys whose values differ between runs that are averaged, the seed and what cannot change a result apart."""
    flat = [flatten(entry.run.config) for entry in entries]
    expected = neutral_keys() | {"seed", "device"}
    keys = sorted({key for one in flat for key in one} - expected)
    return [key for key in keys if any(one.get(key) != flat[0].get(key) for one in flat)]
