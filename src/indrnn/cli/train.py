"""``indrnn-train``: `indrnn.training.train` under Hydra. A bad request gets one line and exit code 2."""

import argparse
import logging
import os
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, cast

from omegaconf import DictConfig

from .. import __version__
from ..errors import UserError
from . import announce, explain, leads, run

if TYPE_CHECKING:
    from ..config.compose import Composer
    from ..config.schema import Config
    from ..record.result import Result
    from .sweep import PlannedJob

PROGRAM = "indrnn-train"
_USAGE = """\
indrnn-train trains one network on one task, evaluates it and records the run.

  indrnn-train                                       the IndRNN, tutorial protocol, full sequential MNIST
  indrnn-train model=lstm seed=1 optimizer.lr=1e-3   key=value sets anything listed below
  indrnn-train experiment=paper model=indrnn_12layer a protocol, and a network that runs it
  indrnn-train -m model=indrnn,lstm seed=0,1,2       one run for each combination
  indrnn-train model=lstm --help                     the same list for another choice

Flags: -m sweep; --cfg job print the configuration, --resolve with references replaced; --config-dir FOLDER more
choices of your own; --version; -sc install=bash tab completion (also zsh, fish); --hydra-help the rest.
A command that is run again continues where it stopped and skips finished runs."""


@dataclass
class _Command:
    """The state of this process's command. Hydra knows no exit codes and has its own way to print exceptions, so a job
    prints its own errors and stores its exit code here."""

    tracebacks: bool = False
    code: int = 0


_command = _Command()


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 a run failed, 2 the request cannot be met, 128 + n stopped by signal n."""
    global _command
    full_error = os.environ.get("HYDRA_FULL_ERROR")
    _command = _Command(tracebacks=full_error == "1")
    # Otherwise Hydra would print every exception itself and exit with code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    terminate = signal.signal(signal.SIGTERM, _stop)
    try:
        run(PROGRAM, lambda: _answer(_options()), _command.tracebacks)
    finally:
        signal.signal(signal.SIGTERM, terminate)
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Outside of training SIGTERM acts like Ctrl-C; a run handles signals itself."""
    raise KeyboardInterrupt(number)


def _options() -> argparse.Namespace:
    """The command's flags, which are Hydra's, and its overrides. Moves the flags to the front of sys.argv, because
    Hydra's own parser does not accept flags between overrides."""
    parser = argparse.ArgumentParser(PROGRAM, add_help=False)
    parser.error = _refuse_flag  # type: ignore[method-assign]
    parser.add_argument("--version", action="version", version=f"indrnn {__version__}")
    for flags in ("--help -h", "--hydra-help", "--resolve", "--run -r", "--multirun -m", "--shell-completion -sc"):
        parser.add_argument(*flags.split(), action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--info", "-i", nargs="?", const="all")
    for flags in ("--package -p", "--config-path -cp", "--config-name -cn", "--config-dir -cd", "--experimental-rerun"):
        parser.add_argument(*flags.split())
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    words = sys.argv[1:]
    for override in options.overrides:
        words.remove(override)
    sys.argv[1:] = [*words, *options.overrides]
    return options


def _refuse_flag(message: str) -> NoReturn:
    raise UserError(f"{message}; --help lists the flags")


def _answer(options: argparse.Namespace) -> int:
    """Do what the command asks for; return its exit code."""
    import hydra
    from hydra.errors import HydraException

    from ..config.compose import Composer, config_dir, plain_message
    from .sweep import Sweep

    plans: list[PlannedJob] = []
    if options.config_path is not None:
        raise UserError("--config-path: the project's own files are always needed; --config-dir adds a folder to them")
    if not (options.hydra_help or options.shell_completion or options.info or options.experimental_rerun):
        composer = Composer(options.config_name or "train", options.config_dir)
        if options.help:
            print(_help(composer, options.overrides))
            return 0
        plans = _check_jobs(composer, options)
    try:
        with Sweep(plans) as sweep:
            hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")(_job)()
        return _command.code or sweep.code
    except (HydraException, ValueError) as error:
        raise UserError(plain_message(error)) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        # Jobs report their own errors, so this one comes from the sweep's folder.
        raise UserError(
            f"{error.filename or 'cannot write'}: {error.strerror}; output_root= names another folder"
        ) from error


def _help(composer: "Composer", overrides: list[str]) -> str:
    """The choices of every group, and every key with its meaning and the value that ``overrides`` give it."""
    from ..config.checks import as_typed, settings

    cfg = composer.compose(overrides)
    keys = [(f"{key}={as_typed(value)}", field.metadata["doc"]) for key, field, value in settings(cfg)]
    choices = composer.choices()
    width = max(map(len, choices))
    lines = [_USAGE, "", "Choices:"]
    lines += [f"  {group:<{width}} = {', '.join(names)}" for group, names in choices.items()]
    lines += ["", "What an experiment sets for one model only, <experiment>_<model>:"]
    lines += [
        f"  {name:<30} {' '.join(f'{key}={as_typed(value)}' for key, value in values.items())}"
        for name, values in composer.for_models().items()
    ]
    lines += ["", "Keys, with the values of this command:", *(f"  {key:<34} {doc}".rstrip() for key, doc in keys)]
    return "\n".join(lines)


def _check_jobs(composer: "Composer", options: argparse.Namespace) -> "list[PlannedJob]":
    """Compose and check every job of the command: the last job of a sweep must not fail because of a misspelt word.
    Return the jobs, if they are known."""
    from ..config.checks import check, result_keys
    from ..record.folder import run_folder
    from .sweep import PlannedJob

    sweep = options.multirun or "hydra.mode=MULTIRUN" in options.overrides
    seen: dict[Path, dict[str, Any]] = {}
    plans: list[PlannedJob] = []
    for overrides in composer.jobs(options.overrides) if sweep else [options.overrides]:
        cfg = composer.compose(overrides)
        check(cfg)
        folder, keys = run_folder(cfg), result_keys(cfg)
        plans.append(PlannedJob(folder, cfg.trainer.max_steps))
        before = seen.setdefault(folder, keys)
        if before != keys:
            key = next(key for key in {**before, **keys} if before.get(key) != keys.get(key))
            raise UserError(
                f"{key} differs between jobs of the same run folder {folder}; keep them apart, "
                f"for example with 'tag={key.rsplit('.', 1)[-1]}-${{{key}}}'"
            )
    # Other sweepers choose their jobs as they go.
    return [] if any(word.startswith("hydra/sweeper=") for word in options.overrides) else plans


def _job(composed: DictConfig) -> float | None:
    """One job, in this process or, with some of Hydra's launchers, in another. Returns the validation score in a
    sweep."""
    from hydra.core.hydra_config import HydraConfig

    if "torch" not in sys.modules and leads():
        announce(PROGRAM, "loading PyTorch")
    hydra = HydraConfig.get()
    if _in_sweep(hydra):
        from .sweep import run_job

        return run_job(composed, hydra, _train, lambda error: explain(PROGRAM, error, _command.tracebacks))
    try:
        _train(composed, hydra)
    except BrokenPipeError:
        raise
    except Exception as error:
        _command.code = explain(PROGRAM, error, _command.tracebacks)
    return None


def _in_sweep(hydra: Any) -> bool:
    return hydra.mode is not None and hydra.mode.name == "MULTIRUN"


def _train(cfg: DictConfig, hydra: Any) -> "Result":
    from indrnn.record.folder import run_folder
    from indrnn.record.result import command_line
    from indrnn.training import train

    # Resolve the name now: it depends on Hydra's settings for this job, which the next job replaces.
    cfg.name = str(cfg.name)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("indrnn").setLevel(logging.INFO)
    overrides = [str(word) for word in hydra.overrides.task]
    # The command that repeats a job of a sweep has the job's overrides, not the sweep's.
    command = shlex.join([PROGRAM, *_flags(hydra), *overrides]) if _in_sweep(hydra) else command_line()
    result = train(cast("Config", cfg), overrides=overrides, command=command)
    if leads():
        print(_outcome(result, run_folder(cast("Config", cfg))), flush=True)
    return result


def _flags(hydra: Any) -> list[str]:
    """The flags of the command that a job's configuration depends on."""
    flags = [] if hydra.job.config_name == "train" else ["--config-name", hydra.job.config_name]
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            flags += ["--config-dir", source.path]
    return flags


def _outcome(result: "Result", folder: Path) -> str:
    """For example: indrnn seed 0 on mnist5k: test accuracy 84.30 % (95 %: 81.92-86.42), step 700 of 800, outputs/..."""
    figures = f"test loss {result.test_loss:.4g}"
    if result.test_accuracy is not None:
        figures = f"test accuracy {result.test_accuracy:.2%}"
        if result.test_ci95 is not None:
            low, high = result.test_ci95
            figures += f" (95 % interval {low:.2%} to {high:.2%})"
    return (
        f"{result.name} seed {result.seed} on {result.task}: {figures} with the checkpoint of step {result.best_step} "
        f"of {result.steps}, {result.parameters:,} parameters; {folder}"
    )


if __name__ == "__main__":
    main()
