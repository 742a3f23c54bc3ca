"""A task as one object: what a network must know of it, how it is called, and how its data are had.

Everything here is known from the configuration alone: no file is read and torch is not imported until `Task.load`.

B batch, T time steps, D input features, K outputs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..config.schema import FOLDER_NAME
from ..errors import UserError
from ..external import blaming, call_target

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Split(Protocol):
    """One part of a task's data: training, validation or test."""

    @property
    def size(self) -> int | None:
        """Number of sequences; None when they are generated without end."""

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The sequences at `indices` (B,) int64 on the data's device: x (B, T, D) float32 and y (B,), int64 classes
        or float32 values. Works on the device alone, without waiting for the host, so it can be part of a CUDA graph.
        """


@dataclass(frozen=True)
class Splits:
    """A task's data at hand.

    `provenance` goes into result.json: the files' SHA-256, the split, the permutation and its SHA-256.
    """

    train: Split
    validation: Split
    provenance: dict[str, Any]
    load_test: Callable[[], Split]

    @cached_property
    def test(self) -> Split:
        """The test split, read when first asked for, so that nothing before can have looked at it."""
        return self.load_test()


@dataclass(frozen=True)
class Task:
    """What the rest of the project knows of a task; a task from outside is a function that returns one of these.

    Attributes:
        name: as in result.json, for example mnist.
        folder: the part of a run folder's path that names the task, safe on any file system, for example adding-T500.
        title: in words, for headings and figures.
        length, input_size, output_size: T, D and K.
        loss: cross_entropy (K classes, y int64) or mse (K = 1, y float32).
        load: reads, checks and places the data on a device. Raises UserError for what is missing or damaged.
        training_samples: how many there are; None if they are generated without end.
        test_samples: how many there are.
        mean_answer_error: the mean squared error that always answering the mean of a part ("train", "validation",
            "test") has, which takes no learning; None if it is not known.
        changed: given the provenance that a finished run recorded, what is not the same any more although the
            configuration is (a file that it names), as "data.file=x holds other numbers", or None; None if nothing can.
        series: tasks of one series differ in their length alone; where ``mean_answer_error`` is known, reports draw
            their error against it.
        caveat: a sentence that stands under every table of this task.
        picture: what a sequence x (T, D) was read from, as an image (rows, columns) from 0 to 1; None if it is none.
    """

    name: str
    folder: str
    title: str
    length: int
    input_size: int
    output_size: int
    loss: Literal["cross_entropy", "mse"]
    load: Callable[[torch.device], Splits] = field(repr=False)
    training_samples: int | None = None
    test_samples: int | None = None
    mean_answer_error: Callable[[str], float] | None = field(default=None, repr=False)
    changed: Callable[[dict[str, Any]], str | None] | None = field(default=None, repr=False)
    series: str | None = None
    caveat: str | None = None
    picture: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Raises UserError for what a task from outside can get wrong."""
        if not re.fullmatch(FOLDER_NAME, self.folder):
            raise UserError(f"folder={self.folder!r} of a task: use letters, digits and . _ - = + , @ %")
        for name in ("length", "input_size", "output_size"):
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise UserError(f"{name}={size!r} of the task {self.name}: it must be a whole number, at least 1")
        if self.loss not in ("cross_entropy", "mse") or (self.loss == "mse" and self.output_size != 1):
            raise UserError(
                f"loss={self.loss!r} and output_size={self.output_size} of the task {self.name}: choose cross_entropy, "
                "or mse with output_size=1"
            )

    @property
    def measures_accuracy(self) -> bool:
        return self.loss == "cross_entropy"


def make_task(data: Any) -> Task:
    """The task that ``cfg.data`` asks for: one of TASKS by its name, or what its ``_target_`` returns.

    Raises:
        UserError: there is no such task, or what it is asked for does not exist (a permutation, an import), or what
            ``_target_`` returns is no task.
    """
    from . import TASKS

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
    """What a task from outside loads. Raises UserError if it fails, or if its batches are not as `Split` says."""
    import torch

    where = f"data._target_={target}"
    splits = blaming(f"{where}, reading the data", task.load, lambda: task.load(device))
    if not isinstance(splits, Splits):
        raise UserError(f"{where}: load must return an indrnn.data.Splits, not {splits!r}")
    indices = torch.arange(2, device=device)
    expected_y = torch.int64 if task.measures_accuracy else torch.float32
    for name, split in (("train", splits.train), ("validation", splits.validation)):
        x, y = blaming(f"{where}, a batch of {name}", type(split), partial(split.batch, indices))
        for letter, tensor, shape, dtype in (
            ("x", x, (2, task.length, task.input_size), torch.float32),
            ("y", y, (2,), expected_y),
        ):
            if not isinstance(tensor, torch.Tensor) or (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
                found = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, torch.Tensor) else repr(tensor)
                raise UserError(f"{where}: {letter} of two sequences of {name} must be {shape} {dtype}, not {found}")
        if task.measures_accuracy and not bool(((y >= 0) & (y < task.output_size)).all()):
            raise UserError(f"{where}: y of {name} must be from 0 to {task.output_size - 1}, not {y.tolist()}")
    return splits
