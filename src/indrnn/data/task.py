"""A task as one object: what a network must know of it, how it is called, and how its data are had.

Everything here is known from the configuration alone: no file is read and torch is not imported until `Task.load`.

B batch, T time steps, D input features, K outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Split(Protocol):
    """One part of a task's data: training, validation or test."""

    @property
    def size(self) -> int | None:
        """Number of sequences; None when they are generated without end."""

    def batch(self, indices: "Tensor") -> "tuple[Tensor, Tensor]":
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
        series: tasks of one series differ in their length alone, and reports draw their error against it.
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
    load: "Callable[[torch.device], Splits]" = field(repr=False)
    training_samples: int | None = None
    test_samples: int | None = None
    mean_answer_error: "Callable[[str], float] | None" = field(default=None, repr=False)
    series: str | None = None
    caveat: str | None = None
    picture: "Callable[[Tensor], Tensor] | None" = field(default=None, repr=False)

    @property
    def measures_accuracy(self) -> bool:
        return self.loss == "cross_entropy"


def make_task(data: Any) -> Task:
    """The task that ``cfg.data`` asks for: one of TASKS by its name, or what its ``_target_`` returns.

    Raises:
        UserError: there is no such task, or what it is asked for does not exist (a permutation, an import).
    """
    from . import TASKS

    if data.name not in TASKS:
        raise UserError(f"data.name={data.name} is unknown; choose from {', '.join(TASKS)}")
    return TASKS[data.name](data)
