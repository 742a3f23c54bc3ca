"""Tasks as tensors: sequential MNIST, permuted MNIST, the bundled mnist5k, the adding problem.

``task_spec`` and ``task_folder`` read no file and import no torch, so that a command can name its run folder at once;
``load_task``, ``Task`` and ``Split`` are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .spec import PERMUTATIONS, TASKS, TaskSpec, task_folder, task_spec

if TYPE_CHECKING:
    from .load import load_task
    from .task import Split, Task

__all__ = ["PERMUTATIONS", "TASKS", "Split", "Task", "TaskSpec", "load_task", "task_folder", "task_spec"]

_HOME = {"load_task": "load", "Split": "task", "Task": "task"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
