"""Curves of training runs: one line a model (the mean over its seeds, with a band), all models in the same axes; and
final error against sequence length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from .runs import Group, Run, mean_answer_level
from .style import BASELINE, Look, figure, legend_below, looks_by_model, save, short_number
from .table import extent

POINTS = 200  # drawn at most in a line; more cannot be seen, and make large files
# Lengths of runs that differ by more than this are drawn on a logarithmic axis, or the short one is a speck.
LOG_RATIO = 8

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
        paths = _against_both(drawn, look, "val", "loss", label, folder / "error", partial(_mean_squared_axis, level))
        level = mean_answer_level(drawn, "train")
        return paths + _against_steps(drawn, look, folder / "loss", "Training error (mse)", level)
    classes = drawn[0].about.output_size
    percent = partial(_percent_axis, classes)
    paths = _against_both(drawn, look, "val", "accuracy", "Validation accuracy (%)", folder / "accuracy", percent)
    best = max((run.best_validation_accuracy or 0.0 for group in drawn for run in group.runs), default=0.0)
    if best > 0.9:
        label = "Validation error (%, log scale)"
        paths += _against_both(drawn, look, "val", "accuracy", label, folder / "error", partial(_error_axis, classes))
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
    by_name: dict[str, list[Group]] = {}
    for group in adding:
        by_name.setdefault(group.name, []).append(group)
    look = looks_by_model({name: members[0].model for name, members in by_name.items()})
    with figure(height=3.8) as (drawing, axes):
        axes.set_xscale("log")
        log_values(axes)
        for pick in (min, max):
            levels = [
                pick(mean_answer_level([g for g in adding if g.about.length == length], "test")[0])
                for length in lengths
            ]
            axes.plot(lengths, levels, zorder=1, **BASELINE)
        labels = {}
        for name, members in by_name.items():
            one = look[name]
            errors = [[result.test_loss for result in group.results] for group in members]
            x = [group.about.length for group in members]
            axes.fill_between(x, [*map(min, errors)], [*map(max, errors)], color=one.color, alpha=0.2, linewidth=0)
            means = [sum(values) / len(values) for values in errors]
            axes.plot(x, means, color=one.color, linestyle=one.linestyle, marker=one.marker)
            labels[name] = f"{name} (n = {extent([len(values) for values in errors])})"
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("Sequence length T (time steps, log scale)")
        axes.set_ylabel("Test mean squared error, log scale")
        steps = extent([result.steps for group in adding for result in group.results])
        title = f"{adding[0].about.series}: error after {steps} updates"
        note = NOTE_SEEDS if any(len(group.results) > 1 for group in adding) else None
        finish(drawing, title, labels, look, mean_answer_level(adding, "test")[1], note)
        return save(drawing, folder, "length_study")


def _against_both(
    groups: Sequence[Group],
    look: dict[str, Look],
    split: str,
    value: str,
    label: str,
    target: Path,
    prepare: Callable[[Axes], tuple[Callable[[np.ndarray], np.ndarray], tuple[list[float], str]]],
) -> list[Path]:
    """One quantity against steps (left) and against wall-clock seconds (right)."""
    with figure(1, 2, height=3.6, sharey=True) as (drawing, (left, right)):
        for axes, x in ((left, "step"), (right, "seconds")):
            transform, level = prepare(axes)
            unit = _time_axis(axes, groups) if x == "seconds" else _step_axis(axes, groups)
            for group in groups:
                curves = [_curve(run, split, value, x, unit) for run in group.drawn]
                _draw(axes, [(a, transform(b)) for a, b in curves], look[group.name])
        left.set_ylabel(label)
        _finish_task(drawing, groups, look, level[1])
        return save(drawing, target.parent, target.name)


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
        for group in groups:
            curves = [_curve(run, "train", "loss", "step", 1.0) for run in group.drawn]
            _draw(axes, [binned(x, y, edges) for x, y in curves if len(x)], look[group.name])
        axes.set_ylabel(f"{label}, log scale")
        _finish_task(drawing, groups, look, level[1])
        return save(drawing, target.parent, target.name)


def _curve(run: Run, split: str, value: str, x: str, unit: float) -> tuple[np.ndarray, np.ndarray]:
    at, y = run.curve(split, value, x)
    order = np.argsort(at, kind="stable")
    return at[order] / unit, y[order]


def _draw(axes: Axes, curves: Sequence[tuple[np.ndarray, np.ndarray]], look: Look) -> None:
    curve = band(curves, log=axes.get_xscale() == "log")
    if curve is None:
        return
    axes.fill_between(curve.x, curve.low, curve.high, color=look.color, alpha=0.2, linewidth=0)
    # Shares of the axes' diagonal, so that markers keep apart on a logarithmic axis too.
    places = (0.05, 0.13)
    axes.plot(curve.x, curve.mean, color=look.color, linestyle=look.linestyle, marker=look.marker, markevery=places)
    for x, y in curve.rest:
        axes.plot(x, y, color=look.color, linestyle=look.linestyle, linewidth=0.7, alpha=0.8)


def finish(
    drawing: Figure, title: str, labels: dict[str, str], look: dict[str, Look], level: str, note: str | None
) -> None:
    """Title and legend: an entry for each name in ``labels``, then the level that takes no learning."""
    drawing.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    ones = [look[name] for name in labels]
    handles = [Line2D([], [], color=one.color, linestyle=one.linestyle, marker=one.marker) for one in ones]
    if level:
        handles.append(Line2D([], [], **BASELINE))
    legend_below(drawing, handles, [*labels.values(), *filter(None, [level])], note)


def _finish_task(drawing: Figure, groups: Sequence[Group], look: dict[str, Look], level: str) -> None:
    labels = {group.name: group.label for group in groups}
    several = [group for group in groups if len(group.drawn) > 1]
    longer = any(len({run.steps for run in group.drawn}) > 1 for group in several)
    note = NOTE_SEEDS + NOTE_LONGER * longer if several else None
    finish(drawing, groups[0].title, labels, look, level, note)


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


def _percent_axis(classes: int, axes: Axes):
    axes.set_ylim(0, 101)
    level = ([100 / classes], f"chance: {100 / classes:.3g} %")
    draw_baseline(axes, level[0])
    return (lambda share: 100 * share), level


def _error_axis(classes: int, axes: Axes):
    log_values(axes)
    level = ([100 - 100 / classes], f"chance: {100 - 100 / classes:.3g} %")
    draw_baseline(axes, level[0])
    # One wrong image in 10,000 is the least that an axis without zero needs to show.
    return (lambda share: np.maximum(100 * (1 - share), 0.01)), level


def _mean_squared_axis(level: tuple[list[float], str], axes: Axes):
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
