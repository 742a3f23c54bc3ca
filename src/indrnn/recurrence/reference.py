"""The definition: a plain loop over time, for every device and nonlinearity. Other backends are compared with it."""

import torch
from torch import Tensor

from ..config.schema import NONLINEARITIES as NONLINEARITIES
from .dispatch import Cell, InputGradients, OutputGradients, Outputs

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NEGATIVE_SLOPE = 0.01  # of leaky_relu, as in torch.nn.LeakyReLU


def unavailable_reason(device: torch.device) -> str | None:
    """Why the backend cannot run on `device`, as a sentence without a full stop, or None."""
    return None


def activate(a: Tensor, nonlinearity: str) -> Tensor:
    """σ(a)."""
    if nonlinearity == "relu":
        return torch.relu(a)
    if nonlinearity == "tanh":
        return torch.tanh(a)
    if nonlinearity == "leaky_relu":
        return torch.nn.functional.leaky_relu(a, NEGATIVE_SLOPE)
    return a


def times_derivative(g: Tensor, h: Tensor, nonlinearity: str) -> Tensor:
    """σ' ⊙ g at the step whose output is h; at the kinks the smaller one-sided derivative, as in autograd."""
    if nonlinearity == "relu":
        return torch.where(h > 0, g, 0.0)
    if nonlinearity == "tanh":
        return (1 - h * h) * g
    if nonlinearity == "leaky_relu":
        return torch.where(h > 0, g, NEGATIVE_SLOPE * g)
    return g


def forward(x: Tensor, bias: Tensor | None, cell: Cell, statistics: bool) -> Outputs:
    """h_t = σ(x_t + bias + u ⊙ h_{t-1}) for x (B, T, H) and bias (H,), (B, H) or None.

    Without `statistics`, mean and variance are None.
    """
    u, h0, nonlinearity, reverse, _ = cell
    entering = x.to(u.dtype)
    states = torch.empty_like(entering)
    state = torch.zeros_like(states[:, 0]) if h0 is None else h0
    for t in _order(x.shape[1], reverse):
        a = entering[:, t] + u * state
        state = activate(a if bias is None else a + bias, nonlinearity)
        states[:, t] = state
    return Outputs(states.to(x.dtype), state.contiguous(), *(batch_statistics(states) if statistics else (None, None)))


def backward(gradients: OutputGradients, h: Tensor, cell: Cell, x: Tensor | None = None) -> InputGradients:
    """The gradients, from the saved output h.

    δ_t = σ'_t ⊙ (∂L/∂h_t + u ⊙ δ_{t+1}),  δ_{T+1} = 0,  σ'_t from h_t (relu: [h_t > 0])
    """
    dh, dh_last, *_ = gradients
    affine = gradients.affine(h.shape[0] * h.shape[1])
    u, h0, nonlinearity, reverse, _ = cell
    dx = torch.empty_like(h)
    carried = torch.zeros_like(h[:, 0], dtype=u.dtype)  # u ⊙ δ_{t+1}
    du, dbias = torch.zeros_like(carried), torch.zeros_like(carried)
    order = _order(h.shape[1], reverse)
    for t, before in zip(reversed(order), [*reversed(order[:-1]), None], strict=True):
        h_t = h[:, t].to(u.dtype)
        g = carried
        if dh is not None:
            g = g + dh[:, t]
        if dh_last is not None and t == order[-1]:
            g = g + dh_last
        if affine is not None:
            g = g + affine[0] + affine[1] * h_t
        delta = times_derivative(g, h_t, nonlinearity)
        dx[:, t] = delta
        dbias += delta
        if before is not None:
            du += delta * h[:, before]
        elif h0 is not None:
            du += delta * h0
        carried = u * delta
    return InputGradients(dx, du, carried, dbias)


def _order(T: int, reverse: bool) -> range:
    return range(T - 1, -1, -1) if reverse else range(T)


def batch_statistics(h: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (H,) of h (B, T, H) over batch and time, in the dtype of h."""
    variance, mean = torch.var_mean(h, dim=(0, 1), correction=0)
    return mean, variance
