"""What trained networks do (`indrnn-report --inspect`): how long their units remember, how gradients reach back, and
what they think step by step.

B: sequences, T: time steps, H: hidden units, K: classes.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.lines import Line2D
from torch import Tensor, nn

from indrnn.config.checks import run_name
from indrnn.data import Split, Splits, Task, make_task
from indrnn.errors import UserError
from indrnn.layers import AffineSequence, IndRNNLayer, materialise, recurrent_layers
from indrnn.models import build_model
from indrnn.training import load_run
from indrnn.training.evaluation import reestimate_batch_norm, spread_indices
from indrnn.training.sampler import Stream, torch_seed

from .runs import MODELS, model_name
from .style import BASELINE, GREY, Line, Look, figure, finish, head, legend_below, looks, save, say_above, short_number
from .table import markdown_table

SEQUENCES = 32  # that gradients are averaged over
KEPT = (
    f"Kept a step: |u|, or the geometric mean of an LSTM's or GRU's gate over {SEQUENCES} validation sequences. "
    "≥: share of units that keep half for that long; never: share with |u| ≥ 1, which do not forget."
)
NEAREST = 1e-5  # the end of the axis of 1 - |u|, where units stand that forget less or nothing


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
            torch.manual_seed(torch_seed(cfg.seed, Stream.INITIALIZATION))
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
    """The module that makes the states that the classifier reads: the last IndRNN layer, RNN, LSTM or GRU."""
    recurrences = [module for module in model.modules() if isinstance(module, IndRNNLayer | nn.RNNBase)]
    if recurrences:
        return recurrences[-1]
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


def inspect_runs(paths: Sequence[Path], out: Path, data_root: str | None) -> tuple[str, list[Path]]:
    """Draw memory, gradients and, for images, the class probabilities after every step, of all networks side by side,
    into ``out``/<task>. Returns the memory of each layer as Markdown tables, and the files written.

    Raises:
        UserError: a folder is no run or has no weights, the runs are of several tasks, or the data is missing.
    """
    runs, task, splits = load_inspected(paths, data_root)
    folder = out / task.folder
    x, y = some_sequences(splits.validation)
    by_label = {run.label: layer_memories(run.trained, x) for run in runs}
    memories = {label: layers for label, layers in by_label.items() if layers}
    text, written = [], []
    for label, layers in memories.items():
        text.append(f"## {label}: memory of each layer\n\n{markdown_table(memory_rows(layers, task.length))}")
    if memories:
        text.append(KEPT)
        written += _draw_memory(memories, looks({run.label: run.model for run in runs}), task, folder)
    norms = {
        f"{run.label}, {stage}": gradient_norms(model, x, y).numpy()
        for run in runs
        for stage, model in (("trained", run.trained), ("untrained", run.untrained))
    }
    stages = {f"{run.label}, {stage}": run.model for run in runs for stage in ("trained", "untrained")}
    written += _draw_gradients(norms, looks(stages), task, folder)
    if task.measures_accuracy and task.picture is not None:
        x, y = splits.validation.batch(torch.zeros(1, dtype=torch.int64))
        beliefs = {run.label: class_probabilities(run.trained, x[0]).numpy() for run in runs}
        written += _draw_digit(beliefs, task.picture(x[0]).numpy(), x[0, :, 0].numpy(), int(y[0]), task, folder)
    return "\n\n".join(text), written


def memory_rows(memories: Sequence[LayerMemory], length: int) -> list[dict[str, str]]:
    """A row a layer: what its units keep a step, their half-life, and the shares that keep a sequence, or for ever."""
    rows = []
    for layer in memories:
        life = layer.half_life
        middle = float(life.median())
        rows.append(
            {
                "name": layer.name,
                "units": str(len(layer.keeps)),
                "kept a step, median": f"{float(layer.keeps.median()):.4f}",
                "range": f"{float(layer.keeps.min()):.4f} … {float(layer.keeps.max()):.4f}",
                "half forgotten after (median)": "never" if math.isinf(middle) else f"{middle:,.1f} steps",
                f"≥ {length:,} steps": f"{100 * float((life >= length).double().mean()):.0f} %",
                "never": f"{100 * layer.share_forever:.0f} %",
            }
        )
    return rows


def _draw_memory(memories: dict[str, list[LayerMemory]], look: dict[str, Look], task: Task, folder: Path) -> list[Path]:
    rows = [(label, layer) for label, layers in memories.items() for layer in (None, *layers)]
    with figure(height=1.9 + 0.25 * len(rows)) as (drawing, axes):
        beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
        axes.text(1.02, -0.6, "never", fontsize=8, fontweight="bold", **beside)
        names = {}
        for row, (label, layer) in enumerate(rows):
            color = look[label]["color"]
            if layer is None:
                axes.text(0.01, row, label, color=color, fontweight="bold", **beside)
                continue
            names[row] = f"layer {memories[label].index(layer) + 1}"
            lost = 1 - layer.keeps.numpy()
            # Units side by side in their order: deterministic, and dense spots stay visible.
            y = row + np.linspace(-0.32, 0.32, len(lost))
            axes.scatter(lost.clip(NEAREST, 1), y, s=5, color=color, alpha=0.45, linewidths=0)
            axes.plot([np.median(lost).clip(NEAREST)] * 2, [row - 0.4, row + 0.4], color="black", linewidth=1.6)
            axes.text(1.02, row, f"{100 * layer.share_forever:.0f} %", fontsize=8, **beside)
        axes.set_yticks([*names], [*names.values()])
        axes.set_ylim(len(rows) - 0.4, -0.9)
        axes.set_xscale("log")
        axes.set_xlim(1.5, NEAREST / 1.5)  # longer memory to the right
        powers = range(round(-math.log10(NEAREST)))
        axes.set_xticks([*(10.0**-power for power in powers), NEAREST], [*(f"{0.1**power:g}" for power in powers), "0"])
        axes.set_xticks([], minor=True)
        axes.axvline(1 - 0.5 ** (1 / task.length), **BASELINE)
        axes.set_xlabel("What a unit loses of its state in a step: 1 − |u|, 1 − forget gate; log scale")
        steps = axes.secondary_xaxis("top")
        lives = (1, 10, 100, 1_000, 10_000)
        places = [*(1 - 0.5 ** (1 / life) for life in lives), NEAREST]
        steps.set_xticks(places, [*map(short_number, lives), "never"])
        steps.set_xticks([], minor=True)
        steps.set_xlabel("Steps until half is forgotten")
        head(drawing, f"How long each unit remembers\n{task.title}")
        handles = {
            "a unit": Line2D([], [], color=GREY, marker="o", linestyle=""),
            "median": Line2D([], [], color="black", linewidth=1.6),
            f"half is left after T = {task.length:,}": Line2D([], [], **BASELINE),
        }
        gates = f"; an LSTM's forget gate: geometric mean over {SEQUENCES} validation sequences"
        gated = any(not layer.name.startswith("layers") for layers in memories.values() for layer in layers)
        legend_below(drawing, handles, "Never: |u| ≥ 1, in per cent of the units" + gates * gated)
        return save(drawing, folder, "memory")


def _draw_gradients(norms: dict[str, np.ndarray], look: dict[str, Look], task: Task, folder: Path) -> list[Path]:
    with figure(height=3.8) as (drawing, axes):
        axes.set_yscale("log")
        lines = []
        for label, values in norms.items():
            # Zeros (a state that the loss does not see) have no place on a logarithmic axis.
            back = np.flatnonzero(values[::-1] > 0)
            axes.plot(back, values[::-1][back], markevery=(0.03, 0.12), **look[label])
            end = (float(back[-1]), float(values[::-1][back[-1]])) if len(back) else None
            lines.append(Line(label, look[label], end))
        largest = max(float(values.max()) for values in norms.values())
        if largest > 0:
            # Below 1e-30 of the largest there is nothing to compare, and float32 training has long lost it.
            axes.set_ylim(bottom=max(axes.get_ylim()[0], largest * 1e-30))
        axes.set_xlabel("Steps back from the last, after which the loss comes")
        say_above(axes, "Norm of ∂loss/∂state, log scale")
        title = f"How far back the gradient of the loss reaches\n{task.title}"
        note = (
            "Level: the first steps count as much as the last. The height follows the loss, near 0 once trained. "
            f"Mean over {SEQUENCES} validation sequences; state: h, and an LSTM's c, of the last recurrent layer; "
            "untrained: before the first update."
        )
        finish(drawing, axes, title, lines, note=note)
        return save(drawing, folder, "gradients")


def _draw_digit(
    beliefs: dict[str, np.ndarray], image: np.ndarray, pixels: np.ndarray, digit: int, task: Task, folder: Path
) -> list[Path]:
    ratios = [0.8] + [1.3] * len(beliefs)
    options: dict[str, Any] = {"height_ratios": ratios, "width_ratios": (0.16, 0.84)}
    with figure(len(ratios), 2, height=0.9 + 1.15 * sum(ratios), **options) as (drawing, axes):
        for blank in axes[:, 0]:
            blank.set_axis_off()
        axes[0, 0].imshow(image, cmap="Greys")
        axes[0, 1].fill_between(np.arange(1, len(pixels) + 1), (pixels + 1) / 2, step="mid", color=GREY, linewidth=0)
        axes[0, 1].set(ylabel="Pixel", ylim=(0, 1.05))
        for place, (label, values) in zip(axes[1:, 1], beliefs.items(), strict=True):
            extent = (0.5, len(pixels) + 0.5, values.shape[1] - 0.5, -0.5)
            shown = place.imshow(
                values.T, aspect="auto", cmap="cividis", vmin=0, vmax=1, extent=extent, interpolation="nearest"
            )
            place.grid(visible=False)
            place.set(yticks=range(values.shape[1]), ylabel="Class")
            place.get_yticklabels()[digit].set_fontweight("bold")
            place.tick_params(axis="y", labelsize=7)
            says = f"says {values[-1].argmax()} with {100 * values[-1].max():.0f} %"
            place.set_title(f"{label}: after the last step it {says}", fontsize=9)
        for place in axes[:, 1]:
            place.set_xlim(0.5, len(pixels) + 0.5)
            place.tick_params(labelbottom=place is axes[-1, 1])
        axes[-1, 1].set_xlabel("Time steps read")
        bar = drawing.colorbar(
            shown, ax=axes[:, 1], location="right", label="Probability", shrink=sum(ratios[1:]) / sum(ratios) - 0.08,
            anchor=(0, 0), fraction=0.05, aspect=14 * len(beliefs),
        )  # fmt: skip
        bar.outline.set_visible(False)
        head(drawing, f"A {digit} (the first validation image), read one pixel a step\n{task.title}")
        return save(drawing, folder, "digit")
