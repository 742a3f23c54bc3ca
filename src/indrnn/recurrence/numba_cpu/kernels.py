"""The loops of the CPU backend.

Letters: B batch, T time steps, H hidden units; b, t, k index them. Every array is flat; an element of x is
x[b * x_b + t * x_t + k], where x_b and x_t are strides (0 repeats a row). A task is one sequence and a range of units;
tasks write to places of their own, so their order and the number of threads cannot change a result.

Memory decides the speed, so both directions walk whole rows in the order of memory (backward from the end, units too),
and the state is taken from the row just written. Walking a few units at a time through a block of steps, with the state
in registers, reads the same lines in leaps of a row: 1.3 times as long forward, twice as long backward. What is summed
over time is summed `CHUNK` rows at a time, while they are in the first-level cache.

`kept` holds the running state (h_t or δ_t), which is never rounded between steps: step t is its row t & kept_rows − 1.
It is the output itself (kept_rows = 0), or for bfloat16, beside it, the last `CHUNK` rows in float32, for every thread
its own.
"""

# mypy: ignore-errors
# (see `vector`)

import numpy as np
import torch
from numba import carray, njit

from .native import FLUSH, float_mode, pointer_at, set_float_mode, take
from .vector import choose, convert, load, relu, store, store_rounded, times, zeros

IDENTITY, RELU, LEAKY_RELU = 0, 1, 2
AFFINE, INITIAL = 1, 2  # what a backward call is given: offset and slope; h0
NEGATIVE_SLOPE = 0.01  # of leaky_relu
CHUNK = 32  # time steps that are summed at once; 32 rows of 128 float32 take 16 kB

ONE = (0,)
FOUR = (0,) * 4
EIGHT = (0,) * 8
SIXTEEN = (0,) * 16
THIRTY_TWO = (0,) * 32


@njit(error_model="numpy")
def forward_task(
    task, groups, B, T, H, kind, statistics, kept_rows, wide, narrower,
    x, x_b, x_t, u, bias, bias_b, h0, h0_b, h, h_b, h_t, h_last, mean, m2, kept, kept_at, kept_b, kept_t,
):  # fmt: skip
    """h for one sequence and one range of units, and with `statistics` their mean and Σ(h − mean)² over time."""
    b, first, end = _range_of(task, groups, B, H, len(wide))
    kept_at, within = kept_at + b * kept_b, kept_rows - 1
    for start in range(0, T, CHUNK):
        stop = min(start + CHUNK, T)
        for t in range(start, stop):
            before, before_at = (h0, b * h0_b) if t == 0 else (kept, kept_at + (t - 1 & within) * kept_t)
            rows = (before, before_at, kept, kept_at + (t & within) * kept_t, h, b * h_b + t * h_t)
            x_at = b * x_b + t * x_t
            k = _step(first, end, kind, wide, x, x_at, u, bias, b * bias_b, rows)
            k = _step(k, end, kind, narrower, x, x_at, u, bias, b * bias_b, rows)
            _step(k, end, kind, ONE, x, x_at, u, bias, b * bias_b, rows)
        if statistics:
            chunk_at = kept_at + (start & within) * kept_t
            k = _accumulate(first, end, start, stop, wide, kept, chunk_at, kept_t, mean, m2, b * H)
            k = _accumulate(k, end, start, stop, narrower, kept, chunk_at, kept_t, mean, m2, b * H)
            _accumulate(k, end, start, stop, ONE, kept, chunk_at, kept_t, mean, m2, b * H)
    for k in range(first, end):  # `load`, because Numba's own indexing counts a negative index from the end
        store(h_last, b * H + k, load(kept, kept_at + (T - 1 & within) * kept_t + k, ONE))


@njit(error_model="numpy")
def _range_of(task, groups, B, H, width):
    """The sequence and the range of units of a task: the units are cut into `groups` ranges of whole vectors."""
    vectors = (H + width - 1) // width
    group = task // B
    first = (vectors * group // groups) * width
    return task % B, first, min((vectors * (group + 1) // groups) * width, H)


@njit(error_model="numpy")
def _step(k, end, kind, lanes, x, x_at, u, bias, bias_at, rows):
    """One row of h from unit k on, in whole vectors; returns the first unit left."""
    before, before_at, kept, kept_at, h, h_at = rows
    while k + len(lanes) <= end:
        a = load(x, x_at + k, lanes) + load(bias, bias_at + k, lanes)
        a = a + load(u, k, lanes) * load(before, before_at + k, lanes)
        if kind == RELU:
            a = relu(a)
        elif kind == LEAKY_RELU:
            a = choose(a, a, times(a, NEGATIVE_SLOPE))
        store(kept, kept_at + k, a)
        store_rounded(h, h_at + k, a)
        k += len(lanes)
    return k


@njit(error_model="numpy")
def _accumulate(k, end, start, stop, lanes, h, h_at, h_t, mean, m2, at):
    """Add the steps start…stop−1, the first of which is at h_at, to mean and Σ(h − mean)² (float64).

    The sums of a chunk are taken about the mean so far (at first: about the first value), so that they cannot cancel,
    and are joined by the formula of Chan, Golub & LeVeque 1983 (doi:10.1080/00031305.1983.10483115, eq. 2.1).
    """
    n = stop - start
    while k + len(lanes) <= end:
        row = load(h, h_at + k, lanes)
        pivot, total, squares = row, zeros(row), zeros(row)
        if start > 0:
            pivot = convert(load(mean, at + k, lanes), row)
        for t in range(n):
            off = load(h, h_at + t * h_t + k, lanes) - pivot
            total = total + off
            squares = squares + off * off
        off_mean = times(convert(total, mean), 1.0 / n)
        chunk_m2 = convert(squares, m2) - convert(total, mean) * off_mean
        chunk_mean = convert(pivot, mean) + off_mean
        if start == 0:
            store(mean, at + k, chunk_mean)
            store(m2, at + k, chunk_m2)
        else:
            mean_before = load(mean, at + k, lanes)
            apart = chunk_mean - mean_before
            store(mean, at + k, mean_before + times(apart, n / stop))
            store(m2, at + k, load(m2, at + k, lanes) + chunk_m2 + times(apart * apart, start * (n / stop)))
        k += len(lanes)
    return k


@njit(error_model="numpy")
def backward_task(
    task, groups, B, T, H, kind, given, kept_rows, wide, narrower,
    g, g_b, g_t, last, last_b, offset, slope, h, h_b, h_t, u, h0, h0_b, dx, dx_b, dx_t, du, dh0, dbias,
    kept, kept_at, kept_b, kept_t,
):  # fmt: skip
    """δ, and their sums over time, for one sequence and one range of units.

    What is not `given` is left out, not taken as zeros: 0 · ∞ would make a state that is infinite a NaN.
    """
    b, first, end = _range_of(task, groups, B, H, len(wide))
    h_at, dx_at, at = b * h_b, b * dx_b, b * H
    kept_at, within = kept_at + b * kept_b, kept_rows - 1
    for start in range((T - 1) // CHUNK * CHUNK, -1, -CHUNK):
        stop = min(start + CHUNK, T)
        for t in range(stop - 1, start - 1, -1):
            after, after_at = (last, b * last_b) if t == T - 1 else (kept, kept_at + (t + 1 & within) * kept_t)
            rows = (
                g, b * g_b + t * g_t, offset, slope, h, h_at + t * h_t, u, after, after_at,
                kept, kept_at + (t & within) * kept_t, dx, dx_at + t * dx_t,
            )  # fmt: skip
            affine, at_end = given & AFFINE, t == T - 1
            k = _step_back(end, first, kind, affine, wide, rows, at_end)
            k = _step_back(k, first, kind, affine, narrower, rows, at_end)
            _step_back(k, first, kind, affine, ONE, rows, at_end)
        chunk_at = kept_at + (start & within) * kept_t
        begins = start == 0 and not given & INITIAL
        rows = (h, h_at, h_t, h0, b * h0_b, kept, chunk_at, kept_t, du, dbias, at)
        k = _sum(first, end, start, stop, T, begins, wide, rows)
        k = _sum(k, end, start, stop, T, begins, narrower, rows)
        _sum(k, end, start, stop, T, begins, ONE, rows)
    for k in range(first, end):
        dh0[at + k] = u[k] * kept[kept_at + k]


@njit(error_model="numpy")
def _step_back(k, first, kind, affine, lanes, rows, at_end):
    """One row of δ, from unit k down, in whole vectors; returns the unit above the first one left.

    δ_t = σ'_t ⊙ (g_t + offset + slope ⊙ h_t + u ⊙ δ_{t+1}); at the end, the gradient of h_last instead of u ⊙ δ_{t+1}.
    """
    g, g_at, offset, slope, h, h_at, u, after, after_at, kept, kept_at, dx, dx_at = rows
    while k - len(lanes) >= first:
        k -= len(lanes)
        state = load(h, h_at + k, lanes)
        delta = load(g, g_at + k, lanes)
        if affine:
            delta = delta + (load(offset, k, lanes) + load(slope, k, lanes) * state)
        if at_end:
            delta = delta + load(after, after_at + k, lanes)
        else:
            delta = delta + load(u, k, lanes) * load(after, after_at + k, lanes)
        if kind == RELU:
            delta = choose(state, delta, zeros(delta))
        elif kind == LEAKY_RELU:
            delta = choose(state, delta, times(delta, NEGATIVE_SLOPE))
        store(kept, kept_at + k, delta)
        store_rounded(dx, dx_at + k, delta)
    return k


@njit(error_model="numpy")
def _sum(k, end, start, stop, T, begins, lanes, rows):
    """Add the steps start…stop−1 to du = Σ δ_t ⊙ h_{t-1} and dbias = Σ δ_t; without h_0 if the sequence `begins`.

    d holds δ, step `start` at d_at.
    """
    h, h_at, h_t, h0, h0_at, d, d_at, d_t, du, dbias, at = rows
    while k + len(lanes) <= end:
        delta = load(d, d_at + k, lanes)
        if begins:
            du_sum = zeros(delta)
        elif start == 0:
            du_sum = delta * load(h0, h0_at + k, lanes)
        else:
            du_sum = delta * load(h, h_at + (start - 1) * h_t + k, lanes)
        dbias_sum = delta
        for t in range(start + 1, stop):
            delta = load(d, d_at + (t - start) * d_t + k, lanes)
            du_sum = du_sum + delta * load(h, h_at + (t - 1) * h_t + k, lanes)
            dbias_sum = dbias_sum + delta
        if stop < T:
            du_sum = du_sum + load(du, at + k, lanes)
            dbias_sum = dbias_sum + load(dbias, at + k, lanes)
        store(du, at + k, du_sum)
        store(dbias, at + k, dbias_sum)
        k += len(lanes)
    return k


# A call, as the entry points receive it, is a list of 64-bit integers: these, and then for every array in the order of
# the task's arguments its address, its stride along the batch and its stride along time.
COUNTER, THREADS, TASKS, GROUPS, BATCH, STEPS, UNITS, KIND, OPTIONS, KEPT_ROWS, ARRAYS = range(11)
PER_ARRAY = 3

# What the arrays hold, for sequences of each dtype: sequences (bfloat16 as uint16), states and all else; and the
# lengths of the vectors, wide and narrower.
VARIANTS = {
    torch.float32: (np.float32, np.float32, THIRTY_TWO, EIGHT),
    torch.float64: (np.float64, np.float64, SIXTEEN, FOUR),
    torch.bfloat16: (np.uint16, np.float32, THIRTY_TWO, EIGHT),
}


def forward_entry(stamp, sequence, state, wide, narrower):
    """Takes and runs forward tasks until none is left: x, u, bias, h0, h, h_last, mean, m2, kept."""

    def forward(pointer):
        _ = stamp  # Numba finds machine code on disk by the values that a function closes over, and this is one
        mode = float_mode()
        set_float_mode(mode | FLUSH)
        _forward_tasks(pointer, sequence, state, wide, narrower)
        set_float_mode(mode)

    return forward


def backward_entry(stamp, sequence, state, wide, narrower):
    """Takes and runs backward tasks until none is left: g, last, offset, slope, h, u, h0, dx, du, dh0, dbias, kept."""

    def backward(pointer):
        _ = stamp  # as above
        mode = float_mode()
        set_float_mode(mode | FLUSH)
        _backward_tasks(pointer, sequence, state, wide, narrower)
        set_float_mode(mode)

    return backward


@njit(error_model="numpy")
def _forward_tasks(pointer, sequence, state, wide, narrower):
    call = carray(pointer, (1,), np.int64)
    groups, B, T, H, kind = call[GROUPS], call[BATCH], call[STEPS], call[UNITS], call[KIND]
    x, x_b, x_t = _array(call, 0, sequence)
    u, _, _ = _array(call, 1, state)
    bias, bias_b, _ = _array(call, 2, state)
    h0, h0_b, _ = _array(call, 3, state)
    h, h_b, h_t = _array(call, 4, sequence)
    h_last, _, _ = _array(call, 5, state)
    mean, _, _ = _array(call, 6, np.float64)
    m2, _, _ = _array(call, 7, np.float64)
    kept, kept_b, kept_t = _array(call, 8, state)
    kept_at = take(pointer, THREADS) * call[KEPT_ROWS] * H
    task = take(pointer, COUNTER)
    while task < call[TASKS]:
        forward_task(
            task, groups, B, T, H, kind, call[OPTIONS], call[KEPT_ROWS], wide, narrower,
            x, x_b, x_t, u, bias, bias_b, h0, h0_b, h, h_b, h_t, h_last, mean, m2, kept, kept_at, kept_b, kept_t,
        )  # fmt: skip
        task = take(pointer, COUNTER)


@njit(error_model="numpy")
def _backward_tasks(pointer, sequence, state, wide, narrower):
    call = carray(pointer, (1,), np.int64)
    groups, B, T, H, kind = call[GROUPS], call[BATCH], call[STEPS], call[UNITS], call[KIND]
    g, g_b, g_t = _array(call, 0, sequence)
    last, last_b, _ = _array(call, 1, state)
    offset, _, _ = _array(call, 2, state)
    slope, _, _ = _array(call, 3, state)
    h, h_b, h_t = _array(call, 4, sequence)
    u, _, _ = _array(call, 5, state)
    h0, h0_b, _ = _array(call, 6, state)
    dx, dx_b, dx_t = _array(call, 7, sequence)
    du, _, _ = _array(call, 8, state)
    dh0, _, _ = _array(call, 9, state)
    dbias, _, _ = _array(call, 10, state)
    kept, kept_b, kept_t = _array(call, 11, state)
    kept_at = take(pointer, THREADS) * call[KEPT_ROWS] * H
    task = take(pointer, COUNTER)
    while task < call[TASKS]:
        backward_task(
            task, groups, B, T, H, kind, call[OPTIONS], call[KEPT_ROWS], wide, narrower,
            g, g_b, g_t, last, last_b, offset, slope, h, h_b, h_t, u, h0, h0_b, dx, dx_b, dx_t, du, dh0, dbias,
            kept, kept_at, kept_b, kept_t,
        )  # fmt: skip
        task = take(pointer, COUNTER)


@njit(error_model="numpy")
def _array(call, which, dtype):
    at = ARRAYS + PER_ARRAY * which
    return carray(pointer_at(call[at]), (1,), dtype), call[at + 1], call[at + 2]


def forward_python(task, sizes, wide, narrower, x, u, bias, h0, h, h_last, mean, m2, kept):
    """One forward task without Numba; every array is (array, stride along the batch, stride along time)."""
    forward_task(
        task, *sizes, wide, narrower,
        *x, u[0], *bias[:2], *h0[:2], *h, h_last[0], mean[0], m2[0], kept[0], 0, *kept[1:],
    )  # fmt: skip


def backward_python(task, sizes, wide, narrower, g, last, offset, slope, h, u, h0, dx, du, dh0, dbias, kept):
    """One backward task without Numba."""
    backward_task(
        task, *sizes, wide, narrower,
        *g, *last[:2], offset[0], slope[0], *h, u[0], *h0[:2], *dx, du[0], dh0[0], dbias[0], kept[0], 0, *kept[1:],
    )  # fmt: skip
