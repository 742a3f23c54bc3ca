"""A training small enough for tests: 20 steps of time, 200 sequences, a network of two layers of 8 units.

Run as a program (``python small_runs.py <output_root> [override ...]``) it trains in a process of its own.
"""

import copy
import csv
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from indrnn.config.compose import load_config
from indrnn.data import Splits, Task, make_task
from indrnn.training import state, train
from parts import mnist5k as mnist5k_data

T = 20
OVERRIDES = (
    "data=mnist5k", "device=cpu", "model.hidden_size=8", "model.num_layers=2", "model.dropout=0.1",
    "model.backend=reference", "trainer.batch_size=16", "trainer.eval_batch_size=32", "trainer.bn_samples=48",
    "trainer.max_steps=30", "trainer.eval_every=10", "trainer.log_every=4", "trainer.checkpoint_every=7",
    "optimizer.lr=0.01",
)  # fmt: skip


class ArraySplit:
    """Sequences in memory; ``read`` lists the indices of every batch taken."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size = size
        self.y = torch.randint(10, (size,), generator=generator)
        self.x = torch.randn(size, T, 1, generator=generator) + self.y.view(-1, 1, 1) / 3
        self.read: list[torch.Tensor] = []

    def batch(self, indices):
        self.read.append(indices.clone())
        return self.x[indices], self.y[indices]


def small_splits() -> Splits:
    provenance = {"sha256": {}, "split": {"seed": 0}, "permutation": None, "permutation_sha256": None}
    return Splits(ArraySplit(200, 1), ArraySplit(70, 2), provenance, lambda: ArraySplit(90, 3))


def small_task(splits: Splits | None = None) -> Task:
    splits = splits or small_splits()
    task = make_task(mnist5k_data())
    return dataclasses.replace(task, length=T, picture=lambda x: x.view(4, 5).sigmoid(), load=lambda device: splits)


def small_config(root: Path, *overrides: str):
    cfg = copy.deepcopy(_composed(*overrides))
    cfg.output_root = str(root)
    return cfg


@functools.cache
def _composed(*overrides: str):
    return load_config([*OVERRIDES, *overrides])


def run_small(root: Path, *overrides: str):
    return trained(small_config(root, *overrides))


def trained(cfg):
    """train(cfg) with one thread: tensors this small only lose time to more, much of it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train(cfg)
    finally:
        torch.set_num_threads(threads)


def folder_of(root: Path, name: str = "indrnn") -> Path:
    return root / "mnist5k" / name / "seed0"


def figures(folder: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on interruptions: rows, result, weights, optimizer, generators."""
    result = json.loads((folder / "result.json").read_text())
    for key in ("seconds", "steps_per_second", "peak_memory_bytes", "command", "git", "segments"):
        del result[key]
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(folder)]
    best = torch.load(folder / "best.pt", weights_only=True)
    last = torch.load(folder / "checkpoint.pt", weights_only=True)
    del last["segments"]
    for key in ("seconds", "interval_seconds", "peak_memory", "warned"):
        del last["progressed"][key]
    return {"result": result, "rows": rows, "best": _bytes(best), "last": _bytes(last)}


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def _bytes(value: Any) -> Any:
    """Tensors as their bits, for equality that NaN and -0 cannot blur."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: _bytes(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_bytes(item) for item in value]
    return value


def task_with(**changes: Any) -> Task:
    return small_task(dataclasses.replace(small_splits(), **changes))


if __name__ == "__main__":
    from indrnn.errors import UserError

    state.make_task = lambda data: small_task()
    try:
        run_small(Path(sys.argv[1]), *sys.argv[2:])
    except UserError as failure:
        print(failure, file=sys.stderr)
        sys.exit(failure.exit_code)
