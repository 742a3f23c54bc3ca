"""``indrnn-train``: Hydra around `indrnn.train.train`; what is wrong with a request is one line and exit code 2."""

import argparse
import logging
import os
import re
import shlex
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, cast

from omegaconf import DictConfig

from ..errors import UserError
from . import announce, drop_output

if TYPE_CHECKING:
    from ..config.compose import Composer
    from ..config.schema import Config
    from ..record import Result

PROGRAM = "indrnn-train"


class _Command:
    """This process's command. Hydra knows no exit codes and words exceptions in its own lines, so a job says itself
    what stopped it and leaves its code here."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.tracebacks = os.environ.get("HYDRA_FULL_ERROR") == "1"
        self.failures: list[int] = []


_command: _Command | None = None


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 a run failed, 2 the request cannot be met, 128 + n stopped by signal n."""
    global _command
    _command = _Command()
    if "--version" in sys.argv[1:]:
        from indrnn import __version__

        print(f"indrnn {__version__}")
        return
    full_error = os.environ.get("HYDRA_FULL_ERROR")
    # Without this Hydra turns every exception into lines of its own and exit code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    terminate = signal.signal(signal.SIGTERM, _stop)
    try:
        _run()
        code = max(_command.failures, default=0)
    except BrokenPipeError:
        drop_output()
        code = 1
    except OSError as error:
        # Jobs report their own; what is left is the folder of a sweep.
        code = _say(f"{error.filename or 'cannot write'}: {error.strerror}; output_root= names another folder", 2)
    except Exception as error:
        code = _report(error)
    except KeyboardInterrupt as stop:
        # While it trains, a run sees to signals itself.
        number = signal.Signals(*stop.args or (signal.SIGINT,))
        code = _say(f"stopped by {number.name} while nothing was being trained; nothing is lost", 128 + number)
    finally:
        signal.signal(signal.SIGTERM, terminate)
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
    if code:
        sys.exit(code)


def _run() -> None:
    import hydra
    from hydra._internal.utils import get_args_parser
    from hydra.errors import HydraException

    from ..config.compose import Composer
    from ..config.paths import config_dir
    from ..config.wording import one_line

    parser = get_args_parser()
    parser.error = _refuse_flag  # type: ignore[method-assign]
    options = parser.parse_intermixed_args()
    # Hydra's own parser takes flags before or after the overrides only, not between them.
    words = sys.argv[1:]
    for override in options.overrides:
        words.remove(override)
    sys.argv[1:] = [*words, *options.overrides]
    if options.config_path is not None:
        raise UserError("--config-path: the project's own files are always needed; --config-dir adds a folder to them")
    if not (options.hydra_help or options.shell_completion or options.info or options.experimental_rerun):
        composer = Composer(options.config_name or "train", options.config_dir)
        if options.help:
            from .help import help_text

            print(help_text(composer, options.overrides))
            return
        _check_jobs(composer, options)
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")(_job)()
    except (HydraException, ValueError) as error:
        raise UserError(one_line(error)) from error


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM ends what is not training as Ctrl-C does."""
    raise KeyboardInterrupt(number)


def _refuse_flag(message: str) -> NoReturn:
    raise UserError(f"{message}; --help lists the flags")


def _check_jobs(composer: "Composer", options: argparse.Namespace) -> None:
    """Compose and check every job of the command, so that the last of a sweep cannot fail over a typing error."""
    from ..config.checks import check, result_keys
    from ..record import run_folder

    sweep = options.multirun or "hydra.mode=MULTIRUN" in options.overrides
    seen: dict[Path, dict[str, Any]] = {}
    for overrides in composer.jobs(options.overrides) if sweep else [options.overrides]:
        cfg = composer.compose(overrides)
        check(cfg)
        folder, keys = run_folder(cfg), result_keys(cfg)
        before = seen.setdefault(folder, keys)
        if before != keys:
            key = next(key for key in {**before, **keys} if before.get(key) != keys.get(key))
            raise UserError(
                f"{key} differs between jobs of the same run folder {folder}; keep them apart, "
                f"for example with 'tag={key.rsplit('.', 1)[-1]}-${{{key}}}'"
            )


def _job(cfg: DictConfig) -> None:
    """One job, in this process or, with another launcher of Hydra, in one of its own."""
    from hydra.core.hydra_config import HydraConfig

    if "torch" not in sys.modules:
        announce(PROGRAM, "loading PyTorch")
    try:
        from indrnn.record import command_line, run_folder
        from indrnn.train import train

        # The name is drawn from what Hydra knows of this job, which the next job replaces.
        cfg.name = cfg.name
        logging.basicConfig(format="%(message)s")
        logging.getLogger("indrnn").setLevel(logging.INFO)
        settings = HydraConfig.get()
        overrides = [str(word) for word in settings.overrides.task]
        sweep = settings.mode is not None and settings.mode.name == "MULTIRUN"
        # A job of a sweep is repeated by its own overrides, not by the sweep's.
        command = shlex.join([PROGRAM, *_flags(settings), *overrides]) if sweep else command_line()
        print(_outcome(train(cast("Config", cfg), overrides=overrides, command=command), run_folder(cfg)), flush=True)
    except Exception as error:
        if _command is None or _command.process != os.getpid():
            raise
        code = _report(error)
        if code > 128:
            # Stopped by a signal: the jobs of a sweep that follow are to stop, too.
            sys.exit(code)
        _command.failures.append(code)


def _flags(settings: Any) -> list[str]:
    """The flags of the command that a job's configuration depends on."""
    flags = [] if settings.job.config_name == "train" else ["--config-name", settings.job.config_name]
    for source in settings.runtime.config_sources:
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


def _report(error: Exception) -> int:
    """Say what went wrong; the exit code."""
    if _command is not None and _command.tracebacks:
        traceback.print_exception(error)
    if isinstance(error, UserError):
        return _say(str(error), error.exit_code)
    # PyTorch's own class is for devices alone; on a CPU it raises a RuntimeError.
    if isinstance(error, MemoryError) or re.search("OutOfMemoryError|can't allocate memory", repr(error)):
        return _say("out of memory; lower trainer.batch_size, trainer.eval_batch_size or model.hidden_size", 1)
    if isinstance(error, OSError) and error.filename is not None:
        return _say(f"{error.filename}: {error.strerror}", 1)
    if not (_command is not None and _command.tracebacks):
        traceback.print_exception(error)
    return 1


def _say(message: str, code: int) -> int:
    # One line, whatever the library thought that worded it first.
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    main()
