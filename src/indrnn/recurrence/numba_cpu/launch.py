"""Running the kernels: compiled, on the threads of PyTorch's own pool; or, with NUMBA_DISABLE_JIT=1, as Python.

PyTorch's OpenMP threads spin for a while after each of its operations. A second pool of threads, such as Numba's,
would compete with them for the cores; so the kernels are handed to the same pool through the OpenMP runtime that
PyTorch has loaded. Where that runtime lacks the entry point (macOS, Windows), threads of Python's run them.
"""

import ctypes
import hashlib
import math
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any, cast

import llvmlite
import numba
import torch
from torch import Tensor

from ..dispatch import Cell, InputGradients, OutputGradients, Outputs
from . import kernels
from .vector import INTERPRETED

# a tensor with stride 1 along its last dimension, and its strides along batch and time; a negative one along time means
# that time runs from the last step to the first
Strided = tuple[Tensor, int, int]
Entry = Callable[[int], None]


NONLINEARITIES = ("relu", "identity", "leaky_relu")
DTYPES = tuple(kernels.VARIANTS)
FORMS_PRODUCT = True
_KINDS = {"identity": kernels.IDENTITY, "relu": kernels.RELU, "leaky_relu": kernels.LEAKY_RELU}


def unavailable_reason(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "it runs on the CPU only"


def forward(x: Tensor, bias: Tensor | None, cell: Cell, statistics: bool) -> Outputs:
    """See `dispatch.Backend.forward`."""
    B, T, D = x.shape
    u, h0, nonlinearity, reverse, weight = cell
    H, transposed = len(u), None if weight is None else weight.mT.contiguous()
    h, h_last = torch.empty_like(x) if weight is None else x.new_empty(B, T, H), u.new_empty(B, H)
    nothing = u.new_zeros(H)
    # mean and Σ(h − mean)² of each sequence
    mean, m2 = x.new_empty(2, B, H, dtype=torch.float64).unbind() if statistics else (nothing, nothing)
    rows = [*(_row(value, nothing) for value in (u, bias, h0)), _features(transposed, nothing)]
    results = [_sequence(h, reverse, nothing), *(_row(value, nothing) for value in (h_last, mean, m2))]
    groups = _groups(B, H)
    sizes = (groups, B, T, H, 0 if weight is None else D, _KINDS[nonlinearity], int(statistics))
    _run("forward", x.dtype, B * groups, sizes, [_sequence(x, reverse, nothing), *rows, *results])
    if not statistics:
        return Outputs(h, h_last, None, None)
    # sequences are of one length: Chan's formula for all of them at once
    whole_mean = mean.mean(0)
    whole_m2 = m2.sum(0) + T * (mean - whole_mean).square_().sum(0)
    return Outputs(h, h_last, whole_mean.to(u.dtype), whole_m2.div_(B * T).to(u.dtype))


def backward(gradients: OutputGradients, h: Tensor, cell: Cell, x: Tensor | None = None) -> InputGradients:
    """See `dispatch.Backend.backward`."""
    B, T, H = h.shape
    dh, dh_last, offset, slope = gradients
    u, h0, nonlinearity, reverse, weight = cell
    D = 0 if weight is None else weight.shape[1]
    dx = torch.empty_like(h) if weight is None else None
    dweight = None if weight is None else u.new_empty(B, D, H)
    du, dh0, dbias = (u.new_empty(B, H) for _ in range(3))
    nothing = u.new_zeros(H)
    given = [
        _sequence(dh, reverse, nothing),
        *(_row(value, nothing) for value in (dh_last, offset, slope)),
        _sequence(h, reverse, nothing),
        *(_row(value, nothing) for value in (u, h0)),
        _sequence(x, reverse, nothing),
    ]
    results = [
        _sequence(dx, reverse, nothing),
        *(_row(value, nothing) for value in (du, dh0, dbias)),
        _features(dweight, nothing),
    ]
    groups = _groups(B, H)
    options = kernels.AFFINE * (offset is not None) + kernels.INITIAL * (h0 is not None)
    sizes = (groups, B, T, H, D, _KINDS[nonlinearity], options)
    _run("backward", h.dtype, B * groups, sizes, [*given, *results])
    return InputGradients(dx, du, dh0, dbias, None if dweight is None else dweight.mT.contiguous())


def _sequence(x: Tensor | None, reverse: bool, nothing: Tensor) -> Strided:
    """(B, T, …), or for None the row of zeros `nothing`."""
    if x is None:
        return nothing, 0, 0
    return x, x.stride(0), -x.stride(1) if reverse else x.stride(1)


def _features(weight: Tensor | None, nothing: Tensor) -> Strided:
    """(D, H) or (B, D, H), with time's place taken by the features; or for None the row of zeros `nothing`."""
    if weight is None:
        return nothing, 0, 0
    return weight, weight.stride(0) if weight.dim() == 3 else 0, weight.stride(-2)


def _row(value: Tensor | None, nothing: Tensor) -> Strided:
    """(H,) or (B, H), or for None the row of zeros `nothing`."""
    value = nothing if value is None else value
    return value, value.stride(0) if value.dim() == 2 else 0, 0


def _groups(B: int, H: int) -> int:
    """Into how many ranges of units each sequence is cut, so that every thread finds tasks."""
    wanted = math.ceil(4 * torch.get_num_threads() / B)
    return max(1, min(wanted, math.ceil(H / kernels.GRAIN)))


def _run(name: str, dtype: torch.dtype, tasks: int, sizes: Sequence[int], arrays: Sequence[Strided]) -> None:
    """Run all tasks of kernel `name` ("forward" or "backward").

    `sizes` are the fields GROUPS…OPTIONS of the record of a call (see `kernels`), `arrays` in the order of the task's
    arguments.
    """
    if INTERPRETED:
        _run_as_python(name, dtype, tasks, sizes, arrays)
        return
    numbers = [0, tasks, *sizes]
    for tensor, batch_stride, time_stride in arrays:
        numbers += tensor.data_ptr() + _first(tensor, time_stride) * tensor.element_size(), batch_stride, time_stride
    call = array("q", numbers)
    _run_on_threads(_compiled(name, dtype, _product(sizes)), call.buffer_info()[0], min(torch.get_num_threads(), tasks))


def _product(sizes: Sequence[int]) -> tuple[int, ...]:
    return kernels.PRODUCT if sizes[kernels.FEATURES - kernels.GROUPS] else kernels.NO_PRODUCT


@cache
def _compiled(name: str, dtype: torch.dtype, product: tuple[int, ...]) -> int:
    """The address of an entry point. Compiled once and kept on disk, unless there is no place to keep it."""
    sequence, state, blocks = kernels.VARIANTS[dtype]
    entry = getattr(kernels, f"{name}_entry")(_stamp(), sequence, state, (blocks, product))
    signature = numba.types.void(numba.types.voidptr)
    try:
        compiled = numba.cfunc(signature, cache=True, error_model="numpy")(entry)
    except (RuntimeError, OSError):  # no folder for the cache can be written
        compiled = numba.cfunc(signature, error_model="numpy")(entry)
    _compiled_entries.append(compiled)
    return cast(int, compiled.address)


@cache
def _stamp() -> str:
    """A hash of all that the machine code is made from; Numba itself compares the processor, and kernels.py alone."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(repr((numba.__version__, llvmlite.__version__, sources)).encode()).hexdigest()


_compiled_entries: list[Any] = []  # keeps the machine code alive


def _run_on_threads(entry: int, call: int, threads: int) -> None:
    if threads == 1:
        _function(entry)(call)
        return
    parallel = _openmp_parallel()
    if parallel is not None:
        parallel(entry, call, threads, 0)
        return
    helpers = [_pool().submit(_function(entry), call) for _ in range(threads - 1)]
    try:
        _function(entry)(call)
    finally:  # also when interrupted: they read memory that the caller would free
        wait(helpers)
    for helper in helpers:
        helper.result()


@cache
def _function(entry: int) -> Entry:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(entry)


@cache
def _openmp_parallel() -> Any | None:
    """GOMP_parallel(function, argument, threads, flags) of the OpenMP runtime that PyTorch runs on, if it has one."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            # looked up through libtorch_cpu, the symbol is the one of the runtime that it depends on
            parallel = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    return None


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="indrnn")


def _run_as_python(name: str, dtype: torch.dtype, tasks: int, sizes: Sequence[int], arrays: Sequence[Strided]) -> None:
    _, _, blocks = kernels.VARIANTS[dtype]
    arguments = [(_Shifted(_flat(tensor), _first(tensor, t)), b, t) for tensor, b, t in arrays]
    for task in range(tasks):
        getattr(kernels, f"{name}_task")(task, sizes, (blocks, _product(sizes)), *arguments)


def _flat(tensor: Tensor) -> Any:
    """The memory of a tensor as a NumPy array; NumPy has no bfloat16, so that comes as uint16."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.detach().as_strided((span,), (1,))
    return (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()


def _first(tensor: Tensor, time_stride: int) -> int:
    """Where the first step that a kernel reads lies: at the end of time, if time runs backwards."""
    return -time_stride * (tensor.shape[1] - 1) if time_stride < 0 else 0


class _Shifted:
    """A flat array whose element 0 is the element `first` of `array`; indices may be negative."""

    def __init__(self, array: Any, first: int) -> None:
        self.array, self.first, self.dtype = array, first, array.dtype

    def _at(self, index: Any) -> Any:
        if isinstance(index, slice):
            return slice(index.start + self.first, index.stop + self.first)
        return index + self.first

    def __getitem__(self, index: Any) -> Any:
        return self.array[self._at(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.array[self._at(index)] = value
