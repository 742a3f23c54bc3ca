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
from indrnn.training.device import prepare_process, resolve_device, set_precision

from .implementations import Implementation, forced, implementations

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


@dataclass(frozen=True)
class Checked:
    """A device whose backends have passed the check."""

    device: torch.device
    implementations: list[Implementation]
    checks: list[Check]


def check_device(device_name: str) -> Checked:
    """Compare every backend of a device with float64, and print how far each is off.

    Raises:
        RunError: a backend is not exact.
        UserError: there is no such device.
    """
    device = resolve_device(device_name)
    prepare_process(device)
    set_precision("float32", device)
    able, unable = implementations(device)
    for name, reason in unable.items():
        print(f"{name} is left out: {reason}")
    checks = require_exact(able, device)
    for name, dtype in dict.fromkeys((check.implementation, check.dtype) for check in checks):
        worst = max(check.error for check in checks if (check.implementation, check.dtype) == (name, dtype))
        kind = str(dtype).removeprefix("torch.")
        print(f"exact: {name}, {kind}: largest error {worst:.1e} of the largest value, gradients included", flush=True)
    return Checked(device, able, checks)


def require_exact(implementations: Sequence[Implementation], device: torch.device) -> list[Check]:
    """Check every backend (and strategy) among the implementations, in every dtype that it supports.

    Raises:
        RunError: one of them is wrong; the message names it, the quantity and the error.
    """
    checks = []
    by_name = {implementation.name: implementation for implementation in implementations if implementation.backend}
    for name, implementation in by_name.items():
        for dtype in load_backend(implementation.backend or "").DTYPES:
            errors = torch.stack([_errors(implementation, *case) for case in _cases(dtype, device)])
            worst = errors.amax(0).tolist()  # a NaN stays one
            checks += [Check(name, dtype, *pair, TOLERANCE[dtype]) for pair in zip(QUANTITIES, worst, strict=True)]
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
            h0, dh, dh_last = normal(B, H), normal(B, T, H), normal(B, H)
            x, h0, dh, dh_last = (tensor.to(device, dtype) for tensor in (x, h0, dh, dh_last))
            yield x, u.to(device, state), h0, dh, dh_last


def _errors(implementation: Implementation, x: Tensor, u: Tensor, h0: Tensor, dh: Tensor, dh_last: Tensor) -> Tensor:
    """The error of each of QUANTITIES."""
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in (x, u, h0))
    with forced(implementation.strategy):
        h, h_last = indrnn_recurrence(*inputs, backend=implementation.backend or "")
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
    return torch.stack(
        [
            (value.double() - right).abs().max() / right.abs().max().clamp(min=1e-6)
            for value, right in zip((h, h_last, *input_gradients), expected, strict=True)
        ]
    )
