"""A sweep (``indrnn-train -m``), whichever of Hydra's launchers runs the jobs: a thread budget for each job, the
progress of all in one place, a table at the end.

The command and its jobs, perhaps on other machines, communicate through the sweep's folder: ``job<k>.json`` holds the
state of job k, and ``stopped`` tells the jobs that have not begun that the command was stopped.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from ..config.schema import THREAD_VARIABLES
from ..errors import RunError, UserError
from . import leads

if TYPE_CHECKING:
    from ..record.result import Result

LINE_EVERY = 30.0  # seconds between two lines of progress
STOPPED = "stopped"


@dataclass
class JobRecord:
    """The state of a job: running, done, skipped (finished before, or run by another process), failed, stopped, or not
    run."""

    job: int
    folder: str
    state: str = "not run"
    code: int = 0
    score: float | None = None
    remark: str = ""
    host: str = ""
    pid: int = 0


@dataclass(frozen=True)
class PlannedJob:
    """A job of the sweep before it runs."""

    folder: Path
    max_steps: int


class Sweep:
    """The command's side of the sweep, within a ``with`` block, which prints the table of a sweep that has begun.

    ``plans`` is empty if the sweeper chooses the jobs as it goes. ``code`` is the exit code, after the block: that of
    the worst job, or of the signal that stopped the sweep.
    """

    current: "Sweep | None" = None

    def __init__(self, plans: Sequence[PlannedJob]) -> None:
        self.plans = plans
        self.folder: Path | None = None
        self.code = self.stopped_by = 0
        self._finished = threading.Event()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Sweep":
        Sweep.current = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._finished.set()
        try:
            if self.folder is not None:
                self._conclude()
        finally:
            Sweep.current = None
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        # A launcher may fail because the sweep was stopped.
        return bool(self.stopped_by) and kind is not None and issubclass(kind, Exception)

    def _conclude(self) -> None:
        """Print the table of all jobs and set the exit code."""
        records = self.records()
        for record in records:
            if record.state == "running":
                record.state, record.code, record.remark = "failed", 1, "its process ended without a message"
        if leads() and any(record.state != "not run" for record in records):
            print(table(records), flush=True)
        self.code = 128 + self.stopped_by if self.stopped_by else max((job.code for job in records), default=0)

    def begin(self, folder: Path, launcher: Any) -> None:
        """Called before the first job, when Hydra has chosen the sweep's folder."""
        self.folder = folder
        kind = str(launcher.get("_target_", ""))
        if kind.endswith(".BasicLauncher"):
            return
        # The processes of the jobs read these when they load PyTorch.
        threads = thread_budget(kind, launcher, len(self.plans))
        if threads is not None:
            for name in THREAD_VARIABLES:
                os.environ.setdefault(name, str(threads))
        # Progress bars of several processes would overwrite each other on one terminal.
        os.environ.setdefault("TQDM_DISABLE", "1")
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._stop)
        threading.Thread(target=self._watch, daemon=True).start()

    def records(self) -> list[JobRecord]:
        """The record of every job, by number; jobs that have not begun are "not run"."""
        records = {number: JobRecord(number, str(plan.folder)) for number, plan in enumerate(self.plans)}
        if self.folder is not None:
            for file in self.folder.glob("job*.json"):
                record = JobRecord(**json.loads(file.read_text(encoding="utf-8")))
                records[record.job] = record
        return [records[number] for number in sorted(records)]

    def _watch(self) -> None:
        last = ""
        while not self._finished.wait(LINE_EVERY):
            line = self.progress()
            if line != last:
                print(line, file=sys.stderr, flush=True)
                last = line

    def progress(self) -> str:
        """For example: 2 of 6 jobs over; running: outputs/mnist/lstm/seed0 step 300 of 800, val 83.20%"""
        records = self.records()
        over = sum(record.state not in ("running", "not run") for record in records)
        running = [
            f"{record.folder} {_position(self.plans[record.job] if record.job < len(self.plans) else None, record)}"
            for record in records
            if record.state == "running"
        ]
        return f"sweep: {over} of {len(records)} jobs over" + (f"; running: {'; '.join(running)}" if running else "")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """The first signal lets every job save a checkpoint and end; the second stops the command at once."""
        if self.stopped_by or self.folder is None:
            raise KeyboardInterrupt(number)
        self.stopped_by = number
        (self.folder / STOPPED).touch()
        # A terminal sends Ctrl-C to the jobs as well, and a second signal would end them without a checkpoint.
        if number == signal.SIGTERM:
            for record in self.records():
                if record.state == "running" and record.host == socket.gethostname():
                    os.kill(record.pid, signal.SIGTERM)


class Begin(Callback):
    """Hydra calls it before the first job, in the command's process."""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        if Sweep.current is not None:
            Sweep.current.begin(Path(str(config.hydra.sweep.dir)).absolute(), config.hydra.launcher)


def thread_budget(kind: str, launcher: Any, jobs: int) -> int | None:
    """CPU threads for each job, so that jobs that run at the same time share the cores; None leaves it to the cluster.

    ``kind`` is the launcher's class, ``jobs`` the number of jobs (0: unknown).
    """
    kind = kind.lower()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "submitit" in kind:
        if launcher.cpus_per_task is not None:
            return int(launcher.cpus_per_task)
        # The local one starts all jobs at once.
        return max(1, cores // max(jobs, 1)) if "local" in kind else None
    if "ray" in kind:
        return max(1, int(launcher.ray.remote.get("num_cpus") or 1))
    if "joblib" in kind:
        at_once = launcher.n_jobs if launcher.n_jobs > 0 else max(1, cores + 1 + launcher.n_jobs)
        return max(1, cores // (min(at_once, jobs) if jobs else at_once))
    return None


def run_job(
    cfg: Any, hydra: Any, train: Callable[[Any, Any], "Result"], report: Callable[[Exception], int]
) -> float | None:
    """One job, recorded in the sweep's folder. Returns the validation score (accuracy, or the negative loss of a task
    without classes), which a sweeper may maximise.

    ``report`` prints an error and returns the exit code. If a job of the basic sweeper fails, this returns None and the
    other jobs go on; other sweepers get a RunError.
    """
    if Sweep.current is None and "joblib" in hydra.launcher._target_:
        _end_with(os.getppid())  # at once, for the parent may end while modules are imported
    from ..record.folder import RESULT, FolderInUseError, run_folder

    with _busy:
        folder = Path(str(hydra.sweep.dir)).absolute()
        if (folder / STOPPED).exists():
            return None
        own_process = Sweep.current is None
        # Otherwise this is one of several processes that torchrun started.
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        run = run_folder(cfg)
        record = JobRecord(hydra.job.num, str(run), host=socket.gethostname(), pid=os.getpid())
        before = _written(run / RESULT)
        _write(folder, record, "running")
        try:
            result = train(cfg, hydra)
        except FolderInUseError:
            if not alone:
                raise
            print(f"skipped, for run folder {run} is in use by another process", file=sys.stderr, flush=True)
            _write(folder, record, "skipped", remark="another process has it")
            return None
        except BrokenPipeError:
            raise
        except Exception as error:
            code = report(error)
            number = code - 128
            if number == getattr(signal, "SIGUSR2", None):
                _write(folder, record, "stopped", code, "continues when it is requeued")
                try:
                    # submitit's handler requeues the job now that its checkpoint is saved, or raises if it cannot.
                    signal.raise_signal(number)
                except Exception as refusal:
                    error, number = refusal, 0
            _write(folder, record, "stopped" if number > 0 else "failed", code, " ".join(str(error).split()))
            if not alone or (number > 0 and not own_process):
                # After a signal, or with some of torchrun's processes gone, no further job can run.
                sys.exit(code)
            if str(hydra.sweeper._target_).endswith(".BasicSweeper"):
                return None
            raise RunError(record.remark) from None
        record.score = result.val_accuracy if result.val_accuracy is not None else -result.val_loss
        again = before is not None and before == _written(run / RESULT)
        _write(folder, record, "skipped" if again else "done", remark="finished before" if again else "")
        return record.score


def table(records: Sequence[JobRecord]) -> str:
    """A line with the number of jobs in each state, then a line for each job."""
    states = [record.state for record in records]
    head = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    rows = [("job", "state", "validation", "run folder", "")]
    for record in records:
        score = "" if record.score is None else f"{record.score:.4g}" if record.score < 0 else f"{record.score:.2%}"
        rows.append((str(record.job), record.state, score, record.folder, record.remark))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join([f"sweep: {head}", *lines])


def _write(folder: Path, record: JobRecord, state: str, code: int = 0, remark: str = "") -> None:
    from ..files import write_atomically

    if not leads():
        return
    record.state, record.code, record.remark = state, code, remark
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"job{record.job}.json", json.dumps(asdict(record)) + "\n", UserError)


def _written(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None


def _position(plan: PlannedJob | None, record: JobRecord) -> str:
    """How far a run has come, from its metrics.csv."""
    from ..record.metrics import read_metrics

    metrics = Path(record.folder) / "metrics.csv"
    if not metrics.exists():
        return "starting"
    columns = read_metrics(metrics)
    if not len(columns["step"]):
        return "starting"
    total = "" if plan is None else f" of {plan.max_steps}"
    text = f"step {int(columns['step'][-1])}{total}"
    scores = columns["accuracy"][columns["split"] == "val"]
    return text + (f", val {scores[-1]:.2%}" if len(scores) and scores[-1] == scores[-1] else "")


_busy = threading.Lock()  # held while this process runs a job


def _end_with(parent: int) -> None:
    """End this process once ``parent`` has ended, and its job as SIGTERM does, with a checkpoint. joblib's processes
    would survive a command that is killed, keep their run folders locked, and wait for jobs forever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        with _busy:
            os._exit(128 + signal.SIGTERM)

    if os.name == "posix" and not any(thread.name == "parent" for thread in threading.enumerate()):
        threading.Thread(target=watch, name="parent", daemon=True).start()
