"""The strategy and the tile for each shape. Predicted, not yet measured on a GPU.

Letters: B batch, T time steps, H hidden units.

Both strategies are one kernel, which processes time in tiles of ``chunks`` × ``steps`` steps (see `primitives`):

- sequential: chunks = 1. A thread computes one chain and issues ``steps`` loads before their use. Nothing is computed
  twice, but only B·H threads have loads in flight.
- scan: ``chunks`` threads share a chain within a tile. Each composes its steps to one map, a scan over the chunks
  yields its initial state, and it repeats its steps from registers. This costs arithmetic, but no memory traffic.

The rule: an H200 copies at 4.3 TB/s with 0.6 µs of latency, so 2.6 MB must be in flight. With the next tile loaded
while this one is used, a thread holds up to 28 float32 forward, or 16 of each of two streams backward, before it would
spill registers; so as many chunks as it takes to have THREADS threads, but no more than MAX_CHUNKS, for in a scan
across warps every warp folds the maps of all before it. At B = 32, H = 128 that is 8 chunks, 128 programs of 256
threads, each with 25 to 50 kB in flight, and T = 784 is four tiles of 8 × 25.
"""

from dataclasses import dataclass
from functools import lru_cache

STRATEGIES = ("auto", "sequential", "scan")
# A scan composes maps (s1, a1) → (s2, a2); these have none in closed form, so their forward is sequential.
WITHOUT_SCAN = ("tanh", "leaky_relu")

THREADS = 65_536
MAX_CHUNKS = 8
STEPS = (1, 2, 4, 7, 8, 14, 16, 20, 25, 28)
# The most steps a thread can hold without spilling, and the same for float64. Half as many if addresses take
# registers.
MAX_STEPS = {"forward": 28, "backward": 16}
MAX_STEPS_WIDE = {"forward": 4, "backward": 4}


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

    def constants(self, T: int, H: int) -> dict[str, int | bool]:
        """The compile-time constants of a kernel for T steps of H units in these tiles."""
        return {
            "CHUNKS": self.chunks,
            "STEPS": self.steps,
            "BLOCK": self.block,
            "AHEAD": self.ahead,
            "WHOLE": H % self.block == 0,
            "FULL": T % (self.chunks * self.steps) == 0,
        }

    @property
    def options(self) -> dict[str, int | bool | None]:
        """Compiler options. Without maxnreg, the assembler may spill registers to fit twice the programs."""
        registers = 128 if self.chunks > 1 else None
        return {"num_warps": self.warps, "num_stages": 1, "maxnreg": registers, "enable_fp_fusion": True}


@lru_cache(maxsize=1024)
def choose(
    direction: str, nonlinearity: str, B: int, T: int, H: int, wide: bool, packed: bool, strategy: str = "auto"
) -> Tile:
    """The tile for one launch.

    Args:
        direction: forward or backward.
        nonlinearity: σ.
        B, T, H: sizes.
        wide: float64.
        packed: every sequence has T-stride H, which is then compiled in; otherwise addresses take registers too.
        strategy: auto, sequential or scan.
    """
    chunks = 1
    if strategy != "sequential" and (direction == "backward" or nonlinearity not in WITHOUT_SCAN):
        wanted = min(THREADS // (B * H), MAX_CHUNKS, T // 4)
        chunks = max(2 if strategy == "scan" else 1, _power_of_two(wanted))
    block = next((block for block in (4, 8, 16) if block >= H), 32)
    limit = (MAX_STEPS_WIDE if wide else MAX_STEPS)[direction] // (1 if packed else 2)
    steps = _steps(T, chunks, limit)
    return Tile(chunks, steps, block, ahead=chunks * steps < T)


def _power_of_two(number: int) -> int:
    """The largest power of two that is not above `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1) if number > 0 else 1


def _steps(T: int, chunks: int, limit: int) -> int:
    """Steps per thread: more than half the limit if T is then a whole number of tiles, which need no mask. Otherwise
    the fewest that need no more tiles than the limit."""
    allowed = [steps for steps in STEPS if steps <= limit]
    whole = [steps for steps in allowed if 2 * steps > limit and T % (chunks * steps) == 0]
    if whole:
        return whole[-1]
    tiles = -(-T // (chunks * limit))
    return next((steps for steps in allowed if chunks * steps * tiles >= T), allowed[-1])
