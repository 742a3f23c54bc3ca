"""Backward: δ_t = σ'_t ⊙ (g_t + u ⊙ δ_{t+1}), a linear scan from the saved output, time reversed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Cell, InputGradients, OutputGradients
from .chooser import Tile
from .primitives import (
    LIMIT,
    clamp,
    compose_affine,
    from_chunk,
    in_time,
    load_steps,
    locate,
    power,
    preceding,
    store_step,
    times_derivative,
)

_SIZES = ["T", "H", "values", "dh_stride_b", "dh_stride_t", "h_stride_b", "h_stride_t", "dx_stride_b", "dx_stride_t"]
_NAMES = ("dh", "dh_last", "dmean", "dvariance", "mean", "h", "u", "h0", "dx", "du", "dh0", "dbias")
_POINTERS = [f"{name}_ptr" for name in _NAMES]


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_POINTERS)
def backward_kernel(
    dh_ptr, dh_last_ptr, dmean_ptr, dvariance_ptr, mean_ptr, h_ptr, u_ptr, h0_ptr, dx_ptr, du_ptr, dh0_ptr, dbias_ptr,
    T, H, values, dh_stride_b, dh_stride_t, h_stride_b, h_stride_t, dx_stride_b, dx_stride_t,
    DH_STEP: tl.constexpr, H_STEP: tl.constexpr, DX_STEP: tl.constexpr, NONLINEARITY: tl.constexpr,
    CHUNKS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
    WHOLE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    sequence, unit, chain, exists = locate(H, BLOCK)
    u = tl.load(u_ptr + unit, mask=exists, other=0.0)
    state = u.dtype
    u = tl.broadcast_to(u, [CHUNKS, BLOCK])
    zeros = tl.zeros([CHUNKS, BLOCK], state)
    delta = zeros
    du = zeros
    dbias = zeros
    offset = zeros
    slope = zeros
    if mean_ptr is not None:
        n = values.to(state)
        slope += tl.load(dvariance_ptr + unit, mask=exists, other=0.0) * 2 / n
        offset += tl.load(dmean_ptr + unit, mask=exists, other=0.0) / n
        offset -= slope * tl.load(mean_ptr + unit, mask=exists, other=0.0)

    chunk = tl.broadcast_to(tl.arange(0, CHUNKS)[:, None], [CHUNKS, BLOCK])
    # Chunks are counted from the last step, so that the partial tile is the one at t = 0.
    left = T - chunk * STEPS
    last = (left - 1).to(tl.int64)
    h_step = h_stride_t.to(tl.int64) if H_STEP == 0 else H_STEP
    dx_step = dx_stride_t.to(tl.int64) if DX_STEP == 0 else DX_STEP
    TILE: tl.constexpr = CHUNKS * STEPS
    h_pos = h_ptr + sequence * h_stride_b + unit + last * h_step
    dx_pos = dx_ptr + sequence * dx_stride_b + unit + last * dx_step
    if dh_ptr is not None:
        dh_step = dh_stride_t.to(tl.int64) if DH_STEP == 0 else DH_STEP
        dh_pos = dh_ptr + sequence * dh_stride_b + unit + last * dh_step

    # The gradient of h_last enters with the first step of the first tile.
    entering = zeros
    if dh_last_ptr is not None:
        entering += tl.where(chunk == 0, tl.load(dh_last_ptr + chain, mask=exists, other=0.0).to(state), 0.0)

    if AHEAD:
        hs_following = load_steps(h_pos, -h_step, left, exists, STEPS, WHOLE, FULL)
        if dh_ptr is not None:
            dhs_following = load_steps(dh_pos, -dh_step, left, exists, STEPS, WHOLE, FULL)
    for _ in range(0, tl.cdiv(T, TILE)):
        # h before the chunk's first step, that is, of the step its last one looks back to
        h_before = load_steps(h_pos - STEPS * h_step, -h_step, left - STEPS, exists, 1, WHOLE, FULL)[0]
        if AHEAD:
            hs = hs_following
            hs_following = load_steps(h_pos - TILE * h_step, -h_step, left - TILE, exists, STEPS, WHOLE, FULL)
            if dh_ptr is not None:
                dhs = dhs_following
                dhs_following = load_steps(dh_pos - TILE * dh_step, -dh_step, left - TILE, exists, STEPS, WHOLE, FULL)
        else:
            hs = load_steps(h_pos, -h_step, left, exists, STEPS, WHOLE, FULL)
            if dh_ptr is not None:
                dhs = load_steps(dh_pos, -dh_step, left, exists, STEPS, WHOLE, FULL)
        hs = hs + (h_before,)  # noqa: RUF005

        incoming = ()
        for i in tl.static_range(STEPS):
            g = offset
            if dh_ptr is not None:
                g = dhs[i].to(state)
                if mean_ptr is not None:
                    g += offset
            if mean_ptr is not None:
                g += slope * hs[i].to(state)
            if i == 0:
                g += entering
            incoming = incoming + (g,)  # type: ignore[assignment] # noqa: RUF005
        entering = zeros

        if CHUNKS > 1:
            a = zeros
            s = zeros + 1.0
            for i in tl.static_range(STEPS):
                h = hs[i].to(state)
                a = times_derivative(incoming[i] + u * a, h, NONLINEARITY)
                s = times_derivative(s, h, NONLINEARITY)
            s = clamp(s * power(u, STEPS), -LIMIT, LIMIT)
            first = chunk == 0
            a = tl.where(first, a + s * delta, a)
            s = tl.where(first, 0.0, s)
            a, s = tl.associative_scan((a, s), 0, compose_affine)
            delta = tl.where(first, delta, preceding(a))
        for i in tl.static_range(STEPS):
            new = times_derivative(incoming[i] + u * delta, hs[i].to(state), NONLINEARITY)
            store_step(dx_pos - i * dx_step, new, i, left, exists, WHOLE, FULL)
            if FULL:
                delta = new
            else:
                new = tl.where(left > i, new, 0.0)
                delta = tl.where(left > i, new, delta)
            du += new * hs[i + 1].to(state)
            dbias += new
        # The chunk that holds t = 0
        ends = (left > 0) & (left <= STEPS) & exists
        tl.store(dh0_ptr + chain + chunk * 0, u * delta, mask=ends)
        if h0_ptr is not None:
            du += delta * tl.load(h0_ptr + chain + chunk * 0, mask=ends, other=0.0).to(state)
        if CHUNKS > 1:
            delta = from_chunk(delta, chunk, CHUNKS - 1)
        left -= TILE
        h_pos -= TILE * h_step
        dx_pos -= TILE * dx_step
        if dh_ptr is not None:
            dh_pos -= TILE * dh_step

    tl.store(du_ptr + chain, tl.sum(du, axis=0, keep_dims=True), mask=exists)
    tl.store(dbias_ptr + chain, tl.sum(dbias, axis=0, keep_dims=True), mask=exists)


def launch_backward(gradients: OutputGradients, h: Tensor, cell: Cell, tile: Tile) -> InputGradients:
    """See `reference.backward`."""
    B, T, H = h.shape
    dh, dh_last, dmean, dvariance, mean = gradients
    u, h0, nonlinearity, reverse, _ = cell
    dx = torch.empty_like(h)
    du, dh0, dbias = u.new_empty(B, H), u.new_empty(B, H), u.new_empty(B, H)
    dh_first, dh_stride_t, dh_step = (None, 0, 0) if dh is None else in_time(dh, reverse)
    h_first, h_stride_t, h_step = in_time(h, reverse)
    dx_first, dx_stride_t, dx_step = in_time(dx, reverse)
    backward_kernel[(B * triton.cdiv(H, tile.block),)](
        dh_first, dh_last, dmean, dvariance, mean, h_first, u, h0, dx_first, du, dh0, dbias,
        T, H, B * T, 0 if dh is None else dh.stride(0), dh_stride_t, h.stride(0), h_stride_t, dx.stride(0), dx_stride_t,
        DH_STEP=dh_step, H_STEP=h_step, DX_STEP=dx_step, NONLINEARITY=nonlinearity,
        **tile.constants(T, H), **tile.options,
    )  # fmt: skip
    return InputGradients(dx, du, dh0, dbias)
