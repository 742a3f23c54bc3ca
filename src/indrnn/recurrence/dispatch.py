"""The interface of the backends, and the choice of one.

Letters: B batch, T time steps, H hidden units, D input features.

A backend is a module with NONLINEARITIES, DTYPES and the functions `unavailable_reason`, `forward` and `backward` of
`reference`, which define them; only numba receives a `Cell.weight`. `ops` checks all arguments first: x, h and dh have
stride 1 along H and any other strides (also 0), every other tensor is contiguous, all are on one device, and
B, T, H >= 1. Results are deterministic: fixed order of summation, no atomic additions.

Sequences (x, h, dh, dx) have one dtype. Everything else has its `state_dtype`: float64 for float64, else float32. For
bfloat16 the running state and δ are therefore never rounded between steps. h and dx are rounded when they are stored
(to nearest, ties to even). The backward reads h as stored: all of it uses the rounded h_t.
"""

import warnings
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config.schema import BACKENDS, NONLINEARITIES
from ..errors import RunError, UserError

# The order in which auto tries backends. On a CPU the loop is faster than the scan, which passes over memory many
# times. Elsewhere one launch per time step is slower.
_PREFERRED: dict[str, tuple[str, ...]] = {"cpu": ("numba", "reference"), "cuda": ("triton", "scan", "reference")}
_MODULES = {"reference": ".reference", "scan": ".scan", "numba": ".numba_cpu", "triton": ".triton_gpu"}
# Largest D for which a layer fuses W x into the recurrence. At D = 12 the separate product is as fast.
SMALL_INPUT_SIZE = 8


class KernelError(RunError):
    """A kernel cannot be compiled or launched on this machine."""


class Cell(NamedTuple):
    """The recurrence without its sequences.

    With ``reverse``, time runs from T to 1: h_t = σ(x_t + bias + u ⊙ h_{t+1}), h_{T+1} = h0, and h_last is h_1.
    With ``weight``, x is (B, T, D) and W x_t replaces x_t, so that W x (B, T, H) and its gradient need no memory.
    """

    u: Tensor  # (H,)
    h0: Tensor | None  # (B, H), None for zeros
    nonlinearity: str
    reverse: bool = False
    weight: Tensor | None = None  # (H, D)


class Outputs(NamedTuple):
    """``h`` is like ``torch.empty_like(x)``, or contiguous with a weight. ``h_last`` is contiguous and not a view."""

    h: Tensor  # (B, T, H)
    h_last: Tensor  # (B, H)
    mean: Tensor | None  # (H,), of h over batch and time
    variance: Tensor | None  # (H,), biased; not Σh² − (Σh)²/n in the working precision


class OutputGradients(NamedTuple):
    """The gradients of `Outputs`, and the mean. None stands for zeros. All of the last three or none are given.

    With n = B·T, ∂L/∂h_t = dh_t + dmean / n + 2 dvariance ⊙ (h_t − mean) / n, plus dh_last at t = T.
    """

    dh: Tensor | None  # (B, T, H)
    dh_last: Tensor | None  # (B, H)
    dmean: Tensor | None = None  # (H,)
    dvariance: Tensor | None = None  # (H,)
    mean: Tensor | None = None  # (H,)

    def affine(self, n: int) -> tuple[Tensor, Tensor] | None:
        """offset and slope (H,) with ∂L/∂h_t = dh_t + offset + slope ⊙ h_t, or None."""
        if self.dmean is None or self.dvariance is None or self.mean is None:
            return None
        slope = self.dvariance * (2 / n)
        return self.dmean / n - slope * self.mean, slope


class InputGradients(NamedTuple):
    """``dx`` is like ``torch.empty_like(h)``. All others have the dtype of u and one row per sequence."""

    dx: Tensor | None  # δ (B, T, H); None with a weight
    du: Tensor  # (B, H), Σ_t δ_t ⊙ h_{t-1}
    dh0: Tensor  # (B, H), u ⊙ δ_1
    dbias: Tensor  # (B, H), Σ_t δ_t
    dweight: Tensor | None = None  # (B, H, D), Σ_t δ_t x_tᵀ; None without a weight


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the running state, of u and of the statistics for sequences of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def load_backend(name: str) -> Any:
    """The module of a backend. Raises ImportError if its library is missing."""
    return import_module(_MODULES[name], __package__)


def available_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Every backend with None, or with the reason why it is not available on `device`."""
    return {name: _refusal(name, torch.device(device)) for name in _MODULES}


def _refusal(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, nonlinearity: str = "relu"
) -> str | None:
    """Why `name` cannot compute this recurrence, or None."""
    try:
        backend = load_backend(name)
    except ImportError as error:
        return f"its library cannot be imported: {error}"
    if nonlinearity not in backend.NONLINEARITIES:
        return f"it computes {', '.join(backend.NONLINEARITIES)}, not {nonlinearity}"
    if dtype not in backend.DTYPES:
        return f"it computes {', '.join(map(str, backend.DTYPES))}, not {dtype}"
    return backend.unavailable_reason(device)


def auto_backend(
    device: torch.device, dtype: torch.dtype = torch.float32, nonlinearity: str = "relu"
) -> tuple[str, dict[str, str]]:
    """The choice of ``auto``, and why each preferred backend cannot be used."""
    refusals: dict[str, str] = {}
    for name in _PREFERRED.get(device.type, ("scan", "reference")):  # the last, reference, always works
        reason = _refusal(name, device, dtype, nonlinearity)
        if reason is None:
            break
        refusals[name] = reason
    return name, refusals


@cache
def resolve_backend(
    backend: str, device: torch.device | str, dtype: torch.dtype = torch.float32, nonlinearity: str = "relu"
) -> str:
    """The name of the backend that computes the recurrence. Resolved once per process for the same arguments.

    ``auto`` chooses numba on a CPU and triton on CUDA. If they cannot compute the recurrence, it chooses reference on a
    CPU and elsewhere scan, or reference if scan cannot. On CUDA that is slow, and a warning is issued once.

    Raises:
        UserError: the name or the nonlinearity is unknown, or the given backend cannot compute this.
    """
    device = torch.device(device)
    for key, value, choices in (("backend", backend, BACKENDS), ("nonlinearity", nonlinearity, NONLINEARITIES)):
        if value not in choices:
            raise UserError(f"{key}={value!r} is unknown; choose one of {', '.join(choices)}")
    if backend != "auto":
        reason = _refusal(backend, device, dtype, nonlinearity)
        if reason is not None:
            others = ", ".join(name for name in BACKENDS if name != backend)
            raise UserError(f"backend={backend} is not available on {device}: {reason}; choose one of {others}")
        return backend
    name, refusals = auto_backend(device, dtype, nonlinearity)
    if "triton" in refusals:
        reason = f"which is slow, because triton is not available: {refusals['triton']}"
        warnings.warn(f"backend=auto uses {name} on {device}, {reason}", stacklevel=2)
    return name
