"""What a run writes into its folder and says on stderr while it trains: metrics.csv, TensorBoard events, progress."""

from types import TracebackType

import torch
from torch import nn

from ..config.checks import result_keys
from ..config.schema import Config
from ..data import Task
from ..models import recurrent_weights
from ..record import MetricsWriter, Result, RunFolder, TensorBoardWriter, read_metrics
from ..record.tensorboard import confusion_matrix, digits_page
from .console import Progress
from .evaluate import Evaluation


class Recorder:
    """Open within a ``with`` block. ``resume_step``: the last step whose rows are kept; None for a fresh run."""

    def __init__(self, cfg: Config, folder: RunFolder, task: Task, step: int, resume_step: int | None) -> None:
        self._cfg, self._folder, self._task = cfg, folder, task
        self._metrics = MetricsWriter(folder.metrics_path, resume_step)
        self._tensorboard = TensorBoardWriter(folder.path, cfg.model.name, task.name, resume_step)
        self._progress = Progress(f"{folder.path.parent.name} seed {cfg.seed}", step, cfg.trainer.max_steps)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.close()
        self._tensorboard.close()
        self._metrics.close()

    def say(self, message: str) -> None:
        """A line that stays."""
        self._progress.say(message)

    def step_made(self) -> None:
        self._progress.advance()

    def training(
        self,
        step: int,
        epoch: float,
        seconds: float,
        *,
        loss: float,
        accuracy: float | None,
        rate: float,
        norm: float,
        speed: float | None,
    ) -> None:
        """Means over the steps since the last row; ``rate``: of learning; ``speed``: steps a second."""
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
        """A run that was killed just before its result has the row already."""
        loss, accuracy = evaluation.loss, evaluation.accuracy
        columns = read_metrics(self._folder.metrics_path)
        if not ((columns["split"] == "test") & (columns["step"] == step)).any():
            self._metrics.row(step, epoch, seconds, "test", loss, accuracy)
        self._tensorboard.scalars(step, {"test/loss": loss, "test/accuracy": accuracy})

    def pictures(self, step: int, evaluation: Evaluation) -> None:
        """How the classes of the test split were answered and, where a sequence is an image, its first ones."""
        if evaluation.outputs is None or evaluation.targets is None or evaluation.inputs is None:
            return
        probabilities, answers = evaluation.outputs.float().softmax(1).max(1)
        targets = evaluation.targets.numpy()
        matrix = confusion_matrix(answers.numpy(), targets, evaluation.outputs.shape[1])
        self._tensorboard.picture("test/confusion", matrix, step)
        if self._task.picture is None:
            return
        shown = len(evaluation.inputs)
        images = torch.stack([self._task.picture(sequence) for sequence in evaluation.inputs.float()]).numpy()
        page = digits_page(images, answers[:shown].numpy(), probabilities[:shown].numpy(), targets[:shown])
        self._tensorboard.picture("test/digits", page, step)

    def result(self, result: Result) -> None:
        self._tensorboard.hparams({**result_keys(self._cfg), "parameters": result.parameters})
        self._tensorboard.text("command", f"`{result.command}`")
        configuration = self._folder.config_path.read_text(encoding="utf-8")
        self._tensorboard.text("configuration", f"```yaml\n{configuration}```")


class SilentRecorder(Recorder):
    """Of a process that leaves writing and speaking to another."""

    def __init__(self) -> None:
        pass

    def _ignore(self, *_: object, **__: object) -> None:
        pass

    say = step_made = training = validation = test = pictures = result = __exit__ = _ignore
