"""TensorBoard: one event file a run segment, the same tags for every model, and the link that shows the comparison.

Event files are written here rather than by torch's SummaryWriter because that one writes from a thread (a full disk
surfaces later, elsewhere) and puts the machine's host name into the file's name, which then is published with results.
"""

import json
import os
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .compare import flatten
from .files import append, one_line

if TYPE_CHECKING:
    import torch

EVENTS = "events.out.tfevents."
PINNED = ("val/accuracy", "train/loss")

# Charts that overlay all runs. TensorBoard matches a chart's tags as regular expressions from their beginning.
_CHARTS = {
    "validation accuracy": "val/accuracy$",
    "training loss": "train/loss$",
    "validation loss": "val/loss$",
    "training accuracy": "train/accuracy$",
    "gradient norm": "grad_norm$",
    "steps per second": "steps_per_second$",
    "learning rate": "lr$",
}
_BINS = 30


class TensorBoardWriter:
    """Scalars, histograms and hyperparameters of one run, in its run folder ``path``.

    With ``resume_step`` a further event file goes on where the checkpoint was: TensorBoard drops what earlier files
    hold past that step, so that curves do not zigzag. Raises RunError with one line if the disk is full.
    """

    def __init__(self, path: Path, model_name: str, task: str, resume_step: int | None) -> None:
        from tensorboard.compat.proto import event_pb2

        self._identity = {"model": model_name, "task": task}
        self._step = resume_step or 0
        self.path = _next_file(Path(path))
        with one_line("write", self.path):
            self._descriptor: int | None = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resume_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(wall_time=time.time(), step=resume_step + 1, session_log=start))
        self._add(_layout(), 0)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """One point for each tag; None (accuracy in a task without classes) is left out."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._step = max(self._step, step)
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if value is not None]
        if points:
            self._add(Summary(value=points), step)

    def histogram(self, tag: str, tensor: "torch.Tensor", step: int) -> None:
        """Equal bins: torch's default ones grow by 10 %, which would put all recurrent weights near 1 into one."""
        from torch.utils.tensorboard.summary import histogram

        self._add(histogram(tag, tensor.detach().double().cpu().numpy(), bins=_BINS), step)

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float | None]) -> None:
        """The run's line in the HPARAMS page. ``values`` may be nested; ``metrics`` become scalars at the last step.

        No summary of the experiment as a whole is written: TensorBoard would take one run's for all, and leave out the
        keys that only other models have. Without it, it collects keys and metrics over all runs.
        """
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        shown = {key: _plain(value) for key, value in flatten({**self._identity, **values}).items()}
        self._add(hparams_pb(shown, trial_id="/".join(self.path.absolute().parts[-4:-1])), 0)
        self.scalars(self._step, metrics)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "TensorBoardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, summary: Any, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert self._descriptor is not None, "the writer is closed"
        with one_line("write", self.path):
            RecordWriter(_Appender(self._descriptor)).write(event.SerializeToString())


class _Appender:
    """The file that RecordWriter expects: one write a record."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes) -> None:
        append(self._descriptor, data)


def tensorboard_command(folder: Path | str) -> str:
    """The command that shows all run folders below ``folder``."""
    return f"tensorboard --logdir {shlex.quote(str(folder))}"


def tensorboard_link(port: int = 6006) -> str:
    """The page with validation accuracy and training loss pinned, unsmoothed, one colour for all seeds of a name."""
    pinned = [{"plugin": "scalars", "tag": tag} for tag in PINNED]
    state = {
        "pinnedCards": json.dumps(pinned, separators=(",", ":")),
        "smoothing": "0",
        "runColorGroup": "regex:([^/]+)/seed",
    }
    query = "&".join(f"{key}={quote(value, safe='/:,')}" for key, value in state.items())
    return f"http://localhost:{port}/?{query}#timeseries"


def _next_file(folder: Path) -> Path:
    """A name that sorts after the earlier segments' (TensorBoard reads them in that order), whatever the clock says."""
    earlier = [file.name.removeprefix(EVENTS).split(".")[0] for file in folder.glob(f"{EVENTS}*")]
    seconds = max([int(time.time()), *(int(stamp) + 1 for stamp in earlier if stamp.isdigit())])
    return folder / f"{EVENTS}{seconds:010d}.indrnn"


def _layout() -> Any:
    from torch.utils.tensorboard.summary import custom_scalars

    return custom_scalars({"comparison": {title: ["Multiline", [tag]] for title, tag in _CHARTS.items()}})


def _plain(value: Any) -> float | str:
    """TensorBoard has no None and no lists here; whole numbers as text are shown as 6, not 6.0000, with check boxes."""
    return value if isinstance(value, float) else "none" if value is None else str(value)
