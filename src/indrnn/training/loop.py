"""train(cfg): the order of events in a run, from its first step or its checkpoint to its result.

After each step these follow in this order, if due: a training row, an evaluation on the validation split (and best.pt),
a checkpoint. Everything that decides how training continues is in the checkpoint, so a resumed run is the same run.
"""

import copy
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..config.compose import check, result_keys
from ..config.schema import Config
from ..data import make_task
from ..errors import RunError
from ..models import build_model, recurrent_weights
from ..record.config_diff import fingerprint, fingerprint_differences
from ..record.folder import RunFolder, open_run, run_folder
from ..record.recorder import Recorder, SilentRecorder
from ..record.result import Result, read_result, running_code, write_result
from .checkpoint import (
    damage_reported,
    random_state,
    read_checkpoint,
    restore_optimizers,
    restore_random_state,
    save_checkpoint,
    save_weights,
)
from .device import (
    autocast_context,
    prepare_process,
    resolve_device,
    return_freed_memory,
    set_precision,
    torch_defaults,
)
from .distributed import Processes, joined_processes
from .evaluation import Evaluation, Objective, evaluate, reestimate_batch_norm
from .optimizer import build_optimizers, build_schedule, learning_rates, set_rates
from .result import build_result, segment
from .sampler import BatchSampler, Stream, torch_seed
from .signals import Interrupted, NotedSignals
from .step import TrainingStep

# The progress in a checkpoint.
PROGRESS = {"step": int, "observed": int, "seconds": float, "interval_seconds": float, "peak_memory": int}


def train(cfg: Config, *, command: str = "") -> Result:
    """Train, evaluate and record the run that ``cfg`` describes.

    The result of a finished run is returned; an unfinished run is resumed. Processes that torchrun started together
    train one run (`indrnn.training.distributed`). For the whole process this sets PyTorch's seed and float32 precision,
    flushes denormals and lets the allocator keep freed memory.

    Args:
        command: recorded in result.json.

    Raises:
        UserError: the request cannot be met (device, data, folder, checkpoint).
        RunError: the run failed (a non-finite loss, a full disk).
        Interrupted: after SIGINT or SIGTERM; a checkpoint is saved, or the run is finished.
    """
    check(cfg)
    with torch_defaults(), joined_processes(cfg.device) as processes:
        device = resolve_device(cfg.device)
        folder = open_run(cfg, command) if processes.is_rank_zero else None
        state = processes.broadcast_from_rank_zero(lambda: folder.state if folder else "")
        with folder or RunFolder(run_folder(cfg), state, cfg, command) as folder:
            if state == "finished":
                result = processes.broadcast_from_rank_zero(lambda: read_result(folder.result_path))
                if processes.is_rank_zero:
                    print(f"{folder.path} is finished: nothing to do", file=sys.stderr)
                return result
            if processes.is_rank_zero:
                print(f"{folder.path}: loading the data and running a warm-up step ...", file=sys.stderr, flush=True)
            return Run(cfg, folder, device, processes).train()


class Run:
    """One run in this process: built as at step 0, then resumed and trained by `train`.

    Attributes:
        step: updates so far.
        observed: everything due up to and including this step has been recorded.
        seconds: time of the training steps alone; interval_seconds is its value at the last training row.
        peak_memory: largest amount allocated on a GPU, in bytes, over all segments.
        best: step, score, accuracy, loss and weights of the best evaluation so far.
        segments: for every start of the run, what computes it.
    """

    def __init__(self, cfg: Config, folder: RunFolder, device: torch.device, processes: Processes) -> None:
        trainer = cfg.trainer
        running_code()  # noted before the data is read: the checkout may change meanwhile
        prepare_process(device)
        set_precision(trainer.precision, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.cfg, self.folder, self.device, self.processes = cfg, folder, device, processes
        self.task = make_task(cfg.data)
        self.data = self.task.load(device)
        torch.manual_seed(torch_seed(cfg.seed, Stream.INITIALIZATION))
        self.model = build_model(cfg.model, self.task).to(device)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.objective = Objective(self.task, trainer.label_smoothing)
        self.sampler = BatchSampler(self.data.train.size, trainer.batch_size, cfg.seed, device)
        self.optimizers = build_optimizers(self.model, cfg.optimizer)
        self.schedule = build_schedule(cfg.schedule, cfg.optimizer.lr, trainer.max_steps)
        share = processes.share(self.model, trainer.batch_size)
        self.update = TrainingStep(self.model, self.optimizers, self.objective, self.data.train, trainer, device, share)
        self.step = self.observed = self.peak_memory = 0
        self.seconds = self.interval_seconds = 0.0
        self.signals = NotedSignals()
        self.best: dict[str, Any] | None = None
        self.segments: list[dict[str, Any]] = []
        self._clock: float | None = None  # when the running steps began; None while the clock is stopped

    def train(self) -> Result:
        """Resume if there is a checkpoint, train to the end and write result.json."""
        folder, resumed = self.folder, self.folder.state == "resume"
        # A graph would freeze the control flow of a custom model, such as layer dropout.
        graph = self.cfg.trainer.cuda_graph
        graph = False if graph == "auto" and hasattr(self.cfg.model, "_target_") else graph
        fallbacks = self.update.warm_up(self.sampler.indices(0), graph)
        torch.manual_seed(torch_seed(self.cfg.seed, Stream.DROPOUT))
        if resumed:
            self._restore(folder.checkpoint_path)
        self.segments.append(segment(self, fallbacks))
        recorder: Recorder = SilentRecorder()
        if self.processes.is_rank_zero:
            folder.begin()
            # The run may have been killed between writing best.pt and checkpoint.pt, which must agree.
            if self.best is not None:
                save_checkpoint(folder.best_path, self.best)
            else:
                folder.best_path.unlink(missing_ok=True)
            label = f"{folder.path.parent.name} seed {self.cfg.seed}"
            recorder = Recorder(
                folder.path, label, self.step, self.cfg.trainer.max_steps, self.observed if resumed else None
            )
            resuming = f", resuming from the checkpoint at step {self.step}" if resumed else ""
            recorder.say(f"{label}: {self.parameters:,} parameters{resuming}")
        with recorder as self.recorder, self.signals:
            try:
                self._train_to_the_end()
            except Interrupted:
                self._save()
                raise
            result = self._finish()
        if self.signals.received:
            raise Interrupted(f"stopped after the run in {folder.path} was finished", self.signals.received)
        return result

    # The order of events

    def _train_to_the_end(self) -> None:
        saved = self.step
        while True:
            self._record_what_is_due()
            self._stop_if_asked()
            ended = self._has_ended()
            if ended or (self.step % self.cfg.trainer.checkpoint_every == 0 and self.step != saved):
                self._save()
                saved = self.step
            if ended:
                return
            if self._clock is None:
                self._clock = time.perf_counter()
            set_rates(self.optimizers, self.schedule.share(self.step))
            self.update(self.sampler.indices(self.step))
            self.step += 1
            self.recorder.step_done()

    def _has_ended(self) -> bool:
        if self.observed != self.step or self.best is None:
            return False
        trainer, accuracy = self.cfg.trainer, self.best["accuracy"]
        reached = accuracy is not None and trainer.target_accuracy is not None and accuracy > trainer.target_accuracy
        reached |= trainer.target_loss is not None and self.best["loss"] < trainer.target_loss
        return reached or self.schedule.finished or self.step >= trainer.max_steps

    def _record_what_is_due(self) -> None:
        """Write the training row and evaluate, if due at this step and not done yet."""
        trainer = self.cfg.trainer
        if self.observed == self.step:
            return
        last = self.step >= trainer.max_steps
        evaluation = None
        if self.step % trainer.eval_every == 0 or last:
            self._read_meter()
            evaluation = self._evaluate("validation")
        # Rows are written after the evaluation: if a signal interrupts it, nothing that was due is recorded yet.
        if self.step % trainer.log_every == 0 or last:
            self._record_training(self._read_meter())
            self.update.meter.clear()
            self.interval_seconds = self.seconds
        if evaluation is not None:
            self._record_validation(evaluation)
        self.observed = self.step

    def _record_training(self, sums: dict[str, float]) -> None:
        """Record the means of the meter's sums."""
        count, elapsed = sums["count"], self.seconds - self.interval_seconds
        loss, norm = sums["loss"] / count, sums["grad_norm"] / count
        accuracy = self.objective.accuracy(sums["correct"], count * self.cfg.trainer.batch_size)
        rates = learning_rates(self.optimizers)
        tags = {f"optimizer/{name}": rate for name, rate in rates.items()} | {
            "optimizer/grad_norm": norm,
            "speed/steps_per_second": count / elapsed if elapsed > 0 else None,
        }
        self._record("train", loss, accuracy, lr=rates["lr"], grad_norm=norm, tags=tags)

    def _record(self, split: str, loss: float, accuracy: float | None, **others: Any) -> None:
        epoch = self.sampler.epochs(self.step)
        self.recorder.row(split, self.step, epoch, self.seconds, loss, accuracy, **others)

    def _read_meter(self) -> dict[str, float]:
        """The sums of the interval so far. Stops the clock. Raises RunError if a step was not finite."""
        if self._clock is not None:
            torch.get_device_module(self.device).synchronize()
            self.seconds += time.perf_counter() - self._clock
            self._clock = None
        sums = self.update.meter.read()
        if sums["finite"] < sums["count"]:
            self._fail("loss or gradient", self.step - int(sums["count"] - sums["finite"]) + 1)
        return sums

    def _evaluate(self, split: str) -> Evaluation:
        """Evaluate ``validation``, with new batch-norm statistics, or ``test``. Raises RunError if it is not finite."""
        size, data = self.cfg.trainer.eval_batch_size, self.data
        with autocast_context(self.cfg.trainer.precision, self.device):
            if split == "validation" and (count := self.cfg.trainer.bn_samples) is not None:
                samples = self.sampler.norm_samples(count, self.step)
                reestimate_batch_norm(self.model, data.train, samples, size)
            part = data.validation if split == "validation" else data.test
            evaluation = evaluate(self.model, part, self.objective, size, self.device, self._stop_if_asked)
        if not math.isfinite(evaluation.loss):
            self._fail(f"{split} loss", self.step)
        self.model.train()
        return_freed_memory()
        return evaluation

    def _record_validation(self, evaluation: Evaluation) -> None:
        """Record a validation; keep the checkpoint if it is the best, or return to the best if the schedule asks."""
        self._record("val", evaluation.loss, evaluation.accuracy)
        self.recorder.recurrent_weights(self.step, recurrent_weights(self.model))
        return_to_best = self.schedule.observe(evaluation.score)
        if self.best is None or evaluation.score > self.best["score"]:
            self.best = {
                "step": self.step,
                "score": evaluation.score,
                "accuracy": evaluation.accuracy,
                "loss": evaluation.loss,
                "model": {name: value.to("cpu", copy=True) for name, value in self.model.state_dict().items()},
            }
            if self.schedule.restores_best:
                self.best["optimizer"] = copy.deepcopy(self._optimizer_states())
            if self.processes.is_rank_zero:
                save_checkpoint(self.folder.best_path, self.best)
        elif return_to_best:
            self.recorder.say(f"step {self.step}: the learning rate drops; back to the best step, {self.best['step']}")
            self.model.load_state_dict(self.best["model"])
            restore_optimizers(self.optimizers, self.best["optimizer"])

    def _finish(self) -> Result:
        """Evaluate the best checkpoint on the test split, which is read here for the first time; write the result."""
        assert self.best is not None, "an evaluation precedes every end"
        self.model.load_state_dict(self.best["model"])
        test = self._evaluate("test")
        result = build_result(self, test)
        best = {"eval/best_accuracy": result.val_accuracy, "eval/best_loss": result.val_loss}
        self._record("test", test.loss, test.accuracy, tags=best)
        results = [*best, "test/accuracy", "test/loss"]
        self.recorder.finished(result.command, self.folder.configuration, result_keys(self.cfg), results)
        if self.processes.is_rank_zero:
            save_weights(self.folder.weights_path, self.best["model"])
            write_result(self.folder.result_path, result)
        return result

    # Checkpoints

    def _save(self) -> None:
        self._read_meter()
        if self.device.type == "cuda":
            self.peak_memory = max(torch.cuda.max_memory_allocated(self.device), self.peak_memory)
        if not self.processes.is_rank_zero:
            return
        content = {
            "model": dict(self.model.state_dict()),
            "optimizer": self._optimizer_states(),
            "meter": self.update.meter.sums.cpu(),
            "random": random_state(self.device),
            "schedule": self.schedule.state,
            "progressed": {name: getattr(self, name) for name in PROGRESS},
            "best": self.best,
            "fingerprint": fingerprint(self.cfg, self.data.provenance),
            "segments": self.segments,
        }
        save_checkpoint(self.folder.checkpoint_path, content)

    def _optimizer_states(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def _restore(self, path: Path) -> None:
        """Continue from a checkpoint. Raises UserError if it is damaged or of another run or other data."""
        content = self.processes.broadcast_from_rank_zero(lambda: read_checkpoint(path))
        with damage_reported(path):
            differ = fingerprint_differences(content["fingerprint"], self.cfg, self.data.provenance)
            if differ:
                raise ValueError(", ".join(differ))
            self.best, self.segments = content["best"], content["segments"]
            self.model.load_state_dict(content["model"])
            restore_optimizers(self.optimizers, content["optimizer"])
            self.update.meter.sums.copy_(content["meter"])
            restore_random_state(content["random"], self.device)
            self.schedule.state.update(content["schedule"])
            for name, kind in PROGRESS.items():
                setattr(self, name, kind(content["progressed"][name]))

    # Stopping

    def _stop_if_asked(self) -> None:
        """Raise Interrupted if any of the processes has received a signal."""
        number = self.processes.all_reduce_max(self.signals.received)
        if number:
            where = f"stopped at step {self.step}, saved in {self.folder.path}"
            raise Interrupted(f"{where}; rerun the same command to resume", number)

    def _fail(self, name: str, step: int) -> None:
        path = self.folder.checkpoint_path
        good = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint had been written yet"
        fix = "try a lower optimizer.lr or trainer.clip_norm"
        raise RunError(f"the {name} is not finite at step {step}; {good}; {fix}")
