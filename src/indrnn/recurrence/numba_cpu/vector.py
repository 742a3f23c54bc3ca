"""Short vectors in registers for Numba: what the kernels' inner loops are made of.

Numba leaves the recurrence's loop scalar (its output is also its input, which defeats the vectoriser), so the kernels
use LLVM's vectors explicitly. A `Vector` holds neighbouring values; LLVM splits it into the registers the processor
has. A tuple of that length, `lanes`, asks for one, because the length of a tuple is part of its type. With
NUMBA_DISABLE_JIT=1 the same functions work on NumPy arrays of that length.

Additions and multiplications carry the flag `contract` alone (a·b + c may be rounded once); infinities, NaN and the
order of additions keep their meaning.
"""

# mypy: ignore-errors
# (Numba calls these functions with types, then with LLVM values; its stubs describe neither)

import operator

import numpy as np
from llvmlite import ir
from numba.core import config, types
from numba.extending import intrinsic, models, overload, register_model

_MAY_FUSE = ("contract",)


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


def _pointer(context, builder, array_type, array, index, vector: Vector):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _ir(vector).as_pointer())


@intrinsic
def _load(typing, array, index, lanes):
    vector = Vector(array.dtype, len(lanes))

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, array, *arguments[:2], vector)
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return vector(array, types.intp, lanes), generate


@intrinsic
def _store(typing, array, index, vector):
    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, array, *arguments[:2], vector)
        builder.store(arguments[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


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
            return getattr(builder, instruction)(*arguments, flags=_MAY_FUSE)

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
        one = builder.insert_element(ir.Constant(_ir(a), ir.Undefined), arguments[1], ir.IntType(32)(0))
        order = ir.Constant(ir.VectorType(ir.IntType(32), a.lanes), None)
        return builder.fmul(arguments[0], builder.shuffle_vector(one, one, order), flags=_MAY_FUSE)

    return a(a, a.dtype), generate


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
        """The vector array[index : index + len(lanes)]."""
        return array[index : index + len(lanes)].copy()

    def store(array, index, a):
        """Put a into array[index : index + its lanes]."""
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

    def choose(by, positive, other):
        """`positive` where by > 0, `other` elsewhere (also where by is NaN)."""
        return np.where(by > 0, positive, other)

    def relu(a):
        """0 where a < 0, a elsewhere; NaN stays."""
        return np.where(a < 0, zeros(a), a)
else:
    load, store, zeros, convert = _load, _store, _zeros, _convert
    times, choose, relu = _times, _choose, _relu
