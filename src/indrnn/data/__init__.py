"""Tasks: sequential MNIST, permuted MNIST, the bundled mnist5k, the adding problem.

``make_task(cfg.data)`` reads no file and imports no torch, so that a command can name its run folder at once;
``task.load(device)`` gives the data.
"""

from collections.abc import Callable
from typing import Any

from .adding import adding_task
from .mnist import mnist5k_task, mnist_task
from .task import Split, Splits, Task, make_task

__all__ = ["TASKS", "Split", "Splits", "Task", "make_task"]

# data.name -> a function of cfg.data.
TASKS: dict[str, Callable[[Any], Task]] = {
    "mnist": mnist_task,
    "mnist_permuted": mnist_task,
    "mnist5k": mnist5k_task,
    "adding": adding_task,
}
