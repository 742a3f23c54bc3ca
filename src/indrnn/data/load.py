"""load_task: from the configuration to tensors on the device."""

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import UserError
from . import adding, mnist, mnist5k
from .images import ImageSplit, image_splits
from .permutations import load_permutation, permutation_sha256
from .spec import task_spec
from .splits import stratified_split
from .task import Task


def load_task(data: Any, device: torch.device) -> Task:
    """Read, check and place on `device` the data that ``cfg.data`` asks for; the test split only when first used.

    Raises UserError, in one line, for files that are missing, damaged or cannot be had, for sizes that leave no
    training image, and for an unknown task or permutation.
    """
    spec = task_spec(data)
    if spec.name == "adding":
        return _adding(data)
    return _mnist5k(data, device) if data.name == "mnist5k" else _mnist(data, device)


def _mnist(data: Any, device: torch.device) -> Task:
    permutation = _permutation(data)
    folder = mnist.locate(data.root, data.mirror)
    images, labels = mnist.read(folder, "train")
    # Nothing is kept of the test set yet; but a damaged file should be found before the training, not after it.
    test_size = len(mnist.read(folder, "t10k")[1])
    if data.validation_size >= len(labels):
        raise UserError(f"data.validation_size={data.validation_size} leaves none of {len(labels)} images to train on")
    held_out, rest = stratified_split(labels, [data.validation_size], data.split_seed)
    train, validation = image_splits(images, labels, [rest, held_out], permutation, device)

    def load_test() -> ImageSplit:
        test_images, test_labels = mnist.read(folder, "t10k")
        return image_splits(test_images, test_labels, [np.arange(len(test_labels))], permutation, device)[0]

    split = {
        "seed": data.split_seed,
        "train": train.size,
        "validation": validation.size,
        "test": test_size,
        "validation_sha256": _rows_sha256(held_out),
    }
    return Task(task_spec(data), train, validation, _provenance(mnist.SHA256, split, data, permutation), load_test)


def _mnist5k(data: Any, device: torch.device) -> Task:
    permutation = _permutation(data)
    images, labels = mnist5k.read()
    if data.validation_size + data.test_size >= len(labels):
        raise UserError(
            f"data.validation_size={data.validation_size} and data.test_size={data.test_size} "
            f"leave none of {len(labels)} images to train on"
        )
    test_rows, held_out, rest = stratified_split(labels, [data.test_size, data.validation_size], data.split_seed)
    train, validation = image_splits(images, labels, [rest, held_out], permutation, device)
    split = {
        "seed": data.split_seed,
        "train": train.size,
        "validation": validation.size,
        "test": len(test_rows),
        "validation_sha256": _rows_sha256(held_out),
    }
    provenance = _provenance({mnist5k.ASSET: mnist5k.SHA256}, split, data, permutation)
    return Task(
        task_spec(data),
        train,
        validation,
        provenance,
        lambda: image_splits(images, labels, [test_rows], permutation, device)[0],
    )


def _adding(data: Any) -> Task:
    def split(start: int, size: int | None) -> adding.AddingSplit:
        return adding.AddingSplit(data.length, data.data_seed, start, size)

    sizes = {"seed": data.data_seed, "train": None, "validation": data.validation_size, "test": data.test_size}
    return Task(
        task_spec(data),
        split(adding.TRAIN, None),
        split(adding.VALIDATION, data.validation_size),
        {"sha256": {}, "split": sizes, "permutation": None, "permutation_sha256": None},
        lambda: split(adding.TEST, data.test_size),
    )


def _permutation(data: Any) -> NDArray[np.int64] | None:
    return None if data.permutation is None else load_permutation(data.permutation)


def _rows_sha256(rows: NDArray[np.int64]) -> str:
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


def _provenance(
    sha256: dict[str, str], split: dict[str, Any], data: Any, permutation: NDArray[np.int64] | None
) -> dict[str, Any]:
    return {
        "sha256": dict(sha256),
        "split": split,
        "permutation": data.permutation,
        "permutation_sha256": None if permutation is None else permutation_sha256(permutation),
    }
