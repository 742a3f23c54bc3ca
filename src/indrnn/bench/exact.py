"""Every backend, forward and backward, compared with a loop over time in float64."""

from collections.abc import Iterator

import pandas as pd
import torch
from torch import Tensor

from indrnn.errors import UserError
from indrnn.layers import recurrent_max
from indrnn.recurrence import indrnn_recurrence, resolve_backend

from .recurrence import available, forced, loop

SHAPES = ((3, 1, 5), (3, 2, 1), (2, 17, 128), (1, 257, 33), (3, 784, 128))  # B, T, H
QUANTITIES = ("h", "h_last", "dx", "du", "dh0")
# Largest error of a quantity, as a share of its largest value.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-4, torch.bfloat16: 2e-2}


def largest_errors(device: torch.device) -> pd.DataFrame:
    """The largest error of each backend on ``device``, dtype and quantity, and the tolerance."""
    rows = []
    for dtype, tolerance in TOLERANCE.items():
        cases = [(inputs, _results(None, *(tensor.double() for tensor in inputs))) for inputs in _cases(dtype)]
        for name in available(device):
            try:
                resolve_backend(name.partition("/")[0], device, dtype)
            except UserError:  # the backend lacks this dtype
                continue
            errors = []
            for inputs, expected in cases:
                results = _results(name, *(tensor.to(device) for tensor in inputs))
                pairs = zip(results, expected, strict=True)
                errors.append([float((value - right).abs().max() / right.abs().max()) for value, right in pairs])
            worst = torch.tensor(errors).amax(0).tolist()  # a NaN stays one
            kind = str(dtype).removeprefix("torch.")
            rows += [(name, kind, *pair, tolerance) for pair in zip(QUANTITIES, worst, strict=True)]
    return pd.DataFrame(rows, columns=["implementation", "dtype", "quantity", "error", "tolerance"])


def _cases(dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    """x, u, h0 and the gradients of h and h_last, with x batch-major and time-major.

    Every x_t + u ⊙ h_{t-1} is about 0.5 or more from relu's kink, so rounding cannot flip a derivative. The share of
    negative ones grows from 0 in the first unit to 0.5 in the last: some units remember all steps, some only a few.
    """
    generator = torch.Generator().manual_seed(0)
    for B, T, H in SHAPES:
        u = (2 * torch.rand(H, generator=generator) - 1) * recurrent_max(T)
        u[::4], u[1::8], u[2::8] = recurrent_max(T), -recurrent_max(T), 0.0
        u = u.to(torch.promote_types(dtype, torch.float32))
        distance, chance, dh = torch.rand(3, B, T, H, generator=generator, dtype=torch.float64)
        target = (0.5 + distance) * torch.where(chance < torch.linspace(0, 0.5, H), -1, 1)
        h0, dh_last = torch.randn(2, B, H, generator=generator).to(dtype)
        x, state = torch.empty(B, T, H, dtype=dtype), h0.double()
        for t in range(T):
            x[:, t] = target[:, t] - u * state
            state = torch.relu(x[:, t].double() + u * state)
        for laid_out in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
            yield laid_out, u, h0, (2 * dh - 1).to(dtype), dh_last


def _results(name: str | None, x: Tensor, u: Tensor, h0: Tensor, dh: Tensor, dh_last: Tensor) -> list[Tensor]:
    """QUANTITIES by a backend, or by a loop if ``name`` is None, as float64 on the CPU."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, u, h0)]
    backend, _, strategy = (name or "").partition("/")
    with forced(strategy):
        h, h_last = loop(*inputs) if name is None else indrnn_recurrence(*inputs, backend=backend)
        gradients = torch.autograd.grad((h, h_last), inputs, (dh, dh_last))
    return [tensor.detach().cpu().double() for tensor in (h, h_last, *gradients)]
