"""A run from its first step, or from its checkpoint, to its result: the order of events.

After every step, in this order, whatever is due: a row of training figures, an evaluation on the validation split (and
best.pt), a checkpoint. Everything that decides how training goes on is in `Progressed` and the tensors beside it, so
that a checkpoint taken there and continued is the same run.
"""

import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from ..data import make_task
from ..errors import RunError
from ..models import build_model
from ..record import MetricsWriter, Result, RunFolder, TensorBoardWriter, running_code, write_result
from ..record.compare import fingerprint
from .checkpoint import (
    copied_weights,
    load_weights,
    optimizer_state,
    random_state,
    read_checkpoint,
    require_same_run,
    require_whole,
    restore_optimizer,
    restore_random_state,
    save_checkpoint,
)
from .device import (
    computing,
    flush_denormals,
    keep_freed_memory,
    peak_memory_bytes,
    reset_peak_memory,
    set_precision,
    synchronise,
)
from .diagnose import first_non_finite
from .evaluate import Evaluation, evaluate, reestimate_batch_norm
from .graph import CaptureError, GraphedStep
from .interrupt import Interrupted, Interrupts
from .objective import Objective
from .optimizer import build_optimizer, rate_tensor
from .order import DataOrder
from .outcome import changes, make_result, passed_over, recurrent_weights, segment, test_row_written
from .progress import Progress
from .schedule import build_schedule
from .seeds import Stream, torch_seed
from .step import TrainingStep


@dataclass
class Progressed:
    """How far a run is, in plain values."""

    step: int = 0
    """Updates made."""
    observed: int = 0
    """All that was due up to and including this step has been done and recorded."""
    seconds: float = 0.0
    """Spent on training steps alone."""
    interval_seconds: float = 0.0
    """`seconds` at the last row of training figures."""
    peak_memory: int = 0
    warned: bool = False


class Training:
    """One run in this process. Use: ``Training(cfg, folder, device).run()``."""

    def __init__(self, cfg: DictConfig, folder: RunFolder, device: torch.device) -> None:
        # The code as it is loaded, not as it may lie there once the data is.
        code = running_code()
        # Before any operator wakes worker threads.
        flush_denormals(device)
        keep_freed_memory()
        set_precision(cfg.trainer.precision, device)
        reset_peak_memory(device)
        self.cfg, self.folder, self.device = cfg, folder, device
        self.task = make_task(cfg.data)
        self.data = self.task.load(device)
        torch.manual_seed(torch_seed(cfg.seed, Stream.INITIALISATION))
        self.model = build_model(cfg).to(device)
        self.objective = Objective(self.task)
        self.order = DataOrder(self.data.train.size, cfg.trainer.batch_size, cfg.seed, device)
        self.optimizer = build_optimizer(self.model, cfg.optimizer, device)
        self.schedule = build_schedule(cfg.schedule, cfg.optimizer.lr, cfg.trainer.max_steps)
        self.update = TrainingStep(self.model, self.optimizer, self.objective, self.data.train, cfg.trainer, device)
        self.at = Progressed()
        self.best: dict[str, Any] | None = None
        self.segments: list[dict[str, Any]] = []
        self._rate: float | None = None
        self._clock: float | None = None
        content = None
        if folder.state == "resume":
            content = read_checkpoint(folder.checkpoint_path)
            require_same_run(content, cfg, self.data.provenance, folder.checkpoint_path)
            load_weights(self.model, content["model"], folder.checkpoint_path)
        # What was to be used and is not -> why.
        self.fallbacks = passed_over(self.model, device, cfg.trainer.precision)
        self._step = self._rehearse()
        self._restore(content)
        self.segments.append(segment(self.at.step, self.model, device, cfg.trainer.precision, code, self.fallbacks))

    def run(self) -> Result:
        """Train to the end and write result.json. Raises Interrupted after SIGINT or SIGTERM (if it came too late to
        stop the run, once that is finished), RunError if a loss is not finite or a file cannot be written; the last
        checkpoint is whole in either case."""
        cfg, at, folder = self.cfg, self.at, self.folder
        folder.begin()
        resume_step = at.observed if folder.state == "resume" else None
        self._consistent_best()
        label = f"{folder.path.parent.name} seed {cfg.seed}"
        with (
            MetricsWriter(folder.metrics_path, resume_step) as self.metrics,
            TensorBoardWriter(folder.path, cfg.model.name, self.task.name, resume_step) as self.tensorboard,
            Interrupts() as self.interrupts,
        ):
            self.progress = Progress(label, at.step, cfg.trainer.max_steps)
            try:
                if folder.state == "resume":
                    self.progress.say(f"{label}: going on from the checkpoint at step {at.step}{self._elsewhere()}")
                self._train()
                result = self._finish()
            except _Stop:
                raise Interrupted(self._farewell(), self.interrupts.received or 0) from None
            finally:
                self.progress.close()
        if self.interrupts.received:
            raise Interrupted(f"stopped after {label} was finished: {folder.path}", self.interrupts.received)
        return result

    # Training

    def _train(self) -> None:
        trainer = self.cfg.trainer
        saved = self.at.step
        while True:
            try:
                self._observe()
            except _Stop:
                self._save()
                raise
            over = self._over()
            if over or self.interrupts.received or self.at.step % trainer.checkpoint_every == 0:
                if self.at.step != saved or over:
                    self._save()
                    saved = self.at.step
                if over:
                    return
                self._between()
            self._advance()

    def _advance(self) -> None:
        if self._clock is None:
            self._clock = time.perf_counter()
        rate = self.schedule.rate(self.at.step)
        if rate != self._rate:
            rate_tensor(self.optimizer).fill_(rate)
            self._rate = rate
        self._step(self.order.indices(self.at.step))
        self.at.step += 1
        self.progress.advance()

    def _over(self) -> bool:
        trainer = self.cfg.trainer
        if self.at.observed != self.at.step or self.best is None:
            return False
        accuracy, target = self.best["accuracy"], trainer.target_accuracy
        reached = accuracy is not None and target is not None and accuracy > target
        return reached or self.schedule.finished or self.at.step >= trainer.max_steps

    def _observe(self) -> None:
        """Record and evaluate what is due at this step, once."""
        at, trainer = self.at, self.cfg.trainer
        if at.observed == at.step:
            return
        last = at.step >= trainer.max_steps
        log, evaluation = at.step % trainer.log_every == 0 or last, None
        if at.step % trainer.eval_every == 0 or last:
            self._read_meter()
            evaluation = self._evaluate()
        # Rows follow the evaluation, which may be broken off: it is then as if nothing had been due yet.
        if log:
            self._log()
        if evaluation is not None:
            self._record(evaluation)
        at.observed = at.step

    def _log(self) -> None:
        at, cfg = self.at, self.cfg
        sums = self._read_meter()
        count = sums["count"]
        loss, norm = sums["loss"] / count, sums["grad_norm"] / count
        accuracy = self.objective.accuracy(sums["correct"], count * cfg.trainer.batch_size)
        elapsed = at.seconds - at.interval_seconds
        speed = count / elapsed if elapsed > 0 else None
        rate = self.schedule.rate(at.step - 1)
        self.metrics.row(at.step, self.order.epochs(at.step), at.seconds, "train", loss, accuracy, rate, norm)
        tags = {"train/loss": loss, "train/accuracy": accuracy, "lr": rate, "grad_norm": norm}
        self.tensorboard.scalars(at.step, {**tags, "steps_per_second": speed})
        self.progress.trained(at.step, loss, speed or 0.0)
        self.update.meter.clear()
        at.interval_seconds = at.seconds

    def _read_meter(self) -> dict[str, float]:
        """The sums of the interval so far. Raises RunError if a step was not finite. Waits for the device."""
        self._stop_clock()
        sums = self.update.meter.read()
        if sums["first_bad"] >= 0:
            step = int(sums["first_bad"])
            self._fail("loss or gradient", step, self.data.train, self.order.indices(step - 1), training=True)
        return sums

    def _evaluate(self) -> Evaluation:
        trainer = self.cfg.trainer
        samples = self.order.norm_samples(trainer.bn_samples, self.at.step)
        try:
            with computing(trainer.precision, self.device):
                reestimate_batch_norm(self.model, self.data.train, samples, trainer.eval_batch_size)
                return self._over_all_of(self.data.validation, "validation loss")
        finally:
            self.model.train()

    def _over_all_of(self, split: Any, figure: str) -> Evaluation:
        """Raises RunError if the loss is not finite."""
        size = self.cfg.trainer.eval_batch_size
        found = evaluate(self.model, split, self.objective, size, self.device, self._between)
        if found.bad is not None:
            self._fail(figure, self.at.step, split, found.bad, training=False)
        return found

    def _record(self, found: Evaluation) -> None:
        """Rows, the schedule and the best checkpoint after an evaluation on validation; back to that one where the
        schedule says so."""
        at = self.at
        self.metrics.row(at.step, self.order.epochs(at.step), at.seconds, "val", found.loss, found.accuracy)
        self.tensorboard.scalars(at.step, {"val/loss": found.loss, "val/accuracy": found.accuracy})
        for number, weight in enumerate(recurrent_weights(self.model), start=1):
            self.tensorboard.histogram(f"recurrent_weight/layer{number}", weight, at.step)
        self.progress.evaluated(at.step, found.loss, found.accuracy)
        if found.near_chance and not at.warned:
            self.progress.say(_nothing_learnt(at.step, found))
            at.warned = True
        go_back = self.schedule.observe(found.score)
        if self.best is None or found.score > self.best["score"]:
            self.best = {
                "step": at.step,
                "score": found.score,
                "accuracy": found.accuracy,
                "loss": found.loss,
                "model": copied_weights(self.model),
            }
            if self.schedule.restores_best:
                self.best["optimizer"] = optimizer_state(self.model, self.optimizer)
            save_checkpoint(self.folder.best_path, self.best)
        elif go_back:
            self.progress.say(
                f"step {at.step}: the learning rate drops; going on from the best step, {self.best['step']}"
            )
            load_weights(self.model, self.best["model"], self.folder.best_path)
            restore_optimizer(self.model, self.optimizer, self.best["optimizer"])

    def _finish(self) -> Result:
        """Read the test split once, with the weights that validation chose and the statistics they were judged with."""
        at, folder, best = self.at, self.folder, self.best
        assert best is not None, "an evaluation precedes every end"
        load_weights(self.model, best["model"], folder.best_path)
        with computing(self.cfg.trainer.precision, self.device):
            found = self._over_all_of(self.data.test, "test loss")
        if not test_row_written(folder.metrics_path, at.step):
            self.metrics.row(at.step, self.order.epochs(at.step), at.seconds, "test", found.loss, found.accuracy)
        self.tensorboard.scalars(at.step, {"test/loss": found.loss, "test/accuracy": found.accuracy})
        result = make_result(
            self.cfg, folder.command, self.task, self.data.provenance, self.model, self.segments, best, found,
            steps=at.step, epochs=self.order.epochs(at.step), seconds=at.seconds, peak_memory=self._peak_memory(),
        )  # fmt: skip
        self.tensorboard.hparams(
            {"lr": self.cfg.optimizer.lr, "batch_size": self.cfg.trainer.batch_size, "seed": self.cfg.seed},
            {"hparam/val_accuracy": result.val_accuracy, "hparam/test_accuracy": result.test_accuracy},
        )
        write_result(folder.result_path, result)
        return result

    # Start-up and checkpoints

    def _rehearse(self) -> Any:
        """Make a step ahead of the run, so that compiling, allocating or capturing is done before the clock starts and
        the optimizer has its state; `_restore` then undoes it in place. Returns the function to call for each step."""
        weights = copied_weights(self.model)
        self.model.train()
        indices = self.order.indices(0)
        step: Any = self.update
        if self.device.type == "cuda" and self.cfg.trainer.cuda_graph:
            try:
                step = GraphedStep(self.update, indices, self.device)
            except CaptureError as failure:
                if self.cfg.trainer.cuda_graph != "auto":
                    raise
                self.fallbacks["cuda_graph"] = failure.reason
                warnings.warn(
                    f"the training step runs without a CUDA graph, which is slow: it cannot be captured "
                    f"({failure.reason}); please report it, with indrnn-info's output",
                    stacklevel=2,
                )
        if step is self.update:
            step(indices)
        synchronise(self.device)
        load_weights(self.model, weights, self.folder.checkpoint_path)
        return step

    def _restore(self, content: dict[str, Any] | None) -> None:
        """Everything but the weights as the checkpoint has it, or as at step 0."""
        meter = self.update.meter
        if content is None:
            restore_optimizer(self.model, self.optimizer, {})
            meter.reset()
            torch.manual_seed(torch_seed(self.cfg.seed, Stream.DROPOUT))
            return
        require_whole(content, self._content(), self.schedule.restores_best, self.folder.checkpoint_path)
        restore_optimizer(self.model, self.optimizer, content["optimizer"])
        meter.restore(content["meter"])
        restore_random_state(content["random"], self.device, self.folder.checkpoint_path)
        self.schedule.restore(content["schedule"])
        self.at = Progressed(**{name: content["progressed"][name] for name in asdict(self.at)})
        self.best = content["best"]
        # Before there were segments, a checkpoint held the number of threads alone.
        self.segments = content.get("segments") or [{"num_threads": content.get("threads")}]

    def _content(self) -> dict[str, Any]:
        """What a checkpoint holds, as it would be now."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": optimizer_state(self.model, self.optimizer),
            "meter": self.update.meter.state(),
            "random": random_state(self.device),
            "schedule": self.schedule.state(),
            "progressed": asdict(self.at),
            "best": self.best,
            "fingerprint": fingerprint(self.cfg, self.data.provenance),
            "segments": self.segments,
        }

    def _save(self) -> None:
        self._read_meter()
        self.at.peak_memory = self._peak_memory() or 0
        save_checkpoint(self.folder.checkpoint_path, self._content())

    def _consistent_best(self) -> None:
        """best.pt as checkpoint.pt knows it: a kill may have come between the two."""
        if self.best is not None:
            save_checkpoint(self.folder.best_path, self.best)
        else:
            self.folder.best_path.unlink(missing_ok=True)

    def _peak_memory(self) -> int | None:
        here = peak_memory_bytes(self.device)
        return None if here is None else max(here, self.at.peak_memory)

    # Stopping

    def _stop_clock(self) -> None:
        if self._clock is not None:
            synchronise(self.device)
            self.at.seconds += time.perf_counter() - self._clock
            self._clock = None

    def _between(self) -> None:
        if self.interrupts.received:
            raise _Stop

    def _farewell(self) -> str:
        again = f": {self.folder.command}" if self.folder.command else ""
        return f"stopped at step {self.at.step}, saved in {self.folder.path}; go on with the same command{again}"

    def _elsewhere(self) -> str:
        differ = changes(self.segments)
        return f", which was made elsewhere ({differ}), so that figures may differ from here on" if differ else ""

    def _fail(self, figure: str, step: int, split: Any, indices: torch.Tensor, training: bool) -> None:
        # No update followed the bad one, so the model still has the weights it started from.
        where = first_non_finite(
            self.model, self.objective, split, indices, self.update.precision, self.device, training
        )  # fmt: skip
        path = self.folder.checkpoint_path
        good = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint had been written yet"
        raise RunError(
            f"the {figure} is not finite at step {step}, first in the {where}; {good}; try a lower "
            "optimizer.lr or trainer.clip_norm"
        )


class _Stop(Exception):  # noqa: N818
    """A signal came; unwinds to where a checkpoint can be written."""


def _nothing_learnt(step: int, found: Evaluation) -> str:
    if found.accuracy is None:
        return (
            f"validation error {found.loss:.4f} at step {step}: always answering the mean has {found.chance:.4f}, so "
            "the network has learnt nothing yet"
        )
    return (
        f"validation accuracy {found.accuracy:.4f} at step {step}: the share of the most frequent class is "
        f"{found.chance:.4f}, so the network has learnt nothing yet"
    )
