"""What a run writes and prints: metrics.csv, TensorBoard events, result.json, and its progress on stderr."""

import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from ..config.compose import run_name
from ..layers import recurrent_layers
from ..models import recurrent_weights
from ..record.metrics import MetricsWriter, read_metrics
from ..record.result import Result, environment, running_code, wilson_interval
from ..record.tensorboard import TensorBoardWriter
from ..recurrence import resolve_backend
from ..recurrence.dispatch import auto_backend
from .evaluation import Evaluation
from .optimizer import learning_rates

if TYPE_CHECKING:
    from .loop import Run

LINE_EVERY = 30.0  # seconds between progress lines if stderr is not a terminal
LINE = "{desc}: step {n_fmt}/{total_fmt}, {rate_fmt}{postfix}, {remaining} left"


class Recorder:
    """Records what belongs to the step that ``run`` has reached, within a ``with`` block.

    Args:
        resume_step: the last step whose rows are kept; None for a fresh run.
    """

    def __init__(self, run: "Run", resume_step: int | None) -> None:
        self._run, self._folder = run, run.folder
        self._metrics = MetricsWriter(run.folder.metrics_path, resume_step)
        self._tensorboard = TensorBoardWriter(run.folder.path, resume_step)
        self._label = f"{run.folder.path.parent.name} seed {run.cfg.seed}"
        self._shown: dict[str, str] = {}
        self._began = self._last_line = time.monotonic()
        self._progress: dict[str, Any] = {"initial": run.step, "total": run.cfg.trainer.max_steps, "unit": "step"}
        # Without a terminal the bar is disabled, and lines are printed instead.
        self._bar = tqdm(desc=self._label, dynamic_ncols=True, file=sys.stderr, disable=None, **self._progress)
        resumed = "" if resume_step is None else f", resuming from the checkpoint at step {run.step}"
        self.say(f"{self._label}: {run.parameters:,} parameters{resumed}")

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._tensorboard.close()
        self._metrics.close()

    def say(self, message: str) -> None:
        """Print a line that stays."""
        tqdm.write(message, file=sys.stderr)

    def step_done(self) -> None:
        """Count a step in the progress."""
        self._bar.update()

    def training(self, sums: dict[str, float]) -> None:
        """Record the means of the meter's sums since the last row."""
        run, count = self._run, sums["count"]
        loss, norm = sums["loss"] / count, sums["grad_norm"] / count
        accuracy = run.objective.accuracy(sums["correct"], count * run.cfg.trainer.batch_size)
        rates, elapsed = learning_rates(run.optimizers), run.seconds - run.interval_seconds
        self._row("train", loss, accuracy, rates["lr"], norm)
        self._scalars(
            {"train/loss": loss, "train/accuracy": accuracy, "optimizer/grad_norm": norm}
            | {f"optimizer/{name}": rate for name, rate in rates.items()}
            | {"speed/steps_per_second": count / elapsed if elapsed > 0 else None}
        )
        self._show("train", f"loss {loss:.4f}", time.monotonic() - self._last_line >= LINE_EVERY)

    def validation(self, evaluation: Evaluation) -> None:
        """Record an evaluation on the validation split, and the recurrent weights."""
        loss, accuracy = evaluation.loss, evaluation.accuracy
        self._row("val", loss, accuracy)
        self._scalars({"eval/loss": loss, "eval/accuracy": accuracy})
        for number, weight in enumerate(recurrent_weights(self._run.model), start=1):
            real = weight.abs() if weight.is_complex() else weight
            self._tensorboard.histogram(f"recurrent_weight/layer{number}", real, self._run.step)
        self._show("val", f"val loss {loss:.4f}" if accuracy is None else f"val {accuracy:.2%}", True)

    def test(self, test: Evaluation, result: Result) -> None:
        """Record the evaluation on the test split, the command and the configuration."""
        # The run may have been killed between this row and its result.
        columns = read_metrics(self._folder.metrics_path)
        if not ((columns["split"] == "test") & (columns["step"] == self._run.step)).any():
            self._row("test", test.loss, test.accuracy)
        self._scalars({"test/loss": test.loss, "test/accuracy": test.accuracy})
        self._tensorboard.text("command", f"`{result.command}`")
        configuration = self._folder.config_path.read_text(encoding="utf-8")
        self._tensorboard.text("configuration", f"```yaml\n{configuration}```")

    def _row(self, split: str, *values: float | None) -> None:
        run = self._run
        self._metrics.row(run.step, run.sampler.epochs(run.step), run.seconds, split, *values)

    def _scalars(self, tags: dict[str, float | None]) -> None:
        self._tensorboard.scalars(self._run.step, tags)

    def _show(self, key: str, text: str, line_due: bool) -> None:
        """Show the latest values next to the bar, or in a line if one is due."""
        self._shown[key] = text
        values = ", ".join(self._shown.values())
        self._bar.set_postfix_str(values, refresh=False)
        if self._bar.disable and line_due:
            self._last_line = time.monotonic()
            elapsed, words = self._last_line - self._began, {"prefix": self._label, "postfix": values}
            self.say(tqdm.format_meter(self._run.step, elapsed=elapsed, bar_format=LINE, **words, **self._progress))


class SilentRecorder(Recorder):
    """Writes and prints nothing: for all processes but rank 0."""

    def __init__(self) -> None: ...

    def _ignore(self, *_: Any, **__: Any) -> None: ...

    say = step_done = training = validation = test = __exit__ = _ignore


def segment(run: "Run", fallbacks: dict[str, str]) -> dict[str, Any]:
    """What computes the run from here on, and in ``fallbacks`` what would be preferred but cannot be used."""
    precision, device = run.cfg.trainer.precision, run.device
    layers = [layer for _, layer in recurrent_layers(run.model)]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32  # of the sequences
    backends = {resolve_backend(layer.backend, device, dtype, layer.nonlinearity) for layer in layers}
    for layer in layers:
        if layer.backend == "auto":
            fallbacks |= auto_backend(device, dtype, layer.nonlinearity)[1]
    if not backends:
        recurrent = any(isinstance(module, nn.RNNBase) for module in run.model.modules())
        cudnn = recurrent and device.type == "cuda" and torch.backends.cudnn.is_available()
        backends = {"cudnn" if cudnn else "torch"}
        if precision == "bfloat16" and device.type == "cpu":
            fallbacks["bfloat16"] = "on a CPU only IndRNN layers compute in it"
            warnings.warn(f"the run uses float32 instead of bfloat16: {fallbacks['bfloat16']}", stacklevel=3)
    return {
        "step": run.step,
        "git": running_code(),
        "device": device.type,
        **environment(device),
        "processes": run.processes.size,
        "precision": precision,
        "backend": "+".join(sorted(backends)),
        "fallbacks": fallbacks,
    }


def build_result(run: "Run", test: Evaluation) -> Result:
    """The result of a finished run; ``test`` is the evaluation of the best checkpoint."""
    assert run.best is not None, "an evaluation precedes every end"
    return Result(
        model=run.cfg.model.name,
        task=run.task.name,
        name=run_name(run.cfg),
        seed=run.cfg.seed,
        parameters=run.parameters,
        best_step=run.best["step"],
        steps=run.step,
        epochs=run.sampler.epochs(run.step),
        val_accuracy=run.best["accuracy"],
        val_loss=run.best["loss"],
        test_accuracy=test.accuracy,
        test_loss=test.loss,
        test_ci95=None if test.accuracy is None else wilson_interval(test.correct, test.size),
        seconds=run.seconds,
        steps_per_second=run.step / run.seconds,
        peak_memory_bytes=run.peak_memory or None,
        backend="+".join(dict.fromkeys(each["backend"] for each in run.segments)),
        device_name=", then ".join(dict.fromkeys(each["device_name"] for each in run.segments)),
        precision=run.cfg.trainer.precision,
        data=run.data.provenance,
        versions=run.segments[-1]["versions"],
        git=run.segments[-1]["git"],
        command=run.folder.command,
        segments=run.segments,
    )
