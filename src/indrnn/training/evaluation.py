"""Evaluation: the loss of a batch, batch-norm statistics from training data, loss and accuracy over a whole split.

B batch, T time steps, D input features, K outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Split, Task
from ..record.result import no_better_than_chance
from .distributed import ALONE, Processes


class Objective:
    """Cross-entropy and the number of right answers, or the mean squared error and no accuracy."""

    def __init__(self, task: Task, label_smoothing: float = 0.0) -> None:
        self.classes = task.output_size if task.measures_accuracy else None
        self.label_smoothing = label_smoothing

    def __call__(self, output: Tensor, y: Tensor, training: bool = False) -> tuple[Tensor, Tensor]:
        """Mean loss over the batch and the number of correct predictions (0 without classes), both scalars on the
        device.

        output (B, K), y (B,): int64 classes or float32 values. Computed in float32 or better. Labels are smoothed only
        with ``training``.
        """
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.classes is not None:
            smoothing = self.label_smoothing if training else 0.0
            return F.cross_entropy(output, y, label_smoothing=smoothing), (output.detach().argmax(1) == y).sum()
        return F.mse_loss(output.squeeze(1), y), torch.zeros((), device=y.device)

    def accuracy(self, correct: float, n: float) -> float | None:
        """None for a task without classes."""
        return None if self.classes is None else correct / n


KEPT = 32


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy over a split. ``chance`` is what takes no learning: the share of the most frequent class, or
    the mean squared error of always answering the mean."""

    loss: float
    accuracy: float | None
    correct: int
    size: int
    chance: float
    bad: Tensor | None = None
    """Indices of the first batch whose loss is not finite."""
    outputs: Tensor | None = None
    """The network's outputs (n, K), on the CPU; None without classes."""
    targets: Tensor | None = None
    """The right answers (n,), on the CPU."""
    inputs: Tensor | None = None
    """The sequences at ``spread_indices(size, KEPT)``, (KEPT, T, D), on the CPU, to be shown with their answers."""

    @property
    def score(self) -> float:
        """What the best checkpoint is chosen by; higher is better."""
        return -self.loss if self.accuracy is None else self.accuracy

    @property
    def near_chance(self) -> bool:
        """Whether the network has learnt nothing; without classes: its error is above 95 % of the mean answer's."""
        if self.accuracy is None:
            return self.loss > 0.95 * self.chance
        return no_better_than_chance(self.accuracy, self.chance)


def spread_indices(size: int, count: int) -> Tensor:
    """``count`` indices (or all ``size``), evenly spread."""
    return torch.arange(min(size, count)) * size // min(size, count)


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms that keep running statistics."""
    modules = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [module for module in modules if module.track_running_stats]


def norm_batches(count: int, batch_size: int) -> int:
    """The number of batches that statistics are estimated from, given ``count`` sequences."""
    return -(-count // batch_size)


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module, split: Split, indices: Tensor, batch_size: int, processes: Processes = ALONE
) -> None:
    """Replace all running statistics by their means over the sequences of `split` at `indices` (n,), dropout off.

    From IndRNN's small initial weights activations grow so fast that running averages lag far behind. Meanwhile each
    batch norm normalises by its own batch, as in training; the batches are as equal in size as possible. Leaves the
    model in evaluation mode; a model without batch norms is not run at all.
    """
    norms = batch_norms(model)
    model.eval()
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
            norm.train()
        for batch in indices.tensor_split(norm_batches(len(indices), batch_size)):
            model(split.batch(processes.part(batch))[0])
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, objective: Objective, batch_size: int, device: torch.device,
    between: Callable[[], None] = lambda: None, processes: Processes = ALONE,
) -> Evaluation:  # fmt: skip
    """Loss and accuracy over all of `split` in evaluation mode, its batches divided among ``processes``.

    ``between`` is called before each batch and may raise to end the evaluation. Waits for the device once, at the end.
    """
    if split.size is None:
        raise ValueError("an endless split cannot be evaluated")
    model.eval()
    n = split.size
    losses, correct, outputs, targets, inputs = [], [], [], [], []
    kept = spread_indices(n, KEPT)
    batches = torch.arange(n, device=device).split(batch_size)
    for number, indices in enumerate(batches):
        if number % processes.size == 0:
            between()
        x, y = split.batch(indices)
        if number % processes.size == processes.rank:
            output = model(x).float()
            loss, right = objective(output, y)
        else:
            output = torch.zeros(len(y), objective.classes or 1, device=device)
            loss = right = torch.zeros((), device=device)
        start = number * batch_size
        inputs.append(x[kept[(kept >= start) & (kept < start + batch_size)] - start])
        losses.append(loss)
        correct.append(right)
        outputs.append(output)
        targets.append(y)
    batch_losses, batch_correct = processes.sum_(
        torch.stack([torch.stack(losses).cpu().double(), torch.stack(correct).cpu().double()])
    )
    sizes = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
    right_answers = int(batch_correct.sum())
    y = torch.cat(targets).cpu()
    classes = objective.classes
    return Evaluation(
        loss=float(batch_losses @ sizes) / n,
        accuracy=objective.accuracy(right_answers, n),
        correct=right_answers,
        size=n,
        chance=float(y.double().var(correction=0)) if classes is None else int(y.bincount().max()) / n,
        bad=next((batch for batch, loss in zip(batches, batch_losses, strict=True) if not loss.isfinite()), None),
        outputs=None if classes is None else processes.sum_(torch.cat(outputs).cpu()),
        targets=y,
        inputs=torch.cat(inputs).cpu(),
    )
