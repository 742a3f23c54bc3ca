"""The recurrence on the CPU, compiled by Numba; see `numba_cpu_kernels` for the loops."""

import torch
from torch import Tensor

from . import numba_cpu_kernels as kernels

NONLINEARITIES = ("relu", "identity")
DTYPES = (torch.float32, torch.float64)


def unavailable_reason(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "it runs on the CPU only"


def forward(
    x: Tensor, u: Tensor, h0: Tensor | None, bias: Tensor | None, nonlinearity: str, statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `dispatch.Backend.forward`."""
    h = torch.empty_like(x)
    B, _, H = x.shape
    start = x.new_zeros(B, H) if h0 is None else h0
    added = x.new_zeros(B, H) if bias is None else bias.expand(B, H)
    kernels.forward(
        x.detach().numpy(),
        u.detach().numpy(),
        start.detach().numpy(),
        added.detach().numpy(),
        h.numpy(),
        nonlinearity == "relu",
    )
    if not statistics:
        return h, None, None
    variance, mean = torch.var_mean(h, dim=(0, 1), correction=0)
    return h, mean, variance


def backward(
    grad_h: Tensor | None,
    grad_last: Tensor | None,
    offset: Tensor | None,
    slope: Tensor | None,
    h: Tensor,
    u: Tensor,
    h0: Tensor | None,
    nonlinearity: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `dispatch.Backend.backward`."""
    B, _, H = h.shape
    if grad_h is None:
        grad_h = h.new_zeros(1, 1, 1).expand(h.shape)
    if grad_last is None:
        grad_last = h.new_zeros(B, H)
    if offset is None or slope is None:
        offset, slope = h.new_zeros(H), h.new_zeros(H)
    start = h.new_zeros(B, H) if h0 is None else h0
    dx = torch.empty_like(h)
    du, dh0, dbias = h.new_zeros(B, H), h.new_zeros(B, H), h.new_zeros(B, H)
    kernels.backward(
        grad_h.numpy(),
        grad_last.numpy(),
        offset.numpy(),
        slope.numpy(),
        h.numpy(),
        u.numpy(),
        start.numpy(),
        dx.numpy(),
        du.numpy(),
        dh0.numpy(),
        dbias.numpy(),
        nonlinearity == "relu",
    )
    return dx, du, dh0, dbias
