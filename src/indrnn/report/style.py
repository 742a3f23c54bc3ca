"""The style of every figure, and how a figure is saved. The same input gives the same bytes.

Figures use matplotlib's defaults with the changes in ``report.mplstyle``, whatever the user's matplotlibrc and backend
are. A model has the same color and marker in all figures. Runs of one model differ in line style.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from indrnn.errors import UserError
from indrnn.files import one_line

# Color and marker of each model. Colors distinguishable with color blindness (Okabe & Ito 2008, and Tol's olive).
MARKS = {
    "indrnn": ("#0072B2", "o"), "lstm": ("#D55E00", "s"), "lstm_chrono": ("#E69F00", "v"), "rnn": ("#CC79A7", "D"),
    "gru": ("#009E73", "^"), "indrnn_dense": ("#56B4E9", "P"), "indrnn_residual": ("#000000", "X"),
    "mingru": ("#999933", "<"),
}  # fmt: skip
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (10, 2)))
GRAY = "#595959"
BASELINE: dict[str, Any] = {"color": GRAY, "linewidth": 0.9, "linestyle": (0, (2, 2))}

Look = dict[str, Any]
"""How a line is drawn: keyword arguments of `Axes.plot` and `Line2D`."""


def looks(models: Mapping[str, str]) -> dict[str, Look]:
    """A look for each name, given its model: the model's color and marker (a custom model has those of a model that is
    absent), and one line style per name."""
    by_model: dict[str, list[str]] = {}
    for name, model in sorted(models.items(), key=lambda pair: (pair[0] != pair[1], pair[0])):
        by_model.setdefault(model, []).append(name)
    free = cycle([MARKS[model] for model in reversed(MARKS) if model not in by_model] or [(GRAY, "o")])
    marks = {model: MARKS[model] if model in MARKS else next(free) for model in sorted(by_model)}
    return {
        name: {
            "color": marks[model][0], "marker": marks[model][1], "linestyle": DASHES[number % len(DASHES)],
            "markerfacecolor": "white" if number else marks[model][0],
        }
        for model, names in by_model.items() for number, name in enumerate(names)
    }  # fmt: skip


@contextmanager
def figure(
    rows: int = 1, columns: int = 1, *, width: float = 7.2, height: float = 3.4, **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """A figure and its axes in the report's style; sizes in inches (7.2 is the text width of a printed page)."""
    with style.context(["default", Path(__file__).with_name("report.mplstyle")], after_reset=True):
        drawing = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawing)
        yield drawing, drawing.subplots(rows, columns, **options)


def save(drawing: Figure, folder: Path, stem: str) -> list[Path]:
    """Write ``stem``.png (200 dpi) and ``stem``.svg to ``folder``, without dates.

    Raises:
        UserError: the folder cannot be written.
    """
    paths = [folder / f"{stem}.png", folder / f"{stem}.svg"]
    with one_line("write", folder, UserError):
        folder.mkdir(parents=True, exist_ok=True)
        drawing.savefig(paths[0], dpi=200, metadata={"Software": None})
        drawing.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths


def legend_below(drawing: Figure, axes: Axes, note: str = "") -> None:
    """One legend for the whole figure, below the axes, of the labels in ``axes``, with a note above the entries."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    # As many columns of equal width as fit the figure, at about 0.062 inch per letter, or 0.056 in the note.
    columns = max(1, int(drawing.get_figwidth() / (0.75 + 0.062 * max(map(len, handles)))))
    text = fill(note, int(drawing.get_figwidth() / 0.056)) or None
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": columns}
    drawing.legend(handles.values(), handles, handlelength=3.2, title=text, **place)


def log_values(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers: 0.00005, not 5e-05."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: np.format_float_positional(value, precision=6, trim="-"))
    axes.yaxis.set_minor_formatter(NullFormatter())
