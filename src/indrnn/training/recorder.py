"""What a run writes and prints while it trains: metrics.csv, TensorBoard events, and its progress on stderr (a bar on a
terminal, otherwise a line now and then)."""

import sys
import time

import torch
from torch import nn
from tqdm import tqdm

from ..config.checks import result_keys
from ..config.schema import Config
from ..data import Task
from ..models import recurrent_weights
from ..record.folder import RunFolder
from ..record.metrics import MetricsWriter, read_metrics
from ..record.result import Result
from ..record.tensorboard import TensorBoardWriter, confusion_matrix, digits_page
from .evaluation import Evaluation, spread_indices

LINE_EVERY = 30.0  # seconds between lines when stderr is not a terminal


class Progress:
    """Steps done, steps/s, training loss, last validation accuracy (or loss) and time left."""

    def __init__(self, label: str, step: int, max_steps: int) -> None:
        self._label = label
        self._max_steps = max_steps
        self._train = self._validation = ""
        self._rate = 0.0
        self._last_line = time.monotonic()
        self._bar = (
            tqdm(desc=label, initial=step, total=max_steps, unit="step", dynamic_ncols=True, file=sys.stderr)
            if sys.stderr.isatty()
            else None
        )

    def advance(self) -> None:
        """Count one more step."""
        if self._bar is not None:
            self._bar.update()

    def trained(self, step: int, loss: float, rate: float) -> None:
        """A log interval has ended; `rate` in steps/s."""
        self._train, self._rate = f"loss {loss:.4f}", rate
        if self._bar is None and time.monotonic() - self._last_line >= LINE_EVERY:
            self._line(step)
        self._show()

    def evaluated(self, step: int, loss: float, accuracy: float | None) -> None:
        self._validation = f"val loss {loss:.4f}" if accuracy is None else f"val {accuracy:.2%}"
        if self._bar is None:
            self._line(step)
        self._show()

    def say(self, message: str) -> None:
        """Print a line that stays."""
        if self._bar is None:
            print(message, file=sys.stderr, flush=True)
        else:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, (self._train, self._validation))), refresh=False)

    def _line(self, step: int) -> None:
        self._last_line = time.monotonic()
        left = f"{tqdm.format_interval((self._max_steps - step) / self._rate)} left" if self._rate else ""
        rate = f"{self._rate:.1f} steps/s" if self._rate else ""
        parts = (f"{self._label}: step {step}/{self._max_steps}", rate, self._train, self._validation, left)
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


class Recorder:
    """Open within a ``with`` block. ``resume_step``: the last step whose rows are kept; None for a fresh run."""

    def __init__(self, cfg: Config, folder: RunFolder, task: Task, step: int, resume_step: int | None) -> None:
        self._cfg, self._folder, self._task = cfg, folder, task
        self._metrics = MetricsWriter(folder.metrics_path, resume_step)
        self._tensorboard = TensorBoardWriter(folder.path, cfg.model.name, task.name, resume_step)
        self._progress = Progress(f"{folder.path.parent.name} seed {cfg.seed}", step, cfg.trainer.max_steps)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        self._tensorboard.close()
        self._metrics.close()

    def say(self, message: str) -> None:
        """Print a line that stays."""
        self._progress.say(message)

    def step_done(self) -> None:
        self._progress.advance()

    def training(
        self, step: int, epoch: float, seconds: float,
        *, loss: float, accuracy: float | None, rate: float, norm: float, speed: float | None,
    ) -> None:  # fmt: skip
        """Means over the steps since the last row; ``rate``: the learning rate; ``speed``: steps a second."""
        self._metrics.row(step, epoch, seconds, "train", loss, accuracy, rate, norm)
        tags = {"train/loss": loss, "train/accuracy": accuracy, "optimizer/lr": rate, "optimizer/grad_norm": norm}
        self._tensorboard.scalars(step, {**tags, "speed/steps_per_second": speed})
        self._progress.trained(step, loss, speed or 0.0)

    def validation(self, step: int, epoch: float, seconds: float, evaluation: Evaluation, model: nn.Module) -> None:
        loss, accuracy = evaluation.loss, evaluation.accuracy
        self._metrics.row(step, epoch, seconds, "val", loss, accuracy)
        self._tensorboard.scalars(step, {"eval/loss": loss, "eval/accuracy": accuracy})
        for number, weight in enumerate(recurrent_weights(model), start=1):
            self._tensorboard.histogram(f"recurrent_weight/layer{number}", weight, step)
        self._progress.evaluated(step, loss, accuracy)

    def test(self, step: int, epoch: float, seconds: float, evaluation: Evaluation) -> None:
        """Skips the row if it exists: the run may have been killed between this row and its result."""
        loss, accuracy = evaluation.loss, evaluation.accuracy
        columns = read_metrics(self._folder.metrics_path)
        if not ((columns["split"] == "test") & (columns["step"] == step)).any():
            self._metrics.row(step, epoch, seconds, "test", loss, accuracy)
        self._tensorboard.scalars(step, {"test/loss": loss, "test/accuracy": accuracy})

    def pictures(self, step: int, evaluation: Evaluation) -> None:
        """The confusion matrix of the test split and, if sequences are images, some images with the answers."""
        if evaluation.outputs is None or evaluation.targets is None or evaluation.inputs is None:
            return
        probabilities, answers = evaluation.outputs.float().softmax(1).max(1)
        targets = evaluation.targets.numpy()
        matrix = confusion_matrix(answers.numpy(), targets, evaluation.outputs.shape[1])
        self._tensorboard.picture("test/confusion", matrix, step)
        if self._task.picture is None:
            return
        shown = spread_indices(evaluation.size, len(evaluation.inputs))
        images = torch.stack([self._task.picture(sequence) for sequence in evaluation.inputs])
        page = digits_page(images.numpy(), answers[shown].numpy(), probabilities[shown].numpy(), targets[shown])
        self._tensorboard.picture("test/digits", page, step)

    def result(self, result: Result) -> None:
        self._tensorboard.hparams({**result_keys(self._cfg), "parameters": result.parameters})
        self._tensorboard.text("command", f"`{result.command}`")
        configuration = self._folder.config_path.read_text(encoding="utf-8")
        self._tensorboard.text("configuration", f"```yaml\n{configuration}```")


class SilentRecorder(Recorder):
    """For the processes that do not lead: nothing is written or printed."""

    def __init__(self) -> None:
        pass

    def _ignore(self, *_: object, **__: object) -> None:
        pass

    say = step_done = training = validation = test = pictures = result = __exit__ = _ignore
