"""What is timed: each contender, at a size, becomes the calls whose time is taken.

B sequences, T time steps, H units (inputs and outputs alike). Batch-major memory.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indrnn.layers import AffineSequence, IndRNNLayer, recurrent_max, sequences_in
from indrnn.recurrence import available_backends, indrnn_recurrence
from indrnn.recurrence.dispatch import load_backend
from indrnn.training.device import bfloat16_refusal

Work = Callable[[], object]

COPY = "copy"
LOOP = "loop"
LOOP_UNBIND = "loop_unbind"
LOOPS = (LOOP, LOOP_UNBIND)
LSTM = "lstm"
LSTM_EQUAL_PARAMETERS = "lstm_equal_parameters"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The backends that are no composition of PyTorch operators.
KERNELS = ("numba", "triton")


@dataclass(frozen=True)
class Size:
    B: int
    T: int
    H: int

    def tensor_bytes(self, dtype: str = "float32") -> int:
        """Of one (B, T, H) tensor."""
        return DTYPES[dtype].itemsize * self.B * self.T * self.H


@dataclass(frozen=True)
class Contender:
    """One implementation. ``op`` is recurrence (x + b is given) or layer (the product with the input weights too);
    ``dtype`` is that of the sequences (our state and weights are float32 all the same; nn.LSTM is fastest with its
    own in bfloat16, too)."""

    op: str
    name: str
    backend: str | None = None
    strategy: str | None = None
    dtype: str = "float32"

    @property
    def passes(self) -> tuple[str, ...]:
        if self.name == COPY:
            return ("forward",)
        return ("forward", "backward") if self.op == "recurrence" else ("step",)

    def bytes_moved(self, which: str, size: Size) -> int | None:
        """Bytes that the operation cannot do without: forward reads x and writes h; backward reads h and the gradient
        and writes dx. None for a layer, which is not bound by memory alone."""
        return None if self.op == "layer" else {"forward": 2, "backward": 3}[which] * size.tensor_bytes(self.dtype)


def contenders(device: torch.device) -> tuple[list[Contender], dict[str, str]]:
    """All contenders that work on ``device``, and why each other backend does not."""
    reasons = available_backends(device)
    layer_dtypes = ["float32"]
    if device.type == "cpu" and bfloat16_refusal() is None:
        layer_dtypes.append("bfloat16")
    able = [Contender("recurrence", COPY), *(Contender(op, name) for name in LOOPS for op in ("recurrence", "layer"))]
    for backend in (name for name, reason in reasons.items() if reason is None):
        for strategy in _strategies(backend):
            name = backend if strategy is None else f"{backend}/{strategy}"
            able += [Contender(op, name, backend, strategy) for op in ("recurrence", "layer")]
            if backend in KERNELS and torch.bfloat16 in load_backend(backend).DTYPES:
                able.append(Contender("recurrence", name, backend, strategy, "bfloat16"))
                able += [Contender("layer", name, backend, strategy, dtype) for dtype in layer_dtypes[1:]]
    if any(each.dtype == "bfloat16" for each in able):
        able.append(Contender("recurrence", COPY, dtype="bfloat16"))
    able += [Contender("layer", name, dtype=dtype) for name in (LSTM, LSTM_EQUAL_PARAMETERS) for dtype in layer_dtypes]
    return able, {name: reason for name, reason in reasons.items() if reason is not None}


def prepare(contender: Contender, size: Size, device: torch.device) -> dict[str, Work]:
    """The calls to time, by pass: forward without autograd, backward alone from a kept graph, or a layer's whole
    training step (forward, gradients of input and weights)."""
    make = _recurrence_works if contender.op == "recurrence" else _layer_works
    return make(contender, size, device)


def _strategies(backend: str) -> tuple[str | None, ...]:
    """None: the backend as it is, choosing for itself; then each strategy that can be forced."""
    if backend != "triton":
        return (None,)
    from indrnn.recurrence.triton_gpu import STRATEGIES

    return (None, *(strategy for strategy in STRATEGIES if strategy != "auto"))


def forced(strategy: str | None) -> AbstractContextManager[None]:
    """Every launch within it uses this strategy; None: the backend chooses."""
    if strategy is None:
        return nullcontext()
    from indrnn.recurrence import triton_gpu

    return triton_gpu.forced(strategy)


def loop(x: Tensor, u: Tensor) -> Tensor:
    """What one writes first in PyTorch: a loop over time that autograd records. Its backward pass fills a gradient of
    x's size for each of the T selections."""
    return _states((x[:, t] for t in range(x.shape[1])), u, x)


def loop_unbind(x: Tensor, u: Tensor) -> Tensor:
    """The same loop without those T gradients: as good as it gets in PyTorch's own operators."""
    return _states(x.unbind(1), u, x)


def _states(steps: Iterable[Tensor], u: Tensor, x: Tensor) -> Tensor:
    state, states = x.new_zeros(x.shape[0], x.shape[2]), []
    for x_t in steps:
        state = torch.relu(x_t + u * state)
        states.append(state)
    return torch.stack(states, 1)


def lstm_units(size: Size) -> int:
    """Units of the LSTM on H inputs that has about as many parameters as an IndRNN layer H -> H (H² + 2 H)."""
    H = size.H
    # 4 n (H + n + 2) = H² + 2 H
    return max(1, round((-(H + 2) + math.sqrt((H + 2) ** 2 + H * H + 2 * H)) / 2))


_LOOP = {LOOP: loop, LOOP_UNBIND: loop_unbind}


def _recurrence_works(contender: Contender, size: Size, device: torch.device) -> dict[str, Work]:
    x = torch.randn(size.B, size.T, size.H, device=device, dtype=DTYPES[contender.dtype])
    if contender.name == COPY:
        target = torch.empty_like(x)
        return {"forward": lambda: target.copy_(x)}
    u = _recurrent_weight(size, device)
    compute = _recurrence(contender)

    @torch.no_grad()
    def forward() -> object:
        with forced(contender.strategy):
            return compute(x, u)

    inputs = (x.clone().requires_grad_(), u.clone().requires_grad_())
    with forced(contender.strategy):
        h = compute(*inputs)
    cotangent = torch.randn_like(h)

    def backward() -> object:
        with forced(contender.strategy):
            return torch.autograd.grad(h, inputs, cotangent, retain_graph=True)

    return {"forward": forward, "backward": backward}


def _recurrence(contender: Contender) -> Callable[[Tensor, Tensor], Tensor]:
    if contender.name in LOOPS:
        return _LOOP[contender.name]
    backend = contender.backend or "auto"
    return lambda x, u: indrnn_recurrence(x, u, backend=backend)[0]


def _layer_works(contender: Contender, size: Size, device: torch.device) -> dict[str, Work]:
    x = torch.randn(size.B, size.T, size.H, device=device, dtype=DTYPES[contender.dtype], requires_grad=True)
    run, module = _layer(contender, size, device)
    inputs = (x, *module.parameters())
    with torch.no_grad():
        cotangent = torch.randn_like(run(x[:, :1])).repeat(1, size.T, 1)

    def step() -> object:
        with forced(contender.strategy):
            return torch.autograd.grad(run(x), inputs, cotangent)

    return {"step": step}


def _layer(contender: Contender, size: Size, device: torch.device) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    if contender.name in (LSTM, LSTM_EQUAL_PARAMETERS):
        units = size.H if contender.name == LSTM else lstm_units(size)
        lstm = nn.LSTM(size.H, units, batch_first=True, device=device, dtype=DTYPES[contender.dtype])
        return lambda x: lstm(x)[0], lstm
    layer = IndRNNLayer(size.H, size.H, backend=contender.backend or "auto", device=device)
    with torch.no_grad():
        layer.weight_hh.copy_(_recurrent_weight(size, device))
    if contender.name in LOOPS:
        assert layer.weight_ih is not None
        weight, bias, states = layer.weight_ih, layer.bias, _LOOP[contender.name]
        return lambda x: states(F.linear(x, weight, bias), layer.weight_hh), layer

    def run(x: Tensor) -> Tensor:
        # As one layer hands it to the next: bfloat16 is not rounded anew.
        with sequences_in(x.dtype):
            return layer(AffineSequence(x, x[:, -1]))[0].h

    return run, layer


def _recurrent_weight(size: Size, device: torch.device) -> Tensor:
    return torch.rand(size.H, device=device) * recurrent_max(size.T)
