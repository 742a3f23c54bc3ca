"""What a run writes and prints while it trains: metrics.csv, TensorBoard events, and its progress on stderr."""

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import compress
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from torch import Tensor
from tqdm import tqdm

from ..errors import RunError
from ..files import one_line, write_atomically
from .folder import METRICS
from .metrics import COLUMNS, complete_lines, read_metrics

log = logging.getLogger(__name__)

TAGS = {"train": "train", "val": "eval", "test": "test"}  # the splits in TensorBoard
LINE_EVERY = 30.0  # seconds between progress lines if stderr is not a terminal
LINE = "{desc}: step {n_fmt}/{total_fmt}, {rate_fmt}{postfix}, {remaining} left"


class Recorder:
    """Writes rows to metrics.csv and TensorBoard, readable at once, and shows the progress, within a ``with`` block.

    ========= ==========================================================================================
    step      updates made
    epoch     passes over the training data
    seconds   training time without evaluation, summed over all interruptions
    split     train (means since the last train row), val (one evaluation) or test (once, at the end)
    loss      mean loss: cross-entropy in nats, or squared error
    accuracy  share of correct predictions in [0, 1]; empty for a regression
    lr        learning rate of the last step; train rows only
    grad_norm norm of the whole gradient before clipping; train rows only
    ========= ==========================================================================================

    Args:
        path: the run folder.
        label: begins every line of the progress.
        step, total: the first and the last step of the progress.
        resume_step: the last step whose rows, except test rows, and points are kept; None for a fresh run.

    Raises RunError with one line if the disk is full or a file cannot be written.
    """

    def __init__(self, path: Path, label: str, step: int, total: int, resume_step: int | None) -> None:
        self._path, self._metrics_path, self._label, kept = path, path / METRICS, label, []
        if resume_step is not None and self._metrics_path.exists():
            # The run may have been killed between the row of its test and its result.
            rows = read_metrics(self._metrics_path)
            keep = (rows["step"] <= resume_step) & (rows["split"] != "test")
            kept = list(compress(complete_lines(self._metrics_path)[1:], keep))
        elif resume_step:
            log.warning("%s is missing: its curves begin at step %d", self._metrics_path, resume_step)
        write_atomically(self._metrics_path, ",".join(COLUMNS) + "\n" + "".join(kept))
        # TensorBoard prefers TensorFlow for writing files, also one that is slow to import or partly uninstalled.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
        from torch.utils.tensorboard import SummaryWriter

        with one_line("write", path):
            self._metrics = open(self._metrics_path, "a", encoding="utf-8", newline="")  # noqa: SIM115
            purge_step = None if resume_step is None else resume_step + 1
            self._tensorboard: Any = SummaryWriter(str(path), purge_step=purge_step)
        self._shown: dict[str, str] = {}
        self._began = self._last_line = time.monotonic()
        self._progress: dict[str, Any] = {"initial": step, "total": total, "unit": "step"}
        # Without a terminal the bar is disabled, and lines are printed instead.
        self._bar = tqdm(desc=label, dynamic_ncols=True, file=sys.stderr, disable=None, **self._progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        with suppress(OSError):  # everything is flushed
            self._metrics.close()
            self._tensorboard.close()

    def say(self, message: str) -> None:
        """Print a line that stays."""
        tqdm.write(message, file=sys.stderr)

    def step_done(self) -> None:
        """Count a step in the progress."""
        self._bar.update()

    def row(
        self,
        split: str,
        step: int,
        epoch: float,
        seconds: float,
        loss: float,
        accuracy: float | None = None,
        lr: float | None = None,
        grad_norm: float | None = None,
        tags: Mapping[str, float | None] | None = None,
    ) -> None:
        """Record one row; None is an empty cell. ``tags`` are further scalars for TensorBoard."""
        # repr keeps every bit: equal runs have equal files.
        cells = [repr(float(value)) if value is not None else "" for value in (loss, accuracy, lr, grad_norm)]
        scalars = {f"{TAGS[split]}/loss": loss, f"{TAGS[split]}/accuracy": accuracy, **(tags or {})}
        with one_line("write", self._metrics_path):
            self._metrics.write(",".join([str(step), f"{epoch:.6g}", f"{seconds:.3f}", split, *cells]) + "\n")
            self._metrics.flush()
        with self._flushed() as tensorboard:
            for tag, value in scalars.items():
                if value is not None:
                    tensorboard.add_scalar(tag, value, step)
        name = "" if split == "train" else f"{split} "
        self._show(step, split, f"{name}loss {loss:.4f}" if accuracy is None or not name else f"{name}{accuracy:.2%}")

    def recurrent_weights(self, step: int, layers: Iterable[Tensor]) -> None:
        """Write a histogram of each layer's recurrent weights, complex ones by size."""
        with self._flushed() as tensorboard:
            for number, weights in enumerate(layers, start=1):
                real = (weights.abs() if weights.is_complex() else weights).detach().double()
                # Equal bins: torch's default ones would have all recurrent weights in one bin near 1.
                tensorboard.add_histogram(f"recurrent_weight/layer{number}", real, step, bins=30)

    def finished(self, command: str, configuration: str, keys: Mapping[str, Any], results: Iterable[str]) -> None:
        """Write the command and configuration for the TEXT page, and for the HPARAMS page the configuration's keys and
        the tags of the results."""
        from torch.utils.tensorboard.summary import hparams

        plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in keys.items()}
        with self._flushed() as tensorboard:
            tensorboard.add_text("command", f"`{command}`")
            tensorboard.add_text("configuration", f"```yaml\n{configuration}```")
            for summary in hparams(plain, dict.fromkeys(results)):
                tensorboard.file_writer.add_summary(summary)

    @contextmanager
    def _flushed(self) -> Iterator[Any]:
        # SummaryWriter writes in a thread, whose traceback must not precede our one line.
        previous, threading.excepthook = threading.excepthook, lambda failure: None
        try:
            with one_line("write TensorBoard events to", self._path):
                yield self._tensorboard
                self._tensorboard.flush()
        except RunError:
            with suppress(OSError):
                self._tensorboard.file_writer.close()  # waits for the thread
            raise
        finally:
            threading.excepthook = previous

    def _show(self, step: int, key: str, text: str) -> None:
        """Show the latest values next to the bar, or in a line if one is due."""
        self._shown[key] = text
        values = ", ".join(self._shown.values())
        self._bar.set_postfix_str(values, refresh=False)
        now = time.monotonic()
        if self._bar.disable and (key != "train" or now - self._last_line >= LINE_EVERY):
            self._last_line = now
            words = {"prefix": self._label, "postfix": values, "elapsed": now - self._began, "bar_format": LINE}
            self.say(tqdm.format_meter(step, **words, **self._progress))


class SilentRecorder(Recorder):
    """Writes and prints nothing: for all processes but rank 0."""

    def __init__(self) -> None: ...

    def _ignore(self, *_: Any, **__: Any) -> None: ...

    say = step_done = row = recurrent_weights = finished = __exit__ = _ignore
