"""What is timed: the implementations, and the calls that each makes at a size.

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

from .clock import Work

COPY = "copy"
LOOP = "loop"
LOOP_UNBIND = "loop_unbind"
LSTM = "lstm"
LSTM_EQUAL_PARAMETERS = "lstm_equal_parameters"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The backends with kernels of their own; the others are composed of PyTorch operators.
KERNELS = ("numba", "triton")


@dataclass(frozen=True)
class Size:
    B: int
    T: int
    H: int

    def tensor_bytes(self, dtype: str = "float32") -> int:
        """The size of one (B, T, H) tensor."""
        return DTYPES[dtype].itemsize * self.B * self.T * self.H


@dataclass(frozen=True)
class Implementation:
    """One implementation. ``op`` is recurrence (x + b is given) or layer (the product with the input weights too);
    ``dtype`` is that of the sequences (our state and weights are float32 even so; nn.LSTM is fastest with bfloat16
    weights and state)."""

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
        """The fewest bytes that the operation can move: forward reads x and writes h; backward reads h and dh and
        writes dx. None for a layer, which is not bound by memory alone."""
        return None if self.op == "layer" else {"forward": 2, "backward": 3}[which] * size.tensor_bytes(self.dtype)


def implementations(device: torch.device) -> tuple[list[Implementation], dict[str, str]]:
    """All implementations that work on ``device``, and why each other backend does not."""
    reasons = available_backends(device)
    layer_dtypes = ["float32"]
    if device.type == "cpu" and bfloat16_refusal() is None:
        layer_dtypes.append("bfloat16")
    able = [
        Implementation("recurrence", COPY),
        *(Implementation(op, name) for name in LOOPS for op in ("recurrence", "layer")),
    ]
    for backend in (name for name, reason in reasons.items() if reason is None):
        for strategy in _strategies(backend):
            name = backend if strategy is None else f"{backend}/{strategy}"
            able += [Implementation(op, name, backend, strategy) for op in ("recurrence", "layer")]
            if backend in KERNELS and torch.bfloat16 in load_backend(backend).DTYPES:
                able.append(Implementation("recurrence", name, backend, strategy, "bfloat16"))
                able += [Implementation("layer", name, backend, strategy, dtype) for dtype in layer_dtypes[1:]]
    if any(implementation.dtype == "bfloat16" for implementation in able):
        able.append(Implementation("recurrence", COPY, dtype="bfloat16"))
    able += [
        Implementation("layer", name, dtype=dtype) for name in (LSTM, LSTM_EQUAL_PARAMETERS) for dtype in layer_dtypes
    ]
    return able, {name: reason for name, reason in reasons.items() if reason is not None}


def prepare(implementation: Implementation, size: Size, device: torch.device) -> dict[str, Work]:
    """The calls to time, by pass: forward without autograd, backward alone from a kept graph, or a layer's whole
    training step (forward, gradients of input and weights)."""
    make = _recurrence_works if implementation.op == "recurrence" else _layer_works
    return make(implementation, size, device)


def _strategies(backend: str) -> tuple[str | None, ...]:
    """None, which lets the backend choose; then each strategy that can be forced."""
    if backend != "triton":
        return (None,)
    from indrnn.recurrence.triton_gpu import STRATEGIES

    return (None, *(strategy for strategy in STRATEGIES if strategy != "auto"))


def forced(strategy: str | None) -> AbstractContextManager[None]:
    """Within the block every launch uses this strategy; None: the backend chooses."""
    if strategy is None:
        return nullcontext()
    from indrnn.recurrence import triton_gpu

    return triton_gpu.forced(strategy)


def loop(x: Tensor, u: Tensor) -> Tensor:
    """The straightforward loop over time, recorded by autograd. Its backward pass fills a gradient of x's size for each
    of the T selections."""
    return _states((x[:, t] for t in range(x.shape[1])), u, x)


def loop_unbind(x: Tensor, u: Tensor) -> Tensor:
    """The same loop without those T gradients: the best that PyTorch's own operators allow."""
    return _states(x.unbind(1), u, x)


def _states(steps: Iterable[Tensor], u: Tensor, x: Tensor) -> Tensor:
    state, states = x.new_zeros(x.shape[0], x.shape[2]), []
    for x_t in steps:
        state = torch.relu(x_t + u * state)
        states.append(state)
    return torch.stack(states, 1)


LOOPS = {LOOP: loop, LOOP_UNBIND: loop_unbind}


def lstm_units(size: Size) -> int:
    """Units of the LSTM on H inputs that has about as many parameters as an IndRNN layer H -> H (H² + 2 H)."""
    H = size.H
    # 4 n (H + n + 2) = H² + 2 H
    return max(1, round((-(H + 2) + math.sqrt((H + 2) ** 2 + H * H + 2 * H)) / 2))


def _recurrence_works(implementation: Implementation, size: Size, device: torch.device) -> dict[str, Work]:
    x = torch.randn(size.B, size.T, size.H, device=device, dtype=DTYPES[implementation.dtype])
    if implementation.name == COPY:
        target = torch.empty_like(x)
        return {"forward": lambda: target.copy_(x)}
    u = _recurrent_weight(size, device)
    backend = implementation.backend or "auto"
    compute = LOOPS.get(implementation.name, lambda x, u: indrnn_recurrence(x, u, backend=backend)[0])

    @torch.no_grad()
    def forward() -> object:
        with forced(implementation.strategy):
            return compute(x, u)

    inputs = (x.clone().requires_grad_(), u.clone().requires_grad_())
    with forced(implementation.strategy):
        h = compute(*inputs)
    cotangent = torch.randn_like(h)

    def backward() -> object:
        with forced(implementation.strategy):
            return torch.autograd.grad(h, inputs, cotangent, retain_graph=True)

    return {"forward": forward, "backward": backward}


def _layer_works(implementation: Implementation, size: Size, device: torch.device) -> dict[str, Work]:
    x = torch.randn(size.B, size.T, size.H, device=device, dtype=DTYPES[implementation.dtype], requires_grad=True)
    run, module = _layer(implementation, size, device)
    inputs = (x, *module.parameters())
    with torch.no_grad():
        cotangent = torch.randn_like(run(x[:, :1])).repeat(1, size.T, 1)

    def step() -> object:
        with forced(implementation.strategy):
            return torch.autograd.grad(run(x), inputs, cotangent)

    return {"step": step}


def _layer(
    implementation: Implementation, size: Size, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    if implementation.name in (LSTM, LSTM_EQUAL_PARAMETERS):
        units = size.H if implementation.name == LSTM else lstm_units(size)
        lstm = nn.LSTM(size.H, units, batch_first=True, device=device, dtype=DTYPES[implementation.dtype])
        return lambda x: lstm(x)[0], lstm
    layer = IndRNNLayer(size.H, size.H, backend=implementation.backend or "auto", device=device)
    with torch.no_grad():
        layer.weight_hh.copy_(_recurrent_weight(size, device))
    if implementation.name in LOOPS:
        assert layer.weight_ih is not None
        weight, bias, states = layer.weight_ih, layer.bias, LOOPS[implementation.name]
        return lambda x: states(F.linear(x, weight, bias), layer.weight_hh), layer

    def run(x: Tensor) -> Tensor:
        # As between two layers: bfloat16 is not rounded again.
        with sequences_in(x.dtype):
            return layer(AffineSequence(x, x[:, -1]))[0].h

    return run, layer


def _recurrent_weight(size: Size, device: torch.device) -> Tensor:
    return torch.rand(size.H, device=device) * recurrent_max(size.T)
