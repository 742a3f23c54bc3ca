"""TensorBoard: the same tags for every model, and the link that shows the comparison."""

import json
import os
import shlex
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self
from unittest import mock
from urllib.parse import quote

import numpy as np

from ..config.checks import flatten
from ..files import one_line

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

EVENTS = "events.out.tfevents."
PINNED = ("eval/accuracy", "train/loss")

# Charts that overlay all runs. TensorBoard matches a chart's tags as regular expressions from their beginning.
_CHARTS = {
    "validation accuracy": "eval/accuracy$",
    "training loss": "train/loss$",
    "validation loss": "eval/loss$",
    "training accuracy": "train/accuracy$",
    "gradient norm": "optimizer/grad_norm$",
    "steps per second": "speed/steps_per_second$",
    "learning rate": "optimizer/lr$",
}
# In inches and dots per inch: TensorBoard shows pictures 350 pixels wide, where 9-point text is just readable.
WIDTH, DPI = 4.2, 200
WRONG = "#c00000"
_IDENTITY = ("model.name", "data.name")  # settings that HPARAMS shows as model and task


@contextmanager
def drawing(style: Any = None) -> Iterator[None]:
    """Draw with matplotlib's defaults and ``style``, independent of MPLBACKEND and matplotlibrc; also a decorator."""
    # `import matplotlib` fails if MPLBACKEND names a backend that is not installed, as in a shell of Jupyter.
    with mock.patch.dict(os.environ, MPLBACKEND="agg"):
        import matplotlib
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style or {})
        yield


class TensorBoardWriter:
    """Scalars, histograms, pictures and hyperparameters of one run, in its run folder ``path``.

    With ``resume_step`` TensorBoard drops the points of earlier event files after that step, so curves do not zigzag.
    Everything is on the disk when a method returns. Raises RunError with one line if it cannot be written.
    """

    def __init__(self, path: Path, model_name: str, task: str, resume_step: int | None) -> None:
        # TensorBoard prefers TensorFlow for writing files, also one that is slow to import or partly uninstalled.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
        from torch.utils.tensorboard import SummaryWriter

        self._path = path
        self._identity = {"model": model_name, "task": task}
        with one_line("write", path):
            self._writer: Any = SummaryWriter(str(path), purge_step=None if resume_step is None else resume_step + 1)
        with self._written() as writer:
            writer.add_custom_scalars({"comparison": {title: ["Multiline", [tag]] for title, tag in _CHARTS.items()}})

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write one point per tag; None (the accuracy of a regression) is left out."""
        with self._written() as writer:
            for tag, value in values.items():
                if value is not None:
                    writer.add_scalar(tag, value, step)

    def histogram(self, tag: str, tensor: "torch.Tensor", step: int) -> None:
        """Write a histogram with 30 equal bins: one of torch's default bins would have all recurrent weights near 1."""
        with self._written() as writer:
            writer.add_histogram(tag, tensor.detach().double(), step, bins=30)

    def text(self, tag: str, text: str) -> None:
        """Write Markdown for the TEXT page."""
        with self._written() as writer:
            writer.add_text(tag, text, 0)

    @drawing()
    def picture(self, tag: str, figure: "Figure", step: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        with self._written() as writer:
            writer.add_image(tag, np.asarray(canvas.buffer_rgba())[..., :3], step, dataformats="HWC")

    def hparams(self, values: Mapping[str, Any]) -> None:
        """Write the run's line of the HPARAMS page, which shows it with the last points of its scalars.

        ``values`` may be nested; model and task come first. There is no summary of the whole experiment (nor
        `add_hparams`, which makes a run of its own): TensorBoard would take that of one run for all, without the keys
        that only other models have.
        """
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        settings = {key: _plain(value) for key, value in flatten(values).items() if key not in _IDENTITY}
        trial = "/".join(self._path.absolute().parts[-3:])
        with self._written() as writer:
            writer.file_writer.add_summary(hparams_pb(self._identity | settings, trial_id=trial), 0)

    @contextmanager
    def _written(self) -> Iterator[Any]:
        """Flush after the block. SummaryWriter writes in a thread, whose traceback must not precede our one line."""
        previous = threading.excepthook
        threading.excepthook = lambda failure: None if issubclass(failure.exc_type, OSError) else previous(failure)
        try:
            with one_line("write TensorBoard events to", self._path):
                try:
                    yield self._writer
                    self._writer.flush()
                except OSError:
                    with suppress(OSError):
                        self._writer.file_writer.close()  # waits for the thread
                    self._writer.all_writers = None
                    raise
        finally:
            threading.excepthook = previous

    def close(self) -> None:
        with one_line("write TensorBoard events to", self._path):
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tensorboard_command(folder: Path | str) -> str:
    """The command that shows all run folders below ``folder``."""
    return f"tensorboard --logdir {shlex.quote(str(folder))}"


def tensorboard_link(folder: Path | str) -> str:
    """The page with validation accuracy and training loss pinned, unsmoothed, one color for all seeds of a name.

    Its port is that of the running TensorBoard that shows ``folder`` on this machine, or the default port.
    """
    from tensorboard.manager import get_all

    ports = [server.port for server in get_all() if Path(server.logdir).resolve() == Path(folder).resolve()]
    pinned = [{"plugin": "scalars", "tag": tag} for tag in PINNED]
    state = {
        "pinnedCards": json.dumps(pinned, separators=(",", ":")),
        "smoothing": "0",
        "runColorGroup": r"regex:([^/]+)/seed\d+$",
    }
    query = "&".join(f"{key}={quote(value, safe='/:,')}" for key, value in state.items())
    return f"http://localhost:{next(filter(_answers, ports), 6006)}/?{query}#timeseries"


def _answers(port: int) -> bool:
    """Whether a server listens at ``port``: a TensorBoard that was killed is still registered."""
    try:
        socket.create_connection(("localhost", port), timeout=1).close()
    except OSError:
        return False
    return True


def _plain(value: Any) -> float | str:
    """HPARAMS accepts neither None nor lists; integers as text are shown as 6, not 6.0000, and get check boxes."""
    return value if isinstance(value, float) else "none" if value is None else str(value)


@drawing()
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


@drawing()
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
