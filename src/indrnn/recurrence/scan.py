"""The recurrence in O(log T) steps, in plain PyTorch, for devices without a kernel.

One step of the recurrence with relu is a map x ↦ clamp(a + s·x, lo, hi) with (a, s, lo, hi) = (x_t, u, 0, ∞), and such
maps are closed under composition, so an associative scan (Blelloch 1990, "Prefix sums and their applications") over
them yields every state. The linear case goes back to Martin & Cundy 2018 (arXiv 1709.04057, section 2), and is the
backward: δ_t = g_t + c_t δ_{t+1} with c_t = σ'_t u. Scanning compositions of function classes goes back to Fisher &
Ghuloum 1994, "Parallelizing complex scans and reductions". Hillis–Steele order: ⌈log2 T⌉ passes over whole tensors.

Two pitfalls of tree order: with hi = ∞, a product s that underflows to zero gives 0·∞ = NaN, so ∞ is replaced by the
finite `UNBOUNDED`. The a and s of a constant map (lo ≥ hi) may overflow and give ∞ − ∞, so they become (lo, 0).

Exact up to |h| = `UNBOUNDED` = 1e30, in every dtype. The relu scan clamps larger and infinite states, and the states
after them are finite, too. NaN in x is not hidden.

Rounding differs from that of the loop: at |u| = 2^(1/784) and T = 784 about 2e-4 relative in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import Cell, InputGradients, OutputGradients, Outputs
from .reference import batch_statistics

NONLINEARITIES = ("relu", "identity")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
UNBOUNDED = 1e30


class ClampAffine(NamedTuple):
    """x ↦ clamp(a + s·x, lo, hi), elementwise; the four tensors have one shape."""

    a: Tensor
    s: Tensor
    lo: Tensor
    hi: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(self.a + self.s * x, self.lo), self.hi)


def compose(first: ClampAffine, second: ClampAffine) -> ClampAffine:
    """The map that applies `first`, then `second`."""
    a = second.a + second.s * first.a
    s = second.s * first.s
    at_lo = second.a + second.s * first.lo
    at_hi = second.a + second.s * first.hi
    lo = torch.minimum(torch.maximum(torch.minimum(at_lo, at_hi), second.lo), second.hi)
    hi = torch.minimum(torch.maximum(torch.maximum(at_lo, at_hi), second.lo), second.hi)
    constant = lo >= hi
    return ClampAffine(torch.where(constant, lo, a), torch.where(constant, torch.zeros_like(s), s), lo, hi)


def unavailable_reason(device: torch.device) -> str | None:
    return None


def forward(x: Tensor, bias: Tensor | None, cell: Cell, statistics: bool) -> Outputs:
    """See `reference.forward`."""
    u, h0, nonlinearity, reverse, _ = cell
    if reverse:
        outputs = forward(x.flip(1), bias, cell._replace(reverse=False), statistics)
        return outputs._replace(h=outputs.h.flip(1))
    a = x.to(u.dtype)
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
    return Outputs(h, h_last, *(batch_statistics(states) if statistics else (None, None)))


def backward(gradients: OutputGradients, h: Tensor, cell: Cell, x: Tensor | None = None) -> InputGradients:
    """See `reference.backward`."""
    dh, dh_last, *_ = gradients
    u, h0, nonlinearity, reverse, _ = cell
    if reverse:
        gradients = gradients._replace(dh=None if dh is None else dh.flip(1))
        results = backward(gradients, h.flip(1), cell._replace(reverse=False))
        return results._replace(dx=results.dx.flip(1))  # type: ignore[union-attr]
    state = h.to(u.dtype)
    g = torch.zeros_like(state) if dh is None else dh.to(u.dtype)
    affine = gradients.affine(h.shape[0] * h.shape[1])
    if affine is not None:
        g = g + affine[0] + affine[1] * state
    if dh_last is not None:
        g = torch.cat([g[:, :-1], (g[:, -1] + dh_last).unsqueeze(1)], dim=1)
    gate = u.expand(state.shape)
    if nonlinearity == "relu":
        active = state > 0
        g, gate = torch.where(active, g, 0.0), torch.where(active, gate, 0.0)
    delta = _scan_gated(g.flip(1), gate.flip(1)).flip(1)
    dx = torch.empty_like(h).copy_(delta)
    before = torch.zeros_like(state[:, :1]) if h0 is None else h0.unsqueeze(1)
    du = (delta * torch.cat([before, state[:, :-1]], dim=1)).sum(1)
    return InputGradients(dx, du, u * delta[:, 0], delta.sum(1))


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
