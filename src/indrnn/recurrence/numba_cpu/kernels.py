"""The loops of the CPU backend.

Letters: B batch, T time steps, H hidden units; b, t, k index them. An array is (values, stride_b, stride_t), flat:
x[b, t, k] is values[b * stride_b + t * stride_t + k], and a stride of 0 repeats a row. A row is (values, index of its
unit 0), as `_row` finds it. A task is one sequence and a range of units; tasks write to places of their own, so their
order and the number of threads cannot change a result.

Memory decides the speed, so both directions walk whole rows in the order of memory (backward from the end, units too),
and the state is taken from the row just written. Walking a few units at a time through a block of steps, with the state
in registers, reads the same lines in leaps of a row: 1.3 times as long forward, twice as long backward. What is summed
over time is summed `CHUNK` rows at a time, while they are in the first-level cache.

`kept` holds the running state (h_t or δ_t), which is never rounded between steps: step t is its row t & kept_rows − 1.
It is the output itself (kept_rows = 0), or for bfloat16, beside it, the last `CHUNK` rows in float32, where each thread
has its own instead of each sequence.
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
    load,
    pointer_at,
    relu,
    set_float_mode,
    store,
    store_rounded,
    take,
    times,
    zeros,
)

# The record of a call, which `launch` writes and the entry points read: 64-bit integers.
#
#   field      at  meaning
#   COUNTER     0  the next task; whichever thread is free takes it
#   THREADS     1  how many threads have come; each takes its number
#   TASKS       2  B · groups
#   GROUPS      3  into how many ranges of units a sequence is cut
#   BATCH       4  B
#   STEPS       5  T
#   UNITS       6  H
#   KIND        7  IDENTITY, RELU or LEAKY_RELU
#   OPTIONS     8  forward: whether statistics are wanted; backward: what is given, AFFINE + INITIAL
#   KEPT_ROWS   9  see above
#   ARRAYS     10  address, stride_b and stride_t of each array, in the order of the task's arguments
COUNTER, THREADS, TASKS, GROUPS, BATCH, STEPS, UNITS, KIND, OPTIONS, KEPT_ROWS, ARRAYS = range(11)
IDENTITY, RELU, LEAKY_RELU = range(3)
AFFINE, INITIAL = 1, 2  # offset and slope; h0
NEGATIVE_SLOPE = 0.01  # of leaky_relu
CHUNK = 32  # time steps that are summed at once; 32 rows of 128 float32 take 16 kB

ONE = (0,)
FOUR = (0,) * 4
EIGHT = (0,) * 8
SIXTEEN = (0,) * 16
THIRTY_TWO = (0,) * 32


@njit(error_model="numpy")
def forward_task(task, thread, sizes, wide, narrower, x, u, bias, h0, h, h_last, mean, m2, kept):
    """h for one sequence and one range of units, and with `statistics` their mean and Σ(h − mean)² over time."""
    groups, B, T, H, kind, statistics, kept_rows = sizes
    b, first, end = _range_of(task, groups, B, H, len(wide))
    owner, within = thread if kept_rows else b, kept_rows - 1
    for start in range(0, T, CHUNK):
        stop = min(start + CHUNK, T)
        for t in range(start, stop):
            before = _row(h0, b, 0) if t == 0 else _row(kept, owner, t - 1 & within)
            rows = (_row(x, b, t), u[0], _row(bias, b, 0), before, _row(kept, owner, t & within), _row(h, b, t))
            k = _step(first, end, kind, wide, rows)
            k = _step(k, end, kind, narrower, rows)
            _step(k, end, kind, ONE, rows)
        if statistics:
            chunk = (_row(kept, owner, start & within), kept[2], _row(mean, b, 0), _row(m2, b, 0))
            k = _accumulate(first, end, start, stop, wide, chunk)
            k = _accumulate(k, end, start, stop, narrower, chunk)
            _accumulate(k, end, start, stop, ONE, chunk)
    last, last_at = _row(kept, owner, T - 1 & within)
    h_last, h_last_at = _row(h_last, b, 0)
    for k in range(first, end):  # `load`, because Numba's own indexing counts a negative index from the end
        store(h_last, h_last_at + k, load(last, last_at + k, ONE))


@njit(error_model="numpy")
def _row(array, b, t):
    values, stride_b, stride_t = array
    return values, b * stride_b + t * stride_t


@njit(error_model="numpy")
def _range_of(task, groups, B, H, width):
    """The sequence and the range of units of a task: the units are cut into `groups` ranges of whole vectors."""
    vectors = (H + width - 1) // width
    group = task // B
    first = (vectors * group // groups) * width
    return task % B, first, min((vectors * (group + 1) // groups) * width, H)


@njit(error_model="numpy")
def _step(k, end, kind, lanes, rows):
    """One row of h from unit k on, in whole vectors; returns the first unit left."""
    (x, x_at), u, (bias, bias_at), (before, before_at), (kept, kept_at), (h, h_at) = rows
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
def _accumulate(k, end, start, stop, lanes, chunk):
    """Add the steps start…stop−1, which are the rows of h from h_at on, to mean and Σ(h − mean)² (float64).

    The sums of a chunk are taken about the mean so far (at first: about the first value), so that they cannot cancel,
    and are joined by the formula of Chan, Golub & LeVeque 1983 (doi:10.1080/00031305.1983.10483115, eq. 2.1).
    """
    (h, h_at), h_t, (mean, mean_at), (m2, m2_at) = chunk
    n = stop - start
    while k + len(lanes) <= end:
        row = load(h, h_at + k, lanes)
        pivot, total, squares = row, zeros(row), zeros(row)
        if start > 0:
            pivot = convert(load(mean, mean_at + k, lanes), row)
        for t in range(n):
            off = load(h, h_at + t * h_t + k, lanes) - pivot
            total = total + off
            squares = squares + off * off
        off_mean = times(convert(total, mean), 1.0 / n)
        chunk_m2 = convert(squares, m2) - convert(total, mean) * off_mean
        chunk_mean = convert(pivot, mean) + off_mean
        if start == 0:
            store(mean, mean_at + k, chunk_mean)
            store(m2, m2_at + k, chunk_m2)
        else:
            mean_before = load(mean, mean_at + k, lanes)
            apart = chunk_mean - mean_before
            store(mean, mean_at + k, mean_before + times(apart, n / stop))
            store(m2, m2_at + k, load(m2, m2_at + k, lanes) + chunk_m2 + times(apart * apart, start * (n / stop)))
        k += len(lanes)
    return k


@njit(error_model="numpy")
def backward_task(task, thread, sizes, wide, narrower, dh, dh_last, offset, slope, h, u, h0, dx, du, dh0, dbias, kept):
    """δ, and their sums over time, for one sequence and one range of units.

    What is not `given` is left out, not taken as zeros: 0 · ∞ would make a state that is infinite a NaN.
    """
    groups, B, T, H, kind, given, kept_rows = sizes
    b, first, end = _range_of(task, groups, B, H, len(wide))
    owner, within = thread if kept_rows else b, kept_rows - 1
    affine = given & AFFINE
    for start in range((T - 1) // CHUNK * CHUNK, -1, -CHUNK):
        stop = min(start + CHUNK, T)
        for t in range(stop - 1, start - 1, -1):
            at_end = t == T - 1
            after = _row(dh_last, b, 0) if at_end else _row(kept, owner, t + 1 & within)
            inputs = (_row(dh, b, t), offset[0], slope[0], _row(h, b, t), u[0], after)
            outputs = (_row(kept, owner, t & within), _row(dx, b, t))
            k = _step_back(end, first, kind, affine, at_end, wide, inputs, outputs)
            k = _step_back(k, first, kind, affine, at_end, narrower, inputs, outputs)
            _step_back(k, first, kind, affine, at_end, ONE, inputs, outputs)
        begins = start == 0 and not given & INITIAL
        inputs = (_row(kept, owner, start & within), kept[2], _row(h0, b, 0), _row(h, b, start), h[2])
        outputs = (_row(du, b, 0), _row(dbias, b, 0))
        k = _sum(first, end, start, stop, T, begins, wide, inputs, outputs)
        k = _sum(k, end, start, stop, T, begins, narrower, inputs, outputs)
        _sum(k, end, start, stop, T, begins, ONE, inputs, outputs)
    (delta, delta_at), (dh0, dh0_at) = _row(kept, owner, 0), _row(dh0, b, 0)
    for k in range(first, end):
        dh0[dh0_at + k] = u[0][k] * delta[delta_at + k]


@njit(error_model="numpy")
def _step_back(k, first, kind, affine, at_end, lanes, inputs, outputs):
    """One row of δ, from unit k down, in whole vectors; returns the unit above the first one left.

    δ_t = σ'_t ⊙ (dh_t + offset + slope ⊙ h_t + u ⊙ δ_{t+1}); at the end, dh_last instead of u ⊙ δ_{t+1}.
    """
    (dh, dh_at), offset, slope, (h, h_at), u, (after, after_at) = inputs
    (kept, kept_at), (dx, dx_at) = outputs
    while k - len(lanes) >= first:
        k -= len(lanes)
        state = load(h, h_at + k, lanes)
        delta = load(dh, dh_at + k, lanes)
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
def _sum(k, end, start, stop, T, begins, lanes, inputs, outputs):
    """Add the steps start…stop−1 to du = Σ δ_t ⊙ h_{t-1} and dbias = Σ δ_t; without h_0 if the sequence `begins`.

    The rows of d (δ) and of h are those of step `start`.
    """
    (d, d_at), d_t, (h0, h0_at), (h, h_at), h_t = inputs
    (du, du_at), (dbias, dbias_at) = outputs
    while k + len(lanes) <= end:
        delta = load(d, d_at + k, lanes)
        if begins:
            du_sum = zeros(delta)
        elif start == 0:
            du_sum = delta * load(h0, h0_at + k, lanes)
        else:
            du_sum = delta * load(h, h_at - h_t + k, lanes)
        dbias_sum = delta
        for t in range(1, stop - start):
            delta = load(d, d_at + t * d_t + k, lanes)
            du_sum = du_sum + delta * load(h, h_at + (t - 1) * h_t + k, lanes)
            dbias_sum = dbias_sum + delta
        if stop < T:
            du_sum = du_sum + load(du, du_at + k, lanes)
            dbias_sum = dbias_sum + load(dbias, dbias_at + k, lanes)
        store(du, du_at + k, du_sum)
        store(dbias, dbias_at + k, dbias_sum)
        k += len(lanes)
    return k


# What the arrays hold, for sequences of each dtype: sequences (bfloat16 as uint16), states and all else; and the
# lengths of the vectors, wide and narrower.
VARIANTS = {
    torch.float32: (np.float32, np.float32, THIRTY_TWO, EIGHT),
    torch.float64: (np.float64, np.float64, SIXTEEN, FOUR),
    torch.bfloat16: (np.uint16, np.float32, THIRTY_TWO, EIGHT),
}


def forward_entry(stamp, sequence, state, wide, narrower):
    """Takes and runs forward tasks until none is left."""

    def forward(pointer):
        _ = stamp  # Numba finds machine code on disk by the values that a function closes over, and this is one
        mode = float_mode()
        set_float_mode(mode | FLUSH)
        _forward_tasks(pointer, sequence, state, wide, narrower)
        set_float_mode(mode)

    return forward


def backward_entry(stamp, sequence, state, wide, narrower):
    """Takes and runs backward tasks until none is left."""

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
    x, u, bias, h0 = _array(call, 0, sequence), _array(call, 1, state), _array(call, 2, state), _array(call, 3, state)
    h, h_last, mean, m2 = (
        _array(call, 4, sequence),
        _array(call, 5, state),
        _array(call, 6, np.float64),
        _array(call, 7, np.float64),
    )
    kept = _array(call, 8, state)
    sizes, thread, task = _sizes(call), take(pointer, THREADS), take(pointer, COUNTER)
    while task < call[TASKS]:
        forward_task(task, thread, sizes, wide, narrower, x, u, bias, h0, h, h_last, mean, m2, kept)
        task = take(pointer, COUNTER)


@njit(error_model="numpy")
def _backward_tasks(pointer, sequence, state, wide, narrower):
    call = carray(pointer, (1,), np.int64)
    dh, dh_last = _array(call, 0, sequence), _array(call, 1, state)
    offset, slope = _array(call, 2, state), _array(call, 3, state)
    h, u, h0, dx = _array(call, 4, sequence), _array(call, 5, state), _array(call, 6, state), _array(call, 7, sequence)
    du, dh0, dbias = _array(call, 8, state), _array(call, 9, state), _array(call, 10, state)
    kept = _array(call, 11, state)
    sizes, thread, task = _sizes(call), take(pointer, THREADS), take(pointer, COUNTER)
    while task < call[TASKS]:
        backward_task(
            task, thread, sizes, wide, narrower, dh, dh_last, offset, slope, h, u, h0, dx, du, dh0, dbias, kept
        )
        task = take(pointer, COUNTER)


@njit(error_model="numpy")
def _sizes(call):
    return call[GROUPS], call[BATCH], call[STEPS], call[UNITS], call[KIND], call[OPTIONS], call[KEPT_ROWS]


@njit(error_model="numpy")
def _array(call, which, dtype):
    at = ARRAYS + 3 * which
    return carray(pointer_at(call[at]), (1,), dtype), call[at + 1], call[at + 2]
