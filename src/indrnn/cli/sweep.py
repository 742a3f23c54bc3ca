"""Sweeps (``indrnn-train -m``): all jobs are checked before the first one runs, concurrent jobs share the CPU cores, a
table at the end lists the results. For any launcher and sweeper of Hydra; checks and table need the basic sweeper."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from ..config.schema import THREAD_VARIABLES, Config
from ..errors import RunError, UserError
from . import explain, leads, run, say

if TYPE_CHECKING:
    from ..record.result import Result

PROGRAM = "indrnn-train"
# The jobs of this command's sweep, each with the time at which its result.json was written before the sweep.
_jobs: list[tuple[Config, int | None]] = []
_logs = ""  # where submitit's jobs print
_stopped = False  # whether this process of a launcher has received a signal


class Sweep(Callback):
    """Hydra's callback before the first job, in the command's process."""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        # Hydra turns an exception of a callback into a warning, except for SystemExit.
        run(PROGRAM, lambda: _begin(config))


def _begin(config: Any) -> None:
    global _logs
    _jobs.clear()
    _logs = str(config.hydra.launcher.get("submitit_folder") or "")
    if config.hydra.sweeper._target_.endswith(".BasicSweeper"):
        _jobs.extend((cfg, _written(cfg)) for cfg in list(_planned(config)))
    if not config.hydra.launcher._target_.endswith(".BasicLauncher"):
        threads = thread_budget(config.hydra.launcher, len(_jobs))
        if threads is not None:
            for name in THREAD_VARIABLES:
                os.environ.setdefault(name, str(threads))
        # Progress bars of several processes would overwrite each other.
        os.environ.setdefault("TQDM_DISABLE", "1")


def _planned(config: Any) -> Iterator[Config]:
    """The checked configuration of every job of Hydra's basic sweeper.

    Raises:
        UserError: a job is refused, or two jobs with different settings share a run folder.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from ..config.checks import result_keys
    from ..config.compose import job_config, job_overrides
    from ..record.folder import run_folder

    loader = GlobalHydra.instance().config_loader()
    words = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create(loader).parse_overrides([*words, *job_overrides(config.hydra)])
    seen: dict[Any, dict[str, Any]] = {}
    for job in BasicSweeper.split_arguments(overrides, None)[0]:
        composed = loader.load_sweep_config(config, list(job))
        cfg = job_config(composed, composed.hydra)
        keys = result_keys(cfg)
        before = seen.setdefault(run_folder(cfg), keys)
        if before != keys:
            key = next(key for key in {**before, **keys} if before.get(key) != keys.get(key))
            raise UserError(
                f"{key} differs between jobs of the same run folder {run_folder(cfg)}; keep them apart, "
                f"for example with 'tag={key.rsplit('.', 1)[-1]}-${{{key}}}'"
            )
        yield cfg


def thread_budget(launcher: Any, jobs: int) -> int | None:
    """CPU threads per job, so that concurrent jobs share the cores; None leaves it to the cluster.

    Args:
        launcher: ``hydra.launcher``.
        jobs: number of jobs, 0 if unknown.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if launcher.get("cpus_per_task"):
        return int(launcher.cpus_per_task)
    kind = launcher._target_.lower()
    if "joblib" in kind:
        concurrent = launcher.n_jobs if launcher.n_jobs > 0 else cores + 1 + launcher.n_jobs
    elif "submitit" in kind and "local" in kind:
        concurrent = jobs
    else:
        return None
    return max(1, cores // max(1, min(concurrent, jobs or concurrent)))


def run_job(train: Callable[[], "Result"], hydra: Any) -> float | None:
    """Run one job. Returns the validation score (accuracy, or the negative loss without classes), to be maximized.

    A failed job of the basic sweeper prints its error and returns None, so that the other jobs run. Other sweepers get
    a RunError.
    """
    launcher = hydra.launcher._target_
    if "joblib" in launcher:
        # Outside of training, which handles signals itself.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _note)
    if _stopped:
        return None
    from ..record.folder import FolderInUseError

    basic = hydra.sweeper._target_.endswith(".BasicSweeper")
    single = os.environ.get("WORLD_SIZE", "") in ("", "1")
    try:
        result = train()
    except FolderInUseError as error:
        if not (basic and single):
            raise
        say(PROGRAM, f"skipped: {error}")
        return None
    except Exception as error:
        code = explain(PROGRAM, error) if leads() else getattr(error, "exit_code", 1)
        if code - 128 == getattr(signal, "SIGUSR2", None):
            # submitit's handler requeues the job now that its checkpoint is saved.
            signal.raise_signal(signal.SIGUSR2)
        if not single or (code > 128 and launcher.endswith(".BasicLauncher")):
            raise SystemExit(code) from error
        if code > 128:
            _note()
        if basic:
            return None
        raise RunError(" ".join(str(error).split())) from None
    return result.val_accuracy if result.val_accuracy is not None else -result.val_loss


def _note(*_: Any) -> None:
    global _stopped
    _stopped = True


def print_table(completed: bool) -> bool:
    """Print the state and the figures of every job of the sweep; return whether one failed.

    Args:
        completed: whether the sweep ran to its end. Otherwise, jobs without a result did not necessarily fail.
    """
    if not _jobs or not leads():
        return False
    import pandas

    rows = [(number, *_row(cfg, before, completed)) for number, (cfg, before) in enumerate(_jobs)]
    _jobs.clear()
    table = pandas.DataFrame(rows, columns=["job", "state", "validation", "test", "run folder"])
    counts = table["state"].value_counts(sort=False)
    if completed or list(counts.index) != ["not run"]:
        print("sweep: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
        print(table.to_string(index=False), flush=True)
    if "failed" in counts and _logs:
        print(f"output of the jobs: {_logs}")
    return "failed" in counts


def _row(cfg: Config, before: int | None, completed: bool) -> tuple[str, str, str, str]:
    """State, validation and test figure, run folder."""
    from ..record.folder import FolderInUseError, open_run, run_folder
    from ..record.result import read_result

    folder, now, state = run_folder(cfg), _written(cfg), "failed" if completed else "not run"
    replaced = not cfg.overwrite or now != before
    cfg.overwrite = False
    try:
        if folder.exists():
            with open_run(cfg) as found:
                if found.state == "finished" and replaced:
                    result = read_result(found.result_path)
                    pairs = ((result.val_accuracy, result.val_loss), (result.test_accuracy, result.test_loss))
                    validation, test = (f"{loss:.4g}" if share is None else f"{share:.2%}" for share, loss in pairs)
                    return "done" if now != before else "skipped", validation, test, str(folder)
                if found.state == "resume" and not completed:
                    state = "unfinished"
    except FolderInUseError:
        state = "running"  # in another process
    except UserError:
        pass  # the job has printed it
    return state, "", "", str(folder)


def _written(cfg: Config) -> int | None:
    """When the result.json of a job was written."""
    from ..record.folder import RESULT, run_folder

    file = run_folder(cfg) / RESULT
    return file.stat().st_mtime_ns if file.exists() else None
