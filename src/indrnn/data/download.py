"""The four files of MNIST (LeCun, Cortes & Burges), where torchvision keeps them: <root>/MNIST/raw/.

Missing files are downloaded from data.mirror and torchvision's mirrors. Every file is checked against its SHA-256 when
it is read. (torchvision's own download has no timeout, stops at the first damaged mirror and reads no folder.)
"""

import gzip
import hashlib
import logging
import os
import tempfile
import zlib
from itertools import product
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..files import expanded

log = logging.getLogger(__name__)

# Seconds without a response after which the next mirror is tried.
TIMEOUT = 5.0

# Of the uncompressed files. Labels first: a folder that is not writable then shows after a small download.
SHA256 = {
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
}


def raw_folder(root: str) -> Path:
    """The folder that holds the four files, compressed or not."""
    return expanded("data.root", root) / "MNIST" / "raw"


def missing_files(folder: Path) -> list[str]:
    """The names of the files that ``folder`` lacks. Their contents are checked when they are read."""
    return [name for name in SHA256 if _find(folder, name) is None]


def locate(root: str, mirror: str | None = None) -> Path:
    """The folder with the four files below ``root``; missing ones are downloaded first.

    Args:
        root: the folder that holds MNIST/raw.
        mirror: a folder or URL to try before torchvision's mirrors.

    Raises:
        UserError: a file is missing and cannot be downloaded.
    """
    folder = raw_folder(root)
    if not missing_files(folder):
        return folder
    mirrors = [] if mirror is None else [_url(mirror)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in missing_files(folder):
            _download(name, folder, mirrors)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write MNIST to {folder} ({reason}); choose another folder with data.root=") from error
    return folder


def read(folder: Path, part: Literal["train", "t10k"]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (N, 784) and labels (N,) of the training or the test set.

    Raises:
        UserError: a file, which it names, is missing, unreadable or damaged.
    """
    images, labels = (_array(folder, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    return images.reshape(len(images), -1), labels


def _url(mirror: str) -> str:
    """A mirror, which may be a folder, as a URL that ends in /."""
    if urlsplit(mirror).scheme in ("http", "https", "file"):
        return mirror.rstrip("/") + "/"
    folder = expanded("data.mirror", mirror)
    if not folder.is_dir():
        raise UserError(f"data.mirror={mirror} is neither a folder with MNIST's files nor a URL")
    return f"{folder.resolve().as_uri()}/"


def _download(name: str, folder: Path, mirrors: list[str]) -> None:
    """Put a file into ``folder``, complete and checked."""
    log.info("downloading %s to %s", name, folder)
    failures: dict[str, str] = {}
    try:
        from torchvision.datasets import MNIST

        mirrors = [*mirrors, *MNIST.mirrors]
    # A torchvision that was built for another torch raises RuntimeError.
    except Exception as error:
        failures["torchvision cannot be imported"] = _in_words(error)
    for mirror, suffix in product(mirrors, (".gz", "")):
        try:
            with urlopen(f"{mirror}{name}{suffix}", timeout=TIMEOUT) as response:
                content = response.read()
            _checked(content, name, suffix)
        # A server can fail in many ways: URLError, TimeoutError, HTTPException, ...
        except Exception as error:
            failures.setdefault(mirror, _in_words(error))
            continue
        others = [f"{other}: {reason}" for other, reason in failures.items() if other != mirror]
        if others:
            log.warning("%s: downloaded from %s after %s", name, mirror, "; ".join(others))
        # Several commands may download the same file: each into its own folder.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
            path = Path(scratch, name + suffix)
            path.write_bytes(content)
            os.replace(path, folder / path.name)
        return
    reasons = "; ".join(f"{mirror}: {reason}" for mirror, reason in failures.items())
    raise UserError(
        f"MNIST is not in {folder} and {name} could not be downloaded ({reasons}); put the four files there "
        "(train-images-idx3-ubyte.gz and so on, compressed or not), or name a folder or URL that has them with "
        "data.mirror=, or use the bundled 5,000 images with data=mnist5k"
    )


def _array(folder: Path, name: str) -> NDArray[np.uint8]:
    path = _find(folder, name)
    if path is None:
        raise UserError(f"data file {folder / name} is missing; put it back, or rerun the command to download it")
    try:
        content = _checked(path.read_bytes(), name, path.suffix)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data file {path} cannot be read or is damaged ({_in_words(error)}); delete it to download it again, or "
            "set data.root="
        ) from error
    # An IDX file of unsigned bytes: 0, 0, 8, number of dimensions; big-endian sizes; the values.
    sizes = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(tuple(sizes.astype(int)))


def _checked(content: bytes, name: str, suffix: str) -> bytes:
    """The uncompressed content of a file. Raises OSError or ValueError unless it is the right one."""
    if suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error) as error:
            raise ValueError(f"not a complete gzip file: {error}") from error
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != SHA256[name]:
        raise ValueError(f"{len(content):,} bytes with SHA-256 {sha256[:12]}..., expected {SHA256[name][:12]}...")
    return content


def _find(folder: Path, name: str) -> Path | None:
    """The path of the file, uncompressed or compressed."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _in_words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
