"""Writing files whole or not at all, even if the process is killed or the disk is full; errors are one line."""

import csv
import errno
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

from .errors import RunError, UserError

TEMPORARY = ".tmp"

_REMEDY = {
    errno.ENOSPC: "free some space, then give the same command again",
    errno.EDQUOT: "free some space, then give the same command again",
    errno.EACCES: "make it writable, or choose another folder with output_root= or --out",
    errno.EPERM: "make it writable, or choose another folder with output_root= or --out",
    errno.EROFS: "choose another folder with output_root= or --out",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another folder with output_root= or --out",
    errno.ENOENT: "choose another folder with output_root= or --out",
    errno.EFBIG: "raise the limit on the size of a file, then give the same command again",
    errno.EEXIST: "a file stands where a folder is needed; choose another folder with output_root= or --out",
    errno.ELOOP: "a symbolic link stands where a file of the run is needed; remove it",
    errno.ENAMETOOLONG: "choose a shorter name=, tag= or output_root=",
}


@contextmanager
def one_line(action: str, path: Path, error: type[UserError] = RunError) -> Iterator[None]:
    """Turn an OSError into ``error("cannot <action> <path>: <reason>; <remedy>")``."""
    try:
        yield
    except OSError as failure:
        reason = failure.strerror or str(failure)
        remedy = _REMEDY.get(failure.errno or 0, "see that the folder exists and can be written")
        raise error(f"cannot {action} {path}: {reason}; {remedy}") from failure


@contextmanager
def replacing(path: Path, error: type[UserError] = RunError) -> Iterator[BinaryIO]:
    """As `replaced_when_complete`, but an OSError becomes ``error`` with one line."""
    with one_line("write", path, error), replaced_when_complete(path, path.with_name(path.name + TEMPORARY)) as file:
        yield file


@contextmanager
def replaced_when_complete(path: Path, temporary: Path) -> Iterator[BinaryIO]:
    """A file, ``temporary``, that replaces ``path`` once the block has succeeded and all of it is on the disk.

    A reader of ``path``, meanwhile or after a crash, sees the old file or the new one, never a part. If the file cannot
    be written, ``path`` stays as it was.
    """
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
    sync_folder(path.parent)


def write_atomically(path: Path, text: str, error: type[UserError] = RunError) -> None:
    """Replace ``path`` by ``text`` (UTF-8), whole or not at all; create its folder."""
    with one_line("write", path, error):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, error) as file:
        file.write(text.encode())


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as CSV, with line feeds on every platform; None becomes an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def written_lines(paths: Iterable[Path]) -> list[str]:
    """A line about each file written; the two formats of a figure share one."""
    return [f"wrote {path}{' and .svg' if path.suffix == '.png' else ''}" for path in paths if path.suffix != ".svg"]


def sync_folder(folder: Path) -> None:
    """Sync renames and deletions in ``folder`` to the disk, if the system can do that for folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AppendOnlyFile:
    """A file that grows by whole records, unbuffered. If the disk is full, an incomplete record is cut off and RunError
    raised with one line. ``flags``: for os.open."""

    def __init__(self, path: Path, flags: int = 0) -> None:
        self.path = path
        with one_line("write", path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | flags, 0o666)

    def append(self, data: bytes) -> None:
        with one_line("write", self.path):
            size = os.fstat(self._descriptor).st_size
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._descriptor, size)
                raise

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
