"""How a program holds its part of the sequence: where its chains lie, and a block of steps in registers.

Letters: B batch, T time steps, H hidden units; a chain is one (sequence, unit), chain number b·H + k.

A program owns BLOCK chains and walks time in tiles of CHUNKS·STEPS steps. Its tensors are [CHUNKS, BLOCK], one element
a thread: a thread owns STEPS consecutive steps of one chain, held as a tuple of STEPS registers. All loads of a tile
are issued before the first is used, so a program has CHUNKS·STEPS·BLOCK values in flight.

WHOLE: H is a multiple of BLOCK, so that a program stays within one sequence and no lane is idle. FULL: T is a multiple
of the tile, so that only steps before the first tile or after the last are masked.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def locate(n, H, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Sequence (int64), unit and chain number (int64) of each of the program's chains, each [1, BLOCK] (the sequence
    is a scalar if WHOLE), and which exist."""
    lane = tl.arange(0, BLOCK)[None, :]
    pid = tl.program_id(0)
    if WHOLE:
        blocks = H // BLOCK
        sequence = (pid // blocks).to(tl.int64)
        unit = (pid % blocks) * BLOCK + lane
        chain = sequence * H + unit
    else:
        chain = pid.to(tl.int64) * BLOCK + lane
        sequence = chain // H
        unit = (chain % H).to(tl.int32)
    return sequence, unit, chain, chain < n


@triton.jit
def load_steps(pointer, step, left, exists, STEPS: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr):
    """A tuple of STEPS tensors, `step` elements apart; from the step on at which `left` have gone by, zeros."""
    # The compiler knows no starred expressions, so tuples grow by +.
    values = ()
    for i in tl.static_range(STEPS):
        inside = left > 0 if FULL else left > i
        if not WHOLE:
            inside = inside & exists
        value = tl.load(pointer + i * step, mask=inside, other=0.0)
        values = values + (value,)  # type: ignore[assignment] # noqa: RUF005
    return values


@triton.jit
def store_step(pointer, value, i, left, exists, WHOLE: tl.constexpr, FULL: tl.constexpr):
    """Store step i of the tile where it exists."""
    if FULL and WHOLE:
        tl.store(pointer, value.to(pointer.dtype.element_ty))
    else:
        inside = left > 0 if FULL else left > i
        if not WHOLE:
            inside = inside & exists
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=inside)


def packed_step(x: Tensor) -> int:
    """The distance of two steps if it is H (batch-major memory), to be compiled in, so that addresses are immediate
    offsets of one register; else 0, and the distance is read at run time."""
    return x.shape[2] if x.stride(1) == x.shape[2] else 0
