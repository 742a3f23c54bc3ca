"""``indrnn-train``: `indrnn.training.train` under Hydra."""

import logging
import os
import shlex
import signal
import sys
from multiprocessing import active_children
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

import indrnn.cli

from . import announce, leads, run

if TYPE_CHECKING:
    from ..record.result import Result

PROGRAM = "indrnn-train"
_USAGE = """\
indrnn-train trains one network on one task, evaluates it and records the run.

  indrnn-train                                       the IndRNN, tutorial protocol, full sequential MNIST
  indrnn-train model=lstm seed=1 optimizer.lr=1e-3   key=value sets any key listed below
  indrnn-train experiment=paper model=indrnn_12layer a protocol, and a network to train with it
  indrnn-train -m model=indrnn,lstm seed=0,1,2       a sweep: one run per combination
  indrnn-train tag=variant optimizer.lr=1e-3         tag= keeps runs with other settings apart
  indrnn-train model=lstm --help                     this list for another choice

Flags: -m sweep; --cfg job print the configuration, --resolve with references replaced; --config-dir FOLDER add your own
choices; --version; -sc install=bash tab completion (also zsh, fish); --hydra-help more.
Rerun a command to resume an interrupted run; finished runs are skipped."""

_signal = 0  # the signal that stops a sweep on several processes


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 a run failed, 2 bad request, 128 + n stopped by signal n."""
    # Hydra then raises its exceptions instead of printing them; only users who set it get tracebacks.
    before = os.environ.setdefault("HYDRA_FULL_ERROR", "0")
    indrnn.cli.full_tracebacks, os.environ["HYDRA_FULL_ERROR"] = before == "1", "1"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        run(PROGRAM, _command)
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    """Let the processes of a sweep save their runs; stop at once if there are none, or on the second signal.

    A run in this process handles signals itself.
    """
    global _signal
    children = active_children()
    if _signal or not children:
        raise KeyboardInterrupt(number)
    _signal = number
    # A terminal sends Ctrl-C to the children as well.
    if number == signal.SIGTERM:
        for child in children:
            child.terminate()


def _command() -> int:
    import hydra
    from hydra._internal.utils import get_args_parser

    from ..config.compose import config_dir, keep_text, one_line
    from ..errors import UserError
    from .sweep import print_table

    if "--version" in sys.argv:
        print(f"indrnn {indrnn.__version__}")
        return 0
    # Hydra's parser expects all flags on one side of the overrides.
    words = sorted(sys.argv[1:], key=lambda word: "=" in word and not word.startswith("-"))
    sys.argv[1:] = map(keep_text, words)
    options = get_args_parser().parse_args()
    if options.help:
        print(_help(options))
        return 0
    completed = False
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")(_job)()
        if _signal:
            raise KeyboardInterrupt(_signal)
        completed = True
    except (ValueError, OverflowError) as error:
        raise UserError(one_line(error)) from error
    except (NotADirectoryError, FileExistsError, PermissionError) as error:
        raise UserError(f"{error.filename}: {error.strerror}; choose another folder with output_root=") from error
    finally:
        failed = print_table(completed)
    return int(failed)


def _help(options: Any) -> str:
    """The choices of every group, and every key with its value and meaning."""
    from ..config.checks import as_typed, settings
    from ..config.compose import config_dir, load_config
    from ..config.schema import SCHEMAS

    cfg = load_config(options.overrides, options.config_name or "train", options.config_dir)
    lines = [_USAGE, "", "Choices:"]
    for group in [*SCHEMAS, "experiment"]:
        folders = [Path(folder, group) for folder in (config_dir(), options.config_dir) if folder is not None]
        names = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
        lines.append(f"  {group:<10} = {', '.join(names)}")
    lines += ["", "Keys, with the values of this command:"]
    for key, field, value in settings(cfg):
        lines.append(f"  {f'{key}={as_typed(value)}':<34} {field.metadata['doc']}")
    return "\n".join(lines)


def _job(composed: DictConfig) -> float | None:
    """One job, in this process or in one of a launcher. Returns the validation score in a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from .sweep import run_job

    hydra: Any = HydraConfig.get()
    # Relative folders must not depend on hydra.job.chdir.
    os.chdir(hydra.runtime.cwd)
    if hydra.mode == RunMode.MULTIRUN:
        return run_job(lambda: _train(composed, hydra), hydra)
    # Its SystemExit passes through Hydra, which would print other exceptions.
    run(PROGRAM, lambda: _train(composed, hydra))
    return None


def _train(composed: DictConfig, hydra: Any) -> "Result":
    from hydra.types import RunMode

    from indrnn.config.compose import job_config, job_overrides

    cfg = job_config(composed, hydra)
    if "torch" not in sys.modules and leads():
        announce(PROGRAM, "loading PyTorch")
    from indrnn.record.folder import run_folder
    from indrnn.record.result import command_line
    from indrnn.training import train

    logging.basicConfig(format="%(message)s")
    logging.getLogger("indrnn").setLevel(logging.INFO)
    command = command_line()
    if hydra.mode == RunMode.MULTIRUN:  # the command that repeats this job alone
        flags = [] if hydra.job.config_name == "train" else ["--config-name", hydra.job.config_name]
        for source in hydra.runtime.config_sources:
            flags += ["--config-dir", source.path] if source.provider == "command-line" else []
        command = shlex.join([PROGRAM, *flags, *job_overrides(hydra)])
    result = train(cfg, command=command)
    if leads():
        print(_outcome(result, run_folder(cfg)), flush=True)
    return result


def _outcome(result: "Result", folder: Path) -> str:
    figures = f"test loss {result.test_loss:.4g}"
    if result.test_accuracy is not None and result.test_ci95 is not None:
        low, high = result.test_ci95
        figures = f"test accuracy {result.test_accuracy:.2%} (95% interval {low:.2%} to {high:.2%})"
    return (
        f"{result.name} seed {result.seed} on {result.task}: {figures} with the checkpoint of step {result.best_step} "
        f"of {result.steps}, {result.parameters:,} parameters; {folder}"
    )


if __name__ == "__main__":
    main()
