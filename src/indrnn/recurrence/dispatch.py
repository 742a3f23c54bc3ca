"""Which backend computes the recurrence, and the interface every backend keeps.

Letters: B batch, T time steps, H hidden units.

A backend is a module with the members of `Backend`. ``ops`` has checked the arguments before a backend sees them:
x, h and dh have stride 1 along H and any other strides (also 0), every other tensor is contiguous, all of them are
on one device, sizes agree, B, T, H >= 1. Sequences (x, h, dh, dx) have one dtype, all else has its `state_dtype`:
float64 for float64, float32 for everything else.

For bfloat16 (and float16) that means: the running state and δ are float32 and never rounded between steps; h and dx
hold what they are at each step, rounded to the nearest, ties to even; h_last, the statistics, dh0 and dbias come from
the unrounded ones. The backward knows h as it was stored: σ' and slope ⊙ h_t take the rounded h_t (rounding to bfloat16
keeps its sign), and du = Σ δ_t ⊙ h_{t-1} takes unrounded δ_t, rounded h_{t-1}, and h_0 as it was given.

Where `Cell.weight` W (H, D) is given, x is (B, T, D) and W x_t enters the recurrence. A backend that forms it in
passing saves a layer that reads one pixel a step both W x (B, T, H) and its gradient.
"""

import warnings
from functools import cache
from importlib import import_module
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..config.schema import BACKENDS, NONLINEARITIES
from ..errors import UserError

# What auto tries, in this order. On a CPU the loop costs less than the scan's many passes over memory; elsewhere a
# launch for each time step costs more.
_PREFERRED: dict[str, tuple[str, ...]] = {"cpu": ("numba", "reference"), "cuda": ("triton", "scan", "reference")}
_WITHOUT_KERNEL = ("scan", "reference")
_MODULES = {"reference": ".reference", "scan": ".scan", "numba": ".numba_cpu", "triton": ".triton_gpu"}
# Largest error allowed between two backends, as a share of the largest value of the quantity. Float32: a scan in tree
# order, whose factors u^length are rounded before they are used, has about 2e-4 after 784 steps at the bound on u.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}

# Up to which D a layer leaves W x to the recurrence. Forward and backward took within and apart, in two runs:
#   D = 8, float32: 3.9 and 4.6, 13 and 18 ms; D = 8, bfloat16: 3.3 and 3.3, 4.0 and 4.1; D = 12, bfloat16: 4.2 and 4.5,
#   4.1 and 4.4 (best of 7; a thread of an AMD EPYC, PyTorch 2.14, B = 32, T = 784, H = 128; 29 November 2026).
SMALL_INPUT_SIZE = 8


class Cell(NamedTuple):
    """The recurrence apart from its sequences."""

    u: Tensor
    """(H,)"""
    h0: Tensor | None
    """(B, H), the state before the first step; None for zeros."""
    nonlinearity: str
    reverse: bool = False
    """Time runs from T to 1, in both directions: h_t = σ(x_t + bias + u ⊙ h_{t+1}), h_{T+1} = h0, and h_last is h_1."""
    weight: Tensor | None = None
    """W (H, D): W x_t enters instead of x_t. Only for a backend that says FORMS_PRODUCT."""


class Outputs(NamedTuple):
    h: Tensor
    """(B, T, H), made as ``torch.empty_like(x)`` is: dense, strides ordered as x's; with a weight, contiguous."""
    h_last: Tensor
    """(B, H), contiguous and with memory of its own."""
    mean: Tensor | None
    """(H,), of h over batch and time."""
    variance: Tensor | None
    """(H,), biased. It must not be formed as Σh² − (Σh)²/n in the working precision."""


class OutputGradients(NamedTuple):
    """What enters the backward at step t is g_t = dh_t + offset + slope ⊙ h_t, with dh_last added at t = T."""

    dh: Tensor | None
    """(B, T, H); None for zeros, which are never materialised."""
    dh_last: Tensor | None
    """(B, H)"""
    offset: Tensor | None
    """(H,); this and slope, both or neither, carry the gradients of mean and variance."""
    slope: Tensor | None
    """(H,)"""


class InputGradients(NamedTuple):
    """All but dx have the dtype of u and one row a sequence, which the caller sums where it needs to: (B, H)."""

    dx: Tensor | None
    """δ (B, T, H), made as ``torch.empty_like(h)``; None with a weight."""
    du: Tensor
    """Σ_t δ_t ⊙ h_{t-1}, with h_0 = h0 or zeros."""
    dh0: Tensor
    """u ⊙ δ_1"""
    dbias: Tensor
    """Σ_t δ_t"""
    dweight: Tensor | None = None
    """(B, H, D), Σ_t δ_t x_tᵀ; None without a weight."""


class Backend(Protocol):
    """What a backend module exposes."""

    NONLINEARITIES: tuple[str, ...]
    DTYPES: tuple[torch.dtype, ...]
    FORMS_PRODUCT: bool
    """Whether it takes a ``cell.weight``; if not, the caller forms W x."""

    def unavailable_reason(self, device: torch.device) -> str | None:
        """Why this backend cannot work on `device` (one sentence without a full stop), or None if it can."""

    def forward(self, x: Tensor, bias: Tensor | None, cell: Cell, statistics: bool) -> Outputs:
        """h_t = σ(x_t + bias + u ⊙ h_{t-1}) for x (B, T, H) and bias (H,) or, one a sequence, (B, H), or None; with
        ``cell.weight``, h_t = σ(W x_t + bias + u ⊙ h_{t-1}) for x (B, T, D), with W x_t in the dtype of u.

        Without `statistics` mean and variance are None.
        """

    def backward(self, gradients: OutputGradients, h: Tensor, cell: Cell, x: Tensor | None = None) -> InputGradients:
        """The gradients, from the saved output and, with ``cell.weight``, from x (B, T, D).

            δ_t = σ'_t ⊙ (g_t + u ⊙ δ_{t+1}),  δ_{T+1} = 0,  σ'_t from h_t (relu: [h_t > 0])

        Deterministic: fixed order of summation, no atomics.
        """


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the running state, of u and of the statistics for sequences of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def load_backend(name: str) -> Backend:
    """The module of a backend. Raises ImportError where its library is missing."""
    return _load(_MODULES[name])


@cache  # looking a module up anew takes microseconds, several times a call
def _load(module: str) -> Backend:
    return cast(Backend, import_module(module, __package__))


def unavailable_reason(name: str, device: torch.device) -> str | None:
    """Why `name` cannot run on `device`, or None if it can."""
    try:
        return load_backend(name).unavailable_reason(device)
    except ImportError as error:
        return f"its library cannot be imported: {error}"


def available_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Every backend, with None if it works on `device` and else the reason why not."""
    return {name: unavailable_reason(name, torch.device(device)) for name in _MODULES}


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, UserWarning, stacklevel=3)


def _refusal(name: str, device: torch.device, dtype: torch.dtype, nonlinearity: str) -> str | None:
    """Why `name` cannot compute this recurrence, or None if it can."""
    reason = unavailable_reason(name, device)
    if reason is not None:
        return reason
    backend = load_backend(name)
    if nonlinearity not in backend.NONLINEARITIES:
        return f"it computes {', '.join(backend.NONLINEARITIES)}, not {nonlinearity}"
    if dtype not in backend.DTYPES:
        return f"it computes {', '.join(map(str, backend.DTYPES))}, not {dtype}"
    return None


@cache
def _fault(name: str, device: torch.device, dtype: torch.dtype, nonlinearity: str) -> str | None:
    """Why the kernels of `name` are not to be trusted on `device`, or None: once a process they are compiled and held,
    forward and backward, against a backend that has none."""
    other = next(backend for backend in _WITHOUT_KERNEL if _refusal(backend, device, dtype, nonlinearity) is None)
    try:
        wrong = _disagreement(name, other, device, dtype, nonlinearity)
    except Exception as failure:  # a compiler, a driver, a launch: each raises what it likes
        wrong = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    if wrong is None:
        return None
    return (
        f"its self-check in {dtype} with {nonlinearity} failed ({wrong}); please report it, with indrnn-info's output"
    )


def _disagreement(name: str, other: str, device: torch.device, dtype: torch.dtype, nonlinearity: str) -> str | None:
    """In which quantity two backends differ, and by how much; None if they agree."""
    generator, state = torch.Generator().manual_seed(0), state_dtype(dtype)
    backends = load_backend(name), load_backend(other)
    # The kernels that the default network needs, and the other options at a size that fills no tile.
    for B, T, H, default in ((2, 784, 128, True), (3, 37, 5, False)):
        x, dh = torch.randn(2, B, T, H, generator=generator).to(device, dtype)
        h0, dh_last = torch.randn(2, B, H, generator=generator).to(device, state)
        bias, offset, slope = torch.randn(3, H, generator=generator).to(device, state)
        u = (2 * torch.rand(H, generator=generator) - 1).to(device, state)
        cell = Cell(u, None if default else h0, nonlinearity)
        entering = OutputGradients(dh, None, offset, slope) if default else OutputGradients(dh, dh_last, None, None)
        outputs = [backend.forward(x, bias if default else None, cell, default) for backend in backends]
        # From one output, for a rounding that moves a state across relu's kink is no error of the gradient.
        gradients = [backend.backward(entering, outputs[1].h, cell) for backend in backends]
        for results in (outputs, gradients):
            for quantity, value, right in zip(results[0]._fields, *results, strict=True):
                if value is None or right is None:
                    continue
                error = ((value - right).abs().max() / right.abs().max()).item()
                if not error <= TOLERANCE[dtype]:  # so that a NaN fails
                    return f"{quantity} is off by {error:.1e} of its largest value"
    return None


def auto_backend(
    device: torch.device, dtype: torch.dtype = torch.float32, nonlinearity: str = "relu"
) -> tuple[str, dict[str, str]]:
    """What ``auto`` takes, and why not each backend that it would rather have taken.

    Triton's kernels are compiled where they run, perhaps for a GPU that nobody has tried them on, so they are checked
    before they are first used; not while a CUDA graph is captured, for the check waits for the device.
    """
    refusals: dict[str, str] = {}
    for name in _PREFERRED.get(device.type, _WITHOUT_KERNEL):  # reference, the last, always works
        reason = _refusal(name, device, dtype, nonlinearity)
        if reason is None and name == "triton" and not torch.cuda.is_current_stream_capturing():
            reason = _fault(name, device, dtype, nonlinearity)
        if reason is None:
            break
        refusals[name] = reason
    return name, refusals


def resolve_backend(
    backend: str, device: torch.device | str, dtype: torch.dtype = torch.float32, nonlinearity: str = "relu"
) -> str:
    """The name of the backend that will compute the recurrence.

    ``auto`` takes numba on the CPU and triton on CUDA. What they cannot compute, reference does on the CPU; elsewhere,
    also where there is no kernel at all, scan does, or reference what scan cannot. On CUDA, where triton also has to
    pass a check of itself, that is slow, and a warning says so once.

    Raises:
        UserError: the name or the nonlinearity is unknown, or the backend asked for cannot compute this.
    """
    device = torch.device(device)
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if nonlinearity not in NONLINEARITIES:
        raise UserError(f"nonlinearity={nonlinearity!r} is unknown; choose one of {', '.join(NONLINEARITIES)}")
    if backend != "auto":
        reason = _refusal(backend, device, dtype, nonlinearity)
        if reason is not None:
            able = [name for name in _MODULES if _refusal(name, device, dtype, nonlinearity) is None]
            raise UserError(
                f"backend={backend} is not available on {device}: {reason}; choose auto or {', '.join(able)}"
            )
        return backend
    name, refusals = auto_backend(device, dtype, nonlinearity)
    if "triton" in refusals:
        _warn_once(
            f"backend=auto takes {name} on {device}, which is slow, because triton cannot be used: {refusals['triton']}"
        )
    return name
