"""Compiles the Triton kernels for GPUs that are not here, and reads what the compiler made of them."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from indrnn.recurrence.triton_gpu.backward import backward_kernel
from indrnn.recurrence.triton_gpu.chooser import WITHOUT_SCAN, Tile, choose
from indrnn.recurrence.triton_gpu.forward import forward_kernel

_POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16"}
_SEQUENCES = ("x_ptr", "h_ptr", "dh_ptr", "dx_ptr")
_H = 128
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)")
_ARITHMETIC = {"FFMA", "FADD", "FMUL", "FMNMX", "DFMA", "DADD", "DMUL", "STG", "BAR"}


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel.

    ``packed``: the strides along T are constants. ``masked``: neither H nor T is a whole number of tiles.
    ``everything``: with bias and statistics (forward) or their gradients (backward).
    """

    direction: str
    tile: Tile
    nonlinearity: str = "relu"
    dtype: torch.dtype = torch.float32
    packed: bool = True
    masked: bool = False
    everything: bool = True


def shipped() -> list[Variant]:
    """The kernels that need the most registers: the most steps of each kind, every dtype and layout."""
    variants = []
    for direction, dtype, packed in product(("forward", "backward"), _POINTERS, (True, False)):
        # One thread per chain at B·H = 2^16, eight at 2^12; the odd T is masked.
        for B, T in ((32, 784), (32, 100_003), (512, 100_003)):
            tile = choose(direction, "relu", B, T, _H, dtype == torch.float64, packed)
            masked = T % (tile.chunks * tile.steps) != 0
            variants.append(Variant(direction, tile, "relu", dtype, packed, masked))
    for direction, nonlinearity in product(("forward", "backward"), (*WITHOUT_SCAN, "identity")):
        tile = choose(direction, nonlinearity, 32, 100_003, _H, False, True)
        variants.append(Variant(direction, tile, nonlinearity, masked=True))
    return variants


def compile_for(variant: Variant, capability: int) -> Any:
    """The compiled kernel (Triton's, with ``.asm``) for a compute capability, 90 for 9.0."""
    kernel = forward_kernel if variant.direction == "forward" else backward_kernel
    state = torch.float64 if variant.dtype == torch.float64 else torch.float32
    absent = ["h0_ptr", "dh_last_ptr"]
    if variant.dtype == state:
        absent.append("h_last_ptr")
    if not variant.everything:
        absent += ["bias_ptr", "mean_ptr", "deviation_ptr", "dmean_ptr", "dvariance_ptr"]
    fixed: dict[str, Any] = {
        **dict.fromkeys(("X_STEP", "H_STEP", "DH_STEP", "DX_STEP"), _H if variant.packed else 0),
        **dict.fromkeys(("WHOLE", "FULL"), not variant.masked), "NONLINEARITY": variant.nonlinearity,
        **variant.tile.constants(1, 1), **dict.fromkeys(absent),
    }  # fmt: skip
    constants = {name: fixed[name] for name in kernel.arg_names if name in fixed}
    pointers = {name: _POINTERS[variant.dtype if name in _SEQUENCES else state] for name in kernel.arg_names}
    signature = {name: pointers[name] if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.tile.options)


def most_loads_in_flight(compiled: Any) -> int:
    """The longest run of loads from global memory without arithmetic, store or barrier between them."""
    longest = run = 0
    for line in _examine(compiled, "nvdisasm", "-c").splitlines():
        instruction = _INSTRUCTION.match(line)
        if instruction:
            run = run + 1 if instruction[1] == "LDG" else 0 if instruction[1] in _ARITHMETIC else run
            longest = max(longest, run)
    return longest


def faults(variant: Variant, compiled: Any) -> list[str]:
    """The faults of a compiled kernel: spills, too many registers, loads that wait, changes of layout."""
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _examine(compiled, "cuobjdump", "--dump-resource-usage")))
    problems = []
    if spilled := int(usage["STACK"]) + int(usage["LOCAL"]):
        problems.append(f"{spilled} bytes of registers spilled")
    if int(usage["REG"]) * 32 * variant.tile.warps > 65_536:
        problems.append(f"{usage['REG']} registers for each of {32 * variant.tile.warps} threads")
    streams = 1 if variant.direction == "forward" else 2
    in_flight = most_loads_in_flight(compiled)
    if in_flight < streams * variant.tile.steps:
        problems.append(f"only {in_flight} of {streams * variant.tile.steps} loads in flight")
    # The threads of a warp own consecutive units: loads are coalesced, and only scans and sums use shared memory.
    layouts = compiled.asm["ttgir"]
    if "ttg.convert_layout" in layouts or "order = [0, 1]" in layouts:
        problems.append("a change of layout, or one that is not coalesced")
    return problems


def _examine(compiled: Any, tool: str, option: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        return subprocess.run([path, option, cubin], capture_output=True, text=True, check=True).stdout
