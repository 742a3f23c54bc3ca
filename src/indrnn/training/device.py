"""The device that a run uses, and how it computes there: denormals, memory, precision."""

import ctypes
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..config.schema import Config
from ..data import make_task
from ..errors import RunError, UserError
from ..layers import sequences_in
from ..record.result import cpu_instructions

# glibc's malloc.h: parameters of mallopt.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
OMP_PAUSE_HARD = 2  # OpenMP 5.0, section 3.2.44: give up the threads; the next parallel region starts new ones.


def resolve_device(name: str) -> torch.device:
    """The device for ``auto`` (a CUDA GPU if there is one, else the CPU), ``cpu``, ``cuda`` or ``mps``.

    Raises UserError if this machine, or this build of PyTorch, has no such device.
    """
    if name == "auto":
        return resolve_device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        if torch.version.cuda is None and torch.version.hip is None:
            raise UserError("device=cuda: this PyTorch is built without CUDA; install a CUDA build or use device=cpu")
        raise UserError("device=cuda: no usable CUDA GPU or driver was found here; use device=cpu")
    if name == "mps":
        if torch.backends.mps.is_available():
            return torch.device("mps")
        raise UserError("device=mps: Apple's Metal is not available here; use device=cpu")
    if name == "cpu":
        return torch.device("cpu")
    raise UserError(f"device={name} is unknown; choose from auto, cpu, cuda, mps")


def check_memory(cfg: Config, device: torch.device) -> None:
    """Raises UserError if the device has less memory than the run needs at the very least: the system would kill the
    process without a message, perhaps not before the first evaluation."""
    have, needed = _memory(device), _least_memory(cfg)
    if have is not None and needed > have:
        raise UserError(
            f"model.hidden_size={getattr(cfg.model, 'hidden_size', None)}, "
            f"trainer.batch_size={cfg.trainer.batch_size}, trainer.eval_batch_size={cfg.trainer.eval_batch_size} and "
            f"{make_task(cfg.data).length:,} time steps need at least {needed / 2**30:,.0f} GiB; "
            f"device={device.type} has {have / 2**30:,.0f}; lower one of them, or the number of layers"
        )


def _least_memory(cfg: Config) -> int:
    """The fewest bytes that training and evaluating the network need: each layer's output for a whole batch (in an
    evaluation, that of one layer and its input), and four numbers for each recurrent or square weight. 0 for a network
    from outside, about which nothing is known."""
    model: Any = cfg.model
    if "_target_" in model:
        return 0
    trainer, size = cfg.trainer, int(model.hidden_size)
    if "growth" in model:
        bottleneck = model.bottleneck * model.growth
        outputs = size + sum(model.block_layers) * (bottleneck + model.growth)
        weights = sum(model.block_layers) * bottleneck * model.growth
    else:
        layers = model.num_layers if "num_layers" in model else 2 * model.num_blocks + 1
        outputs, between = layers * size, layers - 1
        gates = {"lstm": 4, "rnn": 1}.get(model.name, 0)
        weights = (gates * (layers + between) or between) * size**2
    sequences = min(trainer.eval_batch_size, getattr(cfg.data, "validation_size", trainer.eval_batch_size))
    return 4 * make_task(cfg.data).length * max(trainer.batch_size * outputs, 2 * sequences * size) + 16 * weights


def _memory(device: torch.device) -> int | None:
    """The device's memory in bytes, or the container's limit; None if it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return None
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            sizes.append(int((Path("/sys/fs/cgroup") / limit).read_text()))
    return min(sizes)


def prepare_process(device: torch.device) -> None:
    """Make timings on a CPU fair and steady, for the whole process: `keep_freed_memory` and `flush_denormals`. Call it
    before any operator starts worker threads."""
    keep_freed_memory()
    flush_denormals(device)


def flush_denormals(device: torch.device) -> None:
    """Treat denormal numbers as zero in this thread and in every thread that PyTorch's CPU operators use.

    ``torch.set_flush_denormal`` sets this for the calling thread, and threads started later inherit it, but OpenMP
    workers that an earlier operator started do not, and their part of each matrix product stays slow. So the workers
    are dismissed (new ones inherit the setting) and the effect is checked on a product that all of them share.
    (Backward runs in the calling thread. The threads of our own kernels set it themselves.)

    A run on a CPU that cannot flush denormals is refused with RunError: its times would not be fair. For a run on
    another device there is only a warning, also for workers that cannot be dismissed, in a notebook for example.
    """
    if not torch.set_flush_denormal(True):
        reason = "this CPU cannot flush denormal numbers (no SSE3 or NEON), so its timings would not be fair"
        if device.type == "cpu":
            raise RunError(reason)
        warnings.warn(reason, stacklevel=2)
        return
    if _workers_flush():
        return
    for library in _openmp_libraries():
        pause = getattr(ctypes.CDLL(library), "omp_pause_resource_all", None)
        if pause is not None:
            pause(OMP_PAUSE_HARD)
    if not _workers_flush():
        warnings.warn(
            "denormal numbers are not flushed in PyTorch's worker threads, which were started before this run, so it "
            "may be slower than necessary; start it in a new process",
            stacklevel=2,
        )


def keep_freed_memory() -> None:
    """Let the allocator keep the memory that tensors free for the next step, instead of returning it to the system.

    glibc maps every large block afresh, and clears its pages one fault at a time: 54,500 faults in a training step of
    nn.LSTM (128 units, batch 32, 784 steps), which took 0.38 s of one core with them and 0.22 s without; 10,000 and
    0.30 against 0.26 s for the 6 x 128 IndRNN (AMD EPYC, PyTorch 2.15, best of 8). As with denormals, the baseline
    would suffer most. Other C libraries have no such setting and are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Give back to the system what `keep_freed_memory` has kept: after an evaluation, whose tensors are larger than
    those of a step and leave gaps that steps do not fill. A run of the fast protocol's network on mnist5k (float32, an
    evaluation every 40 steps, one thread of a Xeon, PyTorch 2.14, one run each) held 1.0 GB between evaluations with
    this, and without 1.8 after the first and 2.3 after the ninth.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def _workers_flush() -> bool:
    """Whether all threads flush 1e-40, those of a matrix product and those of an elementwise operation."""
    tiny = torch.full((2048, 64), 1e-20)
    numbers = torch.full((1 << 20,), 1e-40)
    return not bool((tiny @ tiny.T).any()) and not bool((numbers * 1.0).any())


def _openmp_libraries() -> list[str]:
    """The OpenMP runtimes that this process has loaded (Linux)."""
    if not sys.platform.startswith("linux"):
        return []
    maps = Path("/proc/self/maps").read_text(errors="replace")
    return sorted(set(re.findall(r"(/\S*omp[^/\s]*\.so\S*)$", maps, re.MULTILINE)))


def bfloat16_refusal() -> str | None:
    """Why ``trainer.precision=bfloat16`` would not be faster on this CPU; None if it is.

    On a processor without the instructions oneDNN emulates bfloat16 products, which takes longer than float32 ones.
    """
    if not cpu_instructions().endswith("-BF16"):
        return "this CPU has neither AMX nor AVX512-BF16, so bfloat16 products would be slower than float32 ones"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if not any(name in limit for name in ("ALL", "DEFAULT", "BF16", "FP16", "AMX", "AVX10")):
        return f"ONEDNN_MAX_CPU_ISA={limit} keeps oneDNN from the bfloat16 instructions of this CPU; unset it"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this build of PyTorch has no oneDNN with bfloat16 products"
    return None


def precision_refusal(precision: str, device: torch.device) -> str | None:
    """Why ``trainer.precision`` would gain nothing on this device; None if it can be used."""
    if precision == "tf32" and device.type != "cuda":
        return f"only NVIDIA GPUs have it, and this run is on {device.type}"
    return bfloat16_refusal() if precision == "bfloat16" and device.type == "cpu" else None


def set_precision(precision: str, device: torch.device) -> None:
    """Set how float32 matrices are multiplied from now on, in matmul and cuDNN alike.

    By default PyTorch uses float32 in matmul but TF32 in cuDNN, which would favour the LSTM. For bfloat16 see
    `computing`.

    Raises:
        UserError: bfloat16 on a CPU that gains nothing from it, or TF32 on anything but an NVIDIA GPU, where it has no
            effect.
    """
    reason = precision_refusal(precision, device)
    if reason is not None:
        raise UserError(f"trainer.precision={precision}: {reason}; use trainer.precision=float32")
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]
    mode = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = mode
    # The older switch first: if it contradicts the newer ones, cudnn.flags raises, and with it torch.export.
    torch.backends.cudnn.allow_tf32 = mode == "tf32"
    torch.backends.cudnn.conv.fp32_precision = mode  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn.fp32_precision = mode  # type: ignore[attr-defined]


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Within the block, compute in ``precision``. bfloat16 is used on a GPU wherever autocast considers it safe; on a
    CPU only for the sequences of IndRNN layers and the factors of their products. Running state, statistics, folded
    scale and shift, weights, classifier and loss stay float32 there, and so does all of nn.LSTM, which autocast would
    change.

    The alternatives were float32 tensors whose factors oneDNN rounds (``mkldnn.matmul.fp32_precision="bf16"``), and
    autocast. A step of 6 x 128 units, batch 32, 784 steps took 0.77 of the time of its float32 products this way, 1.17
    and 0.80 with the alternatives, 1.89 in float32 (one thread of a Xeon with AMX, best of 13, other work on the
    machine). After 15 and 60 updates all gradients together were 2.6 and 3.0 % off those in float64, against 2.1 and
    2.3 %, and 3.1 and 1.5 %.
    """
    bfloat16, on_cpu = precision == "bfloat16", device.type == "cpu"
    # Cached casts of weights would still be used after a captured graph's first replay.
    with (
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16 and not on_cpu, cache_enabled=False),
        sequences_in(torch.bfloat16 if bfloat16 and on_cpu else None),
    ):
        yield


def peak_memory_bytes(device: torch.device) -> int | None:
    """Largest amount allocated on a CUDA device; elsewhere the process's largest resident set (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its work (before reading a clock)."""
    torch.get_device_module(device).synchronize()
