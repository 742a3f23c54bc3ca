"""The pictures of `indrnn-report --inspect`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from .inspection import (
    SEQUENCES,
    GradientNorms,
    Inspected,
    LayerMemory,
    class_probabilities,
    gradient_norms,
    layer_memories,
    load_inspected,
)
from .runs import model_name
from .style import BASELINE, GREY, Look, figure, legend_below, looks, save, say_above, short_number
from .table import markdown_table

NEVER = "≥: share of units that keep half for that long; never: share with |u| ≥ 1, which do not forget."
NEAREST = 1e-5  # to 1: the end of the axis of 1 - |u|


def inspect_runs(paths: Sequence[Path], out: Path, data_root: str | None) -> tuple[str, list[Path]]:
    """Draw memory (one figure an IndRNN run), gradients and, for images, the class probabilities after every step,
    into ``out``/<task>. Returns the memory of each layer as Markdown tables, and the files written.

    Raises:
        UserError: a folder is no run or has no checkpoint, the runs are of several tasks, or the data is missing.
    """
    runs, task, splits = load_inspected(paths, data_root)
    folder, title = out / task.folder, task.title
    length = task.length
    look = looks({run.label: model_name(run.cfg) for run in runs})
    text, written = [], []
    for run in runs:
        memories = layer_memories(run.trained)
        if memories:
            table = markdown_table(memory_rows(memories, length))
            text.append(f"## {run.label}: memory of each layer\n\n{table}\n\n{NEVER}")
            written += _draw_memory(run, memories, length, title, folder, look[run.label])
    classes = task.measures_accuracy
    norms = {
        run.label: [gradient_norms(model, splits.validation, classes) for model in (run.trained, run.untrained)]
        for run in runs
    }
    written += _draw_gradients(norms, look, title, folder)
    if classes and task.picture is not None:
        x, y = splits.validation.batch(torch.zeros(1, dtype=torch.int64))
        sequence, digit, image = x[0], int(y[0]), task.picture(x[0])
        probabilities = {run.label: class_probabilities(run.trained, sequence).numpy() for run in runs}
        pixels = (sequence[:, 0].numpy() + 1) / 2
        written += _draw_digit(probabilities, pixels, image.numpy(), digit, title, folder)
    return "\n\n".join(text), written


def memory_rows(memories: Sequence[LayerMemory], length: int) -> list[dict[str, str]]:
    """A row a layer: median u and half-life, and the shares of units that remember the whole sequence, or for ever."""
    rows = []
    for depth, layer in enumerate(memories, start=1):
        life = layer.half_life
        middle = float(life.median())
        rows.append(
            {
                "layer": str(depth),
                "name": layer.name,
                "units": str(len(layer.u)),
                "u, median": f"{float(layer.u.median()):.4f}",
                "u, range": f"{float(layer.u.min()):.4f} … {float(layer.u.max()):.4f}",
                "half forgotten after (median)": "never" if math.isinf(middle) else f"{middle:,.1f} steps",
                f"≥ {length:,} steps": f"{100 * float((life >= length).double().mean()):.0f} %",
                "never": f"{100 * layer.share_forever:.0f} %",
            }
        )
    return rows


def _draw_memory(
    run: Inspected, memories: Sequence[LayerMemory], length: int, title: str, folder: Path, look: Look
) -> list[Path]:
    height = 1.9 + 0.3 * max(len(memories), 4)
    with figure(1, 2, height=height, sharey=True, width_ratios=(1, 1.35)) as (drawing, (left, right)):
        for row, layer in enumerate(memories):
            u = layer.u.numpy()
            # Units side by side in their order: deterministic, and dense spots stay visible.
            y = row + np.linspace(-0.32, 0.32, len(u))
            dots: dict[str, Any] = {"s": 5, "color": look.color, "alpha": 0.45, "linewidths": 0}
            left.scatter(u, y, **dots)
            left.plot([np.median(u)] * 2, [row - 0.4, row + 0.4], color="black", linewidth=1.6)
            below = 1 - np.abs(u)
            forgets = below > 0
            right.scatter(below[forgets].clip(NEAREST, 1), y[forgets], **dots)
            right.text(NEAREST / 3, row, f"{100 * layer.share_forever:.0f} %", ha="left", va="center", fontsize=8)
        right.text(NEAREST / 3, -0.75, "never", ha="left", va="center", fontsize=8, fontweight="bold")
        left.set_yticks(range(len(memories)), [str(depth + 1) for depth in range(len(memories))])
        left.set_ylim(len(memories) - 0.4, -1.1)
        left.set_ylabel("Layer")
        left.set_xlabel("Recurrent weight u of each unit")
        left.axvline(1, **BASELINE)
        right.set_xscale("log")
        right.set_xlim(1.5, NEAREST / 1.5)  # longer memory to the right
        right.xaxis.set_major_locator(LogLocator(numticks=10))
        right.xaxis.set_minor_formatter(NullFormatter())
        right.axvline(1 - 0.5 ** (1 / length), **BASELINE)
        right.set_xlabel("1 − |u|, log scale")
        steps = right.secondary_xaxis("top")
        lives = (1, 10, 100, 1_000, 10_000)
        steps.set_xticks([1 - 0.5 ** (1 / life) for life in lives], [short_number(life) for life in lives])
        steps.set_xticks([], minor=True)
        steps.set_xlabel("Steps until half is forgotten, ln 0.5 / ln |u|")
        drawing.suptitle(
            f"{run.label}: memory of its units\n{title}", x=0.01, ha="left", fontsize=10, fontweight="bold"
        )
        handles = [
            Line2D([], [], color=look.color, marker="o", linestyle=""),
            Line2D([], [], color="black", linewidth=1.6),
            Line2D([], [], **BASELINE),
        ]
        labels = ["a unit", "median", f"u = 1; half is left after T = {length:,}"]
        legend_below(drawing, handles, labels, "Never: share of units with |u| ≥ 1, which do not forget")
        return save(drawing, folder, f"memory-{run.stem}")


def _draw_gradients(
    norms: dict[str, list[GradientNorms]], look: dict[str, Look], title: str, folder: Path
) -> list[Path]:
    with figure(height=4.0) as (drawing, axes):
        axes.set_yscale("log")
        handles, labels = [], []
        for label, pair in norms.items():
            for stage, of_stage in zip(("trained", "untrained"), pair, strict=True):
                width = 1.8 if stage == "trained" else 0.9
                for letter, values, style in (("h", of_stage.hidden, "-"), ("c", of_stage.cell, (0, (1.5, 1)))):
                    if values is None:
                        continue
                    marker: dict[str, Any] = {"marker": look[label].marker, "markevery": (0.03, 0.12)}
                    marker |= {"markerfacecolor": look[label].color if stage == "trained" else "white"}
                    options: dict[str, Any] = {
                        "color": look[label].color,
                        "linestyle": style,
                        "linewidth": width,
                        **marker,
                    }
                    axes.plot(np.arange(1, len(values) + 1), _positive(values.numpy()), **options)
                    options.pop("markevery")
                    handles.append(Line2D([], [], **options))
                    labels.append(f"{label}, {stage}, {letter}$_t$")
        axes.set_xlabel("Time step t (the loss comes after the last)")
        say_above(axes, "Norm of ∂loss/∂state$_t$, log scale")
        _limit(axes, [values for pair in norms.values() for stage in pair for values in (stage.hidden, stage.cell)])
        drawing.suptitle(
            f"How far back the gradient of the loss reaches\n{title}", x=0.01, ha="left", fontsize=10, fontweight="bold"
        )
        note = f"Mean over {SEQUENCES} validation sequences; last recurrent layer; derivatives along all later steps"
        legend_below(drawing, handles, labels, note)
        return save(drawing, folder, "gradients")


def _positive(values: np.ndarray) -> np.ndarray:
    """Zeros (a state that the loss does not see) have no place on a logarithmic axis."""
    return np.where(values > 0, values, np.nan)


def _limit(axes: Axes, curves: Sequence[Any]) -> None:
    """Below 1e-30 of the largest there is nothing to compare, and float32 training has long lost it."""
    largest = max(float(values.max()) for values in curves if values is not None)
    if largest > 0:
        axes.set_ylim(bottom=max(axes.get_ylim()[0], largest * 1e-30))


def _draw_digit(
    probabilities: dict[str, np.ndarray], pixels: np.ndarray, image: np.ndarray, digit: int, title: str, folder: Path
) -> list[Path]:
    rows = 1 + len(probabilities)
    ratios = [0.8] + [1.3] * len(probabilities)
    options: dict[str, Any] = {"height_ratios": ratios, "width_ratios": (0.16, 0.84)}
    with figure(rows, 2, height=0.9 + 1.15 * sum(ratios), **options) as (drawing, axes):
        for blank in axes[1:, 0]:
            blank.set_axis_off()
        axes[0, 0].imshow(image, cmap="Greys")
        axes[0, 0].set_xticks([])
        axes[0, 0].set_yticks([])
        axes[0, 0].grid(visible=False)
        axes[0, 0].spines[:].set_visible(False)
        steps = np.arange(1, len(pixels) + 1)
        axes[0, 1].fill_between(steps, pixels, step="mid", color=GREY, linewidth=0)
        axes[0, 1].set_ylabel("Pixel")
        axes[0, 1].set_ylim(0, 1.05)
        for place, (label, values) in zip(axes[1:, 1], probabilities.items(), strict=True):
            extent = (0.5, len(pixels) + 0.5, 9.5, -0.5)
            shown = place.imshow(
                values.T, aspect="auto", cmap="cividis", vmin=0, vmax=1, extent=extent, interpolation="nearest"
            )
            place.grid(visible=False)
            place.set_yticks(range(10))
            place.get_yticklabels()[digit].set_fontweight("bold")
            place.tick_params(axis="y", labelsize=7)
            place.set_ylabel("Class")
            says = f"says {values[-1].argmax()} with {100 * values[-1].max():.0f} %"
            place.set_title(f"{label}: after the last step it {says}", fontsize=9)
        for place in axes[:-1, 1]:
            place.set_xticklabels([])
        for place in axes[:, 1]:
            place.set_xlim(0.5, len(pixels) + 0.5)
        axes[-1, 1].set_xlabel("Time steps read")
        bar = drawing.colorbar(
            shown, ax=axes[:, 1], location="right", label="Probability", shrink=sum(ratios[1:]) / sum(ratios) - 0.08,
            anchor=(0, 0), fraction=0.05, aspect=14 * len(probabilities),
        )  # fmt: skip
        bar.outline.set_visible(False)
        drawing.suptitle(
            f"A {digit} (the first validation image), read one pixel a step\n{title}",
            x=0.01, ha="left", fontsize=10, fontweight="bold",
        )  # fmt: skip
        return save(drawing, folder, "digit")
