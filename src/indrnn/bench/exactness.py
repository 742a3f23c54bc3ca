"""The check before any timing: every backend, forward and backward, against float64.

The forward pass is compared with a loop in float64. The backward pass is a function of the output that the forward
pass saved, so it is compared with the reference in float64 on that same output; otherwise a rounding that moves one
state across relu's kink would count as an error of the gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from indrnn.errors import RunError
from indrnn.layers import recurrent_max
from indrnn.recurrence import indrnn_recurrence
from indrnn.recurrence.dispatch import TOLERANCE, Cell, OutputGradients, load_backend

from .implementations import Implementation, forced

SHAPES = ((3, 1, 5), (3, 2, 1), (2, 17, 128), (1, 257, 33), (3, 784, 128))
QUANTITIES = ("h", "h_last", "dx", "du", "dh0")


@dataclass(frozen=True)
class Check:
    """The largest error of one quantity over all cases, and what is allowed, as shares of its largest value."""

    implementation: str
    dtype: torch.dtype
    quantity: str
    error: float
    allowed: float


def check_backend(implementation: Implementation, device: torch.device) -> list[Check]:
    """The errors of one backend (and strategy) in every dtype that it supports."""
    assert implementation.backend is not None
    checks = []
    for dtype in load_backend(implementation.backend).DTYPES:
        worst = dict.fromkeys(QUANTITIES, 0.0)
        for arguments in _cases(dtype, device):
            for name, error in _errors(implementation, *arguments).items():
                # `not <=` keeps a NaN.
                worst[name] = error if not error <= worst[name] else worst[name]
        checks += [Check(implementation.name, dtype, name, error, TOLERANCE[dtype]) for name, error in worst.items()]
    return checks


def require_exact(implementations: Sequence[Implementation], device: torch.device) -> list[Check]:
    """Check every backend among the implementations.

    Raises:
        RunError: one of them is wrong; the message names it, the quantity and the error.
    """
    by_name = {implementation.name: implementation for implementation in implementations if implementation.backend}
    checks = [check for implementation in by_name.values() for check in check_backend(implementation, device)]
    for check in checks:
        if not check.error <= check.allowed:  # or NaN
            raise RunError(
                f"{check.implementation} is wrong in {check.dtype}: {check.quantity} is off by {check.error:.1e} "
                f"of its largest value (allowed: {check.allowed:.0e}); nothing is timed or written"
            )
    return checks


def _cases(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """x, u, h0 and the gradients of h and h_last, also with a time-major x."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    state = torch.float64 if dtype == torch.float64 else torch.float32
    for B, T, H in SHAPES:
        bound = recurrent_max(T)
        u = (2 * torch.rand(H, generator=generator) - 1) * bound
        u[::4] = bound
        u[1::8] = -bound
        u[2::8] = 0.0
        for strided in (False, True):
            x = normal(T, B, H).transpose(0, 1) if strided else normal(B, T, H)
            yield (
                x.to(device, dtype),
                u.to(device, state),
                normal(B, H).to(device, dtype),
                normal(B, T, H).to(device, dtype),
                normal(B, H).to(device, dtype),
            )


def _errors(
    implementation: Implementation, x: Tensor, u: Tensor, h0: Tensor, dh: Tensor, dh_last: Tensor
) -> dict[str, float]:
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in (x, u, h0))
    assert implementation.backend is not None
    with forced(implementation.strategy):
        h, h_last = indrnn_recurrence(*inputs, backend=implementation.backend)
        input_gradients = torch.autograd.grad((h, h_last), inputs, (dh, dh_last))
    state, states = h0.double(), []
    for t in range(x.shape[1]):
        state = torch.relu(x[:, t].double() + u.double() * state)
        states.append(state)
    gradients = OutputGradients(dh.double(), dh_last.double(), None, None)
    cell = Cell(u.double(), h0.double(), "relu")
    dx, du, dh0, *_ = load_backend("reference").backward(gradients, h.detach().double(), cell)
    assert dx is not None
    expected = (torch.stack(states, 1), state, dx, du.sum(0), dh0)
    return {
        name: ((value.double() - right).abs().max() / right.abs().max().clamp(min=1e-6)).item()
        for name, value, right in zip(QUANTITIES, (h, h_last, *input_gradients), expected, strict=True)
    }
