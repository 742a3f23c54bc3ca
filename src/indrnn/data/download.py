"""The four files of MNIST (LeCun, Cortes & Burges), where torchvision keeps them: <root>/MNIST/raw/.

torchvision downloads missing files from its list of mirrors. Every file, wherever it comes from, is checked against its
SHA-256 each time it is read.
"""

import gzip
import hashlib
import logging
import os
import socket
import tempfile
import zlib
from pathlib import Path
from typing import Literal
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..files import replaced_when_complete

log = logging.getLogger(__name__)

# Seconds without an answer after which the next mirror is tried.
TIMEOUT = 5.0

# Of the uncompressed files. Labels first: a folder that is not writable then shows after a small download.
SHA256 = {
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
}


class _DamagedError(Exception):
    """Content that cannot be the file."""


def raw_folder(root: str) -> Path:
    """The folder that holds the four files, packed or not."""
    return Path(root).expanduser() / "MNIST" / "raw"


def missing_files(folder: Path) -> list[str]:
    """The names of the files that ``folder`` lacks. Their contents are checked when they are read."""
    return [name for name in SHA256 if _find(folder, name) is None]


def locate(root: str, mirror: str | None = None) -> Path:
    """The folder with the four files below `root`; missing ones are downloaded first.

    root: the folder that holds MNIST/raw; mirror: a folder or URL to download from before torchvision's mirrors.
    Raises UserError if a file is missing and cannot be downloaded.
    """
    folder = raw_folder(root)
    sources = [] if mirror is None else [_source(mirror)]
    missing = missing_files(folder)
    if missing:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _download(missing, folder, sources)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"cannot write MNIST to {folder} ({reason}); name another folder with data.root="
            ) from error
    return folder


def read(folder: Path, part: Literal["train", "t10k"]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (N, 784) and labels (N,) of the training or the test set.

    Raises UserError, which names the file, if one is missing, unreadable or damaged.
    """
    images = _parse(_checked(folder, f"{part}-images-idx3-ubyte"))
    labels = _parse(_checked(folder, f"{part}-labels-idx1-ubyte"))
    return images.reshape(len(images), -1), labels


def _source(mirror: str) -> str | Path:
    """A mirror as an existing folder or as a URL that ends in /."""
    if urlsplit(mirror).scheme in ("http", "https"):
        return mirror if mirror.endswith("/") else f"{mirror}/"
    folder = Path(url2pathname(mirror.removeprefix("file://")) if mirror.startswith("file:") else mirror).expanduser()
    if not folder.is_dir():
        raise UserError(f"data.mirror={mirror} is neither a folder with MNIST's files nor an http(s):// URL")
    return folder


def _download(names: list[str], folder: Path, sources: list[str | Path]) -> None:
    """Put the files into `folder`; each gets its name only when it is complete and checked."""
    from torchvision.datasets import MNIST

    sources = [*sources, *MNIST.mirrors]
    log.info("downloading MNIST (11 MB) to %s", folder)
    for name in names:
        failures = []
        for source in sources:
            try:
                content = _fetch(source, name)
            except (OSError, _DamagedError, RuntimeError, ValueError) as error:
                failures.append(f"{source}: {' '.join(str(error).split())}")
                continue
            # The next file is taken from the source that had this one.
            sources = [source, *(other for other in sources if other != source)]
            if failures:
                log.warning("%s: downloaded from %s after %s", name, source, "; ".join(failures))
            # Several processes may download the same file: each into a temporary file of its own.
            with replaced_when_complete(folder / name, folder / f".{name}.{os.getpid()}.part") as file:
                file.write(content)
            break
        else:
            raise UserError(
                f"MNIST is not in {folder} and {name} could not be downloaded ({'; '.join(failures)}); put the four "
                "files there (train-images-idx3-ubyte.gz and so on, packed or not), or name a folder or URL that has "
                "them with data.mirror=, or use the bundled 5,000 images with data=mnist5k"
            )


def _fetch(source: str | Path, name: str) -> bytes:
    """The checked content of a file, which the source may hold compressed or not."""
    if isinstance(source, Path):
        path = _find(source, name)
        if path is None:
            raise FileNotFoundError(f"neither {name}.gz nor {name} is there")
        return _unpack(name, path)
    from torchvision.datasets.utils import download_url

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                download_url(f"{source}{name}.gz", scratch, "file.gz")
            except HTTPError as error:
                # S3 answers 403 for a missing file.
                if error.code not in (403, 404):
                    raise
                download_url(f"{source}{name}", scratch, "file")
            (path,) = Path(scratch).iterdir()
            return _unpack(name, path)
    finally:
        socket.setdefaulttimeout(before)


def _unpack(name: str, path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise _DamagedError(f"not a whole gzip file ({error})") from error
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != SHA256[name]:
        raise _DamagedError(f"{len(content):,} bytes with SHA-256 {sha256[:12]}..., expected {SHA256[name][:12]}...")
    return content


def _find(folder: Path, name: str) -> Path | None:
    """The path of the file, unpacked (as torchvision leaves it) or packed (as it is distributed)."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _checked(folder: Path, name: str) -> bytes:
    path = _find(folder, name)
    if path is None:
        raise UserError(f"data file {folder / name} is missing; put it back, or start again to download it")
    try:
        return _unpack(name, path)
    except OSError as error:
        raise UserError(f"data file {path} cannot be read ({error.strerror}); fix it or set data.root=") from error
    except _DamagedError as error:
        raise UserError(
            f"data file {path} is damaged or not MNIST's ({error}); delete it to download it again"
        ) from error


def _parse(content: bytes) -> NDArray[np.uint8]:
    """The array of an IDX file of unsigned bytes: 0, 0, 8, number of dimensions; big-endian sizes; the values."""
    dimensions = content[3]
    sizes = np.frombuffer(content, ">u4", count=dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(tuple(sizes.astype(int)))
