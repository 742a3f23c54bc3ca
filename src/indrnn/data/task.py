"""What a loaded task offers to the trainer.

B batch, T time steps, D input features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from .spec import TaskSpec


class Split(Protocol):
    """One part of a task: training, validation or test."""

    @property
    def size(self) -> int | None:
        """Number of sequences; None when they are generated without end."""

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The sequences at `indices` (B,) int64 on the task's device: x (B, T, D) float32 and y (B,), int64 classes
        or float32 values. Works on the device alone, without waiting for the host, so it can be part of a CUDA graph.
        """


@dataclass(frozen=True)
class Task:
    """A task whose data is at hand.

    `provenance` goes into result.json: the files' SHA-256, the split, the permutation and its SHA-256.
    """

    spec: TaskSpec
    train: Split
    validation: Split
    provenance: dict[str, Any]
    load_test: Callable[[], Split]

    @cached_property
    def test(self) -> Split:
        """The test split, read when first asked for, so that nothing before can have looked at it."""
        return self.load_test()
