"""Final test error against sequence length on the adding problem: how far back each model remembers."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from .collect import Group, mean_answer_level
from .curves import NOTE_SEEDS, finish, log_values
from .style import BASELINE, figure, looks_by_model, save
from .table import extent


def draw_length_study(groups: Sequence[Group], folder: Path) -> list[Path]:
    """``length_study``.png and .svg from the finished adding runs, if they cover at least two lengths."""
    adding = [group for group in groups if group.about.series and group.finished]
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
        title = f"Adding problem: error after {steps} updates"
        note = NOTE_SEEDS if any(len(group.results) > 1 for group in adding) else None
        finish(drawing, title, labels, look, mean_answer_level(adding, "test")[1], note)
        return save(drawing, folder, "length_study")
