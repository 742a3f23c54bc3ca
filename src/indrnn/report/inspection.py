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
from torch import Tensor, nn

from indrnn.config.compose import run_name
from indrnn.data import Splits, Task, make_task
from indrnn.errors import UserError
from indrnn.layers import recurrent_layers
from indrnn.models import build_model
from indrnn.training import load_run
from indrnn.training.evaluation import reestimate_batch_norm, spread_indices

from .runs import MODELS, model_name
from .style import BASELINE, GRAY, Look, figure, legend_below, looks, save
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
        # An untrained network has no running averages.
        samples = spread_indices(splits.train.size or 10_000, cfg.trainer.bn_samples or 500)
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
    module = next((module for module in model.modules() if isinstance(module, nn.LSTM | nn.GRU)), None)
    if module is None:
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
    for label, layers in memories.items():
        for number, kept in enumerate(layers, 1):
            life = float(half_life(kept).median())
            row = {"network": label, "layer": str(number), "kept per step, median": f"{float(kept.median()):.4f}"}
            row["half-life, median"] = "never" if math.isinf(life) else f"{life:,.1f} steps"
            rows.append(row | {"never forget": f"{100 * float((kept >= 1).double().mean()):.0f} %"})
    return pd.DataFrame(rows)


def _draw_memory(
    memories: Mapping[str, Sequence[Tensor]], look: Mapping[str, Look], task: Task, folder: Path
) -> list[Path]:
    table = memory_table(memories)
    with figure(height=1.7 + 0.25 * len(table)) as (drawing, axes):
        axes.scatter([], [], s=5, color=GRAY, label="one unit")
        axes.plot([], [], color="black", label="median")
        axes.axvline(task.length, label=f"T = {task.length:,}", **BASELINE)
        for row, kept in enumerate(kept for layers in memories.values() for kept in layers):
            life = half_life(kept).clamp(0.1, LONGEST).numpy()
            # Units in their order: deterministic, and dense spots stay visible.
            color = look[table["network"][row]]["color"]
            axes.scatter(life, row + np.linspace(-0.3, 0.3, len(life)), s=5, color=color, alpha=0.45)
            axes.plot([np.median(life)] * 2, [row - 0.4, row + 0.4], color="black")
            never = f"{table['never forget'][row]} never"
            axes.text(1.01, row, never, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        axes.set_yticks(range(len(table)), table["network"] + ", layer " + table["layer"])
        axes.set_ylim(len(table) - 0.4, -0.6)
        axes.set(xscale="log", xlim=(0.08, 1.5 * LONGEST), xlabel="Half-life: steps until half is forgotten, log scale")
        axes.set_xticks([0.1, 1, 10, 100, 1e3, 1e4, LONGEST], ["≤ 0.1", "1", "10", "100", "1k", "10k", "never"])
        axes.set_xticks([], minor=True)
        drawing.suptitle(f"How long each unit remembers\n{task.title}", x=0.01, ha="left")
        legend_below(drawing, axes, KEPT)
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
                axes.plot(norms.index + 1, norms, markevery=(0.03, 0.12), label=run.label, **look[run.label])
            axes.set(title=f"Relative gradient norm, {stage}", xlabel="Time step")
            axes.set_yscale("log")
            # Less than 1e-20 of the maximum is lost in float32.
            axes.set_ylim(max(axes.get_ylim()[0], 1e-20), 2)
        drawing.suptitle(f"How much the loss depends on each time step\n{task.title}", x=0.01, ha="left")
        note = (
            "Norm of the gradient of the loss with respect to the input, relative to its maximum. Near 1 at the first "
            "steps: the network can learn from them. Near 0: the gradient vanishes on its way back. "
            f"Mean over {SEQUENCES} validation sequences and {window} neighboring steps."
        )
        legend_below(drawing, panels[0], note)
        return save(drawing, folder, "gradients")
