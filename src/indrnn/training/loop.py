"""train(cfg): a run from its first step, or from its checkpoint, to its result, and the order of events.

After every step these follow in this order, if they are due: a row of training figures, an evaluation on the validation
split (and best.pt), a checkpoint. Everything that decides how training continues is in `TrainingState`, so a run that
resumes from a checkpoint is the same run.
"""

import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ..config.checks import check
from ..config.schema import Config
from ..data import Split
from ..errors import RunError
from ..record.folder import RunFolder, open_run, run_folder
from ..record.result import Result, read_result, write_result
from .checkpoint import (
    copied_weights,
    load_weights,
    optimizer_states,
    restore_optimizers,
    save_checkpoint,
    save_weights,
)
from .device import check_memory, computing, resolve_device, return_freed_memory, synchronise
from .distributed import Processes, ProcessLost, joined_processes
from .evaluation import Evaluation, evaluate, reestimate_batch_norm
from .optimizer import set_rates
from .recorder import Recorder, SilentRecorder
from .state import TrainingState, changes


class Interrupted(RunError):  # noqa: N818
    """The run was asked to stop and can resume later. exit_code is that of a shell: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def train(cfg: Config, *, overrides: Sequence[str] = (), command: str = "") -> Result:
    """Train, evaluate and record the run that ``cfg`` describes.

    A finished run is read, not run again; an unfinished one continues. ``overrides`` and ``command`` are recorded.
    Processes that torchrun started together train one run (`indrnn.training.distributed`). For the whole process this
    sets PyTorch's seed and float32 precision, flushes denormals and lets the allocator keep freed memory.

    Raises:
        UserError: the request cannot be met (device, data, folder, checkpoint).
        RunError: the run failed (a loss that is not finite, a full disk).
        Interrupted: SIGINT or SIGTERM came; a checkpoint is saved, or the run is finished.
    """
    check(cfg)
    with joined_processes(cfg.device) as processes:
        device = resolve_device(cfg.device)
        check_memory(cfg, device)
        with _open(cfg, list(overrides), command, processes) as folder:
            if folder.state == "finished":
                return processes.from_leader(lambda: _finished(folder))
            if processes.leads:
                print(f"{folder.path}: reading the data and trying a first step ...", file=sys.stderr, flush=True)
            return Training(cfg, folder, device, processes).run()


def _open(cfg: Config, overrides: list[str], command: str, processes: Processes) -> RunFolder:
    """The run folder, locked by the leading process; the others only get its path and state."""
    folder = open_run(cfg, overrides, command) if processes.leads else None
    state = processes.from_leader(lambda: folder.state if folder else "")
    return folder or RunFolder(run_folder(cfg), state, cfg, overrides, command)


def _finished(folder: RunFolder) -> Result:
    """The result of a finished run."""
    result = read_result(folder.result_path)
    print(f"{folder.path} is finished: nothing to do", file=sys.stderr)
    return result


class Training:
    """One run in this process. Use: ``Training(cfg, folder, device, processes).run()``."""

    def __init__(self, cfg: Config, folder: RunFolder, device: torch.device, processes: Processes) -> None:
        self.cfg, self.folder, self.device, self.processes = cfg, folder, device, processes
        self.state = TrainingState(cfg, device, processes)
        self.position, self.model, self.data = self.state.position, self.state.model, self.state.data
        self.objective, self.order, self.schedule = self.state.objective, self.state.order, self.state.schedule
        self._clock: float | None = None
        self._signal = 0
        self._random: Tensor | None = None

    def run(self) -> Result:
        """Train to the end and write result.json. Raises Interrupted after SIGINT or SIGTERM (with the run finished, if
        the signal came too late to stop it), RunError if a loss is not finite or a file cannot be written; the last
        checkpoint is intact in either case."""
        position, folder = self.position, self.folder
        self.state.prepare(folder)
        resume_step = position.observed if folder.state == "resume" else None
        if self.processes.leads:
            folder.begin()
            # The run may have been killed between writing best.pt and checkpoint.pt; they must agree.
            if self.state.best is not None:
                save_checkpoint(folder.best_path, self.state.best)
            else:
                folder.best_path.unlink(missing_ok=True)
            recorder = Recorder(self.state, folder, resume_step)
        else:
            recorder = SilentRecorder()
        with recorder as self.recorder, Interrupts() as self.interrupts:
            label = f"{folder.path.parent.name} seed {self.cfg.seed}"
            if folder.state == "resume":
                differ = changes(self.state.segments)
                elsewhere = f", written elsewhere ({differ}), so figures may differ from here on" if differ else ""
                self.recorder.say(f"{label}: resuming from the checkpoint at step {position.step}{elsewhere}")
            self._train()
            result = self._finish()
        if self.interrupts.received:
            raise Interrupted(f"stopped after {label} was finished: {folder.path}", self.interrupts.received)
        return result

    # Training

    def _train(self) -> None:
        try:
            self._train_to_the_end()
        except ProcessLost as lost:
            if not self.processes.leads or self.device.type != "cpu":
                again = f"the last checkpoint is {self.folder.checkpoint_path}; continue with the same command"
                raise ProcessLost(f"{lost}; {again}") from lost
            # The interrupted step has not changed the weights.
            if self._random is not None:
                torch.set_rng_state(self._random)
            self._save()
            raise ProcessLost(f"{lost}; {self._stopped_message()}") from lost

    def _train_to_the_end(self) -> None:
        saved = self.position.step
        while True:
            try:
                self._record_what_is_due()
            except Interrupted:
                self._save()
                raise
            ended = self._has_ended()
            due = self.position.step % self.cfg.trainer.checkpoint_every == 0
            if ended or self._asked_to_stop() or due:
                if self.position.step != saved or ended:
                    self._save()
                    saved = self.position.step
                if ended:
                    return
                self._stop_if_asked()
            self._advance()

    def _advance(self) -> None:
        """Make one update."""
        if self._clock is None:
            self._clock = time.perf_counter()
        set_rates(self.state.optimizers, self.schedule.share(self.position.step))
        if self.processes.size > 1:
            self._random = torch.get_rng_state()
        self.state.update(self.order.indices(self.position.step))
        self._random = None
        self.position.step += 1
        self.recorder.step_done()

    def _has_ended(self) -> bool:
        trainer = self.cfg.trainer
        if self.position.observed != self.position.step or self.state.best is None:
            return False
        accuracy, target = self.state.best["accuracy"], trainer.target_accuracy
        reached = accuracy is not None and target is not None and accuracy > target
        return reached or self.schedule.finished or self.position.step >= trainer.max_steps

    def _record_what_is_due(self) -> None:
        """Write the row of training figures and evaluate, if due at this step and not done yet."""
        position, trainer = self.position, self.cfg.trainer
        if position.observed == position.step:
            return
        last = position.step >= trainer.max_steps
        evaluation = None
        if position.step % trainer.eval_every == 0 or last:
            self._read_meter()
            evaluation = self._validate()
        # Rows are written after the evaluation: if a signal interrupts it, nothing that was due is recorded yet.
        if position.step % trainer.log_every == 0 or last:
            self._record_training()
        if evaluation is not None:
            self._record_validation(evaluation)
        position.observed = position.step

    def _record_training(self) -> None:
        position = self.position
        sums = self._read_meter()
        count = sums["count"]
        elapsed = position.seconds - position.interval_seconds
        self.recorder.training(
            loss=sums["loss"] / count,
            accuracy=self.objective.accuracy(sums["correct"], count * self.cfg.trainer.batch_size),
            share=self.schedule.share(position.step - 1),
            norm=sums["grad_norm"] / count,
            speed=count / elapsed if elapsed > 0 else None,
        )
        self.state.meter.clear()
        position.interval_seconds = position.seconds

    def _read_meter(self) -> dict[str, float]:
        """The sums of the interval so far; stops the clock and waits for the device. Raises RunError if a step was not
        finite."""
        if self._clock is not None:
            synchronise(self.device)
            self.position.seconds += time.perf_counter() - self._clock
            self._clock = None
        sums = self.state.meter.read()
        if sums["finite"] < sums["count"]:
            # A step that is not finite leaves weights that are not, so all steps after it count too.
            self._fail("loss or gradient", self.position.step - int(sums["count"] - sums["finite"]) + 1)
        return sums

    def _validate(self) -> Evaluation:
        trainer = self.cfg.trainer
        samples = self.order.norm_samples(trainer.bn_samples, self.position.step)
        try:
            with computing(trainer.precision, self.device):
                reestimate_batch_norm(self.model, self.data.train, samples, trainer.eval_batch_size, self.processes)
                return self._evaluate(self.data.validation, "validation loss")
        finally:
            self.model.train()
            return_freed_memory()

    def _evaluate(self, split: Split, figure: str) -> Evaluation:
        """Raises RunError, naming the figure, if the loss is not finite."""
        size = self.cfg.trainer.eval_batch_size
        evaluation = evaluate(
            self.model, split, self.objective, size, self.device, self._stop_if_asked, processes=self.processes
        )
        if evaluation.bad is not None:
            self._fail(figure, self.position.step)
        return evaluation

    def _record_validation(self, evaluation: Evaluation) -> None:
        """Record a validation; keep the checkpoint if it is the best, or return to the best if the schedule asks."""
        step = self.position.step
        self.recorder.validation(evaluation)
        if evaluation.near_chance and not self.position.warned:
            self.recorder.say(_nothing_learnt(step, evaluation))
            self.position.warned = True
        go_back = self.schedule.observe(evaluation.score)
        if self.state.best is None or evaluation.score > self.state.best["score"]:
            self.state.best = {
                "step": step,
                "score": evaluation.score,
                "accuracy": evaluation.accuracy,
                "loss": evaluation.loss,
                "model": copied_weights(self.model),
            }
            if self.schedule.restores_best:
                self.state.best["optimizer"] = optimizer_states(self.state.optimizers)
            if self.processes.leads:
                save_checkpoint(self.folder.best_path, self.state.best)
        elif go_back:
            best_step = self.state.best["step"]
            self.recorder.say(f"step {step}: the learning rate drops; back to the best step, {best_step}")
            load_weights(self.model, self.state.best["model"], self.folder.best_path)
            restore_optimizers(self.state.optimizers, self.state.best["optimizer"], self.folder.best_path)

    def _finish(self) -> Result:
        """Read the test split once, with the weights and batch-norm statistics that were best on validation."""
        folder, state, best = self.folder, self.state, self.state.best
        assert best is not None, "an evaluation precedes every end"
        load_weights(self.model, best["model"], folder.best_path)
        with computing(self.cfg.trainer.precision, self.device):
            test = self._evaluate(self.data.test, "test loss")
        result = state.result(folder.command, test)
        self.recorder.finished(test, result)
        if self.processes.leads:
            save_weights(folder.weights_path, best["model"])
            write_result(folder.result_path, result)
        return result

    # Checkpoints

    def _save(self) -> None:
        self._read_meter()
        self.position.peak_memory = self.state.peak_memory() or 0
        if self.processes.leads:
            save_checkpoint(self.folder.checkpoint_path, self.state.content())

    # Stopping

    def _asked_to_stop(self) -> bool:
        """Whether any of the processes has received a signal."""
        self._signal = self.processes.agree(self.interrupts.received or 0)
        return self._signal > 0

    def _stop_if_asked(self) -> None:
        if self._asked_to_stop():
            raise Interrupted(self._stopped_message(), self._signal)

    def _stopped_message(self) -> str:
        again = f": {self.folder.command}" if self.folder.command else ""
        return (
            f"stopped at step {self.position.step}, saved in {self.folder.path}; continue with the same command{again}"
        )

    def _fail(self, figure: str, step: int) -> None:
        path = self.folder.checkpoint_path
        good = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint had been written yet"
        raise RunError(
            f"the {figure} is not finite at step {step}; {good}; try a lower optimizer.lr or trainer.clip_norm"
        )


class Interrupts:
    """Ctrl-C and SIGTERM during training: the current step is finished first; a second signal stops at once.

    Within a ``with`` block, ``received`` is the number of the first SIGINT or SIGTERM, else None. SIGUSR2 counts too if
    it has a handler, such as submitit's: a cluster sends it before the time limit or a preemption.

    Outside the main thread, where Python allows no handlers, signals keep their usual effect.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            numbers = [*self.SIGNALS]
            if hasattr(signal, "SIGUSR2") and callable(signal.getsignal(signal.SIGUSR2)):
                numbers.append(signal.SIGUSR2)
            self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for handled in self.SIGNALS:
            signal.signal(handled, signal.SIG_DFL)


def _nothing_learnt(step: int, evaluation: Evaluation) -> str:
    if evaluation.accuracy is None:
        figure, trivial = f"error {evaluation.loss:.4f}", "the error of always answering the mean"
    else:
        figure, trivial = f"accuracy {evaluation.accuracy:.4f}", "the share of the most frequent class"
    learnt = f"{trivial} is {evaluation.chance:.4f}, so the network has learnt nothing yet"
    return f"validation {figure} at step {step}: {learnt}"
