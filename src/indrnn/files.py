"""Atomic writes and one-line messages for file errors."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import RunError, UserError

TEMPORARY = ".tmp"


@contextmanager
def one_line(action: str, path: Path, error: type[UserError] = RunError) -> Iterator[None]:
    """Turn an OSError into ``error`` with one line that names the path, the reason and the fix."""
    try:
        yield
    except OSError as failure:
        reason = failure.strerror or str(failure)
        fix = "check its permissions and free space, or choose another folder with output_root= or --out"
        raise error(f"cannot {action} {path}: {reason}; {fix}") from failure


@contextmanager
def replacing(path: Path, error: type[UserError] = RunError) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` when the block succeeds.

    A reader of ``path`` sees the old or the new file, also after a crash, never a part. An OSError becomes ``error``.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with one_line("write", path, error):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, text: str, error: type[UserError] = RunError) -> None:
    """Replace ``path`` by ``text`` (UTF-8) atomically; create its folder."""
    with one_line("write", path, error):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, error) as file:
            # Arguments that are not ASCII reach Python as surrogates where the locale is ASCII.
            file.write(text.encode(errors="surrogateescape"))
