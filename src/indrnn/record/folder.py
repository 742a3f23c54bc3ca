"""The run folder: where the files of a run are, and what happens if the folder already has some.

    nothing there                       fresh: start
    result.json, same config            finished: say so and stop
    unfinished, same config             resume from checkpoint.pt (fresh if the run was stopped before the first one)
    same config but a larger max_steps  resume, also of a finished run
    another config                      refused, naming the keys that differ

A finished run that continues keeps the evaluation and the log row of its old end, which an uninterrupted longer run
might not have, and reads the test set again at its new end.

Keys that cannot change the result are not compared (`indrnn.record.same_run`). Nothing is changed before
`RunFolder.begin`, so a command that fails earlier (missing data, no such device) leaves everything as it was.
"""

import errno
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config.checks import run_name
from ..config.schema import Config
from ..data import make_task
from ..errors import UserError
from ..files import TEMPORARY, one_line, sync_folder, write_atomically
from .same_run import SCHEDULES_OF_MAX_STEPS, Difference, continues, differences, in_terms_of_today
from .tensorboard import EVENTS

log = logging.getLogger(__name__)

CONFIG, OVERRIDES, METRICS, RESULT = "config.yaml", "overrides.yaml", "metrics.csv", "result.json"
CHECKPOINT, BEST, WEIGHTS = "checkpoint.pt", "best.pt", "weights.safetensors"
LOCK = ".lock"
TIMING = "timing.json"  # written by scripts/speedrun.py; not valid for a new run
_FILES = (CONFIG, OVERRIDES, METRICS, RESULT, CHECKPOINT, BEST, WEIGHTS, TIMING)
# result.json of a run that was then continued to more steps
_EARLIER_RESULT = re.compile(r"result\.max_steps\d+\.json")

_SHOWN = 4


def run_folder(cfg: Config) -> Path:
    """``output_root/<task>/<name>[-tag]/seed<k>``; reads no file. Raises UserError for an unsafe name or tag."""
    return Path(cfg.output_root).expanduser() / make_task(cfg.data).folder / run_name(cfg) / f"seed{cfg.seed}"


class FolderInUseError(UserError):
    """Another process uses the run folder."""


class RunFolder:
    """A run folder, locked for this process until `close` (or the end of a ``with`` block). `open_run` returns it.

    ``state`` is "fresh" (start at step 0), "resume" (load checkpoint_path) or "finished" (read result_path, stop).
    """

    def __init__(
        self, path: Path, state: str, cfg: Config, overrides: Sequence[str], command: str, lock: FileLock | None = None
    ) -> None:
        self.path = path
        self.state = state
        self.command = command
        self.config_path = path / CONFIG
        self.overrides_path = path / OVERRIDES
        self.metrics_path = path / METRICS
        self.result_path = path / RESULT
        self.checkpoint_path = path / CHECKPOINT
        self.best_path = path / BEST
        self.weights_path = path / WEIGHTS
        self._texts = {
            self.config_path: OmegaConf.to_yaml(cfg, resolve=True),
            self.overrides_path: OmegaConf.to_yaml(OmegaConf.create(list(overrides))),
        }
        self._lock = lock

    def begin(self) -> None:
        """Prepare the folder for the run's files; call it when only training itself can still fail.

        A fresh run removes the files of an earlier one (only those that this package writes); a finished run that
        continues keeps its old result as result.max_steps<n>.json. Then config.yaml and overrides.yaml are written.
        Raises UserError with one line.
        """
        if self.state == "finished":
            return
        with one_line("prepare run folder", self.path, UserError):
            if self.state == "fresh":
                # config.yaml last: if the process is killed meanwhile, the folder is still recognised as a run's.
                for file in sorted(written_files(self.path), key=lambda file: file.name == CONFIG):
                    file.unlink()
            elif self.result_path.exists():
                # Before config.yaml gets the larger max_steps: if the process is killed in between, the run must not
                # look finished.
                old = load_config_file(self.config_path)["trainer"]["max_steps"]
                self.weights_path.unlink(missing_ok=True)
                self.result_path.rename(self.path / f"result.max_steps{old}.json")
            sync_folder(self.path)
        for file, text in self._texts.items():
            write_atomically(file, text, UserError)

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_run(cfg: Config, overrides: Sequence[str], command: str) -> RunFolder:
    """Decide what to do with the folder of ``cfg`` (see the module's docstring) and lock it for this process.

    Raises UserError with one line if the folder holds something else, is in use, or cannot be written.
    """
    path = run_folder(cfg)
    with one_line("open run folder", path, UserError):
        # For a finished run nothing is locked or written: its folder may be read-only.
        if _state(path, cfg) == "finished":
            return RunFolder(path, "finished", cfg, overrides, command)
        path.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
        try:
            # Asked again, now that no other process can change the answer.
            return RunFolder(path, _state(path, cfg), cfg, overrides, command, lock)
        except BaseException:
            lock.release()
            raise


def _locked(folder: Path) -> FileLock:
    """Lock ``folder`` for this process until the lock is released or garbage-collected, or the process ends.

    The lock file stays: if it were deleted, a process that had just opened it would lock a file that no other can find.
    """
    # Any thread may release it.
    lock = FileLock(folder / LOCK, thread_local=False)
    with one_line("lock", folder / LOCK, UserError):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise FolderInUseError(
                f"run folder {folder} is in use by another process; wait for it to end, or keep this run apart with "
                "tag=<word>"
            ) from None
        except OSError as failure:
            # Some network file systems have no locks.
            if failure.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            log.warning("%s: this file system has no locks, so nothing keeps a second process out", folder)
    return lock


def written_files(path: Path) -> list[Path]:
    """The files in ``path`` that runs write, including temporary files of a killed run; never anything else."""
    names = (*_FILES, *(name + TEMPORARY for name in _FILES))
    return [
        file
        for file in sorted(path.iterdir())
        if file.is_file()
        and (file.name in names or file.name.startswith(EVENTS) or _EARLIER_RESULT.fullmatch(file.name))
    ]


def load_config_file(path: Path) -> dict[str, Any]:
    """A run's config.yaml as plain values, in terms of today's schema. Raises UserError with one line if it is not
    one."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as failure:
        reason = " ".join(str(failure).split())[:120]
        raise UserError(f"{path} cannot be read as a run's configuration ({reason}); {_ELSEWHERE}") from failure
    groups = ("model", "data", "trainer", "schedule")
    if not isinstance(config, dict) or not all(isinstance(config.get(group), dict) for group in groups):
        raise UserError(f"{path} is not the configuration of a run; {_ELSEWHERE}")
    return in_terms_of_today({str(key): value for key, value in config.items()})


_ELSEWHERE = "move it away, or keep this run apart with tag=<word> or output_root="


def _state(path: Path, cfg: Config) -> str:
    """fresh, resume or finished; raises UserError if ``cfg`` must not touch what is in ``path``."""
    present = {file.name for file in written_files(path)} if path.is_dir() else set()
    if CONFIG not in present:
        strangers = present & {RESULT, CHECKPOINT, BEST, METRICS}
        if strangers:
            raise UserError(
                f"run folder {path} has {', '.join(sorted(strangers))} but no config.yaml that says of which run; "
                f"{_ELSEWHERE}"
            )
        return "fresh"
    old = load_config_file(path / CONFIG)
    if cfg.overwrite:
        return "fresh"
    if not _was_trained(path):
        return "fresh"  # stopped before it had trained: nothing to resume, nothing to lose
    differ = differences(old, cfg)
    if differ and not continues(differ, cfg):
        raise UserError(_refusal(path, differ, cfg))
    if RESULT in present and not differ:
        return "finished"
    if cfg.resume == "never":
        raise UserError(
            f"run folder {path} holds {'a shorter' if RESULT in present else 'an unfinished'} run and resume=never; "
            "continue it with resume=auto, keep it and add tag=<word>, or replace it with overwrite=true"
        )
    if CHECKPOINT in present:
        return "resume"
    if RESULT in present:
        raise UserError(
            f"the finished run in {path} has no {CHECKPOINT} to continue from ({differ[0]}); keep it and add "
            "tag=<word>, or replace it with overwrite=true"
        )
    return "fresh"


def _was_trained(path: Path) -> bool:
    """Whether ``path`` holds any result of training."""
    metrics = path / METRICS
    rows = metrics.read_bytes().count(b"\n") - 1 if metrics.exists() else 0
    return rows > 0 or any((path / name).exists() for name in (RESULT, CHECKPOINT, BEST))


def _refusal(path: Path, differ: list[Difference], cfg: Config) -> str:
    shown = ", ".join(map(str, differ[:_SHOWN]))
    more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
    why = (
        f" (the whole course of a {cfg.schedule.name} schedule depends on max_steps)"
        if [key for key, *_ in differ] == ["trainer.max_steps"] and cfg.schedule.name in SCHEDULES_OF_MAX_STEPS
        else ""
    )
    return (
        f"run folder {path} holds a run of another config: {shown}{more}{why}; keep both with tag=<word>, "
        "or replace it with overwrite=true"
    )
