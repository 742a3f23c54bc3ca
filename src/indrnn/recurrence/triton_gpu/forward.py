"""Forward: h_t = σ(x_t + bias + u ⊙ h_{t-1})."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Cell, Outputs
from .chooser import Tile
from .primitives import (
    LIMIT,
    activate,
    clamp,
    combine_chains,
    compose_affine,
    compose_clamped,
    from_chunk,
    in_time,
    larger,
    load_steps,
    locate,
    power,
    preceding,
    smaller,
    store_step,
)


@triton.jit
def enter(
    xs, bias, u, carry, chunk,
    NONLINEARITY: tl.constexpr, CHUNKS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state before each chunk of a tile, given the state before the first."""
    first = chunk == 0
    a = tl.zeros([CHUNKS, BLOCK], u.dtype)
    s = power(u, STEPS)
    if NONLINEARITY == "relu":
        # The images of the two ends of the line are the bounds, whatever the sign of u.
        p = a - LIMIT
        q = a + LIMIT
        for i in tl.static_range(STEPS):
            x = xs[i].to(u.dtype) + bias
            a = x + u * a
            p = larger(x + u * p, 0.0)
            q = larger(x + u * q, 0.0)
        a = clamp(a, -LIMIT, LIMIT)
        s = clamp(s, -LIMIT, LIMIT)
        lo = clamp(smaller(p, q), -LIMIT, LIMIT)
        hi = clamp(larger(p, q), -LIMIT, LIMIT)
        # The map of the first chunk becomes constant, so the scan composes values, not maps, from left to right.
        end = clamp(a + s * carry, lo, hi)
        a = tl.where(first, end, a)
        s = tl.where(first, 0.0, s)
        lo = tl.where(first, end, lo)
        hi = tl.where(first, end, hi)
        a, s, lo, hi = tl.associative_scan((a, s, lo, hi), 0, compose_clamped)
    else:
        for i in tl.static_range(STEPS):
            a = xs[i].to(u.dtype) + bias + u * a
        a = tl.where(first, a + s * carry, a)
        s = tl.where(first, 0.0, clamp(s, -LIMIT, LIMIT))
        a, s = tl.associative_scan((a, s), 0, compose_affine)
    return tl.where(first, carry, preceding(a))


_SIZES = ["T", "H", "x_stride_b", "x_stride_t", "h_stride_b", "h_stride_t", "bias_stride_b"]
_POINTERS = ["x_ptr", "u_ptr", "h0_ptr", "bias_ptr", "h_ptr", "h_last_ptr", "mean_ptr", "deviation_ptr"]


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_POINTERS)
def forward_kernel(
    x_ptr, u_ptr, h0_ptr, bias_ptr, h_ptr, h_last_ptr, mean_ptr, deviation_ptr,
    T, H, x_stride_b, x_stride_t, h_stride_b, h_stride_t, bias_stride_b,
    X_STEP: tl.constexpr, H_STEP: tl.constexpr, NONLINEARITY: tl.constexpr,
    CHUNKS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
    WHOLE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    sequence, unit, chain, exists = locate(H, BLOCK)
    u = tl.load(u_ptr + unit, mask=exists, other=0.0)
    state = u.dtype
    u = tl.broadcast_to(u, [CHUNKS, BLOCK])
    zeros = tl.zeros([CHUNKS, BLOCK], state)
    carry = zeros
    if h0_ptr is not None:
        carry += tl.load(h0_ptr + chain, mask=exists, other=0.0).to(state)
    bias = zeros
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + sequence * bias_stride_b + unit, mask=exists, other=0.0)

    chunk = tl.broadcast_to(tl.arange(0, CHUNKS)[:, None], [CHUNKS, BLOCK])
    left = T - chunk * STEPS
    x_step = x_stride_t.to(tl.int64) if X_STEP == 0 else X_STEP
    h_step = h_stride_t.to(tl.int64) if H_STEP == 0 else H_STEP
    TILE: tl.constexpr = CHUNKS * STEPS
    x_pos = x_ptr + sequence * x_stride_b + unit + (chunk * STEPS).to(tl.int64) * x_step
    h_pos = h_ptr + sequence * h_stride_b + unit + (chunk * STEPS).to(tl.int64) * h_step

    if mean_ptr is not None:
        count = zeros
        mean = zeros
        deviation = zeros
    if AHEAD:
        following = load_steps(x_pos, x_step, left, exists, STEPS, WHOLE, FULL)
    for _ in range(0, tl.cdiv(T, TILE)):
        if AHEAD:
            xs = following
            following = load_steps(x_pos + TILE * x_step, x_step, left - TILE, exists, STEPS, WHOLE, FULL)
        else:
            xs = load_steps(x_pos, x_step, left, exists, STEPS, WHOLE, FULL)

        h = carry
        if CHUNKS > 1:
            h = enter(xs, bias, u, carry, chunk, NONLINEARITY, CHUNKS, STEPS, BLOCK)
        for i in tl.static_range(STEPS):
            before = h
            h = activate(xs[i].to(state) + bias + u * before, NONLINEARITY)
            if h_last_ptr is not None and not FULL:
                h = tl.where(left > i, h, before)
            store_step(h_pos + i * h_step, h, i, left, exists, WHOLE, FULL)
            if mean_ptr is not None:
                if i == 0:
                    first = h
                    sum1 = zeros
                    sum2 = zeros
                else:
                    d = h - first
                    if not FULL:
                        d = tl.where(left > i, d, 0.0)
                    sum1 += d
                    sum2 += d * d
        if h_last_ptr is not None:
            # The chunk that holds the last step
            tl.store(h_last_ptr + chain + chunk * 0, h, mask=(left > 0) & (left <= STEPS) & exists)
        carry = h
        if CHUNKS > 1:
            carry = from_chunk(h, chunk, CHUNKS - 1)
        if mean_ptr is not None:
            # The mean and squared deviation of this tile, about its first value, join those of earlier tiles (Chan,
            # Golub & LeVeque 1983, "Algorithms for computing the sample variance").
            size = tl.minimum(tl.maximum(left, 0), STEPS).to(state)
            some = tl.maximum(size, 1.0)
            d = first + sum1 / some - mean
            total = tl.maximum(count + size, 1.0)
            mean += d * (size / total)
            deviation += tl.where(size > 0, sum2 - sum1 * (sum1 / some), 0.0) + d * d * (count * (size / total))
            count += size
        left -= TILE
        x_pos += TILE * x_step
        h_pos += TILE * h_step

    if mean_ptr is not None:
        whole_mean = tl.sum(mean * (count / T), axis=0, keep_dims=True)
        d = mean - whole_mean
        whole_deviation = tl.sum(deviation + d * d * count, axis=0, keep_dims=True)
        tl.store(mean_ptr + chain, whole_mean, mask=exists)
        tl.store(deviation_ptr + chain, whole_deviation, mask=exists)


def launch_forward(x: Tensor, bias: Tensor | None, cell: Cell, statistics: bool, tile: Tile) -> Outputs:
    """See `reference.forward`."""
    B, T, H = x.shape
    u, h0, nonlinearity, reverse, _ = cell
    h = torch.empty_like(x)
    # The kernel writes the last state only if h rounds it, because keeping it costs registers.
    h_last = u.new_empty(B, H) if h.dtype != u.dtype else None
    mean = u.new_empty(B, H) if statistics else None
    deviation = u.new_empty(B, H) if statistics else None
    x_first, x_stride_t, x_step = in_time(x, reverse)
    h_first, h_stride_t, h_step = in_time(h, reverse)
    bias_stride_b = H if bias is not None and bias.dim() == 2 else 0
    forward_kernel[(B * triton.cdiv(H, tile.block),)](
        x_first, u, h0, bias, h_first, h_last, mean, deviation,
        T, H, x.stride(0), x_stride_t, h.stride(0), h_stride_t, bias_stride_b,
        X_STEP=x_step, H_STEP=h_step, NONLINEARITY=nonlinearity, **tile.constants(T, H), **tile.options,
    )  # fmt: skip
    if h_last is None:
        h_last = h[:, 0 if reverse else -1].clone(memory_format=torch.contiguous_format)
    if mean is None or deviation is None:
        return Outputs(h, h_last, None, None)
    return Outputs(h, h_last, *combine_chains(mean, deviation, T))
