"""What a run writes and prints while it trains: metrics.csv, TensorBoard events, and its progress on stderr (a bar on a
terminal, otherwise a line now and then)."""

import sys
import time

import torch
from tqdm import tqdm

from ..config.checks import result_keys
from ..models import recurrent_weights
from ..record.folder import RunFolder
from ..record.metrics import MetricsWriter, read_metrics
from ..record.result import Result
from ..record.tensorboard import TensorBoardWriter, confusion_matrix, digits_page
from .evaluation import Evaluation, spread_indices
from .state import TrainingState

LINE_EVERY = 30.0  # seconds between lines when stderr is not a terminal


class Recorder:
    """Open within a ``with`` block. What is written belongs to the step that ``state`` has reached. ``resume_step``:
    the last step whose rows are kept; None for a fresh run."""

    def __init__(self, state: TrainingState, folder: RunFolder, resume_step: int | None) -> None:
        cfg = state.cfg
        self._state, self._folder, self._max_steps = state, folder, cfg.trainer.max_steps
        self._label = f"{folder.path.parent.name} seed {cfg.seed}"
        self._metrics = MetricsWriter(folder.metrics_path, resume_step)
        self._tensorboard = TensorBoardWriter(folder.path, cfg.model.name, state.task.name, resume_step)
        # What the progress shows beside the step.
        self._train = self._validation = ""
        self._speed = 0.0
        self._last_line = time.monotonic()
        self._bar = (
            tqdm(
                desc=self._label, initial=state.position.step, total=self._max_steps, unit="step", dynamic_ncols=True,
                file=sys.stderr,
            )
            if sys.stderr.isatty()
            else None
        )  # fmt: skip

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self._tensorboard.close()
        self._metrics.close()

    def say(self, message: str) -> None:
        """Print a line that stays."""
        if self._bar is None:
            print(message, file=sys.stderr, flush=True)
        else:
            self._bar.write(message, file=sys.stderr)

    def step_done(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def training(self, loss: float, accuracy: float | None, share: float, norm: float, speed: float | None) -> None:
        """Means over the steps since the last row; ``share``: of the peak learning rates; ``speed``: steps per
        second."""
        optimizer = self._state.cfg.optimizer
        rates = {key: share * getattr(optimizer, key) for key in ("lr", "muon_lr") if hasattr(optimizer, key)}
        self._row("train", loss, accuracy, rates["lr"], norm)
        tags = {"train/loss": loss, "train/accuracy": accuracy, "optimizer/grad_norm": norm}
        tags |= {f"optimizer/{key}": rate for key, rate in rates.items()}
        self._scalars({**tags, "speed/steps_per_second": speed})
        self._train, self._speed = f"loss {loss:.4f}", speed or 0.0
        self._show(time.monotonic() - self._last_line >= LINE_EVERY)

    def validation(self, evaluation: Evaluation) -> None:
        loss, accuracy = evaluation.loss, evaluation.accuracy
        self._row("val", loss, accuracy)
        self._scalars({"eval/loss": loss, "eval/accuracy": accuracy})
        for number, weight in enumerate(recurrent_weights(self._state.model), start=1):
            self._tensorboard.histogram(f"recurrent_weight/layer{number}", weight, self._state.position.step)
        self._validation = f"val loss {loss:.4f}" if accuracy is None else f"val {accuracy:.2%}"
        self._show(True)

    def finished(self, test: Evaluation, result: Result) -> None:
        """The test figures, some pictures, the hyperparameters and the configuration. The row is skipped if it exists:
        the run may have been killed between it and its result."""
        loss, accuracy = test.loss, test.accuracy
        columns = read_metrics(self._folder.metrics_path)
        if not ((columns["split"] == "test") & (columns["step"] == self._state.position.step)).any():
            self._row("test", loss, accuracy)
        self._scalars({"test/loss": loss, "test/accuracy": accuracy})
        self._scalars({"eval/best_loss": result.val_loss, "eval/best_accuracy": result.val_accuracy})
        self._pictures(test)
        self._tensorboard.hparams({**result_keys(self._state.cfg), "parameters": result.parameters})
        self._tensorboard.text("command", f"`{result.command}`")
        configuration = self._folder.config_path.read_text(encoding="utf-8")
        self._tensorboard.text("configuration", f"```yaml\n{configuration}```")

    def _pictures(self, test: Evaluation) -> None:
        """The confusion matrix of the test split and, if sequences are images, some images with the answers."""
        if test.outputs is None or test.targets is None or test.inputs is None:
            return
        step, to_image = self._state.position.step, self._state.task.picture
        probabilities, answers = test.outputs.float().softmax(1).max(1)
        targets = test.targets.numpy()
        matrix = confusion_matrix(answers.numpy(), targets, test.outputs.shape[1])
        self._tensorboard.picture("test/confusion", matrix, step)
        if to_image is None:
            return
        shown = spread_indices(test.size, len(test.inputs))
        images = torch.stack([to_image(sequence) for sequence in test.inputs])
        page = digits_page(images.numpy(), answers[shown].numpy(), probabilities[shown].numpy(), targets[shown])
        self._tensorboard.picture("test/digits", page, step)

    def _row(self, split: str, *figures: float | None) -> None:
        step, seconds = self._state.position.step, self._state.position.seconds
        self._metrics.row(step, self._state.order.epochs(step), seconds, split, *figures)

    def _scalars(self, tags: dict[str, float | None]) -> None:
        self._tensorboard.scalars(self._state.position.step, tags)

    def _show(self, line_due: bool) -> None:
        """Show the latest figures behind the bar, or in a line if one is due."""
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, (self._train, self._validation))), refresh=False)
        elif line_due:
            self._last_line, step, speed = time.monotonic(), self._state.position.step, self._speed
            rate = f"{speed:.1f} steps/s" if speed else ""
            left = f"{tqdm.format_interval((self._max_steps - step) / speed)} left" if speed else ""
            parts = (f"{self._label}: step {step}/{self._max_steps}", rate, self._train, self._validation, left)
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


class SilentRecorder(Recorder):
    """For the processes that do not lead: nothing is written or printed."""

    def __init__(self) -> None:
        pass

    def _ignore(self, *_: object, **__: object) -> None:
        pass

    say = step_done = training = validation = finished = __exit__ = _ignore
