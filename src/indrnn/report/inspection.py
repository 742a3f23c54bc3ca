"""What networks do (``indrnn-report --inspect``): how long their units remember, and how much the loss depends on each
time step.

B: sequences, T: time steps, D: input features, H: hidden units, K: classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.lines import Line2D
from torch import Tensor, nn

from indrnn.config.checks import run_name
from indrnn.data import Splits, Task, make_task
from indrnn.errors import UserError
from indrnn.layers import IndRNNLayer, materialise, recurrent_layers
from indrnn.models import build_model
from indrnn.training import load_run
from indrnn.training.evaluation import reestimate_batch_norm, spread_indices

from .runs import MODELS, model_name
from .style import BASELINE, GRAY, Look, figure, legend_below, looks, save, short_number, title
from .table import markdown_table

SEQUENCES = 32  # averaged over
LONGEST = 1e5  # half-life in steps at the end of the axis
KEPT = (
    f"Kept per step: |u|, or the geometric mean of an LSTM's or GRU's gate over {SEQUENCES} validation sequences. "
    "Never: the share of units with |u| ≥ 1, which do not forget."
)


@dataclass(frozen=True)
class Inspected:
    """One trained network in float64, and the same network newly initialized. ``label`` is unique."""

    label: str
    model: str
    trained: nn.Module
    untrained: nn.Module


def load_inspected(paths: Sequence[Path], data_root: str | None) -> tuple[list[Inspected], Task, Splits]:
    """The networks of runs of one task, and the task's data.

    Raises:
        UserError: a folder is not a run or has no weights, the runs are of several tasks, or the data is missing.
    """
    runs = [load_run(path) for path in paths]
    tasks = sorted({make_task(cfg.data).folder for _, cfg in runs})
    if len(tasks) > 1:
        raise UserError(f"--inspect compares runs of one task, not of {', '.join(tasks)}")
    data = runs[0][1].data
    if data_root is not None:
        if not hasattr(data, "root"):
            raise UserError(f"--data-root={data_root}: the task {data.name} reads no files; remove it")
        data.root = data_root
    task = make_task(data)
    splits = task.load(torch.device("cpu"))
    models = [model_name(cfg) for _, cfg in runs]
    inspected = []
    for (trained, cfg), model in zip(runs, models, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            untrained = build_model(cfg.model, task)
        samples = spread_indices(splits.train.size or 10_000, cfg.trainer.bn_samples)
        reestimate_batch_norm(untrained, splits.train, samples, cfg.trainer.eval_batch_size)
        label = MODELS.get(model, model) + f" ({run_name(cfg)}, seed {cfg.seed})" * (models.count(model) > 1)
        networks = (network.double().eval().requires_grad_(False) for network in (trained, untrained))
        inspected.append(Inspected(label, model, *networks))
    return inspected, task, splits


@torch.no_grad()
def layer_memories(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The factor by which each unit keeps its state per step, (H,) for every layer of an IndRNN, or of an LSTM or GRU
    as it reads x (B, T, D): |u|, or the geometric mean of the gate over sequences and steps. Empty for other models."""
    layers = recurrent_layers(model)
    if layers:
        return [layer.recurrent_weight().double().abs() for _, layer in layers]
    module = last_recurrence(model)
    if not isinstance(module, nn.LSTM | nn.GRU):
        return []
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    model(x)
    handle.remove()
    x, memories = inputs[0], []
    for depth in range(module.num_layers):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = {f"{name}_l0": getattr(module, f"{name}_l{depth}") for name in names}
        layer = type(module)(x.shape[2], module.hidden_size, batch_first=True).double()
        layer.load_state_dict(weights)
        h = layer(x)[0]
        before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)
        w_ih, w_hh, b_ih, b_hh = weights.values()
        # PyTorch's second gate: the LSTM's forget gate, and the GRU's update gate, which keeps its share of h.
        gate = (x @ w_ih.T + before @ w_hh.T + b_ih + b_hh).chunk(4 if isinstance(module, nn.LSTM) else 3, dim=2)[1]
        memories.append(nn.functional.logsigmoid(gate).mean((0, 1)).exp())
        x = h
    return memories


def half_life(kept: Tensor) -> Tensor:
    """Steps until half of a state is forgotten, ln 0.5 / ln kept; infinite where kept is 1 or more."""
    return torch.where(kept < 1, math.log(0.5) / kept.clamp(max=1 - 1e-16).log(), math.inf)


def last_recurrence(model: nn.Module) -> IndRNNLayer | nn.RNNBase:
    """The module whose output the classifier reads: the last IndRNN layer, RNN, LSTM or GRU.

    Raises:
        UserError: the model has none.
    """
    modules = [module for module in model.modules() if isinstance(module, IndRNNLayer | nn.RNNBase)]
    if not modules:
        raise UserError(f"--inspect: {type(model).__name__} has no IndRNN layer, nn.RNN, nn.LSTM or nn.GRU")
    return modules[-1]


def gradient_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The norm of the gradient of the loss with respect to the input of every time step, (T,).

    Args:
        model: in evaluation mode, float64.
        x: (B, T, D), averaged over B.
        y: (B,), classes or float targets.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        output = model(x)
        if y.is_floating_point():
            loss = (output.squeeze(1) - y.double()).square().sum()
        else:
            loss = nn.functional.cross_entropy(output, y, reduction="sum")
        return torch.autograd.grad(loss, x)[0].norm(dim=2).mean(0)


@torch.no_grad()
def class_probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """The class probabilities (T, K) after every prefix of one sequence x (T, D).

    The networks read from left to right, so the state after step t is that of the prefix of t steps.
    """
    head = model.head
    assert isinstance(head, nn.Linear)
    outputs: list[Tensor] = []
    handle = last_recurrence(model).register_forward_hook(lambda _, __, out: outputs.append(materialise(out[0])))
    model(x.double().unsqueeze(0))
    handle.remove()
    return head(outputs[0][0]).softmax(-1)


def inspect_runs(paths: Sequence[Path], out: Path, data_root: str | None) -> tuple[str, list[Path]]:
    """Draw the memory and the gradients of all networks to ``out``/<task>.

    Returns:
        The memory of each layer as a Markdown table, and the files written.

    Raises:
        UserError: as `load_inspected`.
    """
    runs, task, splits = load_inspected(paths, data_root)
    folder = out / task.folder
    x, y = splits.validation.batch(spread_indices(splits.validation.size or 10_000, SEQUENCES))
    x = x.double()
    look = looks({run.label: run.model for run in runs})
    memories = {run.label: layers for run in runs if (layers := layer_memories(run.trained, x))}
    written = _draw_gradients(runs, x, y, look, task, folder)
    if not memories:
        return "", written
    text = f"## Memory of each layer\n\n{markdown_table(memory_table(memories))}\n\n{KEPT}"
    return text, _draw_memory(memories, look, task, folder) + written


def memory_table(memories: Mapping[str, Sequence[Tensor]]) -> pd.DataFrame:
    """One row per layer: what its units keep per step, their half-life, and the share that never forgets."""
    rows = []
    for label, number, kept in _layers(memories):
        life = float(half_life(kept).median())
        row = {"network": label, "layer": str(number), "kept per step, median": f"{float(kept.median()):.4f}"}
        row["half-life, median"] = "never" if math.isinf(life) else f"{life:,.1f} steps"
        rows.append(row | {"never forget": f"{100 * float((kept >= 1).double().mean()):.0f} %"})
    return pd.DataFrame(rows)


def _layers(memories: Mapping[str, Sequence[Tensor]]) -> list[tuple[str, int, Tensor]]:
    return [(label, number, kept) for label, layers in memories.items() for number, kept in enumerate(layers, 1)]


def _draw_memory(
    memories: Mapping[str, Sequence[Tensor]], look: Mapping[str, Look], task: Task, folder: Path
) -> list[Path]:
    table, layers = memory_table(memories), _layers(memories)
    with figure(height=1.7 + 0.25 * len(layers)) as (drawing, axes):
        for row, (label, _, kept) in enumerate(layers):
            life = half_life(kept).clamp(0.1, LONGEST).numpy()
            # Units in their order: deterministic, and dense spots stay visible.
            axes.scatter(life, row + np.linspace(-0.3, 0.3, len(life)), s=5, color=look[label]["color"], alpha=0.45)
            axes.plot([np.median(life)] * 2, [row - 0.4, row + 0.4], color="black")
            never = f"{table['never forget'][row]} never"
            axes.text(1.01, row, never, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        axes.set_yticks(range(len(layers)), [f"{label}, layer {number}" for label, number, _ in layers])
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.set(xscale="log", xlim=(0.08, 1.5 * LONGEST), xlabel="Half-life: steps until half is forgotten, log scale")
        ticks = [0.1, 1, 10, 100, 1_000, 10_000, LONGEST]
        axes.set_xticks(ticks, ["≤ 0.1", *map(short_number, ticks[1:-1]), "never"])
        axes.set_xticks([], minor=True)
        axes.axvline(task.length, **BASELINE)
        title(drawing, f"How long each unit remembers\n{task.title}")
        unit, median = Line2D([], [], color=GRAY, marker="o", linestyle=""), Line2D([], [], color="black")
        handles = {"one unit": unit, "median": median, f"T = {task.length:,}": Line2D([], [], **BASELINE)}
        legend_below(drawing, handles, KEPT)
        return save(drawing, folder, "memory")


def _draw_gradients(
    runs: Sequence[Inspected], x: Tensor, y: Tensor, look: Mapping[str, Look], task: Task, folder: Path
) -> list[Path]:
    window = max(1, task.length // 28)
    with figure(1, 2, height=3.6, sharey=True) as (drawing, panels):
        for axes, stage in zip(panels, ("untrained", "trained"), strict=True):
            for run in runs:
                norms = pd.Series(gradient_norms(getattr(run, stage), x, y).numpy())
                norms = norms.rolling(window, min_periods=1, center=True).mean()
                norms = norms[norms > 0] / norms.max()
                axes.plot(norms.index + 1, norms, markevery=(0.03, 0.12), **look[run.label])
            axes.set(title=f"Relative gradient norm, {stage}", xlabel="Time step")
            axes.set_yscale("log")
            # Less than 1e-20 of the maximum is lost in float32.
            axes.set_ylim(max(axes.get_ylim()[0], 1e-20), 2)
        title(drawing, f"How much the loss depends on each time step\n{task.title}")
        note = (
            "Norm of the gradient of the loss with respect to the input, relative to its maximum. Near 1 at the first "
            "steps: the network can learn from them. Near 0: the gradient vanishes on its way back. "
            f"Mean over {SEQUENCES} validation sequences and {window} neighboring steps."
        )
        legend_below(drawing, {run.label: Line2D([], [], **look[run.label]) for run in runs}, note)
        return save(drawing, folder, "gradients")
