"""The loops of the CPU backend."""

import numba
import numpy as np

_FASTMATH = {"contract", "nsz", "reassoc"}


@numba.njit(parallel=True, cache=True, error_model="numpy", fastmath=_FASTMATH)
def forward(x, u, h0, bias, h, relu):
    B, T, H = x.shape
    for b in numba.prange(B):
        for k in range(H):
            a = x[b, 0, k] + bias[b, k] + u[k] * h0[b, k]
            h[b, 0, k] = max(a, 0) if relu else a
        for t in range(1, T):
            for k in range(H):
                a = x[b, t, k] + bias[b, k] + u[k] * h[b, t - 1, k]
                h[b, t, k] = max(a, 0) if relu else a


@numba.njit(parallel=True, cache=True, error_model="numpy", fastmath=_FASTMATH)
def backward(grad_h, grad_last, offset, slope, h, u, h0, dx, du, dh0, dbias, relu):
    B, T, H = h.shape
    for b in numba.prange(B):
        carried = np.zeros(H, h.dtype)
        for k in range(H):
            carried[k] = grad_last[b, k]
        for t in range(T - 1, -1, -1):
            for k in range(H):
                state = h[b, t, k]
                delta = carried[k] + grad_h[b, t, k] + offset[k] + slope[k] * state
                if relu and state <= 0:
                    delta = delta * 0
                dx[b, t, k] = delta
                dbias[b, k] += delta
                before = h[b, t - 1, k] if t > 0 else h0[b, k]
                du[b, k] += delta * before
                carried[k] = u[k] * delta
        for k in range(H):
            dh0[b, k] = carried[k]
