"""A training small enough for tests: 20 time steps, 200 sequences, a network of two layers of 8 units.

The task is a custom one, ``data=small`` (tests/small/data/small.yaml). Its splits note what is read, and `at` acts when
a certain batch is read. As a program (``python small_runs.py <output_root> [override ...]``) this file trains in a
process of its own; the environment variable SMALL_RUNS_KILL=<rank>:<step> kills it in that step.
"""

import copy
import csv
import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from indrnn.config.compose import load_config
from indrnn.data import Splits, Task
from indrnn.training import train

T = 20
CONFIG_DIR = Path(__file__).with_name("small")
BASE = (
    "data=small", "device=cpu", "trainer.batch_size=16", "trainer.eval_batch_size=32", "trainer.bn_samples=48",
    "trainer.max_steps=30", "trainer.eval_every=10", "trainer.log_every=4", "trainer.checkpoint_every=7",
    "trainer.target_accuracy=null", "optimizer.lr=0.01",
)  # fmt: skip
INDRNN = ("model.hidden_size=8", "model.num_layers=2", "model.dropout=0.1", "model.backend=reference")

READS: list[tuple[str, torch.Tensor]] = []
"""(kind, indices) of every batch since the task was last loaded. Kinds: train, statistics, validation, test."""
PROVENANCE = {"a.npz": "0a"}
_ACTIONS: dict[tuple[str, int], Callable[[torch.Tensor], torch.Tensor | None]] = {}


def at(kind: str, number: int, action: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Call ``action(x)`` when batch ``number`` of a kind is read; it may raise, or return another x. The training
    batches of a process are counted from 0, the warm-up step's, so batch n is that of its n-th update."""
    _ACTIONS[kind, number] = action


def reads(kind: str) -> list[torch.Tensor]:
    return [indices for each, indices in READS if each == kind]


def send(number: int) -> Callable[[torch.Tensor], None]:
    """An action: this process receives a signal."""
    return lambda x: os.kill(os.getpid(), number)


def nan(x: torch.Tensor) -> torch.Tensor:
    """An action."""
    return x * torch.nan


class Killed(BaseException):
    """Stands for kill -9: nothing in the package catches it."""


def kill(*_: Any) -> None:
    """An action."""
    raise Killed


class ArraySplit:
    """Random sequences in memory that depend on their class."""

    def __init__(self, size: int, seed: int, kind: str = "train", device: Any = "cpu") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size, self.kind = size, kind
        y = torch.randint(10, (size,), generator=generator)
        x = torch.randn(size, T, 1, generator=generator) + y.view(-1, 1, 1) / 3
        self.x, self.y = x.to(device), y.to(device)

    def batch(self, indices):
        x = self.x[indices]
        if len(indices) > 2 and x.device.type != "meta":  # the check of a custom task reads two sequences
            kind = "statistics" if self.kind == "train" and not torch.is_grad_enabled() else self.kind
            action = _ACTIONS.get((kind, len(reads(kind))))
            READS.append((kind, indices.clone()))
            changed = action(x) if action is not None else None
            x = x if changed is None else changed
        return x, self.y[indices]


def make_small() -> Task:

    def load(device):
        READS.clear()
        rank, _, step = os.environ.get("SMALL_RUNS_KILL", "").partition(":")
        if step and rank == os.environ.get("RANK", "0"):
            at("train", int(step), send(signal.SIGKILL))
        train, validation = ArraySplit(200, 1, "train", device), ArraySplit(70, 2, "validation", device)
        return Splits(train, validation, {"sha256": PROVENANCE}, lambda: ArraySplit(90, 3, "test", device))

    return Task("small", "small", "Small", T, 1, 10, "cross_entropy", load)


def small_config(root: Path, *overrides: str, base: tuple[str, ...] = (*BASE, *INDRNN)):
    cfg = copy.deepcopy(_composed(*base, *overrides))
    cfg.output_root = str(root)
    return cfg


@functools.cache
def _composed(*overrides: str):
    return load_config(list(overrides), config_dir=str(CONFIG_DIR))


def run_small(root: Path, *overrides: str, base: tuple[str, ...] = (*BASE, *INDRNN)):
    """``train`` with one thread: tensors this small only lose time to more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train(small_config(root, *overrides, base=base))
    finally:
        torch.set_num_threads(threads)
        _ACTIONS.clear()


def folder_of(root: Path, name: str = "indrnn") -> Path:
    return root / "small" / name / "seed0"


def figures(folder: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on interruptions: rows, result, weights, optimizer, generators."""
    result = json.loads((folder / "result.json").read_text())
    for key in ("seconds", "steps_per_second", "peak_memory_bytes", "command", "git", "segments"):
        del result[key]
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(folder)]
    best = torch.load(folder / "best.pt", weights_only=True)
    last = torch.load(folder / "checkpoint.pt", weights_only=True)
    del last["segments"]
    for key in ("seconds", "interval_seconds", "peak_memory"):
        del last["progressed"][key]
    return {"result": result, "rows": rows, "best": _bytes(best), "last": _bytes(last)}


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoint_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def _bytes(value: Any) -> Any:
    """Tensors as their bits, for equality that NaN and -0 cannot blur."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: _bytes(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_bytes(item) for item in value]
    return value


def main(root: str, *overrides: str) -> None:
    from indrnn.errors import UserError

    try:
        run_small(Path(root), *overrides)
    except UserError as failure:
        print(failure, file=sys.stderr)
        sys.exit(failure.exit_code)


if __name__ == "__main__":
    # As an import, so that the task's module is this one.
    from small_runs import main as imported_main

    imported_main(*sys.argv[1:])
