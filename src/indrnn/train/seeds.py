"""Random streams of a run: each purpose draws from one of its own, all derived from ``cfg.seed``.

So more dropout cannot change the order of the data, nor another evaluation the dropout masks. Streams are split with
numpy's SeedSequence (O'Neill's seed_seq_fe), whose children are independent whatever the seed.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """The purposes. Their numbers are part of what a seed means: never reuse or renumber one."""

    INITIALISATION = 0
    DATA_ORDER = 1
    DROPOUT = 2
    NORM_SAMPLES = 3


def generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """The generator of ``stream``; ``key`` picks one draw of it (an epoch, a step) without the draws before."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, stream, *key)))


def torch_seed(seed: int, stream: Stream) -> int:
    """A number for torch.manual_seed, in [0, 2^63)."""
    return int(_sequence(seed, stream).generate_state(1, np.uint64)[0] >> 1)


def _sequence(seed: int, stream: Stream, *key: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(entropy=seed, spawn_key=(int(stream), *key))
