"""Downloads of MNIST's files that end: with the file, or soon and with one line that says what to do.

torchvision knows the mirrors, but its downloader waits without limit for a server that does not answer, leaves half a
file behind when it is interrupted, and ends in a traceback on a file that is not what it should be. So its list of
mirrors is used and the transfer is done here.
"""

import hashlib
import logging
import os
import queue
import threading
import time
import zlib
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, url2pathname, urlopen

from ..errors import UserError

log = logging.getLogger(__name__)

# Seconds spent waiting, for one file and all sources together, while no byte arrives: within ten seconds the user hears
# that there is no network. Importing torchvision takes some of them from the first file, but leaves it half.
PATIENCE = 7.0
# Seconds of rest before each round over the sources that failed for a reason that may pass.
PAUSES = (0.0, 0.3, 0.7)
# No file of MNIST is larger, so neither a page without end nor a compressed bomb fills the memory.
MAX_BYTES = 64 * 2**20

_CHUNK = 1 << 16


class DamagedError(Exception):
    """Content that cannot be the file."""


class _SourceError(Exception):
    """One source did not give the file; `final` when asking again is no use."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(" ".join(reason.split()))
        self.final = final


def check_mirror(mirror: str) -> None:
    """Raise UserError unless `mirror` is an existing folder (also as file://) or an http(s) URL."""
    local = _local_folder(mirror)
    if local is None:
        if urlsplit(mirror).scheme not in ("http", "https"):
            raise UserError(f"data.mirror={mirror} is neither a folder nor a file://, http:// or https:// URL")
    elif not local.is_dir():
        raise UserError(f"data.mirror={mirror} is not a folder; name one that holds MNIST's files, or a URL")


def download(files: dict[str, str], folder: Path, mirror: str | None) -> None:
    """Put `files` (name -> SHA-256 of the uncompressed content) into `folder`, uncompressed.

    Sources are `mirror`, then torchvision's mirrors; each may hold name.gz or name. A file appears under its name only
    when it is whole and checked. Raises UserError when a file cannot be had or written.
    """
    start = time.monotonic()
    sources = [*([mirror] if mirror else []), *_public_mirrors()]
    patience = max(PATIENCE - (time.monotonic() - start), PATIENCE / 2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log.info("downloading MNIST (11 MB) to %s", folder)
        for name, sha256 in files.items():
            # The source that had the last file is asked first for the next.
            content, sources = _fetch(name, sha256, sources, patience, folder)
            _write(folder / name, content)
            patience = PATIENCE
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write MNIST to {folder} ({reason}); choose another folder with data.root=") from error


def unpack(file_name: str, content: bytes) -> bytes:
    """`content`, decompressed if the name ends in .gz. Raises DamagedError."""
    if not file_name.endswith(".gz"):
        return content
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        unpacked = stream.decompress(content, MAX_BYTES)
    except zlib.error as error:
        raise DamagedError("not a gzip file" if not content.startswith(b"\x1f\x8b") else "broken gzip data") from error
    if not stream.eof:
        raise DamagedError("incomplete gzip file")
    return unpacked


def _public_mirrors() -> list[str]:
    from torchvision.datasets import MNIST

    return list(MNIST.mirrors)


def _fetch(name: str, sha256: str, sources: list[str], patience: float, folder: Path) -> tuple[bytes, list[str]]:
    """The file's checked content, and the sources with the one that had it first."""
    failures: dict[str, _SourceError] = {}
    for pause in PAUSES:
        # A list, not an iterator: the last source must know that it may have all the patience that is left.
        round_sources = [s for s in sources if s not in failures or not failures[s].final]
        if not round_sources or patience < 0.1:
            break
        time.sleep(pause)
        for position, source in enumerate(round_sources):
            share = patience / (len(round_sources) - position)
            clock = _Clock(share, patience)
            try:
                content = _read(source, name, sha256, clock)
            except _SourceError as failure:
                failures[source] = failure
                patience -= clock.waited()
            else:
                if failures:
                    log.warning("%s: taken from %s, because of %s", name, source, _reasons(failures))
                return content, [source, *(s for s in sources if s != source)]
    raise UserError(
        f"MNIST is not in {folder} and {name} could not be downloaded ({_reasons(failures)}); "
        "put the four files there (train-images-idx3-ubyte.gz and so on, packed or not), or name a folder or URL that "
        "has them with data.mirror=, or use the bundled 5,000 images with data=mnist5k"
    )


def _reasons(failures: dict[str, _SourceError]) -> str:
    return "; ".join(f"{source}: {failure}" for source, failure in failures.items())


class _Clock:
    """How long a source may stay silent, before it has said anything and after, and since when it has been."""

    def __init__(self, limit: float, limit_once_heard: float) -> None:
        self.limit = limit
        self._limit_once_heard = limit_once_heard
        self._last = time.monotonic()

    def heard(self) -> None:
        self.limit = self._limit_once_heard
        self._last = time.monotonic()

    def waited(self) -> float:
        return time.monotonic() - self._last

    def left(self) -> float:
        return max(self.limit - self.waited(), 0.0)


def _read(source: str, name: str, sha256: str, clock: _Clock) -> bytes:
    """The file from one source, unpacked and checked. Raises _SourceError."""
    local = _local_folder(source)
    packed = f"{name}.gz"
    try:
        if local is not None:
            path = local / packed if (local / packed).is_file() else local / name
            if not path.is_file():
                raise _SourceError(f"neither {packed} nor {name} is there", final=True)
            content = unpack(path.name, path.read_bytes())
        else:
            base = source if source.endswith("/") else f"{source}/"
            try:
                content = unpack(packed, _read_url(base + packed, clock))
            except HTTPError as error:
                # S3 answers 403 for what is not there.
                if error.code not in (403, 404):
                    raise
                content = _read_url(base + name, clock)
    except HTTPError as error:
        raise _SourceError(f"HTTP {error.code}", final=error.code < 500 and error.code not in (408, 429)) from error
    except TimeoutError as error:
        raise _SourceError(f"no answer within {clock.limit:.1f} s") from error
    except URLError as error:
        raise _SourceError(str(getattr(error.reason, "strerror", None) or error.reason)) from error
    except (OSError, HTTPException, ValueError, DamagedError) as error:
        raise _SourceError(str(error) or type(error).__name__) from error
    found = hashlib.sha256(content).hexdigest()
    # The MD5 sums that torchvision publishes are of the packed files; the SHA-256 of what is in them says more, and
    # does not mind who packed them.
    if found != sha256:
        raise _SourceError(f"not the right file (SHA-256 {found[:12]}..., expected {sha256[:12]}...)")
    return content


def _read_url(url: str, clock: _Clock) -> bytes:
    """All bytes at `url`. Raises TimeoutError after `clock.limit` seconds of silence, else what urlopen raises.

    The transfer has a thread of its own, because a socket's timeout does not cover the look-up of a host name, which
    without a network can take longer than all the rest.
    """
    chunks: queue.Queue[bytes | Exception] = queue.Queue()
    abandoned = threading.Event()

    def transfer() -> None:
        try:
            request = Request(url, headers={"User-Agent": "indrnn"})
            with urlopen(request, timeout=PATIENCE) as response:
                while (chunk := response.read1(_CHUNK)) and not abandoned.is_set():
                    chunks.put(chunk)
                # What is left of the announced length.
                chunks.put(DamagedError("the connection was closed early") if response.length else b"")
        except HTTPError as error:
            error.close()
            chunks.put(error)
        except Exception as error:  # handed to the thread that waits, which raises it
            chunks.put(error)

    threading.Thread(target=transfer, daemon=True).start()
    content = bytearray()
    try:
        while True:
            try:
                item = chunks.get(timeout=clock.left())
            except queue.Empty:
                raise TimeoutError from None
            if isinstance(item, URLError) and isinstance(item.reason, TimeoutError):
                raise TimeoutError from item
            if isinstance(item, Exception):
                raise item
            if not item:
                return bytes(content)
            clock.heard()
            content += item
            if len(content) > MAX_BYTES:
                raise DamagedError("far too large")
    finally:
        abandoned.set()


def _local_folder(source: str) -> Path | None:
    """The folder that `source` names, plainly or as file://; None for any other URL."""
    if source.startswith("file:"):
        return Path(url2pathname(urlsplit(source).path))
    return None if "://" in source else Path(source).expanduser()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
