"""Which strategy and which tile a shape gets. Predicted, not yet measured: no GPU was at hand when this was written.

Letters: B batch, T time steps, H hidden units.

Both strategies are the same kernel, which walks time in tiles of ``chunks`` × ``steps`` steps (see `tiles`):

- sequential: chunks = 1. A thread walks one chain, ``steps`` loads ahead of use. Nothing is computed twice, but only
  B·H threads have loads in flight.
- scan: ``chunks`` threads share a chain within a tile. Each composes its steps to one map, a scan over the chunks gives
  each the state it starts from, and each runs its steps again, from registers. Costs arithmetic, no memory traffic.

The rule: an H200 copies at 4.3 TB/s with 0.6 µs of latency, so 2.6 MB must be in flight, and 132 × 512 threads holding
25 float32 loads each are 6.8 MB; so as many chunks as it takes to have about THREADS threads. At B = 32, H = 128 that
is 16 chunks, 128 programs of 512 threads, and T = 784 is two tiles of 16 × 25.
"""

from dataclasses import dataclass
from functools import lru_cache

STRATEGIES = ("auto", "sequential", "scan")
# A scan composes maps (s1, a1) → (s2, a2); with these there is none in closed form, so their forward is sequential.
WITHOUT_SCAN = ("tanh", "leaky_relu")

THREADS = 65_536
MAX_CHUNKS = 16
STEPS = (1, 2, 4, 8, 14, 16, 25, 28, 32)
# The most steps a thread can hold without spilling registers: forward one value a step, backward two.
MAX_STEPS = {"forward": 32, "backward": 25}


@dataclass(frozen=True)
class Tile:
    """chunks × steps steps of time, ``block`` chains; ``ahead``: the next tile is loaded before this one is used."""

    chunks: int
    steps: int
    block: int = 32
    ahead: bool = False

    @property
    def strategy(self) -> str:
        return "sequential" if self.chunks == 1 else "scan"

    @property
    def warps(self) -> int:
        return max(1, self.chunks * self.block // 32)


@lru_cache(maxsize=1024)
def choose(
    direction: str, nonlinearity: str, B: int, T: int, H: int, wide: bool, packed: bool, strategy: str = "auto"
) -> Tile:
    """The tile for one launch.

    Args:
        direction: forward or backward.
        wide: float64, which takes two registers a value.
        packed: every sequence has T-stride H, which is then compiled in; otherwise addresses take registers too.
        strategy: auto, sequential or scan.
    """
    scannable = direction == "backward" or nonlinearity not in WITHOUT_SCAN
    chunks = 1
    if scannable and strategy != "sequential":
        at_least = 2 if strategy == "scan" else 1
        chunks = max(at_least, _power_of_two(min(THREADS // (B * H), MAX_CHUNKS, T // 4)))
    block = 128 if chunks == 1 and B * H >= THREADS and H % 128 == 0 else 32
    limit = MAX_STEPS[direction]
    if wide or not packed:
        limit = min(limit, 16 if direction == "forward" or not wide else 8)
    return Tile(chunks, _steps(T, chunks, limit), block)


def _power_of_two(number: int) -> int:
    """The largest power of two that is not above it; 1 for what is below 1."""
    return 1 << max(0, number.bit_length() - 1) if number > 0 else 1


def _steps(T: int, chunks: int, limit: int) -> int:
    """Steps a thread: such that T is a whole number of tiles (nothing to mask) if half the limit or more allows it;
    else the fewest steps that need no more tiles than the limit does."""
    allowed = [steps for steps in STEPS if steps <= limit]
    whole = [steps for steps in allowed if 2 * steps >= limit and T % (chunks * steps) == 0]
    if whole:
        return whole[-1]
    tiles = -(-T // (chunks * limit))
    return next(steps for steps in allowed if chunks * steps * tiles >= T)
