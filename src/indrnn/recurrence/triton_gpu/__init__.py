"""The recurrence in Triton, for CUDA GPUs. See `indrnn.recurrence.dispatch` for the interface.

Letters: B batch, T time steps, H hidden units.

Bytes moved, and so the time to expect (predicted, not yet measured; H200 at 4.3 TB/s, float32): the forward reads x and
writes h, 8·B·T·H bytes; the backward reads h and the gradient and writes dx, 12·B·T·H; statistics, bias and all else
add less than 1 %. At B = 32, T = 784, H = 128 that is 25.7 MB, 6 µs, and 38.5 MB, 9 µs; with the launch, the latency of
the first load and the last store, and the arithmetic (3–4 µs, most of it under the loads) 8–12 and 12–16 µs. At B = 512
it is 96 and 143 µs, and the rest should be hidden.

With TRITON_INTERPRET=1 set before Triton is first imported, the same kernels run on CPU tensors, interpreted.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from subprocess import CalledProcessError

import torch
import triton
from torch import Tensor

from ..dispatch import Cell, InputGradients, KernelError, OutputGradients, Outputs
from .backward import launch_backward
from .chooser import STRATEGIES, Tile, choose
from .forward import launch_forward

NONLINEARITIES = ("relu", "tanh", "identity", "leaky_relu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
MINIMUM_CAPABILITY = (7, 0)
_INTERPRETED = bool(triton.knobs.runtime.interpret)
_forced = "auto"


def unavailable_reason(device: torch.device) -> str | None:
    """See `reference.unavailable_reason`."""
    if _INTERPRETED and device.type == "cpu":
        return None
    if device.type != "cuda":
        return "it needs a CUDA GPU (or TRITON_INTERPRET=1 in the environment, to test it slowly on the CPU)"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU"
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA, and the kernels are written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return f"it needs a GPU of compute capability 7.0 or later, this one has {capability[0]}.{capability[1]}"
    return None


@contextmanager
def forced(strategy: str) -> Iterator[None]:
    """Every launch within it, of the forward and of the backward, uses this strategy; for benchmarks and tests."""
    global _forced
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}")
    before, _forced = _forced, strategy
    try:
        yield
    finally:
        _forced = before


def forward(x: Tensor, bias: Tensor | None, cell: Cell, statistics: bool, *, tile: Tile | None = None) -> Outputs:
    """See `reference.forward`. ``tile`` overrides the chooser."""
    if tile is None:
        packed = x.stride(1) == x.shape[2]
        tile = choose("forward", cell.nonlinearity, *x.shape, x.element_size() == 8, packed, _forced)
    with _launching_on(x):
        return launch_forward(x, bias, cell, statistics, tile)


def backward(
    gradients: OutputGradients, h: Tensor, cell: Cell, x: Tensor | None = None, *, tile: Tile | None = None
) -> InputGradients:
    """See `reference.backward`. ``tile`` overrides the chooser."""
    if tile is None:
        H = h.shape[2]
        packed = h.stride(1) == H and (gradients.dh is None or gradients.dh.stride(1) == H)
        tile = choose("backward", cell.nonlinearity, *h.shape, h.element_size() == 8, packed, _forced)
    with _launching_on(h):
        return launch_backward(gradients, h, cell, tile)


@contextmanager
def _launching_on(tensor: Tensor) -> Iterator[None]:
    """Launch on the device of a tensor; Triton uses the current one. Its exceptions become a `KernelError`."""
    elsewhere = tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device()
    try:
        with torch.cuda.device(tensor.device) if elsewhere else nullcontext():
            yield
    except Exception as failure:
        # OutOfResources, PTXASError and CompilationError are not RuntimeErrors; CUDA's own errors are.
        without_compiler = "C compiler" in str(failure) or isinstance(failure, CalledProcessError | FileNotFoundError)
        if isinstance(failure, RuntimeError) and not without_compiler:
            raise
        reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
        if without_compiler:
            reason = (
                f"it needs gcc and Python's headers (Debian: apt install gcc python3-dev) to build launchers; {reason}"
            )
        raise KernelError(f"triton cannot run its kernels ({reason}); backend=scan needs none") from failure
