"""The pictures of `indrnn-report --inspect`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.lines import Line2D

from indrnn.data import Task

from .inspection import (
    SEQUENCES,
    LayerMemory,
    class_probabilities,
    gradient_norms,
    layer_memories,
    load_inspected,
    some_sequences,
)
from .style import BASELINE, GREY, Line, Look, figure, finish, head, legend_below, looks, save, say_above, short_number
from .table import markdown_table

KEPT = (
    f"Kept a step: |u|, or the geometric mean of an LSTM's or GRU's gate over {SEQUENCES} validation sequences. "
    "≥: share of units that keep half for that long; never: share with |u| ≥ 1, which do not forget."
)
NEAREST = 1e-5  # the end of the axis of 1 - |u|, where units stand that forget less or nothing


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
            color = look[label].color
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
        handles = [
            Line2D([], [], color=GREY, marker="o", linestyle=""),
            Line2D([], [], color="black", linewidth=1.6),
            Line2D([], [], **BASELINE),
        ]
        labels = ["a unit", "median", f"half is left after T = {task.length:,}"]
        gates = f"; an LSTM's forget gate: geometric mean over {SEQUENCES} validation sequences"
        gated = any(not layer.name.startswith("layers") for layers in memories.values() for layer in layers)
        legend_below(drawing, handles, labels, "Never: |u| ≥ 1, in per cent of the units" + gates * gated)
        return save(drawing, folder, "memory")


def _draw_gradients(norms: dict[str, np.ndarray], look: dict[str, Look], task: Task, folder: Path) -> list[Path]:
    with figure(height=3.8) as (drawing, axes):
        axes.set_yscale("log")
        lines = []
        for label, values in norms.items():
            # Zeros (a state that the loss does not see) have no place on a logarithmic axis.
            back = np.flatnonzero(values[::-1] > 0)
            axes.plot(back, values[::-1][back], markevery=(0.03, 0.12), **look[label].line)
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
