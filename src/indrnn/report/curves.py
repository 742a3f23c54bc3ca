"""Curves of training runs, and error against sequence length. A line is the mean over the seeds of one group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from .runs import Group, Run, baseline, by_task, labels
from .style import BASELINE, Look, figure, legend_below, log_values, looks, save
from .table import extent

POINTS = 200  # bins of a noisy curve
SOLVED = 0.005  # mean squared error of a solved regression
BAND = "Line: mean over n seeds, up to the end of the shortest; band: minimum to maximum."


@dataclass(frozen=True)
class Quantity:
    """A column of metrics.csv as one figure shows it, with the levels that a network reaches without learning."""

    stem: str
    label: str
    split: str
    column: str
    levels: Sequence[float]
    level_label: str
    shown: Callable[[Any], Any] = lambda value: value
    bottom: float | None = None
    """Lower limit of an axis to 100; None: a logarithmic axis."""


def draw(groups: Sequence[Group], out: Path) -> list[Path]:
    """A folder of figures per task, and the length study of each series of tasks. Returns the files written."""
    paths = [path for task, members in by_task(groups).items() for path in _draw_task(members, out / task)]
    studied = (group for group in groups if group.task.series and not group.task.measures_accuracy and group.finished)
    studies = [list(members) for _, members in groupby(studied, key=lambda group: group.task.series)]
    for members in studies:
        paths += _draw_length_study(members, out if len(studies) == 1 else out / members[0].task.name)
    return paths


def _draw_task(groups: Sequence[Group], folder: Path) -> list[Path]:
    if not groups[0].task.measures_accuracy:
        quantities = [
            Quantity("error", "Validation mean squared error", "val", "loss", *baseline(groups, "validation")),
            Quantity("loss", "Training mean squared error", "train", "loss", *baseline(groups, "train")),
        ]
    else:
        classes = groups[0].task.output_size
        best = pd.Series([run.val_accuracy for group in groups for run in group.drawn])
        # Where most runs exceed 90 %, the rest of the axis would hide how they differ.
        bottom = 90 if best.median() > 0.9 else 0
        chance, guess = 100 / classes, np.log(classes)
        accuracy = Quantity(
            "accuracy", "Validation accuracy (%)", "val", "accuracy", [chance] * (bottom == 0),
            f"chance: {chance:.3g} %", lambda share: 100 * share, bottom,
        )  # fmt: skip
        error = Quantity(
            "error", "Validation error (%)", "val", "accuracy", [100 - chance], f"chance: {100 - chance:.3g} %",
            lambda share: np.maximum(100 * (1 - share), 0.01),
        )  # fmt: skip
        loss = Quantity("loss", "Training loss (nats)", "train", "loss", [guess], f"chance: ln {classes} = {guess:.2f}")
        quantities = [accuracy, error, loss] if best.max() > 0.9 else [accuracy, loss]
    return [path for quantity in quantities for path in _draw_curves(groups, quantity, folder)]


def _draw_curves(groups: Sequence[Group], quantity: Quantity, folder: Path) -> list[Path]:
    """One quantity against updates, and a validation quantity also against time if all runs used one device."""
    label, look = labels(groups), looks({group.name: group.model for group in groups})
    runs = [run for group in groups for run in group.drawn]
    devices = {run.result and run.result.device_name for run in runs}
    timed = quantity.split == "val" and len(groups) > 1 and len(devices) == 1 and None not in devices
    batches = " or ".join(map(str, sorted({run.config.trainer.batch_size for run in runs})))
    with figure(1, 1 + timed, height=3.6, sharey=True, squeeze=False) as (drawing, [panels]):
        for axes, x in zip(panels, ("step", "minutes"), strict=False):
            if quantity.bottom is None:
                log_values(axes)
            else:
                axes.set_ylim(quantity.bottom, 100)
            for group in groups:
                n = f"n = {len(group.drawn)}" + ", unfinished" * (not group.finished)
                _draw_group(axes, group.drawn, quantity, x, look[group.name], f"{label[group.name]} ({n})")
            for level in quantity.levels:
                axes.axhline(level, zorder=1, label=quantity.level_label, **BASELINE)
            axes.set_xlabel(f"Updates (batch of {batches})" if x == "step" else "Training time (minutes)")
        panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.5k, 60k
        panels[0].set_title(quantity.label + ", log scale" * (quantity.bottom is None))
        drawing.suptitle(groups[0].task.title, x=0.01, ha="left")
        legend_below(drawing, panels[0], BAND * any(len(group.drawn) > 1 for group in groups))
        return save(drawing, folder, quantity.stem)


def _draw_group(axes: Axes, runs: Sequence[Run], quantity: Quantity, x: str, look: Look, label: str) -> None:
    curves = [run.curve(quantity.split, quantity.column).drop_duplicates("step", keep="last") for run in runs]
    table = pd.concat(curves).assign(y=lambda rows: quantity.shown(rows[quantity.column]))
    table["minutes"] = table["seconds"] / 60
    steps = table.assign(x=table[x]).groupby("step")
    points = steps.agg(x=("x", "mean"), y=("y", "mean"), low=("y", "min"), high=("y", "max"), n=("y", "size"))
    points = points[points["n"] == sum(len(curve) > 0 for curve in curves)]
    if quantity.split == "train":
        points = points.groupby(np.arange(len(points)) * POINTS // max(POINTS, len(points))).mean()
    axes.fill_between(points["x"], points["low"], points["high"], color=look["color"], alpha=0.2, linewidth=0)
    axes.plot(points["x"], points["y"], markevery=None if len(points) <= 40 else (0.05, 0.13), label=label, **look)


def _draw_length_study(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Test error and updates until the task is solved against length, for at least two lengths."""
    lengths = sorted({group.task.length for group in groups})
    if len(lengths) < 2:
        return []
    label, look = labels(groups), looks({group.name: group.model for group in groups})
    rows = [
        (group.name, group.task.length, result.test_loss, _solved(run))
        for group in groups for run, result in zip(group.finished, group.results, strict=True)
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["name", "T", "error", "updates"])
    with figure(1, 2, height=3.8, sharex=True) as (drawing, panels):
        titles = {"error": "Test mean squared error", "updates": f"Updates until validation < {SOLVED}"}
        for axes, (column, text) in zip(panels, titles.items(), strict=True):
            log_values(axes)
            axes.set(title=f"{text}, log scale", xlabel="Sequence length T (time steps)", xscale="log")
            axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45)
            axes.set_xticks([], minor=True)
            for name in label:
                seeds = table[table["name"] == name].groupby("T")[column]
                points = seeds.agg(["mean", "min", "max"]).dropna()
                axes.vlines(points.index, points["min"], points["max"], color=look[name]["color"], lw=3, alpha=0.35)
                n = extent([*seeds.size()])
                axes.plot(points.index, points["mean"], label=f"{label[name]} (n = {n})", **look[name])
        levels, level_label = baseline(groups, "test")
        for level in levels:
            panels[0].axhline(level, zorder=1, label=level_label, **BASELINE)
        steps = extent([result.steps for group in groups for result in group.results])
        drawing.suptitle(f"{groups[0].task.series} after {steps} updates", x=0.01, ha="left")
        note = "Mark: mean over n seeds; bar: minimum to maximum. Right: only runs that solved the task."
        legend_below(drawing, panels[0], note)
        return save(drawing, folder, "length_study")


def _solved(run: Run) -> float:
    """The first step with a validation error below SOLVED; NaN if there is none."""
    curve = run.curve("val", "loss")
    return float(curve["step"][curve["loss"] < SOLVED].min())
