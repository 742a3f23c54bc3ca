"""Images as sequences: every pixel of one uint8 tensor on the device, one time step a pixel."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .spec import PIXELS


class ImageSplit:
    """Images (N, 784) uint8 and their classes (N,) int64, both on the device."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images = images
        self._labels = labels
        self.size: int = len(labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 784, 1) float32 = 2 pixel/255 - 1, and the classes (B,) int64."""
        x = self._images.index_select(0, indices).to(torch.float32)
        # pixel - 127.5 is exact, so there is a single rounding, the same on every device: at most one unit in the
        # last place from 2 pixel/255 - 1, and exactly -1 and 1 at the ends.
        x = x.sub_(127.5).mul_(2 / 255).unsqueeze(-1)
        return x, self._labels.index_select(0, indices)


def image_splits(
    images: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    parts: list[NDArray[np.int64]],
    permutation: NDArray[np.int64] | None,
    device: torch.device,
) -> list[ImageSplit]:
    """One split for each list of row numbers in `parts`, all views of one tensor on the device.

    images (N, 784), labels (N,); with a permutation p, time step t shows pixel p[t].
    """
    rows = np.concatenate(parts)
    pixels = images[rows] if permutation is None else images[rows][:, permutation]
    if pixels.shape[1] != PIXELS:
        raise ValueError(f"images have {pixels.shape[1]} pixels, not {PIXELS}")
    all_images = torch.from_numpy(np.ascontiguousarray(pixels)).to(device)
    all_labels = torch.from_numpy(labels[rows].astype(np.int64)).to(device)
    sizes = [len(part) for part in parts]
    return [ImageSplit(x, y) for x, y in zip(all_images.split(sizes), all_labels.split(sizes), strict=True)]
