"""TensorBoard: one event file per run segment, the same tags for every model, and the link that shows the comparison.

torch's SummaryWriter writes from a thread: on a full disk that thread prints a traceback before the run can report the
problem, and nothing more can be written. It also puts the name of the host into the file's name, which is then
published with results. This module therefore uses its summaries and TensorBoard's RecordWriter without the thread.
"""

import io
import json
import os
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from ..config.checks import flatten
from ..files import AppendOnlyFile

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

EVENTS = "events.out.tfevents."
PINNED = ("eval/accuracy", "train/loss")

# Every scalar with its description. TensorBoard sorts by tag, so validation accuracy comes first.
SCALARS = {
    "eval/accuracy": "Share of right answers on the validation split; the best checkpoint is chosen by it.",
    "eval/loss": "Mean loss on the validation split.",
    "optimizer/grad_norm": "Norm of the whole gradient before clipping, mean since the last point.",
    "optimizer/lr": "Learning rate of the last step.",
    "speed/steps_per_second": "Updates a second since the last point, evaluations apart.",
    "test/accuracy": "Share of right answers on the test split, read once, with the best checkpoint.",
    "test/loss": "Mean loss on the test split, read once, with the best checkpoint.",
    "train/accuracy": "Share of right answers on the training batches since the last point.",
    "train/loss": "Mean loss of the training batches since the last point.",
}
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
_BINS = 30
# In inches and dots an inch: TensorBoard shows a picture 350 pixels wide, at which print of 9 points can just be read.
WIDTH, DPI = 4.2, 200
WRONG = "#c00000"
_IDENTITY = ("model.name", "data.name")  # settings that HPARAMS shows as model and task


class TensorBoardWriter(AppendOnlyFile):
    """Scalars, histograms and hyperparameters of one run, in its run folder ``path``.

    With ``resume_step`` a new event file continues from the checkpoint: TensorBoard drops the points of earlier files
    beyond that step, so curves do not zigzag. Raises RunError with one line if the disk is full.
    """

    def __init__(self, path: Path, model_name: str, task: str, resume_step: int | None) -> None:
        from tensorboard.compat.proto import event_pb2
        from torch.utils.tensorboard.summary import custom_scalars

        super().__init__(_next_file(path), os.O_CREAT | os.O_EXCL)
        self._identity = {"model": model_name, "task": task}
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resume_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(wall_time=time.time(), step=resume_step + 1, session_log=start))
        self._add(custom_scalars({"comparison": {title: ["Multiline", [tag]] for title, tag in _CHARTS.items()}}), 0)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write one point per tag; None (the accuracy in a task without classes) is left out."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

        points = [
            Summary.Value(
                tag=tag, simple_value=value, metadata=SummaryMetadata(summary_description=SCALARS.get(tag, ""))
            )
            for tag, value in values.items()
            if value is not None
        ]
        if points:
            self._add(Summary(value=points), step)

    def histogram(self, tag: str, tensor: "torch.Tensor", step: int) -> None:
        """Write a histogram with equal bins: torch's default bins grow by 10 %, and one of them would have all
        recurrent weights near 1."""
        from torch.utils.tensorboard.summary import histogram

        self._add(histogram(tag, tensor.detach().double().cpu().numpy(), bins=_BINS), step)

    def text(self, tag: str, text: str) -> None:
        """Write Markdown for the TEXT page."""
        from torch.utils.tensorboard.summary import text as summary

        self._add(summary(tag, text), 0)

    def picture(self, tag: str, drawing: "Figure", step: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from torch.utils.tensorboard.summary import image

        canvas = FigureCanvasAgg(drawing)
        canvas.draw()
        self._add(image(tag, np.asarray(canvas.buffer_rgba())[..., :3], dataformats="HWC"), step)

    def hparams(self, values: Mapping[str, Any]) -> None:
        """Write the run's line of the HPARAMS page, which shows it beside the last points of its scalars. ``values``
        may be nested; model and task come first, once each.

        There is no summary of the whole experiment: TensorBoard would take that of one run for all, without the keys
        that only other models have. If there is none, it collects keys and metrics over all runs.
        """
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        settings = {key: _plain(value) for key, value in flatten(values).items() if key not in _IDENTITY}
        self._add(hparams_pb(self._identity | settings, trial_id="/".join(self.path.absolute().parts[-4:-1])), 0)

    def _add(self, summary: Any, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self.append(record.getvalue())


def tensorboard_command(folder: Path | str) -> str:
    """The command that shows all run folders below ``folder``."""
    return f"tensorboard --logdir {shlex.quote(str(folder))}"


def tensorboard_link(folder: Path | str) -> str:
    """The page with validation accuracy and training loss pinned, unsmoothed, one colour for all seeds of a name; at
    the port of the TensorBoard that shows ``folder`` on this machine, or at the default port."""
    from tensorboard.manager import get_all

    ports = [server.port for server in get_all() if Path(server.logdir).resolve() == Path(folder).resolve()]
    pinned = [{"plugin": "scalars", "tag": tag} for tag in PINNED]
    state = {
        "pinnedCards": json.dumps(pinned, separators=(",", ":")),
        "smoothing": "0",
        "runColorGroup": r"regex:([^/]+)/seed\d+$",
    }
    query = "&".join(f"{key}={quote(value, safe='/:,')}" for key, value in state.items())
    return f"http://localhost:{ports[-1] if ports else 6006}/?{query}#timeseries"


def _next_file(folder: Path) -> Path:
    """A name that sorts after those of earlier segments, as TensorBoard expects, even if the clock was set back."""
    earlier = [file.name.removeprefix(EVENTS).split(".")[0] for file in folder.glob(f"{EVENTS}*")]
    seconds = max([int(time.time()), *(int(stamp) + 1 for stamp in earlier if stamp.isdigit())])
    return folder / f"{EVENTS}{seconds:010d}.indrnn"


def _plain(value: Any) -> float | str:
    """HPARAMS accepts neither None nor lists; integers as text are shown as 6, not 6.0000, and get check boxes."""
    return value if isinstance(value, float) else "none" if value is None else str(value)


def digits_page(images: "np.ndarray", answers: "np.ndarray", probabilities: "np.ndarray", targets: "np.ndarray") -> Any:
    """Images (n, rows, columns), each with the answer and its probability; a wrong one in red with the right answer."""
    from matplotlib.figure import Figure

    columns = 4
    rows = -(-len(images) // columns)
    drawing = Figure(figsize=(WIDTH, 1.25 * rows), dpi=DPI, layout="constrained")
    for place, (image, answer, probability, target) in enumerate(
        zip(images, answers, probabilities, targets, strict=True), start=1
    ):
        axes = drawing.add_subplot(rows, columns, place)
        axes.imshow(image, cmap="Greys", vmin=0, vmax=1)
        axes.set_axis_off()
        right = answer == target
        says = f"{answer}, {100 * probability:.0f} %" + ("" if right else f" (a {target})")
        axes.set_title(says, fontsize=9, color="black" if right else WRONG)
    return drawing


def confusion_matrix(answers: "np.ndarray", targets: "np.ndarray", classes: int) -> Any:
    """How often each class (row) was given each answer (column)."""
    from matplotlib.figure import Figure

    counts = np.zeros((classes, classes), dtype=int)
    np.add.at(counts, (targets, answers), 1)
    drawing = Figure(figsize=(WIDTH, WIDTH), dpi=DPI, layout="constrained")
    axes = drawing.add_subplot()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="Answer", ylabel="Class", xticks=range(classes), yticks=range(classes))
    axes.set_title("Answers given to each class (test split)", fontsize=9)
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=7, color=color)
    return drawing
