"""Curves of training runs: one line a model (the mean over its seeds, with a band), all models in the same axes; and
final error against sequence length."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .runs import Group, Run, in_words, mean_answer_level
from .style import (
    BASELINE,
    Look,
    figure,
    label_lines,
    legend_below,
    looks_by_model,
    save,
    say_above,
    short_number,
)
from .table import extent

POINTS = 200  # drawn at most in a line; more cannot be seen, and make large files
# Lengths of runs that differ by more than this are drawn on a logarithmic axis, or the short one is a speck.
LOG_RATIO = 8
MARKED = 40  # evaluations of a line that are all marked
LONGEST_LABEL = 34  # letters beside a line

# How recorded values are drawn, and the level that needs no learning, with its words.
Drawn = tuple[Callable[[Any], Any], tuple[list[float], str]]

NOTE_SEEDS = "Line: mean of n seeds; band: smallest to largest"
NOTE_LONGER = "; thin lines: seeds that ran on longer"


@dataclass(frozen=True)
class Band:
    """Mean, smallest and largest value over seeds at the points x, and what each longer seed did afterwards."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    rest: list[tuple[np.ndarray, np.ndarray]]


def band(curves: Sequence[tuple[np.ndarray, np.ndarray]], *, log: bool = False) -> Band | None:
    """Average curves (x, y) over the range that all of them cover, by linear interpolation.

    Of more than POINTS points, those are kept that lie evenly spread on the axis (``log``: a logarithmic one).
    None if there is no curve with a point.
    """
    curves = [(x, y) for x, y in curves if len(x)]
    if not curves:
        return None
    start = max(x[0] for x, _ in curves)
    end = min(x[-1] for x, _ in curves)
    points = np.unique(np.concatenate([x for x, _ in curves]))
    points = points[(points >= start) & (points <= end)]
    if len(points) > POINTS:
        spaced = np.geomspace if log and points[0] > 0 else np.linspace
        wanted = spaced(points[0], points[-1], POINTS)
        points = points[np.unique(np.searchsorted(points, wanted).clip(max=len(points) - 1))]
    values = np.array([np.interp(points, x, y) for x, y in curves]).reshape(len(curves), len(points))
    rest = [(x[x >= end], y[x >= end]) for x, y in curves if x[-1] > end]
    if not len(points):
        return Band(points, points, points, points, rest=list(curves))
    return Band(points, values.mean(0), values.min(0), values.max(0), rest)


def binned(x: np.ndarray, y: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average a noisy curve within the bins between ``edges``; empty bins are left out."""
    place = np.digitize(x, edges)
    filled = np.unique(place)
    return (
        np.array([x[place == i].mean() for i in filled]),
        np.array([y[place == i].mean() for i in filled]),
    )


def draw_task(groups: Sequence[Group], folder: Path) -> list[Path]:
    """All figures of one task: validation and training curves. Returns the files written (PNG and SVG each)."""
    drawn = [group for group in groups if any(len(run.metrics["step"]) for run in group.runs)]
    if not drawn:
        return []
    look = looks_by_model({group.name: group.model for group in drawn})
    if not drawn[0].measures_accuracy:
        level = mean_answer_level(drawn, "validation")
        label = "Validation mean squared error, log scale"
        paths = _against_both(drawn, look, "loss", label, folder / "error", partial(_mean_squared_axis, level))
        level = mean_answer_level(drawn, "train")
        return paths + _against_steps(drawn, look, folder / "loss", "Training error (mse)", level)
    classes = drawn[0].about.output_size
    percent = partial(_percent_axis, classes)
    paths = _against_both(drawn, look, "accuracy", "Validation accuracy (%)", folder / "accuracy", percent)
    best = max((run.best_validation_accuracy or 0.0 for group in drawn for run in group.runs), default=0.0)
    if best > 0.9:
        label = "Validation error (%), log scale"
        paths += _against_both(drawn, look, "accuracy", label, folder / "error", partial(_error_axis, classes))
    # What is reached without having learnt anything.
    guessing = ([float(np.log(classes))], f"guessing: ln {classes} = {np.log(classes):.2f}")
    return paths + _against_steps(drawn, look, folder / "loss", "Training loss (nats)", guessing)


def draw_length_study(groups: Sequence[Group], folder: Path) -> list[Path]:
    """``length_study``.png and .svg from the finished runs of one series of regressions, if they cover at least two
    lengths."""
    adding = [group for group in groups if group.finished and group.about.mean_answer_error]
    lengths = sorted({group.about.length for group in adding})
    if len(lengths) < 2:
        return []
    by_name: dict[str, dict[int, Group]] = {}
    for group in adding:
        by_name.setdefault(group.name, {})[group.about.length] = group
    words = in_words(adding)
    look = looks_by_model({group.name: group.model for group in adding})
    with figure(height=3.8) as (drawing, axes):
        log_values(axes)
        for pick in (min, max):
            same_length = ([group for group in adding if group.about.length == length] for length in lengths)
            levels = [pick(mean_answer_level(members, "test")[0]) for members in same_length]
            axes.plot(range(len(lengths)), levels, zorder=1, **BASELINE)
        labels, ends, missing = {}, {}, []
        for number, (name, members) in enumerate(by_name.items()):
            # Side by side, so that none hides another where all have learnt nothing.
            x = [lengths.index(length) + 0.06 * (number - (len(by_name) - 1) / 2) for length in members]
            errors = [[result.test_loss for result in group.results] for group in members.values()]
            means = [fmean(values) for values in errors]
            style = look[name]
            axes.vlines(x, [*map(min, errors)], [*map(max, errors)], color=style.color, linewidth=3, alpha=0.35)
            axes.plot(x, means, color=style.color, linestyle=style.linestyle, marker=style.marker, linewidth=1.2)
            labels[name] = f"{words[name]} (n = {extent([len(values) for values in errors])})"
            ends[name] = (x[-1], means[-1])
            absent = [f"{length:,}" for length in lengths if length not in members]
            if absent:
                missing.append(f"{words[name]} was not run at T = {', '.join(absent)}")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_xlabel("Sequence length T (time steps); models side by side")
        say_above(axes, "Test mean squared error, log scale")
        steps = extent([result.steps for group in adding for result in group.results])
        notes = ["Mark: mean of n seeds; bar: smallest to largest"] * any(len(group.results) > 1 for group in adding)
        level = mean_answer_level(adding, "test")[1]
        title = f"{adding[0].about.series}: error after {steps} updates"
        finish(drawing, axes, title, labels, ends, look, level, "; ".join(notes + missing) or None)
        return save(drawing, folder, "length_study")


def _against_both(
    groups: Sequence[Group],
    look: dict[str, Look],
    value: str,
    label: str,
    target: Path,
    prepare: Callable[[Axes], tuple[Callable[[np.ndarray], np.ndarray], tuple[list[float], str]]],
) -> list[Path]:
    """One validation quantity against steps, and beside it against seconds where times compare."""
    kinds = ("step", "seconds") if _times_compare(groups) else ("step",)
    with figure(1, len(kinds), height=3.6, sharey=True, squeeze=False) as (drawing, [panels]):
        ends = []
        for axes, x in zip(panels, kinds, strict=True):
            transform, level = prepare(axes)
            unit = _time_axis(axes, groups) if x == "seconds" else _step_axis(axes, groups)
            for group in groups:
                curves = [_curve(run, "val", value, x, unit) for run in group.drawn]
                end = _draw(axes, [(a, transform(b)) for a, b in curves], look[group.name])
                if x == "step" and end is not None:
                    ends.append((group, *end))
        say_above(panels[0], label)
        _finish_task(drawing, panels[0], groups, ends, look, level[1])
        return save(drawing, target.parent, target.name)


def _times_compare(groups: Sequence[Group]) -> bool:
    """Whether there are several groups, and all of them ran on one device."""
    devices = {run.result and run.result.device_name for group in groups for run in group.drawn}
    return len(groups) > 1 and len(devices) == 1 and None not in devices


def _against_steps(
    groups: Sequence[Group], look: dict[str, Look], target: Path, label: str, level: tuple[list[float], str]
) -> list[Path]:
    with figure(height=3.6) as (drawing, axes):
        _step_axis(axes, groups)
        log_values(axes)
        draw_baseline(axes, level[0])
        last = max(run.steps for group in groups for run in group.drawn)
        edges = np.linspace(0, last, POINTS + 1)
        if axes.get_xscale() == "log":
            edges = np.unique(np.concatenate([np.geomspace(1, last, POINTS + 1), [last]]))
        ends = []
        for group in groups:
            curves = [_curve(run, "train", "loss", "step", 1.0) for run in group.drawn]
            end = _draw(axes, [binned(x, y, edges) for x, y in curves if len(x)], look[group.name])
            if end is not None:
                ends.append((group, *end))
        say_above(axes, f"{label}, log scale")
        _finish_task(drawing, axes, groups, ends, look, level[1])
        return save(drawing, target.parent, target.name)


def _curve(run: Run, split: str, value: str, x: str, unit: float) -> tuple[np.ndarray, np.ndarray]:
    at, y = run.curve(split, value, x)
    order = np.argsort(at, kind="stable")
    return at[order] / unit, y[order]


def _draw(axes: Axes, curves: Sequence[tuple[np.ndarray, np.ndarray]], look: Look) -> tuple[float, float] | None:
    """Returns the line's last point; None if there is no line."""
    curve = band(curves, log=axes.get_xscale() == "log")
    if curve is None:
        return None
    axes.fill_between(curve.x, curve.low, curve.high, color=look.color, alpha=0.2, linewidth=0)
    # Every evaluation is marked where there are few; else marks keep apart by shares of the axes' diagonal, on a
    # logarithmic axis too.
    marks = None if len(curve.x) <= MARKED else (0.05, 0.13)
    axes.plot(curve.x, curve.mean, color=look.color, linestyle=look.linestyle, marker=look.marker, markevery=marks)
    for x, y in curve.rest:
        mark = look.marker if len(x) == 1 else ""
        axes.plot(x, y, color=look.color, linestyle=look.linestyle, marker=mark, linewidth=0.7, alpha=0.8)
    return (float(curve.x[-1]), float(curve.mean[-1])) if len(curve.x) else None


def finish(
    drawing: Figure,
    axes: Axes,
    title: str,
    labels: Mapping[str, str],
    ends: Mapping[str, tuple[float, float]],
    look: Mapping[str, Look],
    level: str,
    note: str | None,
) -> None:
    """Title; the label of each line at its end in ``axes``, or where they do not fit there in a legend; below, the
    level that takes no learning."""
    drawing.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    handles, entries = ([Line2D([], [], **BASELINE)], [level]) if level else ([], [])
    if len(ends) == len(labels) and max(map(len, labels.values())) <= LONGEST_LABEL:
        # The legend first, for it decides how high the axes are.
        legend = legend_below(drawing, handles, entries, note)
        if label_lines(drawing, axes, [(*ends[name], labels[name], look[name].color) for name in labels]):
            return
        legend.remove()
    styles = [look[name] for name in labels]
    lines = [Line2D([], [], color=style.color, linestyle=style.linestyle, marker=style.marker) for style in styles]
    legend_below(drawing, lines + handles, [*labels.values(), *entries], note)


def _finish_task(
    drawing: Figure,
    axes: Axes,
    groups: Sequence[Group],
    ends: Sequence[tuple[Group, float, float]],
    look: dict[str, Look],
    level: str,
) -> None:
    words = in_words(groups)
    labels = {group.name: f"{words[group.name]} ({group.count})" for group in groups}
    several = [group for group in groups if len(group.drawn) > 1]
    longer = any(len({run.steps for run in group.drawn}) > 1 for group in several)
    note = NOTE_SEEDS + NOTE_LONGER * longer if several else None
    finish(drawing, axes, groups[0].title, labels, {group.name: (x, y) for group, x, y in ends}, look, level, note)


def _step_axis(axes: Axes, groups: Sequence[Group]) -> float:
    _maybe_log(axes, [max((run.steps for run in group.drawn), default=0) for group in groups])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.set_xlabel(f"Updates (batch of {_batch(groups)} sequences)" + _log_note(axes))
    return 1.0


def _time_axis(axes: Axes, groups: Sequence[Group]) -> float:
    longest = [max((run.seconds for run in group.drawn), default=0.0) for group in groups]
    unit, word = next(
        (size, word)
        for size, word in ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
        if max(longest) >= 2 * size or size == 1.0
    )
    _maybe_log(axes, longest)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.set_xlabel(f"Training time ({word})" + _log_note(axes))
    return unit


def _batch(groups: Sequence[Group]) -> str:
    sizes = sorted({run.config.trainer.batch_size for group in groups for run in group.drawn})
    return " or ".join(map(str, sizes))


def _maybe_log(axes: Axes, longest: Sequence[float]) -> None:
    known = [value for value in longest if value > 0]
    if known and max(known) > LOG_RATIO * min(known):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())


def _log_note(axes: Axes) -> str:
    return ", log scale" if axes.get_xscale() == "log" else ""


def _percent_axis(classes: int, axes: Axes) -> Drawn:
    axes.set_ylim(0, 101)
    level = ([100 / classes], f"chance: {100 / classes:.3g} %")
    draw_baseline(axes, level[0])
    return (lambda share: 100 * share), level


def _error_axis(classes: int, axes: Axes) -> Drawn:
    log_values(axes)
    level = ([100 - 100 / classes], f"chance: {100 - 100 / classes:.3g} %")
    draw_baseline(axes, level[0])
    # One wrong image in 10,000 is the least that an axis without zero needs to show.
    return (lambda share: np.maximum(100 * (1 - share), 0.01)), level


def _mean_squared_axis(level: tuple[list[float], str], axes: Axes) -> Drawn:
    log_values(axes)
    draw_baseline(axes, level[0])
    return (lambda value: value), level


def log_values(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_baseline(axes: Axes, levels: Sequence[float]) -> None:
    for level in levels:
        axes.axhline(level, zorder=1, **BASELINE)
