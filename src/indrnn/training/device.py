"""Device selection and process-wide settings: denormals, memory, precision."""

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ..errors import RunError, UserError
from ..layers import sequences_in
from ..record.result import cpu_instructions

# glibc's malloc.h: parameters of mallopt.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
OMP_PAUSE_HARD = 2  # OpenMP 5.0, section 3.2.44: end the worker threads; the next parallel region starts new ones.


def resolve_device(name: str) -> torch.device:
    """The device for ``auto`` (a CUDA GPU if there is one, else the CPU), ``cpu``, ``cuda`` or ``mps``.

    Raises:
        UserError: this machine or this build of PyTorch has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        build = f"this PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "it is a CPU build"
        raise UserError(f"device=cuda: PyTorch finds no usable GPU and driver ({build}); use device=cpu")
    if name == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: Apple's Metal is not available; use device=cpu")
    return torch.device(name)


@contextmanager
def torch_defaults() -> Iterator[None]:
    """New tensors are float32 on the CPU within the block, whatever defaults the caller has set."""
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None if device.type == "cpu" else device)


def prepare_process(device: torch.device) -> None:
    """Keep freed memory, and treat denormal numbers as zero in this thread and in PyTorch's worker threads.

    Otherwise glibc maps every large tensor again, page by page: a step of nn.LSTM (128 units, batch 32, 784 steps) took
    0.38 s instead of 0.22 s, one of the 6 x 128 IndRNN 0.30 s instead of 0.26 s (one core of an AMD EPYC, PyTorch 2.15,
    best of 8).

    Raises:
        RunError: the run is on a CPU that cannot flush denormals, so its timings would not be comparable.
    """
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    if not torch.set_flush_denormal(True) and device.type == "cpu":
        raise RunError("this CPU cannot flush denormal numbers (no SSE3 or NEON): timings would not be comparable")
    # Workers inherit the setting when they start, so those of PyTorch's OpenMP runtime that already run are ended.
    for library in (Path(torch.__file__).parent / "lib").glob("lib*omp*.so*"):
        with suppress(OSError, AttributeError):  # not loaded, or without this function
            ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD).omp_pause_resource_all(OMP_PAUSE_HARD)


def return_freed_memory() -> None:
    """Return the memory that `prepare_process` keeps: after an evaluation, whose tensors are larger than a step's."""
    trim = _libc("malloc_trim")
    if trim is not None:
        trim(0)


def _libc(name: str) -> "ctypes._NamedFuncPointer | None":
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def bfloat16_refusal() -> str | None:
    """Why ``trainer.precision=bfloat16`` would not be faster on this CPU; None if it is."""
    if cpu_instructions().endswith("-BF16") and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return "without AMX or AVX512-BF16, and oneDNN in PyTorch, bfloat16 products would be slower than float32 ones"


def precision_refusal(precision: str, device: torch.device) -> str | None:
    """Why ``trainer.precision`` would gain nothing on this device; None if it can be used."""
    if precision == "tf32" and device.type != "cuda":
        return f"only NVIDIA GPUs have it, and this run is on {device.type}"
    return bfloat16_refusal() if precision == "bfloat16" and device.type == "cpu" else None


def set_precision(precision: str, device: torch.device) -> None:
    """Set how float32 matrices are multiplied, in matmul and cuDNN alike, for the whole process.

    PyTorch's default is float32 in matmul but TF32 in cuDNN, which would favor the LSTM. For bfloat16 see
    `autocast_context`.

    Raises:
        UserError: bfloat16 on a CPU that gains nothing from it, or TF32 on anything but an NVIDIA GPU.
    """
    reason = precision_refusal(precision, device)
    if reason is not None:
        raise UserError(f"trainer.precision={precision}: {reason}; use trainer.precision=float32")
    tf32 = precision == "tf32"
    mode = "tf32" if tf32 else "ieee"
    # PyTorch's older switches come first: its getters raise if they contradict the newer ones.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some versions recommend the newer switches
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = mode
    torch.backends.cudnn.conv.fp32_precision = mode  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn.fp32_precision = mode  # type: ignore[attr-defined]


@contextmanager
def autocast_context(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in ``precision`` within the block.

    bfloat16 on a GPU is autocast. On a CPU, where autocast would also change nn.LSTM, it applies only to the sequences
    of IndRNN layers and the factors of their products; state, statistics, weights, classifier and loss stay float32.
    """
    bfloat16, on_cpu = precision == "bfloat16", device.type == "cpu"
    # A captured graph would reuse cached casts of old weights in its second replay.
    with (
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16 and not on_cpu, cache_enabled=False),
        sequences_in(torch.bfloat16 if bfloat16 and on_cpu else None),
    ):
        yield
