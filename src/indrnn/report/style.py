"""How every figure of the report looks, and how it is saved: the same input gives the same bytes.

A model has a colour and a marker in all figures; runs of one model differ in line style. Colours are those of Okabe &
Ito (2008), told apart by the colour-blind; markers repeat the distinction for a print in grey.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from indrnn.errors import UserError
from indrnn.files import one_line

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = (
    "-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (10, 2)), (0, (5, 1.5, 1.5, 1.5, 1.5, 1.5))
)  # fmt: skip
GREY = "#595959"

# Models that most figures show keep their colour whatever else is drawn.
FIXED = {"indrnn": 0, "lstm": 1, "lstm_matched": 2, "rnn": 3, "lstm_chrono": 4}
BASELINE: dict[str, Any] = {"color": GREY, "linewidth": 0.9, "linestyle": (0, (2, 2))}

SETTINGS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "figure.facecolor": "white",
    "svg.fonttype": "none",  # text stays text: searchable, and set in the reader's font
    "svg.hashsalt": "indrnn",
}


# How one name is drawn in all figures: keyword arguments of `Axes.plot` and `Line2D`.
Look = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One line of a figure: how it is called and drawn, and its last point (None: it has none)."""

    label: str
    look: Look
    end: tuple[float, float] | None


def looks(models: Mapping[str, str]) -> dict[str, Look]:
    """A look for each name, given its model: the model's colour and marker, and where several names have one model, a
    line style each. Models that are not in FIXED get the colours that are nobody's, then those of absent ones."""
    present = sorted(set(models.values()))
    used = {FIXED[model] for model in present if model in FIXED}
    free = chain(range(len(FIXED), len(COLOURS)), sorted({*FIXED.values()} - used), count(len(COLOURS)))
    place = {model: FIXED[model] if model in FIXED else next(free) for model in present}
    seen: Counter[str] = Counter()
    by_name: dict[str, Look] = {}
    for name, model in sorted(models.items(), key=lambda pair: (pair[0] != pair[1], pair[0])):
        number, color = seen[model], COLOURS[place[model] % len(COLOURS)]
        seen[model] += 1
        by_name[name] = {
            "color": color,
            "marker": MARKERS[place[model] % len(MARKERS)],
            "linestyle": DASHES[number % len(DASHES)],
            "markerfacecolor": "white" if number else color,
        }
    return by_name


@contextmanager
def figure(
    rows: int = 1, columns: int = 1, *, width: float = 7.2, height: float = 3.4, **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """A figure and its axes in the report's style; sizes in inches (7.2 is a printed page's text width)."""
    with matplotlib.rc_context(SETTINGS):
        drawing, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)
        try:
            yield drawing, axes
        finally:
            plt.close(drawing)


def save(drawing: Figure, folder: Path, stem: str) -> list[Path]:
    """Write ``stem``.png (200 dots an inch) and ``stem``.svg below ``folder``, without dates.

    Raises:
        UserError: the folder cannot be written.
    """
    paths = [folder / f"{stem}.png", folder / f"{stem}.svg"]
    with one_line("write", folder, UserError):
        folder.mkdir(parents=True, exist_ok=True)
        drawing.savefig(paths[0], dpi=200, metadata={"Software": None})
        drawing.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths


def legend_below(drawing: Figure, handles: Mapping[str, Any], note: str | None = None) -> Legend:
    """One legend for the whole figure, under the axes, where it hides no curve. ``handles``: by label; ``note`` stands
    above the entries."""
    # Columns of equal width: as many as fit the figure at about 0.062 inch a letter; of the note, 0.053.
    width = 0.75 + 0.062 * max(map(len, handles), default=0)
    columns = max(1, min(len(handles), int(drawing.get_figwidth() / width)))
    return drawing.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, handlelength=3.2,
        title=note and fill(note, int(drawing.get_figwidth() / 0.053)), title_fontproperties={"size": 7.5},
    )  # fmt: skip


LONGEST_LABEL = {1: 34, 2: 24}  # letters beside a line, by the number of panels in a row
LINE = 10.5  # points: how far apart two lines of small print stand
LEGEND = 0.6  # inches that a figure's height allows for; what a legend needs beyond makes the figure higher


def label_lines(drawing: Figure, axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> bool:
    """Write each line's label (x and y of its last point, text, colour) beside its end, moved apart where two would
    touch. False, and nothing is written, where they do not fit: some line ends early, or there are too many."""
    drawing.draw_without_rendering()
    box = axes.get_window_extent()
    x, y = axes.transData.transform([end[:2] for end in ends]).T
    points = 72 / drawing.dpi
    height, ends_at = box.height * points, (y - box.y0) * points
    if len(ends) * LINE > height or x.min() < box.x1 - 0.12 * box.width:
        return False
    ceiling = height - LINE * (len(ends) - 1)
    place = 0.0
    for rank, which in enumerate(np.argsort(ends_at, kind="stable")):
        # As high as its line ends, but above the label below and with room for those above.
        place = max(place, min(ends_at[which], ceiling + LINE * rank))
        at_x, at_y, text, color = ends[which]
        axes.annotate(
            text, (at_x, at_y), (6, place - ends_at[which]), textcoords="offset points",
            color=color, fontsize=8.5, va="center", annotation_clip=False,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )  # fmt: skip
        place += LINE
    return True


def finish(
    drawing: Figure, axes: Axes, title: str, lines: Sequence[Line], level: str = "", note: str | None = None
) -> None:
    """Title; the label of each line at its end in ``axes``, or where they do not fit there in a legend; below, the
    level that takes no learning, and a note."""
    head(drawing, title)
    below = {level: Line2D([], [], **BASELINE)} if level else {}
    ends = [(*line.end, line.label, line.look["color"]) for line in lines if line.end is not None]
    longest = max(len(line.label) for line in lines)
    if len(ends) == len(lines) and longest <= LONGEST_LABEL[len(drawing.axes)]:
        # The legend first, for it decides how high the axes are.
        legend = legend_below(drawing, below, note)
        if label_lines(drawing, axes, ends):
            return
        legend.remove()
    legend = legend_below(drawing, {line.label: Line2D([], [], **line.look) for line in lines} | below, note)
    drawing.draw_without_rendering()
    beyond = legend.get_window_extent().height / drawing.dpi - LEGEND
    drawing.set_figheight(drawing.get_figheight() + max(0.0, beyond))


def head(drawing: Figure, title: str) -> None:
    """The title of the whole figure."""
    drawing.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")


def say_above(axes: Axes, quantity: str) -> None:
    """What the y axis measures, written above its upper end, where it can be read without turning the head and is
    never too long for the axis."""
    axes.set_title(quantity, fontsize=8.5, color=GREY)


def log_values(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    # As 0.00005, not 5e-05 among decimals.
    plain = partial(np.format_float_positional, precision=3, fractional=False, trim="-")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def tick_at(axis: Axes, sizes: Sequence[int]) -> None:
    """Ticks at the sizes that were measured, not at powers of ten; no numbers where they would touch."""
    numbered: list[int] = []
    apart = 0.15 * math.log(sizes[-1] / sizes[0]) if sizes else 0.0
    for size in sizes:
        if not numbered or math.log(size / numbered[-1]) > apart:
            numbered.append(size)
    axis.set_xticks(numbered, [f"{size:,}" for size in numbered])
    axis.set_xticks(sizes, minor=True)
    axis.xaxis.set_minor_formatter(NullFormatter())


def short_number(value: float) -> str:
    """1500 -> 1.5k, 60000 -> 60k, 702100 -> 702k, 2e6 -> 2M; for axis ticks."""
    for limit, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"
