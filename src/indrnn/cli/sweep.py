"""Sweeps (``indrnn-train -m``): the configurations of all jobs are checked before the first one runs, on a signal every
process saves its run, and a table lists the results. For any launcher; checks and table need the basic sweeper."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import active_children
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from ..errors import RunError, UserError
from . import explain, leads, run, say

PROGRAM = "indrnn-train"
stopped_by = 0  # the signal that this process, which runs a sweep or jobs of one, has received
_jobs: dict[Path, dict[str, Any]] = {}  # the settings of each run folder of the sweep


class JobError(RunError):
    """A job of a sweep has failed, and its error is printed."""


class Sweep(Callback):
    """Hydra's callback before the first job, in the command's process."""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        # Hydra turns an exception of a callback into a warning, except for SystemExit.
        run(PROGRAM, lambda: _begin(config, config.hydra))


def _begin(config: Any, hydra: Any) -> None:
    _jobs.clear()
    if hydra.sweeper._target_.endswith(".BasicSweeper"):
        _check_jobs(config, hydra)
    if not hydra.launcher._target_.endswith(".BasicLauncher"):
        # Progress bars of several processes would overwrite each other.
        os.environ.setdefault("TQDM_DISABLE", "1")
        # joblib would kill its processes, or leave them running.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)


def _check_jobs(config: Any, hydra: Any) -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from ..config.compose import job_config, job_overrides, result_keys
    from ..record.folder import run_folder

    loader = GlobalHydra.instance().config_loader()
    words = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create(loader).parse_overrides([*words, *job_overrides(hydra)])
    for job in BasicSweeper.split_arguments(overrides, None)[0]:
        composed = loader.load_sweep_config(config, list(job))
        cfg = job_config(composed, composed.hydra)
        keys, folder = result_keys(cfg), run_folder(cfg)
        before = _jobs.setdefault(folder, keys)
        differ = [key for key in {**before, **keys} if before.get(key) != keys.get(key)]
        if differ:
            raise UserError(f"jobs with different {differ[0]} share {folder}; add 'tag=${{{differ[0]}}}'")


def _stop(number: int, frame: object) -> None:
    """Let the processes of the sweep save their runs; stop at once if there are none, or on the second signal."""
    global stopped_by
    if stopped_by or not active_children():
        raise KeyboardInterrupt(number)
    stopped_by = number
    # A terminal sends Ctrl-C to the children as well.
    for child in active_children() if number == signal.SIGTERM else ():
        child.terminate()


def run_job(train: Callable[[], Any], hydra: Any) -> float | None:
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
    """Print the results of the sweep's runs, as indrnn-report does."""
    folders = [folder for folder in _jobs if folder.is_dir()]
    if folders and leads():
        from ..report.runs import collect
        from ..report.table import markdown_report

        with suppress(UserError):  # no run has a result
            print(markdown_report(collect(folders)), end="", flush=True)
