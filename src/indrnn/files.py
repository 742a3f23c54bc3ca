"""Atomic writes and one-line messages for file errors."""

import csv
import errno
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import RunError, UserError

TEMPORARY = ".tmp"

_FIX = {
    errno.ENOSPC: "free some space, then rerun the command",
    errno.EDQUOT: "free some space, then rerun the command",
    errno.ELOOP: "remove the symbolic link",
    errno.ENAMETOOLONG: "choose a shorter name=, tag= or output_root=",
}


@contextmanager
def one_line(action: str, path: Path, error: type[UserError] = RunError) -> Iterator[None]:
    """Turn an OSError into ``error("cannot <action> <path>: <reason>; <fix>")``."""
    try:
        yield
    except OSError as failure:
        reason = failure.strerror or str(failure)
        fix = _FIX.get(failure.errno or 0, "make it writable, or choose another folder with output_root= or --out")
        raise error(f"cannot {action} {path}: {reason}; {fix}") from failure


def expanded(key: str, folder: str) -> Path:
    """``folder`` with ``~`` as the home folder. Raises UserError naming ``key`` if there is no home folder."""
    try:
        return Path(folder).expanduser()
    except RuntimeError as failure:
        raise UserError(f"{key}={folder}: there is no home folder; write the whole path, or set HOME") from failure


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
            with suppress(OSError):
                temporary.unlink()
            raise


def write_atomically(path: Path, text: str, error: type[UserError] = RunError) -> None:
    """Replace ``path`` by ``text`` (UTF-8) atomically; create its folder."""
    with one_line("write", path, error):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, error) as file:
        # Arguments that are not ASCII reach Python as surrogates where the locale is ASCII.
        file.write(text.encode(errors="surrogateescape"))


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as CSV with line feeds on every platform; None becomes an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def written_lines(paths: Iterable[Path]) -> list[str]:
    """A line for each file written; the two formats of a figure share one."""
    return [f"wrote {path}{' and .svg' if path.suffix == '.png' else ''}" for path in paths if path.suffix != ".svg"]
