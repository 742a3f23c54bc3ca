"""Curves of training runs, and error against sequence length. A line is the mean over the seeds of one group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from .runs import Group, Run, baseline, by_task, differing_keys, labels
from .style import BASELINE, Look, figure, legend_below, log_values, looks, save, short_number, title
from .table import extent

POINTS = 200  # bins of a noisy curve
SOLVED = 0.005  # mean squared error of a solved regression
BAND = "Line: mean over n seeds; band: minimum to maximum; thin line: a seed that ran longer."


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
    ylim: tuple[float, float] | None = None
    """Limits of a linear axis; None: logarithmic."""


def draw(groups: Sequence[Group], out: Path) -> list[Path]:
    """A folder of figures per task, and the length study of each series of tasks. Returns the files written."""
    paths = [path for task, members in by_task(groups).items() for path in _draw_task(members, out / task)]
    series: dict[str, list[Group]] = {}
    for group in groups:
        if group.task.series and group.task.mean_answer_error and group.finished:
            series.setdefault(group.task.series, []).append(group)
    for members in series.values():
        paths += _draw_length_study(members, out if len(series) == 1 else out / members[0].task.name)
    return paths


def _draw_task(groups: Sequence[Group], folder: Path) -> list[Path]:
    groups = [group for group in groups if any(len(run.metrics) for run in group.runs)]
    if not groups:
        return []
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
            "accuracy", "Validation accuracy (%)", "val", "accuracy", [chance], f"chance: {chance:.3g} %",
            lambda share: 100 * share, (bottom, 100),
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
    shown = _without_duplicates(groups)
    label, look = labels(shown), looks({group.name: group.model for group in shown})
    devices = {run.result and run.result.device_name for group in shown for run in group.drawn}
    timed = quantity.split == "val" and len(shown) > 1 and len(devices) == 1 and None not in devices
    longest = max(run.seconds for group in shown for run in group.drawn)
    units = {1: "seconds", 60: "minutes", 3600: "hours"}
    unit = max(size for size in units if size == 1 or longest >= 2 * size)
    batches = " or ".join(map(str, sorted({run.config.trainer.batch_size for group in shown for run in group.drawn})))
    with figure(1, 1 + timed, height=3.6, sharey=True, squeeze=False) as (drawing, [panels]):
        for axes, x in zip(panels, ("step", "seconds"), strict=False):
            if quantity.ylim:
                axes.set_ylim(*quantity.ylim)
            else:
                log_values(axes)
            for group in shown:
                _draw_group(axes, group.drawn, quantity, x, unit if x == "seconds" else 1, look[group.name])
            for level in quantity.levels:
                axes.axhline(level, zorder=1, **BASELINE)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
            axes.set_xlabel(f"Updates (batch of {batches})" if x == "step" else f"Training time ({units[unit]})")
        panels[0].set_title(quantity.label + ", log scale" * (quantity.ylim is None))
        title(drawing, groups[0].task.title)
        handles = {f"{label[group.name]} ({_count(group)})": Line2D([], [], **look[group.name]) for group in shown}
        if quantity.ylim is None or quantity.ylim[0] < min(quantity.levels, default=0):
            handles |= {quantity.level_label: Line2D([], [], **BASELINE)} if quantity.levels else {}
        hidden = ", ".join(group.name for group in groups if group not in shown)
        notes = [BAND] * any(len(group.drawn) > 1 for group in shown)
        notes += [f"Not drawn, as it differs in precision only: {hidden}."] * bool(hidden)
        legend_below(drawing, handles, " ".join(notes) or None)
        return save(drawing, folder, quantity.stem)


def _without_duplicates(groups: Sequence[Group]) -> list[Group]:
    """The groups without those that differ from an earlier one in precision only."""
    shown: list[Group] = []
    for group in groups:
        changes = (set(differing_keys([other.runs[0], group.runs[0]])) for other in shown)
        if not any(change <= {"trainer.precision", "name", "tag"} for change in changes):
            shown.append(group)
    return shown


def _count(group: Group) -> str:
    others = ", unfinished" if not group.finished else ", others unfinished" * (len(group.finished) < len(group.runs))
    return f"n = {len(group.drawn)}{others}"


def _draw_group(axes: Axes, runs: Sequence[Run], quantity: Quantity, x: str, unit: float, look: Look) -> None:
    curves = []
    for run in runs:
        curve = run.curve(quantity.split, quantity.column).drop_duplicates("step", keep="last").sort_values("step")
        curve = curve.assign(y=quantity.shown(curve[quantity.column]), x=curve[x] / unit)[["step", "x", "y"]]
        if quantity.split == "train" and len(curve):
            # Bins of equal width for all seeds.
            width = max(run.steps for run in runs) / POINTS
            curve = curve.groupby((curve["step"] // width).rename("bin")).mean()
            curve["step"] = curve.index
        curves.append(curve)
    points = mean_curve(curves)
    axes.fill_between(points["x"], points["low"], points["high"], color=look["color"], alpha=0.2, linewidth=0)
    axes.plot(points["x"], points["y"], markevery=None if len(points) <= 40 else (0.05, 0.13), **look)
    for curve in curves:
        rest = curve[curve["step"] >= points["step"].max()] if len(points) else curve
        if len(rest) > 1 or not len(points):
            axes.plot(rest["x"], rest["y"], **look | {"linewidth": 0.7, "marker": ""})


def mean_curve(curves: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Mean (x, y) and extremes (low, high) of curves with columns step, x and y, at the steps that all of them have."""
    steps = pd.concat(curves).groupby("step")
    mean = steps.agg(x=("x", "mean"), y=("y", "mean"), low=("y", "min"), high=("y", "max"), n=("y", "size"))
    return mean[mean["n"] == len(curves)].reset_index()


def _draw_length_study(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Test error and updates until the task is solved against length, for at least two lengths."""
    lengths = sorted({group.task.length for group in groups})
    if len(lengths) < 2:
        return []
    label, look = labels(groups), looks({group.name: group.model for group in groups})
    with figure(1, 2, height=3.8, sharex=True) as (drawing, (errors, updates)):
        for axes, text in ((errors, "Test mean squared error"), (updates, f"Updates until validation < {SOLVED}")):
            log_values(axes)
            axes.set_title(f"{text}, log scale")
            axes.set_xscale("log")
            axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45)
            axes.set_xticks([], minor=True)
            axes.set_xlabel("Sequence length T (time steps)")
        updates.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        handles = {}
        for name in label:
            members = [group for group in groups if group.name == name]
            rows = [
                {"T": group.task.length, "error": result.test_loss, "updates": _solved(run)}
                for group in members for run, result in zip(group.finished, group.results, strict=True)
            ]  # fmt: skip
            for axes, column in ((errors, "error"), (updates, "updates")):
                points = pd.DataFrame(rows).dropna(subset=[column]).groupby("T")[column].agg(["mean", "min", "max"])
                axes.vlines(
                    points.index, points["min"], points["max"], color=look[name]["color"], linewidth=3, alpha=0.35
                )
                axes.plot(points.index, points["mean"], **look[name])
            n = extent([len(group.finished) for group in members])
            handles[f"{label[name]} (n = {n})"] = Line2D([], [], **look[name])
        evaluations = pd.concat([run.curve("val", "loss")["step"] for group in groups for run in group.finished])
        updates.set_ylim(evaluations.min() / 1.5, evaluations.max() * 1.5)
        levels, level_label = baseline(groups, "test")
        for level in {levels[0], levels[-1]}:
            errors.axhline(level, zorder=1, **BASELINE)
        steps = extent([result.steps for group in groups for result in group.results])
        title(drawing, f"{groups[0].task.series} after {steps} updates")
        note = "Mark: mean over n seeds; bar: minimum to maximum. Right: only runs that solved the task."
        legend_below(drawing, handles | {level_label: Line2D([], [], **BASELINE)}, note)
        return save(drawing, folder, "length_study")


def _solved(run: Run) -> float:
    """The first step with a validation error below SOLVED; NaN if there is none."""
    curve = run.curve("val", "loss")
    return float(curve["step"][curve["loss"] < SOLVED].min())
