"""Building blocks of both kernels.

Letters: B batch, T time steps, H hidden units; a chain is one unit of one sequence, with number b·H + k.

Tiles. A program computes BLOCK chains of one sequence in tiles of CHUNKS·STEPS steps. Its tensors are [CHUNKS, BLOCK],
one element per thread. A thread holds STEPS consecutive steps of one chain in a tuple of STEPS registers. All loads of
a tile are issued before the first is used (with AHEAD, one tile earlier), so CHUNKS·STEPS·BLOCK values are in flight.
Consecutive threads own consecutive units, so each load of a warp is one cache line. WHOLE: H is a multiple of BLOCK,
and no lane is idle. FULL: T is a multiple of the tile, and no step of a tile is masked.

Maps. relu is x ↦ clamp(a + s·x, lo, hi) with (a, s, lo, hi) = (x_t, u, 0, ∞), and such maps are closed under
composition; the identity, and the backward of every σ, is the affine x ↦ a + s·x. See `indrnn.recurrence.scan` for the
sources and the two pitfalls of tree order. Values that can overflow are clamped to ±LIMIT, so that neither 0·∞ nor
∞ − ∞ occurs, even for |u| > 1 over many steps. NaN in the input is propagated (FMNMX.NAN).

Statistics. Each chain writes its mean and squared deviation. `combine_chains` joins them.
"""

import triton
import triton.language as tl
from torch import Tensor

LIMIT = tl.constexpr(1e30)
NEGATIVE_SLOPE = tl.constexpr(0.01)  # of leaky_relu


@triton.jit
def locate(H, BLOCK: tl.constexpr):
    """The program's sequence (int64), its units [1, BLOCK], their chains (int64), and which of them exist."""
    blocks = tl.cdiv(H, BLOCK)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    unit = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return sequence, unit, sequence * H + unit, unit < H


@triton.jit
def load_steps(pointer, step, left, exists, STEPS: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr):
    """A tuple of STEPS tensors, `step` elements apart. Steps after `left` are zeros."""
    # The compiler does not support starred expressions.
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
    """Store step i of the tile if it exists."""
    if FULL and WHOLE:
        tl.store(pointer, value.to(pointer.dtype.element_ty))
    else:
        inside = left > 0 if FULL else left > i
        if not WHOLE:
            inside = inside & exists
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=inside)


def packed_step(x: Tensor) -> int:
    """The stride of time if it is H (batch-major memory), else 0. As a compile-time constant it turns addresses into
    immediate offsets of one register."""
    return x.shape[2] if x.stride(1) == x.shape[2] else 0


def in_time(x: Tensor, reverse: bool) -> tuple[Tensor, int, int]:
    """The tensor of the first step that a kernel reads, the stride of time, and `packed_step`. With `reverse`, the
    last step and negative strides."""
    return (x[:, -1], -x.stride(1), -packed_step(x)) if reverse else (x, x.stride(1), packed_step(x))


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp(z, lo, hi):
    return smaller(larger(z, lo), hi)


@triton.jit
def tanh(z):
    # A Padé approximant (error z^13/1.4e9) where 1 − exp(−2|z|) would cancel; only + − · / and exp, so that the
    # interpreter and every CUDA version agree.
    w = z * z
    small = z * (10395.0 + w * (1260.0 + 21.0 * w)) / (10395.0 + w * (4725.0 + w * (210.0 + w)))
    e = tl.exp(-2.0 * tl.abs(z))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(w < 0.0625, small, tl.where(z < 0, -large, large))


@triton.jit
def activate(z, NONLINEARITY: tl.constexpr):
    """σ(z)."""
    h = z
    if NONLINEARITY == "relu":
        h = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if NONLINEARITY == "tanh":
        h = tanh(z)
    if NONLINEARITY == "leaky_relu":
        h = tl.where(z > 0, z, NEGATIVE_SLOPE * z)
    return h


@triton.jit
def times_derivative(z, h, NONLINEARITY: tl.constexpr):
    """z σ' at the step whose output is h."""
    if NONLINEARITY == "relu":
        z = tl.where(h > 0, z, 0.0)
    if NONLINEARITY == "tanh":
        z = z * (1.0 - h * h)
    if NONLINEARITY == "leaky_relu":
        z = tl.where(h > 0, z, NEGATIVE_SLOPE * z)
    return z


@triton.jit
def power(u, EXPONENT: tl.constexpr):
    """u to a power from 1 to 255, by squaring."""
    result = u * 0.0 + 1.0
    base = u
    for bit in tl.static_range(0, 8):
        if (EXPONENT >> bit) & 1 == 1:
            result = result * base
        if (EXPONENT >> bit) > 1:
            base = base * base
    return result


@triton.jit
def compose_affine(a1, s1, a2, s2):
    """First (a1, s1), then (a2, s2)."""
    return a2 + s2 * a1, tl.minimum(tl.maximum(s2 * s1, -LIMIT), LIMIT)


@triton.jit
def compose_clamped(a1, s1, lo1, hi1, a2, s2, lo2, hi2):
    """First (a1, s1, lo1, hi1), then (a2, s2, lo2, hi2); a constant map collapses to (lo, 0, lo, lo)."""
    # Only builtins, because the interpreter takes a millisecond per call of a jitted function.
    every: tl.constexpr = tl.PropagateNan.ALL
    at_lo = a2 + s2 * lo1
    at_hi = a2 + s2 * hi1
    lo = tl.minimum(
        tl.maximum(tl.minimum(at_lo, at_hi, propagate_nan=every), lo2, propagate_nan=every), hi2, propagate_nan=every
    )
    hi = tl.minimum(
        tl.maximum(tl.maximum(at_lo, at_hi, propagate_nan=every), lo2, propagate_nan=every), hi2, propagate_nan=every
    )
    a = tl.minimum(tl.maximum(a2 + s2 * a1, -LIMIT, propagate_nan=every), LIMIT, propagate_nan=every)
    s = tl.minimum(tl.maximum(s2 * s1, -LIMIT), LIMIT)
    constant = lo >= hi
    return tl.where(constant, lo, a), tl.where(constant, 0.0, s), lo, hi


@triton.jit
def _follow(earlier1, value1, follows1, earlier2, value2, follows2):
    return tl.where(follows2 == 1, earlier2, value1), value2, follows1 * 0 + 1


@triton.jit
def preceding(value):
    """[CHUNKS, BLOCK]: the value of the previous chunk; undefined in the first.

    tl.gather would make the compiler choose a layout for the loads that is not coalesced."""
    earlier, _, _ = tl.associative_scan((value, value, (value * 0.0).to(tl.int32)), 0, _follow)
    return earlier


@triton.jit
def from_chunk(value, chunk, INDEX: tl.constexpr):
    """[CHUNKS, BLOCK]: the values of one chunk, in all chunks."""
    return tl.broadcast_to(tl.sum(tl.where(chunk == INDEX, value, 0.0), axis=0, keep_dims=True), value.shape)


ROWS, UNITS = 128, 32  # of mean and deviation (B, H) that a program of `statistics_kernel` holds at once


@triton.jit(do_not_specialize=["B", "T", "H"])
def statistics_kernel(
    mean_ptr, deviation_ptr, mean_out_ptr, variance_out_ptr, B, T, H, ROWS: tl.constexpr, UNITS: tl.constexpr
):
    row = tl.arange(0, ROWS)[:, None]
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[None, :]
    state = mean_ptr.dtype.element_ty
    total = tl.zeros([ROWS, UNITS], state)
    for start in range(0, B, ROWS):
        inside = (start + row < B) & (unit < H)
        total += tl.load(mean_ptr + (start + row).to(tl.int64) * H + unit, mask=inside, other=0.0)
    mean = tl.sum(total, axis=0, keep_dims=True) / B
    total = tl.zeros([ROWS, UNITS], state)
    for start in range(0, B, ROWS):
        inside = (start + row < B) & (unit < H)
        at = (start + row).to(tl.int64) * H + unit
        between = tl.where(inside, tl.load(mean_ptr + at, mask=inside, other=0.0) - mean, 0.0)
        total += tl.load(deviation_ptr + at, mask=inside, other=0.0) / T + between * between
    variance = tl.sum(total, axis=0, keep_dims=True) / B
    tl.store(mean_out_ptr + unit, mean, mask=unit < H)
    tl.store(variance_out_ptr + unit, variance, mask=unit < H)


def combine_chains(mean: Tensor, deviation: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (H,) from the mean and the sum of squared deviations (B, H) of T values each."""
    B, H = mean.shape
    outputs = (mean.new_empty(H), mean.new_empty(H))
    options = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
    statistics_kernel[(triton.cdiv(H, UNITS),)](mean, deviation, *outputs, B, T, H, ROWS=ROWS, UNITS=UNITS, **options)
    return outputs
