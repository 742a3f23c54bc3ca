"""Random streams, and which training sequences a step sees: a function of (seed, step), so that runs can resume.

Each purpose has its own stream, derived from ``cfg.seed`` with numpy's SeedSequence: more dropout cannot change the
order of the data, nor can an additional evaluation change the dropout masks.
"""

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError


class Stream(IntEnum):
    """The purposes. Their numbers are part of what a seed means: never reuse or change one."""

    INITIALIZATION = 0
    DATA_ORDER = 1
    DROPOUT = 2
    NORM_SAMPLES = 3


def generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """The generator of ``stream``; ``key`` selects one draw (an epoch, a step) without those before it."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(int(stream), *key))))


def torch_seed(seed: int, stream: Stream) -> int:
    """A seed for torch.manual_seed, in [0, 2^63)."""
    return int(np.random.SeedSequence(seed, spawn_key=(int(stream),)).generate_state(1, np.uint64)[0] >> 1)


class BatchSampler:
    """Full batches of a new permutation in every epoch (an incomplete last batch is dropped).

    An endless training set (size None) is read in order: step s has the indices from s·B on.
    """

    def __init__(self, size: int | None, batch_size: int, seed: int, device: torch.device) -> None:
        if size is not None and batch_size > size:
            raise UserError(f"trainer.batch_size={batch_size} exceeds the {size} training sequences; lower it")
        self.size, self.batch_size, self.seed, self.device = size, batch_size, seed, device
        self.steps_per_epoch = None if size is None else size // batch_size
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64, device=device)

    def indices(self, step: int) -> Tensor:
        """Indices (B,) of batch number ``step``, counted from 0, on the device."""
        if self.size is None or self.steps_per_epoch is None:
            start = step * self.batch_size
            return torch.arange(start, start + self.batch_size, device=self.device)
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            permutation = generator(self.seed, Stream.DATA_ORDER, epoch).permutation(self.size)
            self._permutation = torch.from_numpy(permutation).to(self.device)
            self._epoch = epoch
        start = position * self.batch_size
        return self._permutation[start : start + self.batch_size]

    def epochs(self, steps: int) -> float:
        """The number of epochs in ``steps`` batches; 0 for an endless training set."""
        return 0.0 if self.steps_per_epoch is None else steps / self.steps_per_epoch

    def norm_samples(self, count: int, step: int) -> Tensor:
        """Indices (≤ count,) of training sequences for the batch-norm statistics of the evaluation at ``step``.

        Distinct, from their own stream. In an endless training set no step reaches these indices.
        """
        draw = generator(self.seed, Stream.NORM_SAMPLES, step)
        if self.size is None:
            chosen = draw.integers(2**40, 2**41, size=count)
        else:
            chosen = draw.choice(self.size, size=min(count, self.size), replace=False)
        return torch.from_numpy(chosen).to(self.device)
