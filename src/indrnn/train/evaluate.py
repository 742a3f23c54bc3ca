"""Batch-norm statistics from training data, and loss and accuracy over a whole split.

B batch, T time steps, D input features, K outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import Split
from .objective import Objective


@dataclass(frozen=True)
class Evaluation:
    """Figures over a split. ``chance`` is what needs no network: the share of the most frequent class, or the mean
    squared error of always answering the mean."""

    loss: float
    accuracy: float | None
    correct: int
    size: int
    chance: float
    bad: Tensor | None = None
    """Indices of the first batch whose loss is not finite."""

    @property
    def score(self) -> float:
        """What the best checkpoint is chosen by; higher is better."""
        return -self.loss if self.accuracy is None else self.accuracy

    @property
    def near_chance(self) -> bool:
        """Within a point of the most frequent class's share, or above 95 % of the mean answer's error."""
        return self.loss > 0.95 * self.chance if self.accuracy is None else self.accuracy <= self.chance + 0.01


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms that keep running statistics."""
    modules = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [module for module in modules if module.track_running_stats]


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, split: Split, indices: Tensor, batch_size: int) -> None:
    """Replace all running statistics by their means over the sequences of `split` at `indices` (n,), dropout off.

    From IndRNN's small initial weights activations grow so fast that running averages lag far behind. Each batch norm
    normalises by its own batch meanwhile, as in training; the batches are as equal in size as n and batch_size allow.
    Leaves the model in evaluation mode; a model without batch norms is not run at all.
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
        for batch in indices.tensor_split(-(-len(indices) // batch_size)):
            model(split.batch(batch)[0])
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, objective: Objective, batch_size: int, device: torch.device,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:  # fmt: skip
    """Loss and accuracy over all of `split` in evaluation mode. ``between`` is called before each batch; what it raises
    ends the evaluation. Waits for the device once, at the end."""
    if split.size is None:
        raise ValueError("a split without an end cannot be evaluated as a whole")
    model.eval()
    losses, correct, targets, batches = [], [], [], []
    for start in range(0, split.size, batch_size):
        between()
        indices = torch.arange(start, min(start + batch_size, split.size), device=device)
        x, y = split.batch(indices)
        loss, right = objective(model(x).float(), y)
        losses.append(loss)
        correct.append(right)
        targets.append(y)
        batches.append(indices)
    n = split.size
    weights = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
    loss_of = torch.stack(losses).cpu().double()
    mean_loss = float(loss_of @ weights) / n
    bad = [batch for batch, finite in zip(batches, loss_of.isfinite().tolist(), strict=True) if not finite]
    answers = int(torch.stack(correct).sum())
    y = torch.cat(targets).cpu()
    classes = objective.classes
    chance = float(y.double().var(correction=0)) if classes is None else int(y.bincount().max()) / n
    return Evaluation(mean_loss, objective.accuracy(answers, n), answers, n, chance, bad[0] if bad else None)
