"""MNIST (LeCun, Cortes & Burges) as its four files, in the layout of torchvision: <root>/MNIST/raw/.

Every file is checked against its SHA-256 each time it is read; those that are absent are downloaded.
"""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from . import download

# Of the uncompressed files. Labels first: should the folder not be writable, little has been downloaded in vain.
SHA256 = {
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
}

Images = NDArray[np.uint8]
Labels = NDArray[np.uint8]


def locate(root: str, mirror: str | None = None) -> Path:
    """The folder with the four files below `root`; what is not there is downloaded first.

    root: the folder that holds MNIST/raw; mirror: a folder or URL to download from before all others.
    Raises UserError when a file is neither there nor to be had.
    """
    folder = Path(root).expanduser() / "MNIST" / "raw"
    if mirror is not None:
        download.check_mirror(mirror)
    missing = {name: digest for name, digest in SHA256.items() if _find(folder, name) is None}
    if missing:
        download.download(missing, folder, mirror)
    return folder


def read(folder: Path, part: Literal["train", "t10k"]) -> tuple[Images, Labels]:
    """Images (N, 784) and labels (N,), both uint8, of the training or the test set.

    Raises UserError, which names the file, for one that is absent, unreadable or damaged.
    """
    images = _parse(_checked(folder, f"{part}-images-idx3-ubyte"))
    labels = _parse(_checked(folder, f"{part}-labels-idx1-ubyte"))
    return images.reshape(len(images), -1), labels


def _find(folder: Path, name: str) -> Path | None:
    """The file as torchvision unpacks it, or else as it is distributed."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _checked(folder: Path, name: str) -> bytes:
    path = _find(folder, name)
    if path is None:
        raise UserError(f"data file {folder / name} has gone; put it back, or start again to have it downloaded")
    try:
        content = download.unpack(path.name, path.read_bytes())
    except OSError as error:
        raise UserError(f"data file {path} cannot be read ({error.strerror}); mend it or set data.root=") from error
    except download.DamagedError as error:
        raise UserError(f"data file {path} is damaged ({error}); delete it to have it downloaded again") from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise UserError(
            f"data file {path} is damaged or not MNIST's ({len(content):,} bytes, SHA-256 {found[:12]}..., "
            f"expected {SHA256[name][:12]}...); delete it to have it downloaded again"
        )
    return content


def _parse(content: bytes) -> NDArray[np.uint8]:
    """The array of an IDX file of unsigned bytes: 0, 0, 8, number of dimensions; big-endian sizes; the values."""
    dimensions = content[3]
    sizes = np.frombuffer(content, ">u4", count=dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(tuple(sizes.astype(int)))
