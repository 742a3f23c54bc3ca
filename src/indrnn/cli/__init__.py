"""The commands, one module each, whose ``main`` is the entry point. Heavy libraries are imported inside functions."""

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable

from ..errors import UserError


def run(program: str, command: Callable[[], object]) -> None:
    """Run a command's body, which may return an exit code, and exit with that code unless it is 0.

    Errors become one line on stderr. Exit codes: 2 for a bad request, 1 for a failure, 128 + n for signal n.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal
    try:
        result = command()
        code = result if isinstance(result, int) else 0
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout again at exit, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt as stop:
        number = signal.Signals(*stop.args or (signal.SIGINT,))
        code = say(program, f"stopped by {number.name}; nothing is lost", 128 + number)
    except Exception as error:
        code = explain(program, error)
    if code:
        sys.exit(code)


def explain(program: str, error: Exception) -> int:
    """Print an error in one line, with a traceback if it is unexpected; return the exit code."""
    if isinstance(error, UserError):
        return say(program, str(error), error.exit_code)
    if type(error).__module__.partition(".")[0] in ("hydra", "omegaconf", "yaml"):
        from ..config.compose import one_line

        return say(program, one_line(error), 2)
    # PyTorch's OutOfMemoryError is only for GPUs; on a CPU it raises a RuntimeError.
    if isinstance(error, MemoryError) or re.search("OutOfMemoryError|can't allocate memory", repr(error)):
        return say(program, "out of memory; lower trainer.batch_size, trainer.eval_batch_size or model.hidden_size", 1)
    if isinstance(error, OSError) and error.filename is not None:
        return say(program, f"{error.filename}: {error.strerror}", 1)
    if leads():
        traceback.print_exception(error)
    return 1


def say(program: str, message: str, code: int = 0) -> int:
    """Print a message as one line on stderr, on rank 0 only; return ``code``."""
    if leads():
        print(f"{program}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def leads() -> bool:
    """Whether this process prints: every process except ranks 1 to WORLD_SIZE - 1 of those that torchrun started."""
    rank, size, *address = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    numbers = all(number.isascii() and number.isdecimal() for number in (rank, size))
    return not (numbers and all(address) and 0 < int(rank) < int(size))
