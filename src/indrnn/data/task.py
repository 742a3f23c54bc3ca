"""A task as one object: its name, the sizes that a network needs, and how to load its data.

Everything follows from the configuration alone: no file is read and torch is not imported before `Task.load`.

B batch, T time steps, D input features, K outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..config.schema import FOLDER_NAME, FOLDER_NAME_RULE
from ..errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Split(Protocol):
    """One part of a task's data: training, validation or test."""

    @property
    def size(self) -> int | None:
        """Number of sequences; None if they are generated endlessly."""

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The sequences at ``indices`` (B,) int64, on the data's device.

        Runs without waiting for the device, so it can be part of a CUDA graph.

        Returns:
            x (B, T, D) float32, and y (B,), int64 classes or float32 values.
        """


@dataclass(frozen=True)
class Splits:
    """The data of a task.

    ``provenance`` goes into result.json: the files' SHA-256, the split, the permutation and its SHA-256.
    """

    train: Split
    validation: Split
    provenance: dict[str, Any]
    load_test: Callable[[], Split]

    @cached_property
    def test(self) -> Split:
        """The test split, read on first use, after the checkpoint is selected."""
        return self.load_test()


@dataclass(frozen=True)
class Task:
    """All that the rest of the package knows about a task. A custom task is a function that returns one.

    Attributes:
        name: as in result.json, for example mnist.
        folder: the part of a run folder's path that names the task, safe on any file system, for example adding-T500.
        title: for headings and figures.
        length, input_size, output_size: T, D and K.
        loss: cross_entropy (K classes, y int64) or mse (K = 1, y float32).
        load: reads, checks and places the data on a device. Raises UserError if files are missing or damaged. Under
            torchrun every process calls it at the same time: lock files that it writes.
        mean_answer_error: maps a part ("train", "validation", "test") to the mean squared error of the
            predict-the-mean baseline; None if it is not known.
        series: tasks of one series differ only in length; reports draw their error against length.
        caveat: a sentence below every table of this task.
        picture: maps a sequence x (T, D) to the image it was read from, (rows, columns) in [0, 1]; None if sequences
            are not images.
    """

    name: str
    folder: str
    title: str
    length: int
    input_size: int
    output_size: int
    loss: Literal["cross_entropy", "mse"]
    load: Callable[[torch.device], Splits] = field(repr=False)
    mean_answer_error: Callable[[str], float] | None = field(default=None, repr=False)
    series: str | None = None
    caveat: str | None = None
    picture: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(FOLDER_NAME, self.folder):
            raise UserError(f"folder={self.folder!r} of a task: {FOLDER_NAME_RULE}")
        if self.loss not in ("cross_entropy", "mse") or (self.loss == "mse" and self.output_size != 1):
            raise UserError(
                f"loss={self.loss!r} and output_size={self.output_size} of the task {self.name}: choose cross_entropy, "
                "or mse with output_size=1"
            )

    @property
    def measures_accuracy(self) -> bool:
        return self.loss == "cross_entropy"
