"""Tasks: sequential MNIST, permuted MNIST, the bundled mnist5k, the adding problem.

``make_task(cfg.data)`` reads no file and does not import torch, so a command can name its run folder at once;
``task.load(device)`` returns the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..config.schema import DataConfig
from ..errors import UserError
from ..external import call_target, explained
from .adding import adding_task
from .mnist import image_task
from .task import Split, Splits, Task

if TYPE_CHECKING:
    import torch

__all__ = ["TASKS", "Split", "Splits", "Task", "make_task"]

# data.name -> a function of cfg.data.
TASKS: dict[str, Callable[[Any], Task]] = {
    "mnist": image_task,
    "mnist_permuted": image_task,
    "mnist5k": image_task,
    "adding": adding_task,
}


def make_task(data: DataConfig) -> Task:
    """The task of ``cfg.data``: an entry of TASKS by name, or the return value of its ``_target_``.

    Raises:
        UserError: the task, permutation or import does not exist, or ``_target_`` returns no task.
    """
    target = getattr(data, "_target_", None)
    if target is not None:
        task = call_target("data", data)
        if not isinstance(task, Task):
            raise UserError(f"data._target_={target}: it must return an indrnn.data.Task, not {task!r}")
        what = f"data._target_={target}, reading the data"
        return dataclasses.replace(task, load=lambda device: explained(what, task.load, lambda: _load(task, device)))
    if data.name not in TASKS:
        raise UserError(f"data.name={data.name} is unknown; choose from {', '.join(TASKS)}")
    return TASKS[data.name](data)


def _load(task: Task, device: torch.device) -> Splits:
    """Load a custom task, whose length the initialization depends on."""
    import torch

    splits = task.load(device)
    x, _ = splits.train.batch(torch.arange(2, device=device))
    expected = (2, task.length, task.input_size)
    if tuple(x.shape) != expected:
        raise UserError(f"task {task.name}: x of two sequences must be {expected}, not {tuple(x.shape)}")
    return splits
