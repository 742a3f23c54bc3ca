"""Evaluation: the loss of a batch, batch-norm statistics from training data, loss and accuracy over a whole split, and
the evaluation of a finished run's weights again.

B batch, T time steps, D input features, K outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Split, Task, make_task
from ..errors import UserError
from ..layers import recurrent_layers
from ..record.folder import RESULT
from ..record.result import Result, no_better_than_chance, read_result
from .checkpoint import load_run
from .device import computing, precision_refusal, prepare_process, resolve_device, set_precision
from .distributed import ALONE, Processes


class Objective:
    """Cross-entropy and the number of right answers, or the mean squared error and no accuracy."""

    def __init__(self, task: Task) -> None:
        self.classes = task.output_size if task.measures_accuracy else None

    def __call__(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss over the batch and the number of right answers (0 without classes), both scalars on the device.

        output (B, K), y (B,): int64 classes or float32 values. Computed in float32 or better.
        """
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.classes is not None:
            return F.cross_entropy(output, y), (output.detach().argmax(1) == y).sum()
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


@dataclass(frozen=True)
class Reevaluation:
    """A finished run and a new evaluation of its weights, in ``precision``: float32 if this device lacks the run's."""

    recorded: Result
    evaluation: Evaluation
    precision: str

    @property
    def recorded_correct(self) -> int | None:
        """None for a task without classes."""
        accuracy = self.recorded.test_accuracy
        return None if accuracy is None else round(accuracy * self.evaluation.size)


def evaluate_run(path: Path, device_name: str = "auto", data_root: str | None = None) -> Reevaluation:
    """Read the test set again, with the weights and batch-norm statistics of a finished run.

    The backend is chosen for this device, not taken from the run. ``data_root`` replaces the run's data.root.
    Sets PyTorch's float32 precision, flushes denormals and keeps freed memory, for the whole process.

    Raises:
        UserError: the folder is no finished run, or its weights or data are missing, damaged or another run's.
    """
    device = resolve_device(device_name)
    prepare_process(device)
    recorded = read_result(path / RESULT)
    model, cfg = load_run(path)
    if data_root is not None and hasattr(cfg.data, "root"):
        cfg.data.root = data_root
    task = make_task(cfg.data)
    data = task.load(device)
    for key, value in data.provenance.items():
        if recorded.data.get(key, value) != value:
            raise UserError(f"{path}: {key} of the data here is {value}, of the run {recorded.data[key]}")
    for _, layer in recurrent_layers(model):
        layer.backend = "auto"
    precision = "float32" if precision_refusal(cfg.trainer.precision, device) else cfg.trainer.precision
    set_precision(precision, device)
    with computing(precision, device):
        evaluation = evaluate(model.to(device), data.test, Objective(task), cfg.trainer.eval_batch_size, device)
    return Reevaluation(recorded, evaluation, precision)
