"""How a program holds its part of the sequence: where its chains lie, and a block of steps in registers.

Letters: B batch, T time steps, H hidden units; a chain is one (sequence, unit), chain number b·H + k.

A program owns BLOCK chains of one sequence and walks time in tiles of CHUNKS·STEPS steps. Its tensors are
[CHUNKS, BLOCK], one element a thread: a thread owns STEPS consecutive steps of one chain, held as a tuple of STEPS
registers. All loads of a tile are issued before the first is used (with AHEAD, a tile earlier), so a program has
CHUNKS·STEPS·BLOCK values in flight; consecutive threads own consecutive units, so each load of a warp is one line.

WHOLE: H is a multiple of BLOCK, so that no lane is idle. FULL: T is a multiple of the tile, so that a tile is there or
is not, and no step of it need be masked.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def locate(H, BLOCK: tl.constexpr):
    """The program's sequence (int64), its units [1, BLOCK], their chains (int64), and which of them exist."""
    blocks = tl.cdiv(H, BLOCK)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    unit = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return sequence, unit, sequence * H + unit, unit < H


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


def in_time(x: Tensor, reverse: bool) -> tuple[Tensor, int, int]:
    """For a kernel: the tensor at whose address its first step lies, the distance of two steps, and `packed_step`;
    if time runs backwards, the last step and negative distances."""
    return (x[:, -1], -x.stride(1), -packed_step(x)) if reverse else (x, x.stride(1), packed_step(x))
