"""What trained networks do: how long their units remember, how gradients reach back, and what they think step by step.

B: sequences, T: time steps, H: hidden units, K: classes.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from indrnn.config.checks import run_name
from indrnn.config.schema import Config
from indrnn.data import Split, Splits, Task, make_task
from indrnn.errors import UserError
from indrnn.layers import AffineSequence, IndRNNLayer, materialise, recurrent_layers
from indrnn.models import build_model
from indrnn.training import load_run
from indrnn.training.evaluate import reestimate_batch_norm
from indrnn.training.order import Stream, torch_seed

from .runs import MODELS, model_name

SEQUENCES = 32  # that gradients are averaged over


@dataclass(frozen=True)
class Inspected:
    """One run: its trained network, and the same network as it was before the first update. ``label``: its model in
    words, with the run's name and seed where several have that model; ``stem``: the same for file names."""

    label: str
    stem: str
    cfg: Config
    trained: nn.Module
    untrained: nn.Module


@dataclass(frozen=True)
class LayerMemory:
    """The recurrent weights u (H,) of one layer as the recurrence uses them, on the CPU in float64."""

    name: str
    u: Tensor

    @property
    def half_life(self) -> Tensor:
        """Steps until half of a state is forgotten, ln 0.5 / ln |u|; infinite where |u| >= 1."""
        size = self.u.abs()
        return torch.where(size < 1, math.log(0.5) / size.clamp(max=1 - 1e-16).log(), math.inf)

    @property
    def share_forever(self) -> float:
        return float((self.u.abs() >= 1).double().mean())


@dataclass(frozen=True)
class GradientNorms:
    """Mean over sequences of the norm of d loss / d state_t, (T,) each; ``cell`` is an LSTM's c_t, else None."""

    hidden: Tensor
    cell: Tensor | None


def load_inspected(paths: Sequence[Path], data_root: str | None) -> tuple[list[Inspected], Task, Splits]:
    """The networks of runs of one task, and the task's data.

    Raises:
        UserError: a folder is no run or has no checkpoint, the runs are of several tasks, or the data is missing.
    """
    runs = [(path, *load_run(path)) for path in paths]
    tasks = sorted({make_task(cfg.data).folder for _, _, cfg in runs})
    if len(tasks) > 1:
        raise UserError(f"--inspect compares runs of one task; these are of {', '.join(tasks)}")
    data = runs[0][2].data
    if data_root is not None:
        if not hasattr(data, "root"):
            raise UserError(f"--data-root: the task {data.name} reads no files")
        data.root = data_root
    task = make_task(data)
    splits = task.load(torch.device("cpu"))
    models = [model_name(cfg) for _, _, cfg in runs]
    return [_inspected(model, cfg, splits, models.count(model_name(cfg)) == 1) for _, model, cfg in runs], task, splits


def _inspected(model: nn.Module, cfg: Config, splits: Splits, only: bool) -> Inspected:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(cfg.seed, Stream.INITIALISATION))
        untrained = build_model(cfg.model, make_task(cfg.data))
    samples = spread_indices(splits.train.size or 10_000, cfg.trainer.bn_samples)
    reestimate_batch_norm(untrained, splits.train, samples, cfg.trainer.eval_batch_size)
    networks = [network.double().eval().requires_grad_(False) for network in (model, untrained)]
    label = MODELS.get(model_name(cfg), model_name(cfg))
    label = label if only else f"{label} ({run_name(cfg)}, seed {cfg.seed})"
    return Inspected(label, f"{run_name(cfg)}-seed{cfg.seed}", cfg, *networks)


def spread_indices(size: int, count: int) -> Tensor:
    """``count`` indices (or all ``size``), evenly spread."""
    return torch.arange(min(size, count)) * size // min(size, count)


def layer_memories(model: nn.Module) -> list[LayerMemory]:
    """Of every IndRNN layer in depth order; empty for other networks."""
    return [
        LayerMemory(name, layer.recurrent_weight().detach().double().cpu()) for name, layer in recurrent_layers(model)
    ]


def last_recurrence(model: nn.Module) -> IndRNNLayer | nn.RNNBase:
    """The module that makes the states that the classifier reads: the last IndRNN layer, or the LSTM or RNN."""
    layers = recurrent_layers(model)
    if layers:
        return layers[-1][1]
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            return module
    raise UserError(f"--inspect: {type(model).__name__} has neither an IndRNN layer nor an nn.RNN, nn.LSTM or nn.GRU")


def gradient_norms(model: nn.Module, split: Split, classes: bool) -> GradientNorms:
    """The norm of d loss / d h_t for every t, averaged over SEQUENCES sequences of ``split``.

    h_t is the last recurrent layer's state after step t, and the derivative is the whole one: along every path from
    h_t to the loss, through all later steps. For an LSTM d loss / d c_t beside it is that along the paths that leave
    step t through its cell state. The layer is run step by step with its own weights, in float64, the network in
    evaluation mode. ``model``: as in `Inspected`.
    """
    x, y = split.batch(spread_indices(split.size or 10_000, SEQUENCES))
    states: list[tuple[Tensor, ...]] = []
    with _replaced_output(last_recurrence(model), states), torch.enable_grad():
        output = model(x.double())
        if classes:
            loss = nn.functional.cross_entropy(output, y, reduction="sum")
        else:
            loss = (output.squeeze(1) - y.double()).square().sum()
        loss.backward()

    def norms(which: int) -> Tensor:
        gradients = [state[which].grad for state in states]
        # A state of nn.RNNBase is (layers, B, H): the last layer's is meant.
        tops = [gradient if gradient is None or gradient.dim() == 2 else gradient[-1] for gradient in gradients]
        return torch.stack([torch.zeros(()).double() if g is None else g.norm(dim=1).mean() for g in tops])

    return GradientNorms(norms(0), norms(1) if len(states[0]) > 1 else None)


@contextmanager
def _replaced_output(module: IndRNNLayer | nn.RNNBase, states: list[tuple[Tensor, ...]]) -> Iterator[None]:
    """Within the block, ``module`` is run step by step, and ``states`` gets its state after each step."""

    def unroll(_: nn.Module, arguments: tuple[Any, ...], __: object) -> object:
        handle.remove()  # the steps below call the module again
        sequence = arguments[0]
        state: tuple[Tensor, ...] = ()
        for t in range(_length(sequence)):
            output, state = _advance(module, _step(sequence, t), state)
            for tensor in state:
                tensor.retain_grad()
            states.append(state)
        return output, (state if len(state) > 1 else state[0])

    handle = module.register_forward_hook(unroll)
    try:
        yield
    finally:
        handle.remove()


def _advance(
    module: IndRNNLayer | nn.RNNBase, x: Tensor | AffineSequence, state: tuple[Tensor, ...]
) -> tuple[Any, ...]:
    """One step: the output that the classifier reads, and the new state. The first state is zeros that need a gradient,
    from which all later ones inherit it, since no weight needs one."""
    batch = len(x.h if isinstance(x, AffineSequence) else x)
    if isinstance(module, IndRNNLayer):
        output, h = module(x, state[0] if state else _zeros(batch, module.hidden_size))
        return output, (h,)
    if not state:
        shape = (module.num_layers, batch, module.hidden_size)
        state = tuple(_zeros(*shape) for _ in range(2 if isinstance(module, nn.LSTM) else 1))
    _, new = module(x, state if isinstance(module, nn.LSTM) else state[0])
    new = new if isinstance(new, tuple) else (new,)
    # From the state, not the output beside it, so that the loss reaches it through the state itself.
    return new[0][-1].unsqueeze(1), new


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64, requires_grad=True)


def _length(sequence: Tensor | AffineSequence) -> int:
    return (sequence.h if isinstance(sequence, AffineSequence) else sequence).shape[1]


def _step(sequence: Tensor | AffineSequence, t: int) -> Tensor | AffineSequence:
    """Step ``t`` alone, still a sequence; without dropout, as in evaluation mode."""
    if not isinstance(sequence, AffineSequence):
        return sequence[:, t : t + 1]
    return AffineSequence(sequence.h[:, t : t + 1], sequence.h[:, t], sequence.scale, sequence.shift)


@torch.no_grad()
def class_probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """What the classifier says after every prefix of one sequence x (T, D): probabilities (T, K).

    The networks read from left to right, so the state after step t is that of the prefix of t steps.
    """
    head = model.head
    assert isinstance(head, nn.Linear)
    seen: list[Tensor] = []
    module = last_recurrence(model)
    handle = module.register_forward_hook(lambda _, __, output: seen.append(materialise(output[0])))
    try:
        model(x.double().unsqueeze(0))
    finally:
        handle.remove()
    return head(seen[0][0]).softmax(-1)
