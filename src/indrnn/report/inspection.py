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
from indrnn.data import Split, Splits, Task, make_task
from indrnn.errors import UserError
from indrnn.layers import AffineSequence, IndRNNLayer, materialise, recurrent_layers
from indrnn.models import build_model
from indrnn.training import load_run
from indrnn.training.evaluation import reestimate_batch_norm, spread_indices
from indrnn.training.order import Stream, torch_seed

from .runs import MODELS, model_name

SEQUENCES = 32  # that gradients are averaged over


@dataclass(frozen=True)
class Inspected:
    """One run: its trained network, and the same network as it was before the first update. ``label``: its model in
    words, with the run's name and seed where several have that model."""

    label: str
    model: str
    trained: nn.Module
    untrained: nn.Module


@dataclass(frozen=True)
class LayerMemory:
    """The factor by which each unit of one layer keeps its state in a step, (H,) float64 on the CPU: |u|, or what an
    LSTM's or GRU's gate keeps (its geometric mean over sequences and steps)."""

    name: str
    keeps: Tensor

    @property
    def half_life(self) -> Tensor:
        """Steps until half of a state is forgotten, ln 0.5 / ln of the factor; infinite where it is 1 or more."""
        return torch.where(self.keeps < 1, math.log(0.5) / self.keeps.clamp(max=1 - 1e-16).log(), math.inf)

    @property
    def share_forever(self) -> float:
        return float((self.keeps >= 1).double().mean())


def load_inspected(paths: Sequence[Path], data_root: str | None) -> tuple[list[Inspected], Task, Splits]:
    """The networks of runs of one task, and the task's data.

    Raises:
        UserError: a folder is no run or has no weights, the runs are of several tasks, or the data is missing.
    """
    runs = [load_run(path) for path in paths]
    tasks = sorted({make_task(cfg.data).folder for _, cfg in runs})
    if len(tasks) > 1:
        raise UserError(f"--inspect compares runs of one task; these are of {', '.join(tasks)}")
    data = runs[0][1].data
    if data_root is not None:
        if not hasattr(data, "root"):
            raise UserError(f"--data-root: the task {data.name} reads no files")
        data.root = data_root
    task = make_task(data)
    splits = task.load(torch.device("cpu"))
    models = [model_name(cfg) for _, cfg in runs]
    inspected = []
    for (trained, cfg), model in zip(runs, models, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(cfg.seed, Stream.INITIALISATION))
            untrained = build_model(cfg.model, task)
        samples = spread_indices(splits.train.size or 10_000, cfg.trainer.bn_samples)
        reestimate_batch_norm(untrained, splits.train, samples, cfg.trainer.eval_batch_size)
        label = MODELS.get(model, model) + f" ({run_name(cfg)}, seed {cfg.seed})" * (models.count(model) > 1)
        networks = (network.double().eval().requires_grad_(False) for network in (trained, untrained))
        inspected.append(Inspected(label, model, *networks))
    return inspected, task, splits


def some_sequences(split: Split) -> tuple[Tensor, Tensor]:
    """x (SEQUENCES, T, D) in float64 and y (SEQUENCES,), evenly spread over the split."""
    x, y = split.batch(spread_indices(split.size or 10_000, SEQUENCES))
    return x.double(), y


@torch.no_grad()
def layer_memories(model: nn.Module, x: Tensor) -> list[LayerMemory]:
    """Of every IndRNN layer, or of every layer of an LSTM or GRU as it reads x (B, T, D), in depth order; empty for
    other networks."""
    layers = recurrent_layers(model)
    if layers:
        return [LayerMemory(name, layer.recurrent_weight().double().abs()) for name, layer in layers]
    module = last_recurrence(model)
    if not isinstance(module, nn.LSTM | nn.GRU):
        return []
    read: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    model(x)
    handle.remove()
    x, memories = read[0], []
    for depth in range(module.num_layers):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = {f"{name}_l0": getattr(module, f"{name}_l{depth}") for name in names}
        alone = type(module)(x.shape[2], module.hidden_size, batch_first=True).double()
        alone.load_state_dict(weights)
        h = alone(x)[0]
        before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)
        w_ih, w_hh, b_ih, b_hh = weights.values()
        # The second of PyTorch's gates: the LSTM's forget gate, and the GRU's update gate, which keeps its share of h.
        gate = (x @ w_ih.T + before @ w_hh.T + b_ih + b_hh).chunk(4 if isinstance(module, nn.LSTM) else 3, dim=2)[1]
        memories.append(LayerMemory(f"layer {depth + 1}", nn.functional.logsigmoid(gate).mean((0, 1)).exp()))
        x = h
    return memories


def last_recurrence(model: nn.Module) -> IndRNNLayer | nn.RNNBase:
    """The module that makes the states that the classifier reads: the last IndRNN layer, or the LSTM or RNN."""
    layers = recurrent_layers(model)
    if layers:
        return layers[-1][1]
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            return module
    raise UserError(f"--inspect: {type(model).__name__} has neither an IndRNN layer nor an nn.RNN, nn.LSTM or nn.GRU")


def gradient_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The norm of d loss / d state_t for every t, (T,): the mean over the sequences x (B, T, D), y (B,).

    state_t is all that the last recurrent layer hands on from step t to t + 1 (h_t, and an LSTM's c_t too), and the
    derivative is the whole one: along every path to the loss, through all later steps. The layer is run step by step
    with its own weights, in float64, the network in evaluation mode. ``model``: as in `Inspected`.
    """
    states: list[tuple[Tensor, ...]] = []
    with _replaced_output(last_recurrence(model), states), torch.enable_grad():
        output = model(x)
        if y.is_floating_point():
            loss = (output.squeeze(1) - y.double()).square().sum()
        else:
            loss = nn.functional.cross_entropy(output, y, reduction="sum")
        loss.backward()

    def norm(state: tuple[Tensor, ...]) -> Tensor:
        # The loss does not see a state without a gradient. A state of nn.RNNBase is (layers, B, H): the last is meant.
        gradients = [torch.zeros_like(part) if part.grad is None else part.grad for part in state]
        return torch.cat([gradient.reshape(-1, *gradient.shape[-2:])[-1] for gradient in gradients], 1).norm(dim=1)

    return torch.stack([norm(state).mean() for state in states]).detach()


@contextmanager
def _replaced_output(module: IndRNNLayer | nn.RNNBase, states: list[tuple[Tensor, ...]]) -> Iterator[None]:
    """Within the block, ``module`` is run step by step, and ``states`` gets its state after each step."""

    def unroll(_: nn.Module, arguments: tuple[Any, ...], __: object) -> object:
        handle.remove()  # the steps below call the module again
        sequence = arguments[0]
        x = sequence.h if isinstance(sequence, AffineSequence) else sequence
        stacked = isinstance(module, nn.RNNBase)
        shape = (module.num_layers, len(x), module.hidden_size) if stacked else (len(x), module.hidden_size)
        # Zeros that need a gradient, from which all later states inherit it, since no weight needs one.
        zeros = torch.zeros(*shape, dtype=torch.float64, requires_grad=True)
        state: Any = (zeros, zeros) if isinstance(module, nn.LSTM) else zeros
        for t in range(x.shape[1]):
            step = x[:, t : t + 1]
            if isinstance(sequence, AffineSequence):
                step = AffineSequence(step, x[:, t], sequence.scale, sequence.shift)
            output, state = module(step, state)
            states.append(state if isinstance(state, tuple) else (state,))
            for tensor in states[-1]:
                tensor.retain_grad()
        # From the state, not the output beside it, so that the loss reaches it through the state itself.
        return states[-1][0][-1].unsqueeze(1) if stacked else output, state

    handle = module.register_forward_hook(unroll)
    try:
        yield
    finally:
        handle.remove()


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
