"""Running the kernels: compiled, on the threads of PyTorch's own pool; or, with NUMBA_DISABLE_JIT=1, as Python.

PyTorch's OpenMP threads spin for a while after each of its operations. A second pool of threads, such as Numba's,
would compete with them for the cores; so the kernels are handed to the same pool through the OpenMP runtime that
PyTorch has loaded. Where that runtime lacks the entry point (macOS, Windows), threads of Python's run them.
"""

import ctypes
import hashlib
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

from . import kernels
from .vector import INTERPRETED

# a tensor with stride 1 along its last dimension, and its strides along batch and time; a negative one along time means
# that time runs from the last step to the first
Strided = tuple[Tensor, int, int]
Entry = Callable[[int], None]


def run(name: str, dtype: torch.dtype, tasks: int, sizes: Sequence[int], arrays: Sequence[Strided]) -> None:
    """Run all tasks of kernel `name` ("forward" or "backward").

    `sizes` are groups, B, T, H, kind, `statistics` (forward) or `given` (backward) and kept_rows, `arrays` in the order
    of the task's arguments.
    """
    if INTERPRETED:
        _run_as_python(name, dtype, tasks, sizes, arrays)
        return
    # in the order of kernels.COUNTER, THREADS, TASKS, GROUPS, ..., ARRAYS
    numbers = [0, 0, tasks, *sizes]
    for tensor, batch_stride, time_stride in arrays:
        numbers += tensor.data_ptr() + _first(tensor, time_stride) * tensor.element_size(), batch_stride, time_stride
    call = array("q", numbers)
    _run_on_threads(_compiled(name, dtype), call.buffer_info()[0], min(torch.get_num_threads(), tasks))


@cache
def _compiled(name: str, dtype: torch.dtype) -> int:
    """The address of an entry point. Compiled once and kept on disk, unless there is no place to keep it."""
    entry = getattr(kernels, f"{name}_entry")(_stamp(), *kernels.VARIANTS[dtype])
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
    lanes = kernels.VARIANTS[dtype][2:]
    arguments = [[_Shifted(_flat(tensor), _first(tensor, t)), b, t] for tensor, b, t in arrays]
    for task in range(tasks):
        getattr(kernels, f"{name}_python")(task, sizes, *lanes, *arguments)


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
