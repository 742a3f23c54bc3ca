"""Drawing with matplotlib, whatever the user's environment, and the figures that a run writes to TensorBoard."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

# In inches and dots per inch: TensorBoard shows pictures 350 pixels wide, where 9-point text is just readable.
WIDTH, DPI = 4.2, 200
WRONG = "#c00000"


@contextmanager
def drawing(what: str, style: Any = None) -> Iterator[None]:
    """Draw within the block with matplotlib's defaults and ``style``, independent of MPLBACKEND and matplotlibrc.

    A picture must never cost a result: an exception becomes a logged warning that begins with ``what``, except
    UserError, such as a folder that cannot be written.
    """
    try:
        # `import matplotlib` fails if MPLBACKEND names a backend that is not installed, as in a shell of Jupyter.
        with mock.patch.dict(os.environ, MPLBACKEND="agg"):
            import matplotlib
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(style or {})
            yield
    except UserError:
        raise
    except Exception as failure:
        log.warning("%s: not drawn (%s: %s)", what, type(failure).__name__, " ".join(str(failure).split()))


def digits_page(images: np.ndarray, predictions: np.ndarray, probabilities: np.ndarray, labels: np.ndarray) -> "Figure":
    """Images (n, rows, columns), each with its prediction and probability; a wrong one is red and has its label."""
    from matplotlib.figure import Figure

    columns = 4
    rows = -(-len(images) // columns)
    page = Figure(figsize=(WIDTH, 1.25 * rows), dpi=DPI, layout="constrained")
    for place, (image, prediction, probability, label) in enumerate(
        zip(images, predictions, probabilities, labels, strict=True), start=1
    ):
        axes = page.add_subplot(rows, columns, place)
        axes.imshow(image, cmap="Greys", vmin=0, vmax=1)
        axes.set_axis_off()
        correct = prediction == label
        title = f"{prediction}, {100 * probability:.0f} %" + ("" if correct else f" (a {label})")
        axes.set_title(title, fontsize=9, color="black" if correct else WRONG)
    return page


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, classes: int) -> "Figure":
    """How often each class (row) was predicted as each class (column)."""
    from matplotlib.figure import Figure

    counts = np.zeros((classes, classes), dtype=int)
    np.add.at(counts, (labels, predictions), 1)
    figure = Figure(figsize=(WIDTH, WIDTH), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="Prediction", ylabel="Class", xticks=range(classes), yticks=range(classes))
    axes.set_title("Predictions for each class (test split)", fontsize=9)
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=7, color=color)
    return figure
