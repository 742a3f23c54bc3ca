"""The run folder: its files, and what a rerun does with them.

    nothing recorded or overwrite=true  fresh: start at step 0
    no checkpoint yet, same config      fresh
    result.json, same config            finished: report it and stop
    unfinished, same config             resume from checkpoint.pt
    different config                    refused, naming the keys that differ

Keys that cannot change the result are not compared (`indrnn.record.config_diff`). Nothing is changed before
`RunFolder.begin`, so a command that fails earlier (missing data, no such device) leaves everything as it was.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config.compose import flatten, run_name
from ..config.schema import Config
from ..data import make_task
from ..errors import UserError
from ..files import TEMPORARY, one_line, write_atomically
from .config_diff import differences

CONFIG, METRICS, RESULT = "config.yaml", "metrics.csv", "result.json"
EVENTS = "events.out.tfevents."
CHECKPOINT, BEST, WEIGHTS = "checkpoint.pt", "best.pt", "weights.safetensors"
LOCK = ".lock"
_FILES = (CONFIG, METRICS, RESULT, CHECKPOINT, BEST, WEIGHTS)

_ELSEWHERE = "move it away, or keep both with tag=<name> or output_root="
_KEEP_OR_REPLACE = "keep both with tag=<name>, or replace it with overwrite=true"


def run_folder(cfg: Config) -> Path:
    """``output_root/<task>/<name>[-tag]/seed<k>``; reads no file. Raises UserError for an unsafe name or tag."""
    return Path(os.path.expanduser(cfg.output_root)) / make_task(cfg.data).folder / run_name(cfg) / f"seed{cfg.seed}"


def find_run_folders(folder: Path) -> Iterator[Path]:
    """Every run folder at or below ``folder``, in alphabetical order, also through symbolic links; each folder once.

    Hidden folders are skipped. Raises UserError if ``folder`` is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name one that holds run folders")
    seen = set()
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        # A link to a folder above would be followed forever.
        subfolders[:] = [] if real in seen else sorted(name for name in subfolders if not name.startswith("."))
        if real not in seen and CONFIG in files and (METRICS in files or RESULT in files):
            yield Path(parent)
        seen.add(real)


class FolderInUseError(UserError):
    """Another process uses the run folder."""


class RunFolder:
    """A run folder, locked for this process until the end of a ``with`` block. `open_run` returns it.

    ``state`` is "fresh" (start at step 0), "resume" (load checkpoint_path) or "finished" (read result_path, stop).
    """

    def __init__(self, path: Path, state: str, cfg: Config, command: str, lock: FileLock | None = None) -> None:
        self.path = path
        self.state = state
        self.command = command
        self.config_path = path / CONFIG
        self.result_path = path / RESULT
        self.checkpoint_path = path / CHECKPOINT
        self.best_path = path / BEST
        self.weights_path = path / WEIGHTS
        self.configuration, self._lock = OmegaConf.to_yaml(cfg, resolve=True), lock

    def begin(self) -> None:
        """Prepare the folder for the run's files; call it when only training itself can still fail.

        A fresh run removes the files of an earlier one (only those that this package writes). Then config.yaml
        is written. Raises UserError with one line.
        """
        with one_line("prepare run folder", self.path, UserError):
            if self.state == "fresh":
                # config.yaml last: if the process is killed meanwhile, the folder is still recognized as a run's.
                for file in sorted(written_files(self.path), key=lambda file: file.name == CONFIG):
                    file.unlink()
        write_atomically(self.config_path, self.configuration, UserError)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()


def open_run(cfg: Config, command: str = "") -> RunFolder:
    """Decide what to do with the folder of ``cfg`` (see the module's docstring) and lock it for this process.

    Raises UserError with one line if the folder holds something else, is in use, or cannot be written.
    """
    path = run_folder(cfg)
    # Any thread may release the lock. Its file stays: another process may have opened it just now.
    lock = FileLock(path / LOCK, thread_local=False)
    with one_line("open run folder", path, UserError):
        state = _state(path, cfg)
        if state != "finished":  # otherwise the folder may be read-only
            path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
                state = _state(path, cfg)  # again: now no other process can change the answer
            except Timeout:
                fix = "wait until it ends, or keep both with tag=<name>"
                raise FolderInUseError(f"run folder {path} is in use by another process; {fix}") from None
            except BaseException:
                lock.release()
                raise
    return RunFolder(path, state, cfg, command, lock)


def written_files(path: Path) -> list[Path]:
    """The files in ``path`` that runs write, including temporary files of a killed run; never anything else."""
    names = (*_FILES, *(name + TEMPORARY for name in _FILES))
    files = (file for file in sorted(path.iterdir()) if file.is_file())
    return [file for file in files if file.name in names or file.name.startswith(EVENTS)]


def load_config_file(path: Path) -> dict[str, Any]:
    """A run's config.yaml as plain values. Raises UserError with one line if it is not one."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as failure:
        reason = " ".join(str(failure).split())[:120]
        raise UserError(f"{path} cannot be read as a run's configuration ({reason}); {_ELSEWHERE}") from failure
    groups = ("model", "data", "trainer", "schedule")
    if not isinstance(config, dict) or not all(isinstance(config.get(group), dict) for group in groups):
        raise UserError(f"{path} is not the configuration of a run; {_ELSEWHERE}")
    return {str(key): value for key, value in config.items()}


def _state(path: Path, cfg: Config) -> str:
    """fresh, resume or finished; raises UserError if ``cfg`` must not touch what is in ``path``."""
    present = {file.name for file in written_files(path)} if path.is_dir() else set()
    if CONFIG not in present:
        if trained := present & {RESULT, CHECKPOINT, BEST, METRICS}:
            raise UserError(f"run folder {path} has {', '.join(sorted(trained))} but no {CONFIG}; {_ELSEWHERE}")
        return "fresh"
    old = flatten(load_config_file(path / CONFIG))
    begun = METRICS in present and (path / METRICS).read_text(errors="replace").count("\n") > 1
    if cfg.overwrite or not (begun or present & {RESULT, CHECKPOINT, BEST}):
        return "fresh"
    differ = differences(old, cfg)
    if differ:
        shown = ", ".join(differ[:4])
        more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise UserError(f"run folder {path} holds a run of another config: {shown}{more}; {_KEEP_OR_REPLACE}")
    if RESULT in present:
        return "finished"
    return "resume" if CHECKPOINT in present else "fresh"
