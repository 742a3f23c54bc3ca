"""The commands: one module each, whose ``main`` is an entry point. Heavy libraries are imported inside functions."""

import os
import sys
from collections.abc import Callable

from ..errors import UserError


def run(program: str, command: Callable[[], None]) -> None:
    """Run a command's body. Exits with one line on stderr for a UserError, and quietly when it is interrupted or
    whoever reads its output has had enough."""
    try:
        command()
        sys.stdout.flush()
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        drop_output()
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def announce(program: str, doing: str) -> None:
    """Say on stderr what is about to take more than a moment."""
    print(f"{program}: {doing} ...", file=sys.stderr, flush=True)


def drop_output() -> None:
    """After a BrokenPipeError: nor may the interpreter flush into the pipe as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
