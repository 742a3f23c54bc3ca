"""The adding problem (Hochreiter & Schmidhuber 1997; as in Li et al. 2018, section 5.1), generated on the fly.

x (B, T, 2): a value from U[0, 1) at every step, and a marker that is 1 at two steps, one in each half of the sequence,
and 0 elsewhere. y (B,): the sum of the two marked values. The predict-the-mean baseline has an expected squared error
of 1/6; finite splits compute theirs.

Sequence i of a split is a pure function of (data_seed, split, i): a counter is hashed, there is no generator state. A
resumed run sees the same numbers as an uninterrupted one, on any device, and a batch can be part of a CUDA graph.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from .task import Splits, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..config.schema import AddingConfig

# SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", section 4) in signed 64-bit
# numbers: the increment and the multipliers of its variant-13 finalizer.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64

# The number of each split's first sequence; the ranges are too far apart to overlap.
_STARTS = {"train": 0, "validation": 1 << 61, "test": 1 << 62}


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own >> would copy the sign bit in."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer: a bijection of the 64-bit numbers; int64 products wrap as unsigned ones do."""
    z = (z ^ _shift_right(z, 30)) * _MULTIPLIERS[0]
    z = (z ^ _shift_right(z, 27)) * _MULTIPLIERS[1]
    return z ^ _shift_right(z, 31)


class AddingSplit:
    """Sequences ``start``, ``start`` + 1, ... of the stream that ``data_seed`` selects; ``size`` None: endless."""

    def __init__(self, length: int, data_seed: int, start: int, size: int | None) -> None:
        import torch

        self.size = size
        self._length = length
        # The key of sequence i is mix(seed key + (start + i) * increment), so no two sequences of a seed share a key.
        seed, first = torch.tensor([data_seed, start], device="cpu") * _INCREMENT
        self._base = int(_mix(seed + 1) + first)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, 2) float32 (value, marker) and y (B,) float32."""
        import torch

        keys = _mix(indices * _INCREMENT + self._base).unsqueeze(1)
        # SplitMix64's outputs from each key: the first two place the markers, the rest are the values.
        draws = _mix(keys + torch.arange(1, self._length + 3, device=keys.device) * _INCREMENT)
        # The upper 24 bits: every multiple of 2^-24 in [0, 1), exact in float32.
        values = _shift_right(draws[:, 2:], 40).float() * 2.0**-24
        half = self._length // 2
        # floor(u31 * n / 2^31) is uniform on 0..n-1 but for n / 2^31.
        u31 = _shift_right(draws[:, :2], 33)
        second = half + (u31[:, 1:] * (self._length - half) >> 31)
        positions = torch.cat((u31[:, :1] * half >> 31, second), 1)
        markers = torch.zeros_like(values).scatter_(1, positions, 1.0)
        return torch.stack((values, markers), 2), values.gather(1, positions).sum(1)


def adding_task(data: AddingConfig) -> Task:
    """The adding problem over ``data.length`` steps; endless training sequences."""
    sizes = {"train": None, "validation": data.validation_size, "test": data.test_size}

    def split(part: str) -> AddingSplit:
        return AddingSplit(data.length, data.data_seed, _STARTS[part], sizes[part])

    def load(device: torch.device) -> Splits:
        drawn = {"seed": data.data_seed, **sizes}
        provenance = {"sha256": {}, "split": drawn, "permutation": None, "permutation_sha256": None}
        return Splits(split("train"), split("validation"), provenance, partial(split, "test"))

    def mean_answer_error(part: str) -> float:
        import torch

        if (size := sizes[part]) is None:
            return 1 / 6
        targets = [split(part).batch(indices)[1] for indices in torch.arange(size, device="cpu").split(500)]
        return float(torch.cat(targets).double().var(correction=0))

    return Task(
        name="adding",
        folder=f"adding-T{data.length}",
        title=f"Adding problem, T = {data.length:,}",
        length=data.length,
        input_size=2,
        output_size=1,
        loss="mse",
        load=load,
        series="Adding problem",
        mean_answer_error=mean_answer_error,
    )
