"""The style of every figure, and how a figure is saved. The same input gives the same bytes.

Figures use matplotlib's defaults with the changes in ``report.mplstyle``, whatever the user's matplotlibrc and backend
are. A model has the same color and marker in all figures. Runs of one model differ in line style.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from indrnn.errors import UserError
from indrnn.files import one_line

# Okabe & Ito (2008): distinguishable with color blindness. The markers repeat the distinction for grayscale prints.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (10, 2)))
GRAY = "#595959"
BASELINE: dict[str, Any] = {"color": GRAY, "linewidth": 0.9, "linestyle": (0, (2, 2))}
# Models that most figures show keep their color, whatever else is drawn.
FIXED = {"indrnn": 0, "lstm": 1, "rnn": 3, "lstm_chrono": 4}
LEGEND = 0.6  # inches of a figure's height that a legend can use; a taller legend makes the figure taller

Look = dict[str, Any]
"""How a line is drawn: keyword arguments of `Axes.plot` and `Line2D`."""


def looks(models: Mapping[str, str]) -> dict[str, Look]:
    """A look for each name, given its model: the model's color and marker, and one line style per name."""
    present = sorted(set(models.values()))
    used = {FIXED[model] for model in present if model in FIXED}
    free = sorted(set(range(len(COLORS))) - used, key=lambda place: (place in FIXED.values(), place)) or [0]
    others = [model for model in present if model not in FIXED]
    places = FIXED | {model: free[number % len(free)] for number, model in enumerate(others)}
    seen: Counter[str] = Counter()
    by_name: dict[str, Look] = {}
    for name, model in sorted(models.items(), key=lambda pair: (pair[0] != pair[1], pair[0])):
        color, marker, number = COLORS[places[model]], MARKERS[places[model]], seen[model]
        seen[model] += 1
        by_name[name] = {
            "color": color, "marker": marker, "linestyle": DASHES[number % len(DASHES)],
            "markerfacecolor": "white" if number else color,
        }  # fmt: skip
    return by_name


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


def title(drawing: Figure, text: str) -> None:
    """The title of the whole figure."""
    drawing.suptitle(text, x=0.01, ha="left", fontsize=10, fontweight="bold")


def legend_below(drawing: Figure, handles: Mapping[str, Any], note: str | None = None) -> None:
    """One legend for the whole figure, below the axes. ``handles``: by label; ``note``: text above the entries."""
    # As many columns of equal width as fit the figure, at about 0.062 inch per letter, or 0.056 in the note.
    width = 0.75 + 0.062 * max(map(len, handles), default=0)
    columns = max(1, min(len(handles), int(drawing.get_figwidth() / width)))
    text = note and fill(note, int(drawing.get_figwidth() / 0.056))
    legend = drawing.legend(
        handles.values(), handles, loc="outside lower center", ncols=columns, handlelength=3.2, title=text
    )
    drawing.draw_without_rendering()
    beyond = legend.get_window_extent().height / drawing.dpi - LEGEND
    drawing.set_figheight(drawing.get_figheight() + max(0.0, beyond))


def log_values(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers: 0.00005, not 5e-05."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plain = partial(np.format_float_positional, precision=3, fractional=False, trim="-")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def short_number(value: float) -> str:
    """1500 -> 1.5k, 60000 -> 60k, 2e6 -> 2M; for axis ticks."""
    for limit, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"
