"""The recurrence on the CPU, compiled by Numba at its first use (no compiler is needed on the machine)."""

import math

import torch
from torch import Tensor

from . import kernels, launch

NONLINEARITIES = ("relu", "identity", "leaky_relu")
DTYPES = tuple(kernels.VARIANTS)
_KINDS = {"identity": kernels.IDENTITY, "relu": kernels.RELU, "leaky_relu": kernels.LEAKY_RELU}


def unavailable_reason(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "it runs on the CPU only"


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
    B, T, H = x.shape
    h = torch.empty_like(x)
    h_last = u.new_empty(B, H)
    kept, kept_rows = _kept(h, u, reverse)
    nothing = u.new_zeros(H)
    # mean and Σ(h − mean)² of each sequence
    mean, m2 = torch.empty(2, B, H, dtype=torch.float64).unbind() if statistics else (nothing, nothing)
    groups = _groups(B, H)
    launch.run(
        "forward",
        x.dtype,
        B * groups,
        (groups, B, T, H, _KINDS[nonlinearity], int(statistics), kept_rows),
        (
            _sequence(x, reverse),
            _row(u),
            _row(bias, nothing),
            _row(h0, nothing),
            _sequence(h, reverse),
            _row(h_last),
            _row(mean),
            _row(m2),
            kept,
        ),
    )
    if not statistics:
        return h, h_last, None, None
    # sequences are of one length: Chan's formula for all of them at once
    whole_mean = mean.mean(0)
    whole_m2 = m2.sum(0) + T * (mean - whole_mean).square_().sum(0)
    return h, h_last, whole_mean.to(u.dtype), whole_m2.div_(B * T).to(u.dtype)


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
    B, T, H = h.shape
    dx = torch.empty_like(h)
    kept, kept_rows = _kept(dx, u, reverse)
    du, dh0, dbias = (u.new_empty(B, H) for _ in range(3))
    nothing = u.new_zeros(H)
    groups = _groups(B, H)
    given = (kernels.AFFINE if offset is not None else 0) | (kernels.INITIAL if h0 is not None else 0)
    launch.run(
        "backward",
        h.dtype,
        B * groups,
        (groups, B, T, H, _KINDS[nonlinearity], given, kept_rows),
        (
            _row(None, nothing) if grad_h is None else _sequence(grad_h, reverse),
            _row(grad_last, nothing),
            _row(offset, nothing),
            _row(slope, nothing),
            _sequence(h, reverse),
            _row(u),
            _row(h0, nothing),
            _sequence(dx, reverse),
            _row(du),
            _row(dh0),
            _row(dbias),
            kept,
        ),
    )
    return dx, du, dh0, dbias


def _sequence(x: Tensor, reverse: bool) -> launch.Strided:
    return x, x.stride(0), -x.stride(1) if reverse else x.stride(1)


def _kept(output: Tensor, u: Tensor, reverse: bool) -> tuple[launch.Strided, int]:
    """Where the running state is kept, and how many rows of it a thread has: see `kernels`."""
    if output.dtype == u.dtype:
        return _sequence(output, reverse), 0
    H = output.shape[2]
    return (u.new_empty(torch.get_num_threads(), kernels.CHUNK, H), 0, H), kernels.CHUNK


def _row(value: Tensor | None, nothing: Tensor | None = None) -> launch.Strided:
    """(H,) or (B, H), or for None the row of zeros `nothing`."""
    if value is None:
        assert nothing is not None
        value = nothing
    return value, value.stride(0) if value.dim() == 2 else 0, 0


def _groups(B: int, H: int) -> int:
    """Into how many ranges of units each sequence is cut, so that every thread finds tasks."""
    wanted = math.ceil(4 * torch.get_num_threads() / B)
    return max(1, min(wanted, math.ceil(H / 32)))
