"""How every figure of the report looks, and how it is saved: the same input gives the same bytes.

Colours are those of Okabe & Ito (2008), told apart by the colour-blind; line style and marker repeat the distinction
for a print in grey.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from indrnn.errors import UserError
from indrnn.record.files import one_line

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (8, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
GREY = "#595959"

# Those that most figures show keep their look whatever else is drawn.
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


@dataclass(frozen=True)
class Look:
    """How one model is drawn in all figures."""

    color: str
    linestyle: Any
    marker: str


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name: its own for those in FIXED; for the others by alphabetical order, first colours that are
    nobody's, then those of absent FIXED names, so that no two share one while there are enough."""
    wanted = sorted(set(names))
    taken = {FIXED[name] for name in wanted if name in FIXED}
    free = chain(range(len(FIXED), len(COLOURS)), sorted({*FIXED.values()} - taken), count(len(COLOURS)))
    place = {name: FIXED[name] if name in FIXED else next(free) for name in wanted}
    return {
        name: Look(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)])
        for name, i in place.items()
    }


def looks_by_model(models: Mapping[str, str]) -> dict[str, Look]:
    """A look for each name, given its model: one name of a model has the model's look (that of the same name, or the
    first), others have their own."""
    keys: dict[str, str] = {}
    for name in sorted(models, key=lambda name: (name != models[name], name)):
        keys[name] = name if models[name] in keys.values() else models[name]
    look = looks(keys.values())
    return {name: look[key] for name, key in keys.items()}


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


def legend_below(drawing: Figure, handles: list[Any], labels: list[str], note: str | None = None) -> Legend:
    """One legend for the whole figure, under the axes, where it hides no curve; ``note`` stands above its entries."""
    # Columns of equal width: as many as fit the figure at about 0.062 inch a letter.
    width = 0.75 + 0.062 * max(map(len, labels), default=0)
    columns = max(1, min(len(labels), int(drawing.get_figwidth() / width)))
    return drawing.legend(
        handles, labels, loc="outside lower center", ncols=columns, handlelength=3.2,
        title=note, title_fontproperties={"size": 7.5},
    )  # fmt: skip


LINE = 10.5  # points: how far apart two lines of small print stand


def label_lines(drawing: Figure, axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> bool:
    """Write each line's label (x and y of its last point, text, colour) beside its end, moved apart where two would
    touch. False, and nothing is written, where they do not fit: some line ends early, or there are too many."""
    drawing.draw_without_rendering()
    points = 72 / drawing.dpi
    box = axes.get_window_extent()
    x, y = axes.transData.transform([end[:2] for end in ends]).T
    if len(ends) * LINE > box.height * points or x.min() < box.x1 - 0.12 * box.width:
        return False
    order = np.argsort(y, kind="stable")
    wanted = (y[order] - box.y0) * points
    places = wanted.copy()
    for _ in range(200):
        for low, high in pairwise(range(len(places))):
            overlap = LINE - (places[high] - places[low])
            if overlap > 1e-6:
                places[low] -= overlap / 2
                places[high] += overlap / 2
        places = places.clip(min=0) - max(0.0, float(places.max()) - box.height * points)
    for which, place, height in zip(order, places, wanted, strict=True):
        at_x, at_y, text, color = ends[which]
        axes.annotate(
            text, (at_x, at_y), (6, place - height), textcoords="offset points",
            color=color, fontsize=8.5, va="center", annotation_clip=False,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )  # fmt: skip
    return True


def say_above(axes: Axes, quantity: str) -> None:
    """What the y axis measures, written above its upper end, where it can be read without turning the head and is
    never too long for the axis."""
    axes.set_title(quantity, fontsize=8.5, color=GREY)


def short_number(value: float) -> str:
    """1500 -> 1.5k, 60000 -> 60k, 702100 -> 702k, 2e6 -> 2M; for axis ticks."""
    for limit, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"
