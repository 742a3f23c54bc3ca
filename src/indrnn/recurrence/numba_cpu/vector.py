"""What the kernels need that Numba lacks: short vectors in registers, pointers, an atomic counter, and flushing of
denormals.

Numba leaves the recurrence's loop scalar (its output is also its input, which defeats the vectoriser), so the kernels
use LLVM's vectors explicitly. A `Vector` holds neighbouring values; LLVM splits it into the registers the processor
has. A tuple of that length, `lanes`, asks for one, because the length of a tuple is part of its type. With
NUMBA_DISABLE_JIT=1 the same functions work on NumPy arrays of that length.

bfloat16 is an array of uint16, the upper halves of float32 values: `load` gives float32, `store` rounds to it.

Arithmetic is IEEE's, and `fused` says which a·b + c is rounded once, where the processor can. Left to LLVM, the choice
differed between the kernels of two dtypes.

An entry point is a C function ``void (*)(int64_t *call)`` that several threads run at once on one call: each takes
tasks from the counter call[0] until none is left. It flushes denormals to zero in its own thread for as long as it
runs, because gradients that vanish over hundreds of steps are denormal, and those cost a hundred times a normal number;
``torch.set_flush_denormal`` reaches the calling thread only.
"""

# mypy: ignore-errors
# (Numba calls these functions with types, then with LLVM values; its stubs describe neither)

import operator
import platform

import numpy as np
from llvmlite import ir
from numba.core import config, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, overload, register_model


class Vector(types.Type):
    """`lanes` values of the Numba type `dtype`."""

    def __init__(self, dtype, lanes):
        self.dtype, self.lanes = dtype, lanes
        super().__init__(name=f"Vector({dtype}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector: Vector):
        super().__init__(manager, vector, _ir(vector))


def _ir(vector: Vector) -> ir.VectorType:
    return ir.VectorType(ir.FloatType() if vector.dtype == types.float32 else ir.DoubleType(), vector.lanes)


def _loaded(array_type, lanes) -> Vector:
    return Vector(types.float32 if array_type.dtype == types.uint16 else array_type.dtype, lanes)


def _integers(bits: int, vector: Vector, value: int | None = None):
    """The LLVM type of as many integers, or with `value` that many times that value."""
    kind = ir.VectorType(ir.IntType(bits), vector.lanes)
    return kind if value is None else ir.Constant(kind, [value] * vector.lanes)


class _BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite lacks."""

    def _to_string(self):
        return "bfloat"


_BFLOAT16 = _BFloat16()


def _pointer(context, builder, array_type, array, index, kind: ir.Type):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


@intrinsic
def _load(typing, array, index, lanes):
    vector = _loaded(array, len(lanes))

    def generate(context, builder, signature, arguments):
        return _read(context, builder, array, *arguments[:2], vector)

    return vector(array, types.intp, lanes), generate


def _read(context, builder, array_type, array, index, vector: Vector):
    half = array_type.dtype == types.uint16
    kind = _integers(16, vector) if half else _ir(vector)
    pointer = _pointer(context, builder, array_type, array, index, kind)
    values = builder.load(pointer, align=array_type.dtype.bitwidth // 8)
    if not half:
        return values
    upper = builder.shl(builder.zext(values, _integers(32, vector)), _integers(32, vector, 16))
    return builder.bitcast(upper, _ir(vector))


@intrinsic
def _spread(typing, array, index, lanes):
    vector = _loaded(array, len(lanes))

    def generate(context, builder, signature, arguments):
        value = _read(context, builder, array, *arguments[:2], _loaded(array, 1))
        return _splat(builder, builder.extract_element(value, ir.IntType(32)(0)), vector)

    return vector(array, types.intp, lanes), generate


def _splat(builder, value, vector: Vector):
    one = builder.insert_element(ir.Constant(_ir(vector), ir.Undefined), value, ir.IntType(32)(0))
    order = ir.Constant(ir.VectorType(ir.IntType(32), vector.lanes), None)
    return builder.shuffle_vector(one, one, order)


@intrinsic
def _store(typing, array, index, vector):
    def generate(context, builder, signature, arguments):
        values = arguments[2]
        if array.dtype == types.uint16:
            values = _bfloat16(context, builder, values, vector)
        pointer = _pointer(context, builder, array, *arguments[:2], values.type)
        builder.store(values, pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


def wide_registers() -> bool:
    """Whether the processor that is compiled for has AVX-512: 32 registers of 16 float32."""
    return "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[-1].split(",")


def rounds_by_instruction(context) -> bool:
    """Whether the processor that is compiled for has an instruction for it (by what Numba's cache on disk goes by)."""
    return "+avx512bf16" in context.codegen().magic_tuple()[-1].split(",")


def _bfloat16(context, builder, values, vector: Vector):
    """The nearest bfloat16 values, ties to even, as integers."""
    if rounds_by_instruction(context):
        return builder.bitcast(builder.fptrunc(values, ir.VectorType(_BFLOAT16, vector.lanes)), _integers(16, vector))
    bits = builder.bitcast(values, _integers(32, vector))
    half = _integers(32, vector, 16)
    odd = builder.and_(builder.lshr(bits, half), _integers(32, vector, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _integers(32, vector, 0x7FFF))), half)
    not_a_number = builder.fcmp_unordered("uno", values, values)
    return builder.trunc(builder.select(not_a_number, _integers(32, vector, 0x7FC0), rounded), _integers(16, vector))


@intrinsic
def _zeros(typing, like):
    return like(like), lambda context, builder, signature, arguments: ir.Constant(_ir(like), None)


@intrinsic
def _convert(typing, a, like):
    result = Vector(like.dtype, a.lanes)

    def generate(context, builder, signature, arguments):
        if a.dtype == like.dtype:
            return arguments[0]
        instruction = builder.fpext if like.dtype == types.float64 else builder.fptrunc
        return instruction(arguments[0], _ir(result))

    return result(a, like), generate


def _arithmetic(instruction: str):
    @intrinsic
    def operate(typing, a, b):
        def generate(context, builder, signature, arguments):
            return getattr(builder, instruction)(*arguments)

        return a(a, b), generate

    return operate


def _between_vectors(symbol, operate):
    @overload(symbol)
    def _(a, b):  # Numba compares the two signatures, annotations included
        if isinstance(a, Vector) and a == b:
            return lambda a, b: operate(a, b)
        return None


_between_vectors(operator.add, _arithmetic("fadd"))
_between_vectors(operator.sub, _arithmetic("fsub"))
_between_vectors(operator.mul, _arithmetic("fmul"))


@intrinsic
def _times(typing, a, factor):
    def generate(context, builder, signature, arguments):
        return builder.fmul(arguments[0], _splat(builder, arguments[1], a))

    return a(a, a.dtype), generate


@intrinsic
def _fused(typing, a, b, c):
    def generate(context, builder, signature, arguments):
        name = f"llvm.fmuladd.v{a.lanes}f{a.dtype.bitwidth}"
        operation = builder.module.globals.get(name)
        if operation is None:
            operation = ir.Function(builder.module, ir.FunctionType(_ir(a), [_ir(a)] * 3), name)
        return builder.call(operation, arguments)

    return a(a, b, c), generate


@intrinsic
def _choose(typing, by, positive, other):
    def generate(context, builder, signature, arguments):
        condition = builder.fcmp_ordered(">", arguments[0], ir.Constant(_ir(by), None))
        return builder.select(condition, arguments[1], arguments[2])

    return by(by, by, by), generate


@intrinsic
def _relu(typing, a):
    def generate(context, builder, signature, arguments):
        zero = ir.Constant(_ir(a), None)
        return builder.select(builder.fcmp_ordered("<", arguments[0], zero), zero, arguments[0])

    return a(a), generate


INTERPRETED = bool(config.DISABLE_JIT)

if INTERPRETED:

    def load(array, index, lanes):
        """The vector array[index : index + len(lanes)]; of bfloat16, as float32."""
        values = array[index : index + len(lanes)].copy()
        return (values.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else values

    def spread(array, index, lanes):
        """A vector as long as `lanes` with array[index] in every place."""
        return np.repeat(load(array, index, (0,)), len(lanes))

    def store(array, index, a):
        """Put a into array[index : index + its lanes]; as bfloat16 each value rounded to the nearest, ties to even."""
        if array.dtype == np.uint16:
            bits = a.view(np.uint32)
            a = np.where(np.isnan(a), 0x7FC0, (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16)
        array[index : index + len(a)] = a

    def zeros(like):
        """Zeros of that type."""
        return np.zeros_like(like)

    def convert(a, like):
        """a with the elements' type of the vector or array `like`."""
        return a.astype(like.dtype)

    def times(a, factor):
        """a times a number."""
        return a * a.dtype.type(factor)

    def fused(a, b, c):
        """a·b + c."""
        return a * b + c

    def choose(by, positive, other):
        """`positive` where by > 0, `other` elsewhere (also where by is NaN)."""
        return np.where(by > 0, positive, other)

    def relu(a):
        """0 where a < 0, a elsewhere; NaN stays."""
        return np.where(a < 0, zeros(a), a)
else:
    load, spread, store, zeros, convert = _load, _spread, _store, _zeros, _convert
    times, fused, choose, relu = _times, _fused, _choose, _relu


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
