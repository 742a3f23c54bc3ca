"""The four files of MNIST (LeCun, Cortes & Burges), where torchvision keeps them: <root>/MNIST/raw/.

torchvision downloads missing files; every file is checked against its SHA-256 when it is read.
"""

import hashlib
import os
import socket
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from ..errors import UserError
from ..files import replacing

# Of the uncompressed files.
SHA256 = {
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
}
TIMEOUT = 10.0  # seconds without a response; torchvision sets none


def raw_folder(root: str) -> Path:
    """The folder that holds the four files."""
    return Path(os.path.expanduser(root)) / "MNIST" / "raw"


def missing_files(folder: Path) -> list[str]:
    """The names of the files that ``folder`` lacks. Their contents are checked when they are read."""
    return [name for name in SHA256 if not (folder / name).is_file()]


def locate(root: str, mirror: str | None = None) -> Path:
    """The folder with the four files below ``root``; missing ones are downloaded first.

    Args:
        root: the folder that holds MNIST/raw.
        mirror: a folder or URL (of .gz files) to try before torchvision's mirrors.

    Raises:
        UserError: a file is missing and cannot be downloaded.
    """
    folder = raw_folder(root)
    if not missing_files(folder):
        return folder
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        from torchvision.datasets import MNIST

        near = Path(os.path.expanduser(mirror or ""))
        first = [f"{mirror.rstrip('/')}/"] if mirror and not near.is_dir() else []
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # several commands may download at once
            for file in near.glob("*-ubyte*") if mirror else ():
                if not (folder / file.name).exists():
                    with replacing(folder / file.name) as copy:
                        copy.write(file.read_bytes())
            # torchvision unpacks the .gz files that are there, and names the folder after the class.
            type("MNIST", (MNIST,), {"mirrors": first + MNIST.mirrors})(folder.parents[1], download=True)
    # A server or a file system can fail in many ways, and so can a torchvision that was built for another torch.
    except Exception as error:
        raise UserError(
            f"MNIST is not in {folder} and cannot be downloaded there ({' '.join(str(error).split())}); put the four "
            f"files there ({', '.join(SHA256)}), or choose another folder with data.root=, or name a folder or URL "
            "that has them with data.mirror=, or use the bundled 5,000 images with data=mnist5k"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return folder


def read(path: Path) -> NDArray[np.uint8]:
    """The array in one of the files, images (N, 28, 28) or labels (N,). Raises UserError if the file is damaged."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256[path.name]:
        raise UserError(f"data file {path} is damaged: its SHA-256 is wrong; delete it to download it again")
    # An IDX file of unsigned bytes: 0, 0, 8, number of dimensions; big-endian sizes; the values.
    sizes = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(tuple(sizes.astype(int)))
