"""What the kernels need of the machine: pointers, an atomic counter, and flushing of denormals.

An entry point is a C function ``void (*)(int64_t *call)`` that several threads run at once on one call: each takes a
number of its own from the counter call[1], and then the next task from the counter call[0] until none is left. It
flushes denormals to zero in its own thread for as long as it runs, because gradients that vanish over hundreds of steps
are denormal, and those cost a hundred times a normal number; ``torch.set_flush_denormal`` reaches the calling thread
only.
"""

# mypy: ignore-errors
# (see `vector`)

import platform

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

_MACHINE = platform.machine().lower()
_X86 = _MACHINE in ("x86_64", "amd64", "i386", "i686")
_ARM = _MACHINE in ("aarch64", "arm64")
# x86: flush to zero and denormals are zero, in MXCSR; ARM: FZ, in FPCR; nothing to set elsewhere
FLUSH = 0x8040 if _X86 else 1 << 24 if _ARM else 0


@intrinsic
def pointer_at(typing, address):
    """The integer `address` as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def take(typing, call, which):
    """The 64-bit integer call[which], which grows by one, atomically."""

    def generate(context, builder, signature, arguments):
        pointer = builder.gep(builder.bitcast(arguments[0], ir.IntType(64).as_pointer()), [arguments[1]])
        return builder.atomic_rmw("add", pointer, ir.IntType(64)(1), "monotonic")

    return types.int64(types.voidptr, types.int64), generate


@intrinsic
def float_mode(typing):
    """The processor's floating-point control register."""

    def generate(context, builder, signature, arguments):
        if _X86:
            register = builder.alloca(ir.IntType(32))
            builder.call(_mxcsr(builder, "st"), [builder.bitcast(register, ir.IntType(8).as_pointer())])
            return builder.zext(builder.load(register), ir.IntType(64))
        if _ARM:
            return builder.asm(ir.FunctionType(ir.IntType(64), []), "mrs $0, fpcr", "=r", [], side_effect=True)
        return ir.IntType(64)(0)

    return types.int64(), generate


@intrinsic
def set_float_mode(typing, mode):
    """Set what `float_mode` reads, for this thread."""

    def generate(context, builder, signature, arguments):
        if _X86:
            register = builder.alloca(ir.IntType(32))
            builder.store(builder.trunc(arguments[0], ir.IntType(32)), register)
            builder.call(_mxcsr(builder, "ld"), [builder.bitcast(register, ir.IntType(8).as_pointer())])
        elif _ARM:
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
            builder.asm(kind, "msr fpcr, $0", "r", [arguments[0]], side_effect=True)
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _mxcsr(builder, direction):
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
    return builder.module.declare_intrinsic(f"llvm.x86.sse.{direction}mxcsr", (), kind)
