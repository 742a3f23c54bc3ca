"""One process a run folder: a lock that the kernel gives back however the process ends."""

import errno
import os
import weakref
from contextlib import suppress
from pathlib import Path

from ..errors import UserError

LOCK = ".lock"

# What file systems without locks answer (some network mounts); a run there is not protected from a second one.
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class FolderLock:
    """Holds ``folder/.lock`` with flock(2) until `release`, garbage collection or the end of the process.

    Raises UserError naming the process that holds it, and OSError if the file cannot be made. On Windows, which has
    no flock, it holds nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _flock(descriptor)
                ours = _same_file(descriptor, self.path)
                if ours:
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, str(os.getpid()).encode())
            except BlockingIOError:
                holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
                os.close(descriptor)
                raise UserError(
                    f"run folder {folder} is in use by process {holder}; wait for it to end, or keep this run apart "
                    "with tag=<word>"
                ) from None
            except OSError:
                os.close(descriptor)
                raise
            if ours:
                break
            # The holder deleted the file between our open and our lock: what we hold is no longer the folder's lock.
            os.close(descriptor)
        self._close = weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        """Give the lock back and remove its file; one that stays behind does no harm. A second call does nothing."""
        if self._close.alive:
            with suppress(OSError):
                self.path.unlink()
            self._close()


def _flock(descriptor: int) -> None:
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as failure:
        if failure.errno not in _UNSUPPORTED:
            raise


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
