"""Sweeps (``indrnn-train -m``): all jobs are checked before the first one runs, concurrent jobs share the CPU cores, a
table at the end lists the results. For any launcher and sweeper of Hydra; checks and table need the basic sweeper."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import active_children
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from ..config.schema import THREAD_VARIABLES, Config
from ..errors import RunError, UserError
from . import explain, leads, run, say

if TYPE_CHECKING:
    from ..record.result import Result

PROGRAM = "indrnn-train"
stopped_by = 0  # the signal that this process, which runs a sweep or jobs of one, has received
_jobs: list[Config] = []


class JobError(RunError):
    """A job of a sweep has failed, and its error is printed."""


class Sweep(Callback):
    """Hydra's callback before the first job, in the command's process."""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        # Hydra turns an exception of a callback into a warning, except for SystemExit.
        run(PROGRAM, lambda: _begin(config.hydra, config))


def _begin(hydra: Any, config: Any) -> None:
    _jobs[:] = _planned(config) if hydra.sweeper._target_.endswith(".BasicSweeper") else []
    if hydra.launcher._target_.endswith(".BasicLauncher"):
        return
    threads = thread_budget(hydra.launcher, len(_jobs))
    for name in THREAD_VARIABLES if threads else ():
        os.environ.setdefault(name, str(threads))
    # Progress bars of several processes would overwrite each other.
    os.environ.setdefault("TQDM_DISABLE", "1")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


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
        keys, folder = result_keys(cfg), run_folder(cfg)
        before = seen.setdefault(folder, keys)
        differ = [key for key in {**before, **keys} if before.get(key) != keys.get(key)]
        if differ:
            raise UserError(f"jobs with different {differ[0]} share {folder}; add 'tag=${{{differ[0]}}}'")
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
    if launcher.get("n_jobs"):  # joblib
        concurrent = launcher.n_jobs if launcher.n_jobs > 0 else cores + 1 + launcher.n_jobs
        return max(1, cores // max(1, min(concurrent, jobs or concurrent)))
    return max(1, cores // max(1, jobs)) if launcher._target_.endswith("LocalLauncher") else None


def _stop(number: int, frame: object) -> None:
    """Let the processes of the sweep save their runs; stop at once if there are none, or on the second signal."""
    global stopped_by
    if stopped_by or not active_children():
        raise KeyboardInterrupt(number)
    stopped_by = number
    # A terminal sends Ctrl-C to the children as well.
    for child in active_children() if number == signal.SIGTERM else ():
        child.terminate()


def run_job(train: Callable[[], "Result"], hydra: Any) -> float | None:
    """Run one job. Returns the validation score (accuracy, or the negative loss without classes), to be maximized.

    Raises:
        JobError: it failed. Hydra runs the other jobs all the same.
    """
    global stopped_by
    from ..record.folder import FolderInUseError

    if stopped_by:
        return None
    try:
        result = train()
    except FolderInUseError as error:
        say(PROGRAM, f"skipped: {error}")
        return None
    except Exception as error:
        code = explain(PROGRAM, error)
        if code - 128 == getattr(signal, "SIGUSR2", None):
            # submitit's handler requeues the job now that its checkpoint is saved.
            signal.raise_signal(code - 128)
        serial = hydra.launcher._target_.endswith(".BasicLauncher")
        if (code > 128 and serial) or os.environ.get("WORLD_SIZE", "") not in ("", "1"):
            raise SystemExit(code) from error
        stopped_by = max(0, code - 128)
        raise JobError(" ".join(str(error).split())) from None
    return result.val_accuracy if result.val_accuracy is not None else -result.val_loss


def print_table() -> None:
    """Print the figures of every job of the sweep."""
    if _jobs and leads():
        rows = [("job", "validation", "test", "run folder"), *((str(n), *_row(cfg)) for n, cfg in enumerate(_jobs))]
        for number, validation, test, folder in rows:
            print(f"{number:>4}  {validation:>10}  {test:>10}  {folder}", flush=True)
        _jobs.clear()


def _row(cfg: Config) -> tuple[str, str, str]:
    """Validation and test figure, run folder."""
    from ..record.folder import open_run, run_folder
    from ..record.result import read_result

    folder, figures = run_folder(cfg), ["no result", ""]
    cfg.overwrite, cfg.resume = False, "auto"
    # If the folder holds another config or is in use, the job has printed it.
    with suppress(UserError):
        if folder.exists() and (found := open_run(cfg, [], "")).state == "finished":
            result = read_result(found.result_path)
            pairs = ((result.val_accuracy, result.val_loss), (result.test_accuracy, result.test_loss))
            figures = [f"{loss:.4g}" if share is None else f"{share:.2%}" for share, loss in pairs]
    return figures[0], figures[1], str(folder)
