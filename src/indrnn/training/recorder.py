"""What a run writes and prints: metrics.csv, TensorBoard events, result.json, and its progress on stderr."""

import sys
import time
from typing import Any

from tqdm import tqdm

from ..config.checks import run_name
from ..models import recurrent_weights
from ..record.folder import RunFolder
from ..record.metrics import MetricsWriter, read_metrics
from ..record.result import Result, wilson_interval
from ..record.tensorboard import TensorBoardWriter
from .evaluation import Evaluation
from .optimizer import learning_rates
from .state import RunState

LINE_EVERY = 30.0  # seconds between progress lines if stderr is not a terminal
LINE = "{desc}: step {n_fmt}/{total_fmt}, {rate_fmt}{postfix}, {remaining} left"


class Recorder:
    """Records what belongs to the step that ``state`` has reached, within a ``with`` block.

    Args:
        resume_step: the last step whose rows are kept; None for a fresh run.
    """

    def __init__(self, state: RunState, folder: RunFolder, resume_step: int | None) -> None:
        cfg = state.cfg
        self._state, self._folder = state, folder
        self._metrics = MetricsWriter(folder.metrics_path, resume_step)
        self._tensorboard = TensorBoardWriter(folder.path, resume_step)
        self._label = f"{folder.path.parent.name} seed {cfg.seed}"
        self._shown: dict[str, str] = {}
        self._initial, self._began = state.position.step, time.monotonic()
        self._last_line = self._began
        # Without a terminal the bar is disabled, and lines are printed instead.
        self._bar = tqdm(
            desc=self._label, initial=self._initial, total=cfg.trainer.max_steps, unit="step", dynamic_ncols=True,
            file=sys.stderr, disable=None,
        )  # fmt: skip

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
        state, position, count = self._state, self._state.position, sums["count"]
        loss, norm = sums["loss"] / count, sums["grad_norm"] / count
        accuracy = state.objective.accuracy(sums["correct"], count * state.cfg.trainer.batch_size)
        rates, elapsed = learning_rates(state.optimizers), position.seconds - position.interval_seconds
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
        for number, weight in enumerate(recurrent_weights(self._state.model), start=1):
            real = weight.abs() if weight.is_complex() else weight
            self._tensorboard.histogram(f"recurrent_weight/layer{number}", real, self._state.position.step)
        self._show("val", f"val loss {loss:.4f}" if accuracy is None else f"val {accuracy:.2%}", True)

    def test(self, test: Evaluation, result: Result) -> None:
        """Record the evaluation on the test split, the command and the configuration."""
        # The run may have been killed between this row and its result.
        columns = read_metrics(self._folder.metrics_path)
        if not ((columns["split"] == "test") & (columns["step"] == self._state.position.step)).any():
            self._row("test", test.loss, test.accuracy)
        self._scalars({"test/loss": test.loss, "test/accuracy": test.accuracy})
        self._scalars({"eval/best_loss": result.val_loss, "eval/best_accuracy": result.val_accuracy})
        self._tensorboard.text("command", f"`{result.command}`")
        configuration = self._folder.config_path.read_text(encoding="utf-8")
        self._tensorboard.text("configuration", f"```yaml\n{configuration}```")

    def _row(self, split: str, *values: float | None) -> None:
        step, seconds = self._state.position.step, self._state.position.seconds
        self._metrics.row(step, self._state.sampler.epochs(step), seconds, split, *values)

    def _scalars(self, tags: dict[str, float | None]) -> None:
        self._tensorboard.scalars(self._state.position.step, tags)

    def _show(self, key: str, text: str, line_due: bool) -> None:
        """Show the latest values next to the bar, or in a line if one is due."""
        self._shown[key] = text
        values = ", ".join(self._shown.values())
        self._bar.set_postfix_str(values, refresh=False)
        if self._bar.disable and line_due:
            self._last_line = time.monotonic()
            line = tqdm.format_meter(
                self._state.position.step, self._state.cfg.trainer.max_steps, self._last_line - self._began,
                prefix=self._label, postfix=values, unit="step", initial=self._initial, bar_format=LINE,
            )  # fmt: skip
            print(line, file=sys.stderr, flush=True)


class SilentRecorder(Recorder):
    """Writes and prints nothing: for all processes but rank 0."""

    def __init__(self) -> None: ...

    def _ignore(self, *_: Any, **__: Any) -> None: ...

    say = step_done = training = validation = test = __exit__ = _ignore


def build_result(state: RunState, command: str, test: Evaluation) -> Result:
    """The result of a finished run; ``test`` is the evaluation of the best checkpoint."""
    cfg, position, best, segments = state.cfg, state.position, state.best, state.segments
    assert best is not None, "an evaluation precedes every end"
    return Result(
        model=cfg.model.name,
        task=state.task.name,
        name=run_name(cfg),
        seed=cfg.seed,
        parameters=state.parameters,
        best_step=best["step"],
        steps=position.step,
        epochs=state.sampler.epochs(position.step),
        val_accuracy=best["accuracy"],
        val_loss=best["loss"],
        test_accuracy=test.accuracy,
        test_loss=test.loss,
        test_ci95=None if test.accuracy is None else wilson_interval(test.correct, test.size),
        seconds=position.seconds,
        steps_per_second=position.step / position.seconds,
        peak_memory_bytes=position.peak_memory or None,
        backend="+".join(dict.fromkeys(segment["backend"] for segment in segments)),
        device_name=", then ".join(dict.fromkeys(segment["device_name"] for segment in segments)),
        precision=cfg.trainer.precision,
        data=state.data.provenance,
        versions=segments[-1]["versions"],
        git=segments[-1]["git"],
        command=command,
        segments=segments,
    )
