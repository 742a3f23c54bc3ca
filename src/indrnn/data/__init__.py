"""Tasks: sequential MNIST, permuted MNIST, the bundled mnist5k, the adding problem.

``make_task(cfg.data)`` reads no file and does not import torch, so a command can name its run folder at once;
``task.load(device)`` returns the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..config.schema import DataConfig
from ..errors import UserError
from ..external import call_target, explained
from .adding import adding_task
from .mnist import mnist5k_task, mnist_task
from .task import Split, Splits, Task

if TYPE_CHECKING:
    import torch

__all__ = ["TASKS", "Split", "Splits", "Task", "make_task"]

# data.name -> a function of cfg.data.
TASKS: dict[str, Callable[[Any], Task]] = {
    "mnist": mnist_task,
    "mnist_permuted": mnist_task,
    "mnist5k": mnist5k_task,
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
        return dataclasses.replace(task, load=lambda device: _checked(task, target, device))
    if data.name not in TASKS:
        raise UserError(f"data.name={data.name} is unknown; choose from {', '.join(TASKS)}")
    return TASKS[data.name](data)


def _checked(task: Task, target: str, device: torch.device) -> Splits:
    """Load a custom task. Raises UserError if that fails, or if its batches are not as `Split` describes."""
    import torch

    where = f"data._target_={target}"
    splits = explained(f"{where}, reading the data", task.load, lambda: task.load(device))
    if not isinstance(splits, Splits):
        raise UserError(f"{where}: load must return an indrnn.data.Splits, not {splits!r}")
    indices = torch.arange(2, device=device)
    expected_y = torch.int64 if task.measures_accuracy else torch.float32
    for name, split in (("train", splits.train), ("validation", splits.validation)):
        x, y = explained(f"{where}, a batch of {name}", type(split), partial(split.batch, indices))
        for letter, tensor, shape, dtype in (
            ("x", x, (2, task.length, task.input_size), torch.float32),
            ("y", y, (2,), expected_y),
        ):
            if not isinstance(tensor, torch.Tensor) or (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
                actual = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, torch.Tensor) else repr(tensor)
                raise UserError(f"{where}: {letter} of two sequences of {name} must be {shape} {dtype}, not {actual}")
        if task.measures_accuracy and not bool(((y >= 0) & (y < task.output_size)).all()):
            raise UserError(f"{where}: y of {name} must be from 0 to {task.output_size - 1}, not {y.tolist()}")
    return splits
