"""Loss of a batch, batch-norm statistics from training data, loss and accuracy over a whole split.

B batch, T time steps, D input features, K outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Split, Task


class Objective:
    """Cross-entropy and the number of correct predictions, or the mean squared error and no accuracy."""

    def __init__(self, task: Task, label_smoothing: float = 0.0) -> None:
        self.classes = task.output_size if task.measures_accuracy else None
        self.label_smoothing = label_smoothing

    def __call__(self, output: Tensor, y: Tensor, training: bool = False) -> tuple[Tensor, Tensor]:
        """Mean loss over the batch and the number of correct predictions (0 without classes), scalars on the device.

        Args:
            output: (B, K). The loss is computed in float32 or better.
            y: (B,), int64 classes or float32 values.
            training: whether to smooth the labels.
        """
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.classes is not None:
            smoothing = self.label_smoothing if training else 0.0
            return F.cross_entropy(output, y, label_smoothing=smoothing), (output.detach().argmax(1) == y).sum()
        return F.mse_loss(output.squeeze(1), y), torch.zeros((), device=y.device, dtype=torch.int64)

    def accuracy(self, correct: float, n: float) -> float | None:
        """``correct`` of ``n``; None for a task without classes."""
        return None if self.classes is None else correct / n


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy over a split of ``size`` sequences; accuracy is None without classes."""

    loss: float
    accuracy: float | None
    correct: int
    size: int

    @property
    def score(self) -> float:
        """What the best checkpoint is chosen by; higher is better."""
        return -self.loss if self.accuracy is None else self.accuracy


def spread_indices(size: int, count: int) -> Tensor:
    """``count`` indices (or all ``size``), evenly spread."""
    return torch.arange(min(size, count), device="cpu") * size // min(size, count)


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms that keep running statistics."""
    modules = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [module for module in modules if module.track_running_stats]


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, split: Split, indices: Tensor, batch_size: int) -> None:
    """Replace all running statistics by their means over the sequences at ``indices`` (n,), without dropout.

    From IndRNN's small initial weights activations grow so fast that running averages lag far behind. Each batch norm
    normalizes by its own batch meanwhile, as in training. Leaves the model in evaluation mode.
    """
    norms = batch_norms(model)
    model.eval()
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    for batch in indices.tensor_split(-(-len(indices) // batch_size)):
        model(split.batch(batch)[0])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, objective: Objective, batch_size: int, device: torch.device,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:  # fmt: skip
    """Loss and accuracy over all of ``split`` in evaluation mode.

    Args:
        between: called before each batch; may raise to end the evaluation.
    """
    if split.size is None:
        raise ValueError("an endless split cannot be evaluated")
    model.eval()
    losses, correct = [], []
    batches = torch.arange(split.size, device=device).split(batch_size)
    for indices in batches:
        between()
        x, y = split.batch(indices)
        loss, hits = objective(model(x), y)
        losses.append(loss)
        correct.append(hits)
    sizes = torch.tensor([len(batch) for batch in batches], device="cpu", dtype=torch.float64)
    mean, total = float(torch.stack(losses).cpu().double() @ sizes) / split.size, int(torch.stack(correct).sum())
    return Evaluation(mean, objective.accuracy(total, split.size), total, split.size)
