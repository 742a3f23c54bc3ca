"""train(cfg): the order of events in a run, from its first step or its checkpoint to its result.

After each step these follow in this order, if due: a training row, an evaluation on the validation split (and best.pt),
a checkpoint. Everything that decides how training continues is in `RunState`, so a resumed run is the same run.
"""

import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch

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
from .device import autocast_context, resolve_device, return_freed_memory, synchronize, torch_defaults
from .distributed import Processes, ProcessLost, joined_processes
from .evaluation import Evaluation, evaluate, reestimate_batch_norm
from .optimizer import set_rates
from .recorder import Recorder, SilentRecorder, build_result
from .state import RunState


class Interrupted(RunError):  # noqa: N818
    """The run was interrupted and can be resumed. exit_code is that of a shell: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


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
                return processes.broadcast_from_rank_zero(lambda: _finished(folder))
            if processes.is_rank_zero:
                print(f"{folder.path}: loading the data and running a warm-up step ...", file=sys.stderr, flush=True)
            return Training(cfg, folder, device, processes).run()


def _finished(folder: RunFolder) -> Result:
    result = read_result(folder.result_path)
    print(f"{folder.path} is finished: nothing to do", file=sys.stderr)
    return result


class Training:
    """One run in this process: ``Training(cfg, folder, device, processes).run()``."""

    def __init__(self, cfg: Config, folder: RunFolder, device: torch.device, processes: Processes) -> None:
        self.cfg, self.folder, self.device, self.processes = cfg, folder, device, processes
        self.state = RunState(cfg, device, processes)
        self.position = self.state.position
        self.interrupts = Interrupts()
        self._clock: float | None = None
        """When the running steps began; None while the clock is stopped."""

    def run(self) -> Result:
        """Train to the end and write result.json. Whatever is raised, the last checkpoint is intact."""
        position, folder, state = self.position, self.folder, self.state
        resumed = folder.state == "resume"
        state.start(folder.checkpoint_path if resumed else None)
        recorder: Recorder = SilentRecorder()
        if self.processes.is_rank_zero:
            folder.begin()
            # The run may have been killed between writing best.pt and checkpoint.pt, which must agree.
            if state.best is not None:
                save_checkpoint(folder.best_path, state.best)
            else:
                folder.best_path.unlink(missing_ok=True)
            recorder = Recorder(state, folder, position.observed if resumed else None)
        with recorder as self.recorder, self.interrupts:
            message = f"{state.parameters:,} parameters"
            if resumed:
                moved = state.moved()
                message += f", resuming from the checkpoint at step {position.step}"
                message += f", written elsewhere ({moved}), so results may differ from here on" if moved else ""
            recorder.say(f"{folder.path.parent.name} seed {self.cfg.seed}: {message}")
            self._train()
            result = self._finish()
        if self.interrupts.received:
            raise Interrupted(f"stopped after the run in {folder.path} was finished", self.interrupts.received)
        return result

    # Training

    def _train(self) -> None:
        try:
            self._train_to_the_end()
        except ProcessLost as lost:
            if not self.processes.is_rank_zero or self.device.type != "cpu":
                fix = f"the last checkpoint is {self.folder.checkpoint_path}; rerun the same command to resume"
                raise ProcessLost(f"{lost}; {fix}") from lost
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
            if ended or self._signal() or self.position.step % self.cfg.trainer.checkpoint_every == 0:
                if self.position.step != saved or ended:
                    self._save()
                    saved = self.position.step
                if ended:
                    return
                self._stop_if_asked()
            self._advance()

    def _advance(self) -> None:
        """Make one update. If another process is lost, weights and generators are as before the step."""
        if self._clock is None:
            self._clock = time.perf_counter()
        set_rates(self.state.optimizers, self.state.schedule.share(self.position.step))
        random = torch.get_rng_state() if self.processes.size > 1 else None
        try:
            self.state.update(self.state.sampler.indices(self.position.step))
        except ProcessLost:
            if random is not None:
                torch.set_rng_state(random)
            raise
        self.position.step += 1
        self.recorder.step_done()

    def _has_ended(self) -> bool:
        trainer, best = self.cfg.trainer, self.state.best
        if self.position.observed != self.position.step or best is None:
            return False
        accuracy, target = best["accuracy"], trainer.target_accuracy
        reached = accuracy is not None and target is not None and accuracy > target
        return reached or self.state.schedule.finished or self.position.step >= trainer.max_steps

    def _record_what_is_due(self) -> None:
        """Write the training row and evaluate, if due at this step and not done yet."""
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
            self.recorder.training(self._read_meter())
            self.state.meter.clear()
            position.interval_seconds = position.seconds
        if evaluation is not None:
            self._record_validation(evaluation)
        position.observed = position.step

    def _read_meter(self) -> dict[str, float]:
        """The sums of the interval so far. Stops the clock. Raises RunError if a step was not finite."""
        if self._clock is not None:
            synchronize(self.device)
            self.position.seconds += time.perf_counter() - self._clock
            self._clock = None
        sums = self.state.meter.read()
        if sums["finite"] < sums["count"]:
            self._fail("loss or gradient", self.position.step - int(sums["count"] - sums["finite"]) + 1)
        return sums

    def _validate(self) -> Evaluation:
        trainer, state = self.cfg.trainer, self.state
        samples = state.sampler.norm_samples(trainer.bn_samples, self.position.step)
        try:
            with autocast_context(trainer.precision, self.device):
                reestimate_batch_norm(state.model, state.data.train, samples, trainer.eval_batch_size, self.processes)
                return self._evaluate(state.data.validation, "validation loss")
        finally:
            state.model.train()
            return_freed_memory()

    def _evaluate(self, split: Split, name: str) -> Evaluation:
        """Raises RunError, with the loss's name, if it is not finite."""
        size, objective = self.cfg.trainer.eval_batch_size, self.state.objective
        evaluation = evaluate(
            self.state.model, split, objective, size, self.device, self._stop_if_asked, processes=self.processes
        )
        if not evaluation.finite:
            self._fail(name, self.position.step)
        return evaluation

    def _record_validation(self, evaluation: Evaluation) -> None:
        """Record a validation; keep the checkpoint if it is the best, or return to the best if the schedule asks."""
        step, state = self.position.step, self.state
        self.recorder.validation(evaluation)
        if evaluation.near_chance and not self.position.warned:
            self.recorder.say(_at_chance_level(step, evaluation))
            self.position.warned = True
        return_to_best = state.schedule.observe(evaluation.score)
        if state.best is None or evaluation.score > state.best["score"]:
            state.best = {
                "step": step,
                "score": evaluation.score,
                "accuracy": evaluation.accuracy,
                "loss": evaluation.loss,
                "model": copied_weights(state.model),
            }
            if state.schedule.restores_best:
                state.best["optimizer"] = optimizer_states(state.optimizers)
            if self.processes.is_rank_zero:
                save_checkpoint(self.folder.best_path, state.best)
        elif return_to_best:
            self.recorder.say(f"step {step}: the learning rate drops; back to the best step, {state.best['step']}")
            load_weights(state.model, state.best["model"], self.folder.best_path)
            restore_optimizers(state.optimizers, state.best["optimizer"])

    def _finish(self) -> Result:
        """Evaluate the best checkpoint on the test split, read here for the first time, and write the result."""
        folder, best = self.folder, self.state.best
        assert best is not None, "an evaluation precedes every end"
        load_weights(self.state.model, best["model"], folder.best_path)
        with autocast_context(self.cfg.trainer.precision, self.device):
            test = self._evaluate(self.state.data.test, "test loss")
        self.state.note_peak_memory()
        result = build_result(self.state, folder.command, test)
        self.recorder.test(test, result)
        if self.processes.is_rank_zero:
            save_weights(folder.weights_path, best["model"])
            write_result(folder.result_path, result)
        return result

    def _save(self) -> None:
        self._read_meter()
        if self.processes.is_rank_zero:
            save_checkpoint(self.folder.checkpoint_path, self.state.content())

    # Stopping

    def _signal(self) -> int:
        """The signal that any of the processes has received; 0 if none."""
        return self.processes.all_reduce_max(self.interrupts.received)

    def _stop_if_asked(self) -> None:
        number = self._signal()
        if number:
            raise Interrupted(self._stopped_message(), number)

    def _stopped_message(self) -> str:
        command = f": {self.folder.command}" if self.folder.command else ""
        where = f"stopped at step {self.position.step}, saved in {self.folder.path}"
        return f"{where}; rerun the same command to resume{command}"

    def _fail(self, name: str, step: int) -> None:
        path = self.folder.checkpoint_path
        good = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint had been written yet"
        raise RunError(
            f"the {name} is not finite at step {step}; {good}; try a lower optimizer.lr or trainer.clip_norm"
        )


class Interrupts:
    """Notes the first SIGINT or SIGTERM within a ``with`` block, so that the current step is finished first.

    A second signal stops at once. SIGUSR2 counts too if it has a handler, such as submitit's: a cluster sends it before
    the time limit or a preemption. Outside the main thread, where Python allows no handlers, signals are not noted.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received = 0
        """The number of the signal."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            numbers = [*self.SIGNALS]
            if hasattr(signal, "SIGUSR2") and callable(signal.getsignal(signal.SIGUSR2)):
                numbers.append(signal.SIGUSR2)
            self._previous = {number: signal.signal(number, self._note) for number in numbers}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for handled in self.SIGNALS:
            signal.signal(handled, signal.SIG_DFL)


def _at_chance_level(step: int, evaluation: Evaluation) -> str:
    name, value, baseline = "accuracy", evaluation.accuracy, "the share of the most frequent class"
    if value is None:
        name, value, baseline = "error", evaluation.loss, "the predict-the-mean baseline"
    return f"validation {name} {value:.4f} at step {step} is at chance level ({baseline} is {evaluation.chance:.4f})"
