"""The recurrence in O(log T) steps, in plain PyTorch: for devices without a kernel of their own.

Forward (relu): an inclusive scan of the maps x ↦ clamp(x_t + u·x, 0, ∞), see `clamp_affine`. Backward: δ_t is a gated
linear recurrence that runs backwards, δ_t = g_t + c_t δ_{t+1} with c_t = σ'_t u, and scans in the same way
(Martin & Cundy 2018, arXiv 1709.04057, section 2). Hillis–Steele order: ⌈log2 T⌉ passes over whole tensors.

Exact up to |h| = `UNBOUNDED` = 1e30, in every dtype: the relu scan clamps there, so that a larger or an infinite state
comes out finite, and so do the states after it. NaN in x is not hidden.

Rounding differs from the loop's: at |u| = 2^(1/784) and T = 784 about 2e-4 relative in float32.
"""

import torch
from torch import Tensor

from .clamp_affine import UNBOUNDED, ClampAffine, compose
from .dispatch import state_dtype
from .reference import batch_statistics

NONLINEARITIES = ("relu", "identity")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unavailable_reason(device: torch.device) -> str | None:
    return None


def forward(
    x: Tensor,
    u: Tensor,
    h0: Tensor | None,
    bias: Tensor | None,
    nonlinearity: str,
    statistics: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `dispatch.Backend.forward`."""
    if reverse:
        h, h_last, mean, variance = forward(x.flip(1), u, h0, bias, nonlinearity, statistics)
        return h.flip(1), h_last, mean, variance
    a = x.to(state_dtype(x.dtype))
    if bias is not None:
        a = a + (bias.unsqueeze(1) if bias.dim() == 2 else bias)
    start = torch.zeros_like(a[:, 0]) if h0 is None else h0
    if nonlinearity == "relu":
        states = _scan_clamp_affine(a, u)(start.unsqueeze(1))
    else:
        a = torch.cat([(a[:, 0] + u * start).unsqueeze(1), a[:, 1:]], dim=1)
        states = _scan_gated(a, u.expand(a.shape))
    h = torch.empty_like(x).copy_(states)
    h_last = states[:, -1].clone(memory_format=torch.contiguous_format)
    return h, h_last, *(batch_statistics(states) if statistics else (None, None))


def backward(
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    offset: Tensor | None,
    slope: Tensor | None,
    h: Tensor,
    u: Tensor,
    h0: Tensor | None,
    nonlinearity: str,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `dispatch.Backend.backward`."""
    if reverse:
        grad_h = None if grad_h is None else grad_h.flip(1)
        dx, *sums = backward(grad_h, grad_last, offset, slope, h.flip(1), u, h0, nonlinearity)
        return dx.flip(1), sums[0], sums[1], sums[2]
    state = h.to(u.dtype)
    g = torch.zeros_like(state) if grad_h is None else grad_h.to(u.dtype)
    if offset is not None and slope is not None:
        g = g + offset + slope * state
    if grad_last is not None:
        g = torch.cat([g[:, :-1], (g[:, -1] + grad_last).unsqueeze(1)], dim=1)
    gate = u.expand(state.shape)
    if nonlinearity == "relu":
        active = state > 0
        g, gate = torch.where(active, g, 0.0), torch.where(active, gate, 0.0)
    delta = _scan_gated(g.flip(1), gate.flip(1)).flip(1)
    dx = torch.empty_like(h)
    dx.copy_(delta)
    before = torch.zeros_like(state[:, :1]) if h0 is None else h0.unsqueeze(1)
    du = (delta * torch.cat([before, state[:, :-1]], dim=1)).sum(1)
    return dx, du, u * delta[:, 0], delta.sum(1)


def _scan_clamp_affine(a: Tensor, u: Tensor) -> ClampAffine:
    """The composition of steps 1…t, for every t; a (B, T, H)."""
    maps = ClampAffine(a, u.expand(a.shape), torch.zeros_like(a), torch.full_like(a, UNBOUNDED))
    distance = 1
    while distance < a.shape[1]:
        earlier = ClampAffine(*(part[:, :-distance] for part in maps))
        later = ClampAffine(*(part[:, distance:] for part in maps))
        pairs = zip(maps, compose(earlier, later), strict=True)
        maps = ClampAffine(*(torch.cat([part[:, :distance], new], dim=1) for part, new in pairs))
        distance *= 2
    return maps


def _scan_gated(a: Tensor, gate: Tensor) -> Tensor:
    """y_t = a_t + gate_t ⊙ y_{t-1}, y_0 = 0, for every t; a and gate (B, T, H)."""
    distance = 1
    while distance < a.shape[1]:
        a = torch.cat([a[:, :distance], a[:, distance:] + gate[:, distance:] * a[:, :-distance]], dim=1)
        gate = torch.cat([gate[:, :distance], gate[:, distance:] * gate[:, :-distance]], dim=1)
        distance *= 2
    return a
