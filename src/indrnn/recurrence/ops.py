"""The recurrence as custom operators, for autograd, torch.compile and torch.export.

Letters: B batch, T time steps, H hidden units, D input features. Every backend is one node forward
(`indrnn::recurrence`) and one backward (`indrnn::recurrence_backward`).

The private variant `recurrence` also returns the mean and the biased variance of h over batch and time.

torch.compile and torch.export see the operators with their registered autograd formulas. Eager calls use a
`torch.autograd.Function`, because torch.func (grad, vjp, vmap, jacrev) does not support registered formulas, and
forward mode would ignore them. The kernel is called directly unless something has to see the operator, because the
dispatcher takes longer than the CPU kernel on a short sequence.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..errors import UserError
from .dispatch import SMALL_INPUT_SIZE, Cell, OutputGradients, Outputs, load_backend, resolve_backend, state_dtype


def indrnn_recurrence(
    x: Tensor, u: Tensor, h0: Tensor | None = None, *, nonlinearity: str = "relu", backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Compute h_t = σ(x_t + u ⊙ h_{t-1}) for t = 1…T (Li et al. 2018, arXiv 1803.04831, eq. 2 with x = W x + b).

    Args:
        x: (B, T, H), float32, float64 or bfloat16. Any strides. Not copied if H is contiguous.
        u: (H,), the recurrent weights, in the dtype of x or, for bfloat16, in float32.
        h0: (B, H), the state before the first step, in the same dtypes. Zeros if None.
        nonlinearity: σ, one of relu, tanh, identity, leaky_relu.
        backend: auto, reference, scan, numba or triton.

    Returns:
        h (B, T, H), laid out like x, and h_last (B, H), its last step. For bfloat16, h_last is the running state, which
        is float32. Differentiable once, in reverse mode, in x, u and h0, also by torch.func. A loss that reads only
        h_last never materializes a gradient of h.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
        UserError: an unknown or unavailable backend or nonlinearity, or an ONNX export with an open time dimension.
        NotImplementedError: a second or a forward-mode derivative.
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
    """`indrnn_recurrence` with a bias (H,) or (B, H) added to x and, with a weight (H, D) or (B, H, D), W x_t for x
    (B, T, D).

    Returns h, h_last, and the mean and the biased variance (H,) of h over batch and time in the dtype of the running
    state, which are empty without `statistics`. With `reverse`, time runs from the last step to the first: h0 is the
    state after step T, and h_last that at step 1. B may be 0, as in torch.nn.RNN.
    """
    _check(x, u, h0, bias, weight)
    state = state_dtype(x.dtype)
    u = u.to(state)
    h0 = None if h0 is None else h0.to(state)
    bias = None if bias is None else bias.to(state)
    if weight is not None and _fuses(x, weight, nonlinearity, backend):
        weight = weight.to(state)
    elif weight is not None:
        x, weight = x @ weight.to(x.dtype).mT, None
    if torch.onnx.is_in_onnx_export():
        return _decomposed(x, bias, Cell(u, h0, nonlinearity, reverse), statistics)
    operator = _recurrence if torch.compiler.is_compiling() else IndRNNRecurrence.apply
    h, last, mean, variance = operator(x, u, h0, bias, weight, statistics, nonlinearity, backend, reverse)
    return h, last, mean, variance


def _fuses(x: Tensor, weight: Tensor, nonlinearity: str, backend: str) -> bool:
    """Whether the kernel forms W x_t itself, without memory for W x. Only Numba's does, and it has no gradient of x."""
    seen = torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() or _is_traced()
    if seen or x.requires_grad or torch._C._are_functorch_transforms_active():
        return False
    if weight.dim() == 3 or x.shape[-1] > SMALL_INPUT_SIZE:
        return False
    # autocast chooses the dtype of products
    return resolve_backend(backend, x.device, x.dtype, nonlinearity) == "numba" and not torch.is_autocast_enabled("cpu")


def _decomposed(x: Tensor, bias: Tensor | None, cell: Cell, statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The recurrence in PyTorch's own operators, for ONNX: the scan, or the loop if scan does not support σ."""
    if _is_traced() or not isinstance(x.shape[1], int):
        raise UserError(
            "ONNX export needs a fixed number of time steps, because the exported scan is unrolled; "
            "use torch.onnx.export(dynamo=True) and leave only the batch dimension dynamic"
        )
    backend = load_backend("scan")
    if cell.nonlinearity not in backend.NONLINEARITIES:
        backend = load_backend("reference")
    return _as_tensors(backend.forward(x, bias, cell, statistics))


def _as_tensors(outputs: Outputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors instead of None, because operators do not return None."""
    h, h_last, mean, variance = outputs
    if mean is None or variance is None:
        mean, variance = h_last.new_empty(0), h_last.new_empty(0)
    return h, h_last, mean, variance


def _check(x: Tensor, u: Tensor, h0: Tensor | None, bias: Tensor | None, weight: Tensor | None) -> None:
    # min(x.shape) would specialize a length that torch.export leaves open
    if x.dim() != 3 or x.shape[1] < 1 or x.shape[2] < 1 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (B, T, H) with T, H >= 1, got {x.dtype} {tuple(x.shape)}")
    B, _, D = x.shape
    H = D if weight is None else weight.shape[-2]
    shapes: dict[str, list[Any]] = {"u": [(H,)], "h0": [(B, H)], "bias": [(H,), (B, H)], "weight": [(H, D), (B, H, D)]}
    for name, tensor in (("u", u), ("h0", h0), ("bias", bias), ("weight", weight)):
        if tensor is not None and tensor.shape not in shapes[name]:
            expected = " or ".join(map(str, shapes[name]))
            raise ValueError(f"{name} must have shape {expected} to match x, got {tuple(tensor.shape)}")
        if tensor is not None and (tensor.dtype not in (x.dtype, state_dtype(x.dtype)) or tensor.device != x.device):
            raise ValueError(f"{name} must be {x.dtype} on {x.device} as x, got {tensor.dtype} on {tensor.device}")


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
    # resolved inside the operator, so that an exported program runs on any device
    module = load_backend(resolve_backend(backend, x.device, x.dtype, nonlinearity))
    if x.shape[0] == 0:
        return _empty_outputs(x, u, h0, bias, weight, statistics, fill=Tensor.new_zeros)
    cell = Cell(u.contiguous(), _contiguous(h0), nonlinearity, reverse, _contiguous(weight))
    return _as_tensors(module.forward(_unit_stride(x), _contiguous(bias), cell, statistics))


def _empty_outputs(
    x: Tensor, u: Tensor, h0: Any, bias: Any, weight: Any, statistics: bool, *options: Any, fill: Any = Tensor.new_empty
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of `_forward`, without values."""
    B, T, H = x.shape[0], x.shape[1], u.shape[0]
    h = torch.empty_like(_unit_stride(x)) if weight is None else x.new_empty(B, T, H)
    units = H if statistics else 0
    return h, u.new_empty(B, H), fill(u, units), fill(u, units)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, u, h0, bias, weight, statistics, *ctx.options = inputs
    h, _, mean, _ = output
    ctx.save_for_backward(h, u, h0, mean, None if weight is None else x, weight)
    ctx.set_materialize_grads(False)
    ctx.statistics, ctx.bias_dim = statistics, None if bias is None else bias.dim()


def _autograd(
    ctx: Any, dh: Tensor | None, dh_last: Tensor | None, dmean: Tensor | None, dvariance: Tensor | None
) -> tuple[Tensor | None, ...]:
    h, u, h0, mean, x, weight = ctx.saved_tensors
    statistics: tuple[Tensor | None, ...] = (None, None, None)
    if ctx.statistics and (dmean is not None or dvariance is not None):
        zeros = torch.zeros_like(mean) if dmean is None or dvariance is None else None
        statistics = (zeros if dmean is None else dmean, zeros if dvariance is None else dvariance, mean)
    operator = _recurrence_backward if torch.compiler.is_compiling() else IndRNNRecurrenceGradients.apply
    dx, du, dh0, dbias, dweight = operator(dh, dh_last, *statistics, h, u, h0, x, weight, *ctx.options)
    return (
        dx if weight is None else None,
        du.sum(0),
        None if h0 is None else dh0,
        None if ctx.bias_dim is None else dbias if ctx.bias_dim == 2 else dbias.sum(0),
        None if weight is None else dweight.sum(0),
        *(None,) * 4,
    )


def _backward(
    dh: Tensor | None,
    dh_last: Tensor | None,
    dmean: Tensor | None,
    dvariance: Tensor | None,
    mean: Tensor | None,
    h: Tensor,
    u: Tensor,
    h0: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    nonlinearity: str,
    backend: str,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, du, dh0, dbias and dweight as in `InputGradients`. With x and weight dx is empty, without them dweight."""
    module = load_backend(resolve_backend(backend, h.device, h.dtype, nonlinearity))
    if h.shape[0] == 0:
        return _empty_gradients(dh, dh_last, dmean, dvariance, mean, h, u, h0, x, weight)
    rows = (_contiguous(each) for each in (dh_last, dmean, dvariance, mean))
    gradients = OutputGradients(None if dh is None else _unit_stride(dh), *rows)
    cell = Cell(u.contiguous(), _contiguous(h0), nonlinearity, reverse, _contiguous(weight))
    dx, du, dh0, dbias, dweight = module.backward(gradients, h, cell, None if x is None else _unit_stride(x))
    return h.new_empty(0) if dx is None else dx, du, dh0, dbias, u.new_empty(0) if dweight is None else dweight


def _empty_gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of `_backward`, without values."""
    h, u, _, _, weight = arguments[5:10]
    B, _, H = h.shape
    rows = u.new_empty(B, H), u.new_empty(B, H), u.new_empty(B, H)
    if weight is None:
        return torch.empty_like(h), *rows, u.new_empty(0)
    return h.new_empty(0), *rows, u.new_empty(B, *weight.shape)


def _call(operator: Any, kernel: Any, arguments: tuple[Any, ...]) -> Any:
    """Call the kernel, or the operator if a trace, a mode or a subclass of Tensor has to see it."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    plain = all(type(value) in (Tensor, nn.Parameter) for value in tensors)
    return (kernel if plain and not _is_traced() and not is_in_torch_dispatch_mode() else operator)(*arguments)


def _is_traced() -> bool:
    return torch.jit.is_tracing()  # type: ignore[attr-defined]


def _vmap(operator: Any) -> Any:
    """The vmap rule of an operator: N examples (…, H) become one (…, N·H), because units are independent."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        N = info.batch_size

        def first(value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.expand(N, *value.shape) if dim is None else value.movedim(dim, 0)

        def fold(value: Any) -> Any:
            return value.movedim(0, -2).flatten(-2) if isinstance(value, Tensor) else value

        folded = [fold(first(*each)) for each in zip(arguments, in_dims, strict=True)]
        outputs = [out.unflatten(-1, (N, -1)).movedim(-2, 0) for out in operator(*folded)]
        return tuple(outputs), (0,) * len(outputs)

    return rule


_recurrence = torch.library.custom_op("indrnn::recurrence", _forward, mutates_args=())
_recurrence.register_fake(_empty_outputs)
_recurrence.register_autograd(_autograd, setup_context=_setup_context)
_recurrence_backward = torch.library.custom_op("indrnn::recurrence_backward", _backward, mutates_args=())
_recurrence_backward.register_fake(_empty_gradients)


class IndRNNRecurrence(torch.autograd.Function):
    """`indrnn::recurrence` in eager code."""

    setup_context, backward = staticmethod(_setup_context), staticmethod(_autograd)
    vmap = staticmethod(_vmap(lambda *arguments: IndRNNRecurrence.apply(*arguments)))

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _call(_recurrence, _forward, arguments)


class IndRNNRecurrenceGradients(torch.autograd.Function):
    """`indrnn::recurrence_backward` in eager code."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        *others, x, weight = arguments[:10]
        rule = _vmap(lambda *folded: IndRNNRecurrenceGradients.apply(*folded))
        outputs, dims = rule(info, (*in_dims[:8], None, None, *in_dims[10:]), *others, None, None, *arguments[10:])
        if weight is not None:  # the forward was fused, outside of vmap, so x is the same for all examples
            dx, *rows, _ = outputs
            outputs = dx.new_empty(info.batch_size, 0), *rows, dx.to(weight.dtype).mT @ x.to(weight.dtype)
        return outputs, dims

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _call(_recurrence_backward, _backward, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)


# Function.apply would otherwise derive the signature in every call.
for _function in (IndRNNRecurrence, IndRNNRecurrenceGradients):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[attr-defined]
