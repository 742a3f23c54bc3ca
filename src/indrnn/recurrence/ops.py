"""The recurrence as custom operators: what autograd, torch.compile and torch.export see.

Letters: B batch, T time steps, H hidden units. One node forward (`indrnn::recurrence`) and one backward
(`indrnn::recurrence_backward`), whatever the backend.

The private variant `recurrence_with_statistics` also returns the mean and the biased variance of h over batch and
time. Their gradients enter step t of the backward as an affine function of h_t: with n = B·T,

    ∂L/∂h_t += dmean / n + 2 dvariance ⊙ (h_t − mean) / n = offset + slope ⊙ h_t.

Two ways lead into each operator. torch.compile and torch.export see the operator with its registered formula. Eager
calls go through a `torch.autograd.Function` around it: torch.func (grad, vjp, vmap, jacrev) does not enter a registered
formula, and forward mode passes it by without a derivative, where a Function can refuse. Unless something looks on that
must see the operator, the Function calls what the operator would: the dispatcher takes longer than the CPU's kernel
takes for a short sequence.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .dispatch import Cell, OutputGradients, Outputs, load_backend, resolve_backend, state_dtype
from .reference import weight_gradients


def indrnn_recurrence(
    x: Tensor, u: Tensor, h0: Tensor | None = None, *, nonlinearity: str = "relu", backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Compute h_t = σ(x_t + u ⊙ h_{t-1}) for t = 1…T (Li et al. 2018, arXiv 1803.04831, eq. 2 with x = W x + b).

    Args:
        x: (B, T, H), float32, float64 or bfloat16. Any strides; with H contiguous it is not copied.
        u: (H,), the recurrent weights, in the dtype of x or, for bfloat16, in float32.
        h0: (B, H), the state before the first step, likewise; zeros if None.
        nonlinearity: σ: relu, tanh, identity or leaky_relu (slope 0.01).
        backend: reference, scan, numba, triton, or auto (see `resolve_backend`).

    Returns:
        h (B, T, H), laid out like x, and h_last (B, H), a copy of its last step: for bfloat16 the running state itself,
        which is float32 and never rounded. Differentiable once in x, u and h0, in reverse mode, also by torch.func; a
        loss that reads only h_last never materialises a gradient of h.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        UserError: an unknown or unavailable backend or nonlinearity.
        RuntimeError: a second or a forward-mode derivative is asked for.
    """
    h, last, _, _ = recurrence(x, u, h0, nonlinearity=nonlinearity, backend=backend)
    return h, last


def recurrence(
    x: Tensor,
    u: Tensor,
    h0: Tensor | None = None,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    statistics: bool = False,
    nonlinearity: str = "relu",
    backend: str = "auto",
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`indrnn_recurrence` with a bias (H,) or (B, H) added to x, which the kernels do in passing. With a weight (H, D),
    x is (B, T, D) and W x_t enters instead; a backend that can (`Backend.FORMS_PRODUCT`) forms it in passing.

    Returns h, h_last, and with `statistics` the mean and the biased variance (H,) of h over batch and time, in the
    dtype of the running state; without, two empty tensors. With `reverse` time runs from the last step to the first:
    h0 is the state after step T, and h_last that at step 1. B may be 0, as in torch.nn.RNN.
    """
    _check(x, u, h0, bias, weight)
    state = state_dtype(x.dtype)
    u = u.to(state)
    h0 = None if h0 is None else h0.to(state)
    bias = None if bias is None else bias.to(state)
    weight = None if weight is None else weight.to(state)
    if torch.onnx.is_in_onnx_export():
        x = x if weight is None else _product(x, weight)
        return _decomposed(x, bias, Cell(u, h0, nonlinearity, reverse), statistics)
    operator = _recurrence if torch.compiler.is_compiling() else _recurrence_eager
    h, last, mean, variance = operator(x, u, h0, bias, weight, statistics, nonlinearity, backend, reverse)
    return h, last, mean, variance


def _decomposed(x: Tensor, bias: Tensor | None, cell: Cell, statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The recurrence in PyTorch's own operators, for ONNX, which knows no others: the scan, whose number of passes is
    that of the example's time steps, or the loop where the scan does not know σ."""
    backend = load_backend("scan")
    if cell.nonlinearity not in backend.NONLINEARITIES:
        backend = load_backend("reference")
    return _as_tensors(backend.forward(x, bias, cell, statistics))


def _as_tensors(outputs: Outputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors for statistics that were not asked for: an operator returns no None."""
    h, h_last, mean, variance = outputs
    if mean is None or variance is None:
        mean, variance = h_last.new_empty(0), h_last.new_empty(0)
    return h, h_last, mean, variance


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ (…, T, H) of x (…, T, D), in the dtype of x."""
    return x @ weight.to(x.dtype).mT


def _check(x: Tensor, u: Tensor, h0: Tensor | None, bias: Tensor | None, weight: Tensor | None) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be (B, T, H), got shape {tuple(x.shape)}")
    B, T, H = x.shape
    if T < 1 or H < 1:  # min(…) would bind a length that torch.export leaves open
        raise ValueError(f"x must have at least one time step and unit, got shape {tuple(x.shape)}")
    if weight is not None:
        if weight.dim() != 2 or weight.shape[1] != H:
            raise ValueError(f"weight must have shape (H, {H}) to fit x, got {tuple(weight.shape)}")
        H = weight.shape[0]
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must be floating point, got {x.dtype}")
    if u.shape != (H,):
        raise ValueError(f"u must have shape ({H},) to fit x, got {tuple(u.shape)}")
    if h0 is not None and h0.shape != (B, H):
        raise ValueError(f"h0 must have shape ({B}, {H}) to fit x, got {tuple(h0.shape)}")
    if bias is not None and bias.shape not in ((H,), (B, H)):
        raise ValueError(f"bias must have shape ({H},) or ({B}, {H}) to fit x, got {tuple(bias.shape)}")
    given = (("u", u), ("h0", h0), ("bias", bias), ("weight", weight))
    for name, tensor in given:
        if tensor is not None and tensor.dtype not in (x.dtype, state_dtype(x.dtype)):
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
    for name, tensor in given:
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")


def _unit_stride(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _forward(
    x: Tensor,
    u: Tensor,
    h0: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    statistics: bool,
    nonlinearity: str,
    backend: str,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # resolved here, inside the operator, where torch.compile does not look
    module = load_backend(resolve_backend(backend, x.device, x.dtype, nonlinearity))
    if x.shape[0] == 0:
        units = len(u) if statistics else 0
        return _like_h(x, u, weight), u.new_empty(0, len(u)), u.new_zeros(units), u.new_zeros(units)
    if weight is not None and not module.FORMS_PRODUCT:
        x, weight = _product(x, weight), None
    cell = Cell(u.contiguous(), _contiguous(h0), nonlinearity, reverse, _contiguous(weight))
    return _as_tensors(module.forward(_unit_stride(x), _contiguous(bias), cell, statistics))


_recurrence = torch.library.custom_op("indrnn::recurrence", _forward, mutates_args=())


def _like_h(x: Tensor, u: Tensor, weight: Tensor | None) -> Tensor:
    """h (B, T, H), empty."""
    return torch.empty_like(_unit_stride(x)) if weight is None else x.new_empty(*x.shape[:2], len(u))


@_recurrence.register_fake
def _(x: Tensor, u: Tensor, h0: Any, bias: Any, weight: Any, statistics: bool, *options: Any) -> tuple[Tensor, ...]:
    B, H = x.shape[0], u.shape[0]
    units = H if statistics else 0
    return _like_h(x, u, weight), u.new_empty(B, H), u.new_empty(units), u.new_empty(units)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, u, h0, bias, weight, statistics, nonlinearity, backend, reverse = inputs
    h, _, mean, _ = output
    ctx.save_for_backward(h, u, h0, mean, None if weight is None else x, weight)
    ctx.set_materialize_grads(False)
    ctx.statistics, ctx.nonlinearity, ctx.backend, ctx.reverse = statistics, nonlinearity, backend, reverse
    ctx.bias_dim = None if bias is None else bias.dim()


def _autograd(
    ctx: Any, dh: Tensor | None, dh_last: Tensor | None, dmean: Tensor | None, dvariance: Tensor | None
) -> tuple[Tensor | None, ...]:
    h, u, h0, mean, x, weight = ctx.saved_tensors
    offset = slope = None
    if ctx.statistics and (dmean is not None or dvariance is not None):
        n = h.shape[0] * h.shape[1]
        slope = torch.zeros_like(mean) if dvariance is None else dvariance * (2 / n)
        offset = -slope * mean if dmean is None else torch.addcmul(dmean / n, slope, mean, value=-1)
    operator = _recurrence_backward if torch.compiler.is_compiling() else _recurrence_backward_eager
    # The gradient of x needs δ itself, which is formed in memory only without a weight.
    through = weight is not None and ctx.needs_input_grad[0]
    product = (None, None) if through else (x, weight)
    options = (ctx.nonlinearity, ctx.backend, ctx.reverse)
    dx, du, dh0, dbias, dweight = operator(dh, dh_last, offset, slope, h, u, h0, *product, *options)
    if through:
        dx, dweight = _product(dx, weight.mT), weight_gradients(dx, x, u.dtype)
    bias_gradient = None if ctx.bias_dim is None else dbias if ctx.bias_dim == 2 else dbias.sum(0)
    return (
        dx if weight is None or through else None,
        du.sum(0),
        None if h0 is None else dh0,
        bias_gradient,
        None if weight is None else dweight.sum(0),
        *(None,) * 4,
    )


def _no_forward_mode(ctx: Any, *tangents: Tensor | None) -> None:
    raise RuntimeError(
        "indrnn_recurrence has no forward-mode derivative (jvp, jacfwd, linearize, hessian); "
        "use reverse mode: backward(), or torch.func.grad, vjp or jacrev"
    )


def _fold_units(
    operator: Any, names: list[str], info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[Any, Any]:
    """The rule of vmap. Units do not see each other, so N examples of (…, H) are one of (…, N·H)."""
    N = info.batch_size

    def first(value: Any, dim: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.expand(N, *value.shape) if dim is None else value.movedim(dim, 0)

    def fold(value: Any) -> Any:
        return value.movedim(0, -2).flatten(-2) if isinstance(value, Tensor) else value

    values = dict(zip(names, map(first, arguments, in_dims), strict=False))
    x, weight = values["x"], values["weight"]
    if weight is not None:
        # One x may meet N matrices, so W x is formed here; the backward's x is there for the gradient of W alone.
        values |= {"x": None if "h" in values else _product(x, weight.unsqueeze(1)), "weight": None}
    outputs = [out.unflatten(-1, (N, -1)).movedim(-2, 0) for out in operator(*map(fold, values.values()))]
    if weight is not None and "h" in values:
        dx = outputs[0]
        outputs[0], outputs[-1] = dx.new_empty(N, 0), weight_gradients(dx, x, weight.dtype)
    return tuple(outputs), (0,) * len(outputs)


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether nothing has to see the operator: no trace, no mode that watches or fakes operators, no subclass of Tensor
    that does."""
    if torch.jit.is_tracing() or is_in_torch_dispatch_mode():  # type: ignore[attr-defined]
        return False
    return all(type(value) in (Tensor, nn.Parameter) for value in arguments if isinstance(value, Tensor))


def _eager(name: str, operator: Any, function: Any, setup_context: Any, backward: Any) -> Any:
    """Give the operator its derivative, and return it as eager code calls it (see the top of this file).

    ``function`` is what the operator runs; ``name`` is what a profile calls it.
    """
    names = [argument.name for argument in operator._opoverload._schema.arguments]

    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return _fold_units(apply, names, info, in_dims, *arguments)

    def forward(*arguments: Any) -> Any:
        return (function if _is_plain(arguments) else operator)(*arguments)

    # Function.apply asks for the signature at every call; to work it out takes as long as a small operator.
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    operator.register_autograd(backward, setup_context=setup_context)
    parts = {
        "forward": forward,
        "setup_context": setup_context,
        "backward": backward,
        "jvp": _no_forward_mode,
        "vmap": vmap,
    }
    members = {method: staticmethod(part) for method, part in parts.items()}
    apply: Any = getattr(type(name, (torch.autograd.Function,), members), "apply")  # noqa: B009
    return apply


_recurrence_eager = _eager("IndRNNRecurrence", _recurrence, _forward, _setup_context, _autograd)


def _backward(
    dh: Tensor | None,
    dh_last: Tensor | None,
    offset: Tensor | None,
    slope: Tensor | None,
    h: Tensor,
    u: Tensor,
    h0: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    nonlinearity: str,
    backend: str,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, du, dh0, dbias and dweight as in `InputGradients`; with x and weight dx is empty, without them dweight."""
    module = load_backend(resolve_backend(backend, h.device, h.dtype, nonlinearity))
    if h.shape[0] == 0:
        return _like_gradients(h, u, weight)
    gradients = OutputGradients(
        None if dh is None else _unit_stride(dh), _contiguous(dh_last), _contiguous(offset), _contiguous(slope)
    )
    cell = Cell(u.contiguous(), _contiguous(h0), nonlinearity, reverse)
    if x is not None and weight is not None and module.FORMS_PRODUCT:
        cell = cell._replace(weight=weight.contiguous())
        results = module.backward(gradients, h, cell, _unit_stride(x))
    else:
        results = module.backward(gradients, h, cell)
        if x is not None and results.dx is not None:
            results = results._replace(dx=None, dweight=weight_gradients(results.dx, x, u.dtype))
    dx, du, dh0, dbias, dweight = results
    return h.new_empty(0) if dx is None else dx, du, dh0, dbias, u.new_empty(0) if dweight is None else dweight


_recurrence_backward = torch.library.custom_op("indrnn::recurrence_backward", _backward, mutates_args=())


def _like_gradients(h: Tensor, u: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five gradients, empty."""
    B, _, H = h.shape
    rows = u.new_empty(B, H), u.new_empty(B, H), u.new_empty(B, H)
    if weight is None:
        return torch.empty_like(h), *rows, u.new_empty(0)
    return h.new_empty(0), *rows, u.new_empty(B, *weight.shape)


@_recurrence_backward.register_fake
def _(
    dh: Any, dh_last: Any, offset: Any, slope: Any, h: Tensor, u: Tensor, h0: Any, x: Any, weight: Any, *options: Any
) -> tuple[Tensor, ...]:
    return _like_gradients(h, u, weight)


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("indrnn_recurrence can be differentiated once, not twice; call it without create_graph")


_recurrence_backward_eager = _eager(
    "IndRNNRecurrenceGradients",
    _recurrence_backward,
    _backward,
    lambda ctx, inputs, output: ctx.set_materialize_grads(False),
    _no_second_derivative,
)
