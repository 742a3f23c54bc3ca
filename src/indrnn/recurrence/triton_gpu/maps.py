"""The pieces of arithmetic that the kernels share: σ, its derivative, and the maps that a scan over time composes.

relu is x ↦ clamp(a + s·x, lo, hi) with (a, s, lo, hi) = (x_t, u, 0, ∞), and such maps are closed under composition;
the identity, and the backward of every σ, is the affine x ↦ a + s·x. See `indrnn.recurrence.clamp_affine` for the
sources and for the two traps of tree order; here everything that can overflow is held within ±LIMIT, so that neither
0·∞ nor ∞ − ∞ can occur, also for |u| > 1 over many steps. A NaN in the input stays one (FMNMX.NAN).
"""

import triton
import triton.language as tl

LIMIT = tl.constexpr(1e30)
NEGATIVE_SLOPE = tl.constexpr(0.01)  # of leaky_relu


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
    # Calls of builtins alone: the interpreter takes a millisecond for each call of a jitted function.
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
    """[CHUNKS, BLOCK]: each chunk's predecessor's value; nothing of use in the first chunk.

    tl.gather would do, but the compiler then moves the loads to a layout that suits it, which is not coalesced."""
    earlier, _, _ = tl.associative_scan((value, value, (value * 0.0).to(tl.int32)), 0, _follow)
    return earlier


@triton.jit
def from_chunk(value, chunk, INDEX: tl.constexpr):
    """[CHUNKS, BLOCK]: one chunk's values in all of them."""
    return tl.broadcast_to(tl.sum(tl.where(chunk == INDEX, value, 0.0), axis=0, keep_dims=True), value.shape)
