"""The recurrence on the CPU: loops that Numba compiles at their first use, without a compiler on the machine.

PyTorch's OpenMP threads spin for a while after each of its operations. A second pool of threads, such as Numba's,
would compete with them for the cores, so the kernels run in the same pool, through the OpenMP runtime that PyTorch has
loaded. Where that runtime lacks the entry point (macOS, Windows), Python threads run them.
"""

import ctypes
import logging
import math
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba.core import config, types
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from torch import Tensor

from ..dispatch import Cell, InputGradients, OutputGradients, Outputs
from .kernels import MAX_UNITS, make_backward, make_forward

NONLINEARITIES = ("relu", "identity", "leaky_relu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# NumPy's dtypes of sequences and of all else. NumPy has no bfloat16.
NUMPY_DTYPES = {
    torch.float32: (np.float32, np.float32),
    torch.float64: (np.float64, np.float64),
    torch.bfloat16: (np.uint16, np.float32),
}
_log = logging.getLogger(__name__)


def unavailable_reason(device: torch.device) -> str | None:
    """See `reference.unavailable_reason`."""
    return None if device.type == "cpu" else "it runs on the CPU only"


def forward(x: Tensor, bias: Tensor | None, cell: Cell, statistics: bool) -> Outputs:
    """See `reference.forward`."""
    B, T, D = x.shape
    u, h0, nonlinearity, reverse, weight = cell
    H, zeros, product = len(u), torch.zeros_like(u), weight is not None
    h, h_last = x.new_empty(B, T, H) if product else torch.empty_like(x), u.new_empty(B, H)
    # mean and Σ(h − mean)² of each sequence
    mean, m2 = u.new_empty(2, B if statistics else 0, H, dtype=torch.float64).unbind()
    columns = zeros if weight is None else weight.mT.contiguous()
    sequences = [*_sequence(x, reverse, zeros), *_sequence(h, reverse, zeros)]
    rows = [*_rows(bias, zeros), u, _or(h0, zeros), columns]
    kernel = _compiled(make_forward, *NUMPY_DTYPES[x.dtype], nonlinearity, reverse, D if product else 0, statistics)
    _run(kernel, (B, T, H, h0 is not None), [*sequences, *rows, h_last, mean, m2])
    if not statistics:
        return Outputs(h, h_last, None, None)
    # Chan's formula for all sequences at once, since they have one length
    whole_mean = mean.mean(0)
    whole_m2 = m2.sum(0) + T * (mean - whole_mean).square_().sum(0)
    return Outputs(h, h_last, whole_mean.to(u.dtype), whole_m2.div_(B * T).to(u.dtype))


def backward(gradients: OutputGradients, h: Tensor, cell: Cell, x: Tensor | None = None) -> InputGradients:
    """See `reference.backward`."""
    B, T, H = h.shape
    dh, dh_last, dmean, dvariance, mean = gradients
    u, h0, nonlinearity, reverse, weight = cell
    D, zeros, product = 0 if x is None else x.shape[2], torch.zeros_like(u), weight is not None
    dx = None if product else torch.empty_like(h)
    dweight = u.new_empty(B, D, H) if product else None
    du, dh0, dbias = (u.new_empty(B, H) for _ in range(3))
    sequences = [*_sequence(dh, reverse, zeros), *_sequence(h, reverse, zeros)]
    sequences += [*_sequence(x, reverse, zeros), *_sequence(dx, reverse, zeros)]
    rows = [*_rows(dh_last, zeros), u, _or(h0, zeros), *(_or(each, zeros) for each in (dmean, dvariance, mean))]
    kernel = _compiled(make_backward, *NUMPY_DTYPES[h.dtype], nonlinearity, not reverse, D, mean is not None)
    _run(kernel, (B, T, H, h0 is not None), [*sequences, *rows, du, dh0, dbias, _or(dweight, zeros)])
    return InputGradients(dx, du, dh0, dbias, None if dweight is None else dweight.mT.contiguous())


def _or(value: Tensor | None, zeros: Tensor) -> Tensor:
    return zeros if value is None else value


def _sequence(x: Tensor | None, reverse: bool, zeros: Tensor) -> tuple[Tensor | int, int, int]:
    """The first step that a kernel reads, and the strides of b and t; of None a row of zeros (H,)."""
    if x is None:
        return zeros, 0, 0
    if not reverse:
        return x, x.stride(0), x.stride(1)
    return x.data_ptr() + (x.shape[1] - 1) * x.stride(1) * x.element_size(), x.stride(0), -x.stride(1)


def _rows(value: Tensor | None, zeros: Tensor) -> tuple[Tensor, int]:
    """(H,) or (B, H), and the stride of b."""
    value = _or(value, zeros)
    return value, value.stride(0) if value.dim() == 2 else 0


def _run(kernel: CFunc, sizes: tuple[int, ...], arrays: Sequence[Any]) -> None:
    """Run a kernel on PyTorch's threads. ``sizes`` are B, T, H and whether h0 is given; see `kernels`."""
    B, _, H, _ = sizes
    threads = torch.get_num_threads()
    # Each sequence is cut into ranges of units, whole multiples of 32, so that every thread finds tasks.
    groups = max(1, min(math.ceil(4 * threads / B), math.ceil(H / 32)), math.ceil(H / MAX_UNITS))
    units = math.ceil(H / groups / 32) * 32
    tasks = B * math.ceil(H / units)
    addresses = [each.data_ptr() if isinstance(each, Tensor) else each for each in arrays]
    call = array("q", [0, tasks, units, *sizes, *addresses])
    address, threads = call.buffer_info()[0], min(threads, tasks)
    parallel = _openmp_parallel()
    if threads == 1:
        kernel.ctypes(address)
    elif parallel is not None:
        parallel(kernel.address, address, threads, 0)
    else:
        helpers = [_pool().submit(kernel.ctypes, address) for _ in range(threads - 1)]
        try:
            kernel.ctypes(address)
        finally:  # also when interrupted, because they use memory that the caller would free
            wait(helpers)


@cache
def _openmp_parallel() -> Any | None:
    """GOMP_parallel(function, argument, threads, flags) of the OpenMP runtime that PyTorch uses, if it has one."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        with suppress(OSError, AttributeError):
            # Looked up through libtorch_cpu, the symbol is that of the runtime which the library depends on.
            parallel = ctypes.CDLL(str(library)).GOMP_parallel
            parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            parallel.restype = None
            return parallel
    return None


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="indrnn")


@cache
def _compiled(make: Any, *options: Any) -> CFunc:
    """A kernel, compiled for these options or loaded from Numba's cache on disk."""
    compiled = CFunc(make(*options), ((types.int64,), types.void), {}, {"error_model": "numpy"})
    try:
        if not config.CACHE_DIR:  # type: ignore[attr-defined]
            Path.home()  # a RuntimeError if there is none, where Numba would create a folder named ~
        compiled._cache = _Cache(compiled.__wrapped__)  # type: ignore[attr-defined]
    except RuntimeError:  # no folder for a cache can be written
        _announce()
    compiled.compile()
    return compiled


class _Cache(FunctionCache):
    """Numba's cache, which also survives damaged files and a full disk. The kernel is compiled instead."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # unpickling damaged bytes can raise anything
            found = None
            with suppress(OSError):
                self.flush()
        if found is None:
            _announce()
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)


@cache  # once per process
def _announce() -> None:
    _log.warning("compiling the CPU kernels, which takes some seconds the first time; they are cached on disk")
