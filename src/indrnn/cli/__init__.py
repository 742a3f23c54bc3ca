"""The commands: a module for each, whose ``main`` is the entry point. Heavy libraries are imported inside functions."""

import argparse
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable

from ..errors import UserError


def command_parser(program: str, description: str) -> argparse.ArgumentParser:
    """A parser whose help keeps the line breaks of ``description``."""
    return argparse.ArgumentParser(
        program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run(program: str, command: Callable[[], int | None], tracebacks: bool = False) -> None:
    """Run a command's body, which returns its exit code. Errors become one line on stderr, with exit code 2 for a
    request that cannot be met, 1 for a failure, 128 + n for signal n; nothing is printed if stdout was closed."""
    try:
        code = command() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout again at exit, which must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt as stop:
        number = signal.Signals(*stop.args or (signal.SIGINT,))
        code = 128 + number
        if leads():
            say(program, f"stopped by {number.name}; nothing is lost", code)
    except Exception as error:
        # A command that cannot be met fails in every process, but only one reports it.
        code = explain(program, error, tracebacks) if leads() else getattr(error, "exit_code", 1)
    if code:
        sys.exit(code)


def explain(program: str, error: Exception, tracebacks: bool = False) -> int:
    """Print what went wrong, with a traceback if ``tracebacks`` or if the error is unexpected; return the exit code."""
    line, code = None, 1
    if isinstance(error, UserError):
        line, code = str(error), error.exit_code
    # PyTorch's OutOfMemoryError is only for GPUs; on a CPU it raises a RuntimeError.
    elif isinstance(error, MemoryError) or re.search("OutOfMemoryError|can't allocate memory", repr(error)):
        line = "out of memory; lower trainer.batch_size, trainer.eval_batch_size or model.hidden_size"
    elif isinstance(error, OSError) and error.filename is not None:
        line = f"{error.filename}: {error.strerror}"
    if tracebacks or line is None:
        traceback.print_exception(error)
    return code if line is None else say(program, line, code)


def say(program: str, message: str, code: int) -> int:
    """Print a message as one line on stderr; return ``code``."""
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def announce(program: str, doing: str) -> None:
    """Say on stderr what the command is doing, before it is silent for a while."""
    print(f"{program}: {doing} ...", file=sys.stderr, flush=True)


def leads() -> bool:
    """Whether this is the process that prints, of those that torchrun started together."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"
