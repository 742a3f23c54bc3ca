"""What a task trains on and is judged by.

B batch, K outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Task


class Objective:
    """Cross-entropy and the number of right answers, or the mean squared error and no accuracy."""

    def __init__(self, spec: Task) -> None:
        self.classes = spec.output_size if spec.loss == "cross_entropy" else None

    def __call__(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss over the batch and the number of right answers (0 without classes), both scalars on the device.

        output (B, K); y (B,), int64 classes or float32 values.
        """
        if self.classes is not None:
            return F.cross_entropy(output, y), (output.detach().argmax(1) == y).sum()
        return F.mse_loss(output.squeeze(1), y), torch.zeros((), device=y.device)

    def accuracy(self, correct: float, n: float) -> float | None:
        """None for a task without classes."""
        return None if self.classes is None else correct / n
