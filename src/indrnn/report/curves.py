"""Curves of training runs: one line a group (the mean over its seeds, with a band), all groups of a task in the same
axes; and final error against sequence length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from .runs import Group, extent, grouped, in_words, mean_answer_level
from .style import BASELINE, Line, Look, figure, finish, log_values, looks, save, say_above, short_number

POINTS = 200  # drawn at most in a line; more cannot be seen, and make large files
# Lengths of runs that differ by more than this are drawn on a logarithmic axis, or the short one is a speck.
LOG_RATIO = 8
MARKED = 40  # evaluations of a line that are all marked


@dataclass(frozen=True)
class Quantity:
    """A column of metrics.csv as a figure shows it, and the levels that take no learning, with their words."""

    stem: str
    label: str
    split: str
    column: str
    levels: list[float]
    level_words: str
    shown: Callable[[Any], Any] = lambda value: value
    log: bool = True


def draw_task(groups: Sequence[Group], folder: Path) -> list[Path]:
    """All figures of one task: validation and training curves. Returns the files written (PNG and SVG each)."""
    groups = [group for group in groups if any(len(run.metrics["step"]) for run in group.runs)]
    if not groups:
        return []
    if groups[0].about.measures_accuracy:
        classes = groups[0].about.output_size
        chance = 100 / classes
        accuracy = Quantity(
            "accuracy", "Validation accuracy (%)", "val", "accuracy", [chance], f"chance: {chance:.3g} %",
            lambda share: 100 * share, log=False,
        )  # fmt: skip
        error = Quantity(
            "error", "Validation error (%)", "val", "accuracy", [100 - chance], f"chance: {100 - chance:.3g} %",
            # One wrong image in 10,000 is the least that an axis without zero needs to show.
            lambda share: np.maximum(100 * (1 - share), 0.01),
        )  # fmt: skip
        guessing = [float(np.log(classes))], f"guessing: ln {classes} = {np.log(classes):.2f}"
        loss = Quantity("loss", "Training loss (nats)", "train", "loss", *guessing)
        best = max(run.best_validation.get("accuracy", 0.0) for group in groups for run in group.runs)
        quantities = [accuracy, error, loss] if best > 0.9 else [accuracy, loss]
    else:
        level, training_level = (mean_answer_level(groups, part) for part in ("validation", "train"))
        quantities = [
            Quantity("error", "Validation mean squared error", "val", "loss", *level),
            Quantity("loss", "Training error (mse)", "train", "loss", *training_level),
        ]
    return [path for quantity in quantities for path in _draw_curves(groups, quantity, folder)]


def _draw_curves(groups: Sequence[Group], quantity: Quantity, folder: Path) -> list[Path]:
    """One quantity against updates; one of validation also against seconds, where times compare."""
    look, words = looks({group.name: group.model for group in groups}), in_words(groups)
    times = quantity.split == "val" and _times_compare(groups)
    with figure(1, 1 + times, height=3.6, sharey=True, squeeze=False) as (drawing, [panels]):
        lines = []
        for axes, x in zip(panels, ("step", "seconds"), strict=False):
            log_values(axes) if quantity.log else axes.set_ylim(0, 101)
            for level in quantity.levels:
                axes.axhline(level, zorder=1, **BASELINE)
            unit = _axis_of(axes, x, groups)
            for group in groups:
                points = [run.curve(quantity.split, quantity.column, x) for run in group.drawn]
                curves = [(at / unit, quantity.shown(y)) for at, y in points if len(at)]
                end = _draw(axes, curves, look[group.name], noisy=quantity.split == "train")
                if x == "step":
                    lines.append(Line(f"{words[group.name]} ({group.count})", look[group.name], end))
        say_above(panels[0], quantity.label + ", log scale" * quantity.log)
        several = [group for group in groups if len(group.drawn) > 1]
        longer = any(len({run.steps for run in group.drawn}) > 1 for group in several)
        note = "Line: mean of n seeds; band: smallest to largest" + "; thin lines: seeds that ran on longer" * longer
        finish(drawing, panels[0], groups[0].about.title, lines, quantity.level_words, note if several else None)
        return save(drawing, folder, quantity.stem)


def draw_length_study(groups: Sequence[Group], folder: Path) -> list[Path]:
    """``length_study``.png and .svg from the finished runs of one series of regressions, if they cover at least two
    lengths."""
    groups = [group for group in groups if group.finished and group.about.mean_answer_error]
    by_length = grouped(groups, lambda group: group.about.length)
    lengths = sorted(by_length)
    if len(lengths) < 2:
        return []
    by_name = grouped(groups, lambda group: group.name)
    look, words = looks({group.name: group.model for group in groups}), in_words(groups)
    with figure(height=3.8) as (drawing, axes):
        log_values(axes)
        for pick in (min, max):
            levels = [pick(mean_answer_level(by_length[length], "test")[0]) for length in lengths]
            axes.plot(range(len(lengths)), levels, zorder=1, **BASELINE)
        lines, missing = [], []
        for number, (name, members) in enumerate(by_name.items()):
            # Side by side, so that none hides another where all have learnt nothing.
            x = [lengths.index(group.about.length) + 0.06 * (number - (len(by_name) - 1) / 2) for group in members]
            errors = [[result.test_loss for result in group.results] for group in members]
            axes.vlines(x, [*map(min, errors)], [*map(max, errors)], color=look[name]["color"], linewidth=3, alpha=0.35)
            axes.plot(x, [*map(fmean, errors)], linewidth=1.2, **look[name])
            label = f"{words[name]} (n = {extent([len(values) for values in errors])})"
            lines.append(Line(label, look[name], (x[-1], fmean(errors[-1]))))
            absent = [f"{length:,}" for length in lengths if length not in {group.about.length for group in members}]
            missing += [f"{words[name]} at T = {', '.join(absent)}"] * bool(absent)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_xlabel("Sequence length T (time steps); models side by side")
        say_above(axes, "Test mean squared error, log scale")
        steps = extent([result.steps for group in groups for result in group.results])
        notes = ["Mark: mean of n seeds; bar: smallest to largest."] * any(len(group.results) > 1 for group in groups)
        notes += [f"Not run: {'; '.join(missing)}."] * bool(missing)
        level = mean_answer_level(groups, "test")[1]
        title = f"{groups[0].about.series}: error after {steps} updates"
        finish(drawing, axes, title, lines, level, " ".join(notes) or None)
        return save(drawing, folder, "length_study")


@dataclass(frozen=True)
class Band:
    """Mean, smallest and largest value over seeds at the points x, and what each longer seed did afterwards."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    rest: list[tuple[np.ndarray, np.ndarray]]


def band(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> Band:
    """Average curves (x, y), each with a point, over the range that all of them cover, by linear interpolation. Of many
    points POINTS are kept."""
    start = max(x[0] for x, _ in curves)
    end = min(x[-1] for x, _ in curves)
    points = np.unique(np.concatenate([x for x, _ in curves]))
    points = points[(points >= start) & (points <= end)]
    if not len(points):
        return Band(points, points, points, points, rest=list(curves))
    points = points[np.linspace(0, len(points) - 1, min(len(points), POINTS)).round().astype(int)]
    values = np.array([np.interp(points, x, y) for x, y in curves])
    rest = [(x[x >= end], y[x >= end]) for x, y in curves if x[-1] > end]
    return Band(points, values.mean(0), values.min(0), values.max(0), rest)


def binned(x: np.ndarray, y: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average a noisy curve within the bins between ``edges``; empty bins are left out."""
    place = np.digitize(x, edges)
    filled = np.unique(place)
    return np.array([x[place == i].mean() for i in filled]), np.array([y[place == i].mean() for i in filled])


def _draw(
    axes: Axes, curves: Sequence[tuple[np.ndarray, np.ndarray]], look: Look, noisy: bool
) -> tuple[float, float] | None:
    """Returns the line's last point; None if there is no line."""
    if not curves:
        return None
    if noisy:
        last = max(x[-1] for x, _ in curves)
        spaced = np.geomspace(1, last, POINTS + 1) if axes.get_xscale() == "log" else np.linspace(0, last, POINTS + 1)
        curves = [binned(x, y, spaced) for x, y in curves]
    curve = band(curves)
    axes.fill_between(curve.x, curve.low, curve.high, color=look["color"], alpha=0.2, linewidth=0)
    # Every evaluation is marked where there are few; else marks keep apart by shares of the axes' diagonal, on a
    # logarithmic axis too.
    axes.plot(curve.x, curve.mean, markevery=None if len(curve.x) <= MARKED else (0.05, 0.13), **look)
    for x, y in curve.rest:
        axes.plot(x, y, linewidth=0.7, alpha=0.8, **look | ({"marker": ""} if len(x) > 1 else {}))
    return (float(curve.x[-1]), float(curve.mean[-1])) if len(curve.x) else None


def _times_compare(groups: Sequence[Group]) -> bool:
    """Whether there are several groups, and all of them ran on one device."""
    devices = {run.result and run.result.device_name for group in groups for run in group.drawn}
    return len(groups) > 1 and len(devices) == 1 and None not in devices


def _axis_of(axes: Axes, x: str, groups: Sequence[Group]) -> float:
    """Prepare the axis of updates or seconds; returns the unit that the latter are drawn in."""
    longest = [max(run.steps if x == "step" else run.seconds for run in group.drawn) for group in groups]
    if x == "step":
        sizes = sorted({run.config.trainer.batch_size for group in groups for run in group.drawn})
        unit, label = 1.0, f"Updates (batch of {' or '.join(map(str, sizes))} sequences)"
    else:
        units = {3600.0: "hours", 60.0: "minutes", 1.0: "seconds"}
        unit = next((size for size in units if max(longest) >= 2 * size), 1.0)
        label = f"Training time ({units[unit]})"
    if max(longest) > LOG_RATIO * min([value for value in longest if value > 0], default=np.inf):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        label += ", log scale"
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.set_xlabel(label)
    return unit
