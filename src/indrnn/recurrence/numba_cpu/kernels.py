"""The loops of the CPU backend.

Letters: B batch, T time steps, H hidden units; b, t, k index them. An array is (values, stride_b, stride_t), flat:
x[b, t, k] is values[b * stride_b + t * stride_t + k], and a stride of 0 repeats a row. A row is (values, index of its
unit 0), as `_row` finds it. A task is one sequence and a range of units; tasks write to places of their own, so their
order and the number of threads cannot change a result.

A task goes through time in chunks, and through a chunk once for each block of units, whose running state (h_t or δ_t)
and sums over time stay in registers, never rounded to the dtype of the sequence. From chunk to chunk they are kept in
the results themselves: h_last, mean and m2; dh0, du and dbias. The widest block is what the processor's registers hold:
with AVX-512 a whole row of 128 units, read in the order of memory; narrower ones read in leaps of a row, but from the
caches, because a chunk is short.

Functions that are called within the loops over time take vectors, not arrays: Numba counts the references to an array
at every call, which doubled the time of a step backward.
"""

# mypy: ignore-errors
# (see `vector`)

import numpy as np
import torch
from numba import carray, njit

from .vector import (
    FLUSH,
    choose,
    convert,
    float_mode,
    fused,
    load,
    pointer_at,
    relu,
    set_float_mode,
    spread,
    store,
    take,
    times,
    wide_registers,
    zeros,
)

# The record of a call, which `launch` writes and the entry points read: 64-bit integers.
#
#   field      at  meaning
#   COUNTER     0  the next task; whichever thread is free takes it
#   TASKS       1  B · groups
#   GROUPS      2  into how many ranges of units a sequence is cut
#   BATCH       3  B
#   STEPS       4  T
#   UNITS       5  H
#   FEATURES    6  D, where W x_t enters; else 0
#   KIND        7  IDENTITY, RELU or LEAKY_RELU
#   OPTIONS     8  forward: whether statistics are wanted; backward: what is given, AFFINE + INITIAL
#   ARRAYS      9  address, stride_b and stride_t of each array, in the order of the task's arguments
COUNTER, TASKS, GROUPS, BATCH, STEPS, UNITS, FEATURES, KIND, OPTIONS, ARRAYS = range(10)
IDENTITY, RELU, LEAKY_RELU = range(3)
AFFINE, INITIAL = 1, 2  # offset and slope; h0
NEGATIVE_SLOPE = 0.01  # of leaky_relu
CHUNK = 32  # time steps
GRAIN = 32  # the units of a task are whole grains

ONE = (0,)


@njit(error_model="numpy")
def forward_task(task, sizes, variant, x, u, bias, h0, weight, h, h_last, mean, m2):
    """h for one sequence and one range of units, and with `statistics` their mean and Σ(h − mean)² over time."""
    groups, B, T, H, D, kind, statistics = sizes
    blocks, product = variant
    b, first, end = _range_of(task, groups, B, H)
    (h0, h0_at), (last, last_at) = _row(h0, b, 0), _row(h_last, b, 0)
    for k in range(first, end):  # `load`, because Numba's own indexing counts a negative index from the end
        store(last, last_at + k, load(h0, h0_at + k, ONE))
    given = (u[0], _row(bias, b, 0), weight[0], weight[2], D)
    results = ((last, last_at), _row(mean, b, 0), _row(m2, b, 0))
    for start in range(0, T, CHUNK):
        span = (start, min(start + CHUNK, T))
        sequences = (_row(x, b, start), x[2], _row(h, b, start), h[2])
        k = _steps(first, end, kind, statistics, blocks[0], product, span, sequences, given, results)
        if k < end:  # a call passes a hundred words on the stack, as much work as a few steps
            k = _steps(k, end, kind, statistics, blocks[1], product, span, sequences, given, results)
            k = _steps(k, end, kind, statistics, blocks[2], product, span, sequences, given, results)
            _steps(k, end, kind, statistics, ONE, product, span, sequences, given, results)


@njit(error_model="numpy")
def _row(array, b, t):
    values, stride_b, stride_t = array
    return values, b * stride_b + t * stride_t


@njit(error_model="numpy")
def _range_of(task, groups, B, H):
    """The sequence and the range of units of a task: the units are cut into `groups` ranges of whole grains."""
    grains, group = (H + GRAIN - 1) // GRAIN, task // B
    return task % B, grains * group // groups * GRAIN, min(grains * (group + 1) // groups * GRAIN, H)


@njit(error_model="numpy")
def _steps(k, end, kind, statistics, lanes, product, span, sequences, given, results):
    """The steps of a chunk for all whole blocks from unit k on; returns the first unit left.

    The statistics of a chunk are summed about the mean so far (at first: about the first value), so that they cannot
    cancel, and joined by the formula of Chan, Golub & LeVeque 1983 (doi:10.1080/00031305.1983.10483115, eq. 2.1).
    """
    start, stop = span
    (x, x_at), x_t, (h, h_at), h_t = sequences
    u, (bias, bias_at), weight, weight_d, D = given
    (last, last_at), (mean, mean_at), (m2, m2_at) = results
    n = stop - start
    while k + len(lanes) <= end:
        state, recurrent, added = load(last, last_at + k, lanes), load(u, k, lanes), load(bias, bias_at + k, lanes)
        if statistics:
            if start == 0:
                entering = _entering(x, x_at, k, lanes, added, weight, weight_d, D, product)
                pivot = _activated(fused(recurrent, state, entering), kind)
            else:
                pivot = convert(load(mean, mean_at + k, lanes), state)
            total, squares = zeros(state), zeros(state)
            for t in range(n):
                entering = _entering(x, x_at + t * x_t, k, lanes, added, weight, weight_d, D, product)
                state = _activated(fused(recurrent, state, entering), kind)
                store(h, h_at + t * h_t + k, state)
                off = state - pivot
                total = total + off
                squares = fused(off, off, squares)
            off_mean = times(convert(total, mean), 1.0 / n)
            chunk_m2 = convert(squares, m2) - convert(total, mean) * off_mean
            chunk_mean = convert(pivot, mean) + off_mean
            if start > 0:
                mean_before = load(mean, mean_at + k, lanes)
                apart = chunk_mean - mean_before
                chunk_mean = mean_before + times(apart, n / stop)
                chunk_m2 = load(m2, m2_at + k, lanes) + chunk_m2 + times(apart * apart, start * (n / stop))
            store(mean, mean_at + k, chunk_mean)
            store(m2, m2_at + k, chunk_m2)
        else:
            for t in range(n):
                entering = _entering(x, x_at + t * x_t, k, lanes, added, weight, weight_d, D, product)
                state = _activated(fused(recurrent, state, entering), kind)
                store(h, h_at + t * h_t + k, state)
        store(last, last_at + k, state)
        k += len(lanes)
    return k


@njit(error_model="numpy", inline="always")
def _entering(x, x_at, k, lanes, added, weight, weight_d, D, product):
    """x_t + bias, or W x_t + bias."""
    if len(product):
        for d in range(D):
            added = fused(load(weight, d * weight_d + k, lanes), spread(x, x_at + d, lanes), added)
        return added
    return load(x, x_at + k, lanes) + added


@njit(error_model="numpy")
def _activated(a, kind):
    if kind == RELU:
        return relu(a)
    if kind == LEAKY_RELU:
        return choose(a, a, times(a, NEGATIVE_SLOPE))
    return a


@njit(error_model="numpy")
def backward_task(task, sizes, variant, dh, dh_last, offset, slope, h, u, h0, x, dx, du, dh0, dbias, dweight):
    """δ, and their sums over time, for one sequence and one range of units.

    What is not `given` is left out, not taken as zeros: 0 · ∞ would make a state that is infinite a NaN.
    """
    groups, B, T, H, D, kind, options = sizes
    blocks, product = variant
    b, first, end = _range_of(task, groups, B, H)
    affine = options & AFFINE
    (last, last_at), (delta, delta_at) = _row(dh_last, b, 0), _row(dh0, b, 0)
    for k in range(first, end):
        store(delta, delta_at + k, load(last, last_at + k, ONE))
    given = (offset[0], slope[0], u[0])
    (dw, dw_at), dw_d = _row(dweight, b, 0), dweight[2]
    if len(product):
        for d in range(D):
            for k in range(first, end):
                dw[dw_at + d * dw_d + k] = 0
    results = (_row(du, b, 0), (delta, delta_at), _row(dbias, b, 0), (dw, dw_at), dw_d, D)
    for start in range((T - 1) // CHUNK * CHUNK, -1, -CHUNK):
        span = (min(CHUNK, T - start), start + CHUNK >= T)
        sequences = (
            _row(dh, b, start), dh[2], _row(h, b, start), h[2], _row(x, b, start), x[2], _row(dx, b, start), dx[2],
        )  # fmt: skip
        k = _steps_back(first, end, kind, affine, blocks[0], product, span, sequences, given, results)
        if k < end:  # as above
            k = _steps_back(k, end, kind, affine, blocks[1], product, span, sequences, given, results)
            k = _steps_back(k, end, kind, affine, blocks[2], product, span, sequences, given, results)
            _steps_back(k, end, kind, affine, ONE, product, span, sequences, given, results)
    (h0, h0_at), (du, du_at) = _row(h0, b, 0), results[0]
    for k in range(first, end):
        if options & INITIAL:
            du[du_at + k] += delta[delta_at + k] * h0[h0_at + k]
        delta[delta_at + k] *= u[0][k]


@njit(error_model="numpy")
def _steps_back(k, end, kind, affine, lanes, product, span, sequences, given, results):
    """The steps of a chunk, the last one first, for all whole blocks from unit k on; returns the first unit left.

    δ_t = σ'_t ⊙ (dh_t + offset + slope ⊙ h_t + u ⊙ δ_{t+1}); at the end, dh_last instead of u ⊙ δ_{t+1}.
    du = Σ δ_{t+1} ⊙ h_t, dbias = Σ δ_t, and with `product` dweight = Σ δ_t x_tᵀ; without, δ itself is stored.
    """
    n, at_end = span
    (dh, dh_at), dh_t, (h, h_at), h_t, (x, x_at), x_t, (dx, dx_at), dx_t = sequences
    offset, slope, u = given
    (du, du_at), (dh0, dh0_at), (dbias, dbias_at), (dw, dw_at), dw_d, D = results
    while k + len(lanes) <= end:
        recurrent, added, factor = load(u, k, lanes), load(offset, k, lanes), load(slope, k, lanes)
        delta = load(dh0, dh0_at + k, lanes)
        steps = n
        if at_end:
            steps -= 1
            state = load(h, h_at + steps * h_t + k, lanes)
            delta = load(dh, dh_at + steps * dh_t + k, lanes) + delta
            delta = _times_slope(delta, added, factor, state, affine, kind)
            if len(product):
                _add_product(dw, dw_at + k, dw_d, D, delta, x, x_at + steps * x_t, lanes)
            else:
                store(dx, dx_at + steps * dx_t + k, delta)
            du_sum, dbias_sum = zeros(delta), delta
        else:
            du_sum, dbias_sum = load(du, du_at + k, lanes), load(dbias, dbias_at + k, lanes)
        for t in range(steps - 1, -1, -1):
            state = load(h, h_at + t * h_t + k, lanes)
            du_sum = fused(delta, state, du_sum)
            delta = fused(recurrent, delta, load(dh, dh_at + t * dh_t + k, lanes))
            delta = _times_slope(delta, added, factor, state, affine, kind)
            if len(product):
                _add_product(dw, dw_at + k, dw_d, D, delta, x, x_at + t * x_t, lanes)
            else:
                store(dx, dx_at + t * dx_t + k, delta)
            dbias_sum = dbias_sum + delta
        store(du, du_at + k, du_sum)
        store(dbias, dbias_at + k, dbias_sum)
        store(dh0, dh0_at + k, delta)
        k += len(lanes)
    return k


@njit(error_model="numpy", inline="always")
def _add_product(dw, at, dw_d, D, delta, x, x_at, lanes):
    """dweight += δ_t x_tᵀ. The sums stay in memory, in the nearest cache: the registers hold all other ones."""
    for d in range(D):
        store(dw, at + d * dw_d, fused(delta, spread(x, x_at + d, lanes), load(dw, at + d * dw_d, lanes)))


@njit(error_model="numpy")
def _times_slope(delta, offset, slope, state, affine, kind):
    """σ' ⊙ (delta + offset + slope ⊙ state)."""
    if affine:
        delta = delta + fused(slope, state, offset)
    if kind == RELU:
        return choose(state, delta, zeros(delta))
    if kind == LEAKY_RELU:
        return choose(state, delta, times(delta, NEGATIVE_SLOPE))
    return delta


def _blocks(widths):
    return tuple((0,) * width for width in widths)


# The widths of blocks of float32: what the registers hold together with the sums, and two smaller ones for the rest.
WIDTHS = (128, 32, 4) if wide_registers() else (16, 8, 4)

# Whether W x_t enters, or x_t itself: by the length of a tuple, so that each kernel is compiled for one of them.
PRODUCT, NO_PRODUCT = (0,), ()

# What the arrays hold, for sequences of each dtype: sequences (bfloat16 as uint16), states and all else; the blocks.
VARIANTS = {
    torch.float32: (np.float32, np.float32, _blocks(WIDTHS)),
    torch.float64: (np.float64, np.float64, _blocks(width // 2 for width in WIDTHS)),
    torch.bfloat16: (np.uint16, np.float32, _blocks(WIDTHS)),
}


def forward_entry(stamp, sequence, state, variant):
    """Takes and runs forward tasks until none is left."""

    def forward(pointer):
        _ = stamp  # Numba finds machine code on disk by the values that a function closes over, and this is one
        mode = float_mode()
        set_float_mode(mode | FLUSH)
        _forward_tasks(pointer, sequence, state, variant)
        set_float_mode(mode)

    return forward


def backward_entry(stamp, sequence, state, variant):
    """Takes and runs backward tasks until none is left."""

    def backward(pointer):
        _ = stamp  # as above
        mode = float_mode()
        set_float_mode(mode | FLUSH)
        _backward_tasks(pointer, sequence, state, variant)
        set_float_mode(mode)

    return backward


@njit(error_model="numpy")
def _forward_tasks(pointer, sequence, state, variant):
    call = carray(pointer, (1,), np.int64)
    x, u, bias, h0 = _array(call, 0, sequence), _array(call, 1, state), _array(call, 2, state), _array(call, 3, state)
    weight, h, h_last = _array(call, 4, state), _array(call, 5, sequence), _array(call, 6, state)
    mean, m2 = _array(call, 7, np.float64), _array(call, 8, np.float64)
    sizes, task = _sizes(call), take(pointer, COUNTER)
    while task < call[TASKS]:
        forward_task(task, sizes, variant, x, u, bias, h0, weight, h, h_last, mean, m2)
        task = take(pointer, COUNTER)


@njit(error_model="numpy")
def _backward_tasks(pointer, sequence, state, variant):
    call = carray(pointer, (1,), np.int64)
    dh, dh_last = _array(call, 0, sequence), _array(call, 1, state)
    offset, slope = _array(call, 2, state), _array(call, 3, state)
    h, u, h0, x = _array(call, 4, sequence), _array(call, 5, state), _array(call, 6, state), _array(call, 7, sequence)
    dx, du, dh0 = _array(call, 8, sequence), _array(call, 9, state), _array(call, 10, state)
    dbias, dweight = _array(call, 11, state), _array(call, 12, state)
    sizes, task = _sizes(call), take(pointer, COUNTER)
    while task < call[TASKS]:
        backward_task(task, sizes, variant, dh, dh_last, offset, slope, h, u, h0, x, dx, du, dh0, dbias, dweight)
        task = take(pointer, COUNTER)


@njit(error_model="numpy")
def _sizes(call):
    return call[GROUPS], call[BATCH], call[STEPS], call[UNITS], call[FEATURES], call[KIND], call[OPTIONS]


@njit(error_model="numpy")
def _array(call, which, dtype):
    at = ARRAYS + 3 * which
    return carray(pointer_at(call[at]), (1,), dtype), call[at + 1], call[at + 2]
