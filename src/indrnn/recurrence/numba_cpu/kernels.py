"""The loops of the CPU backend, in plain Numba.

Letters: B batch, T time steps, H hidden units, D input features; b, t, k, d index them.

A task is one sequence and a range of at most `MAX_UNITS` units. Tasks write to separate places, so neither their order
nor the number of threads changes a result. Arithmetic is IEEE's, in the order of `reference`, without fused operations.

LLVM vectorizes a loop over units if nothing in it may alias. What a task reads and writes in every step (running state,
sums) is therefore copied to rows on the stack. The loops run through memory in one direction, because hardware
prefetchers do not follow rows in descending order whose elements are in ascending order.
"""

# mypy: ignore-errors
# (Numba calls these functions with types, then with LLVM values. Its stubs describe neither.)

import platform

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# By default LLVM leaves a loop scalar if it needs more than eight alias checks. Checks hoisted out of the loop over
# time fail for negative strides.
llvmlite.binding.set_option("", "--runtime-memory-check-threshold=128")
llvmlite.binding.set_option("", "--hoist-runtime-checks=false")

MAX_UNITS = 512
CHUNK = 32  # steps whose statistics are summed in the precision of the state
NEGATIVE_SLOPE = 0.01  # of leaky_relu


@intrinsic
def pointer(typing, address, dtype):
    """The integer `address` as a pointer to values of a NumPy dtype."""
    result = types.CPointer(dtype.dtype)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(result))

    return result(address, dtype), generate


@intrinsic
def row(typing, dtype):
    """Memory for `MAX_UNITS` values on the stack."""
    result = types.CPointer(dtype.dtype)

    def generate(context, builder, signature, arguments):
        kind = context.get_value_type(dtype.dtype)
        memory = cgutils.alloca_once(builder, ir.ArrayType(kind, MAX_UNITS + 64))  # + 64: rows of 128 do not alias
        memory.align = 64
        return builder.bitcast(memory, kind.as_pointer())

    return result(dtype), generate


@intrinsic
def widen(typing, value):
    """A bfloat16 value, stored as uint16, as float32. Other values are returned unchanged."""
    if value != types.uint16:
        return value(value), lambda context, builder, signature, arguments: arguments[0]

    def generate(context, builder, signature, arguments):
        bits = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, bits.type(16)), ir.FloatType())

    return types.float32(value), generate


class _BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite lacks."""

    def _to_string(self):
        return "bfloat"


@intrinsic
def narrow(typing, value, sequence):
    """`value` in the dtype of a pointer. bfloat16 rounds to the nearest value, ties to even."""
    if sequence.dtype != types.uint16:
        return value(value, sequence), lambda context, builder, signature, arguments: arguments[0]

    def generate(context, builder, signature, arguments):
        if "+avx512bf16" in context.codegen().magic_tuple()[-1].split(","):  # the processor has an instruction for it
            return builder.bitcast(builder.fptrunc(arguments[0], _BFloat16()), ir.IntType(16))
        bits = builder.bitcast(arguments[0], ir.IntType(32))
        odd = builder.and_(builder.lshr(bits, bits.type(16)), bits.type(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, bits.type(0x7FFF))), bits.type(16))
        not_a_number = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.trunc(builder.select(not_a_number, bits.type(0x7FC0), rounded), ir.IntType(16))

    return types.uint16(value, sequence), generate


@intrinsic
def take(typing, counter):
    """The integer that `counter` points to, which is increased by one, atomically."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", arguments[0], ir.IntType(64)(1), "monotonic")

    return types.int64(counter), generate


_X86 = platform.machine().lower() in ("x86_64", "amd64")
_ARM = platform.machine().lower() in ("aarch64", "arm64")
# x86: flush to zero and denormals are zero, in MXCSR. ARM: FZ, in FPCR.
FLUSH = 0x8040 if _X86 else 1 << 24 if _ARM else 0


@intrinsic
def set_float_mode(typing, kept, added):
    """Set this thread's floating-point control register to (register & kept) | added. Returns its former value."""
    i64, byte_pointer = ir.IntType(64), ir.IntType(8).as_pointer()

    def generate(context, builder, signature, arguments):
        if not (_X86 or _ARM):
            return i64(0)
        if _ARM:
            before = builder.asm(ir.FunctionType(i64, []), "mrs $0, fpcr", "=r", [], side_effect=True)
            after = builder.or_(builder.and_(before, arguments[0]), arguments[1])
            builder.asm(ir.FunctionType(ir.VoidType(), [i64]), "msr fpcr, $0", "r", [after], side_effect=True)
            return before
        register = cgutils.alloca_once(builder, ir.IntType(32))
        access = ir.FunctionType(ir.VoidType(), [byte_pointer])
        for operation in ("st", "ld"):
            if operation == "ld":
                before = builder.zext(builder.load(register), i64)
                after = builder.or_(builder.and_(before, arguments[0]), arguments[1])
                builder.store(builder.trunc(after, ir.IntType(32)), register)
            function = builder.module.declare_intrinsic(f"llvm.x86.sse.{operation}mxcsr", (), access)
            builder.call(function, [builder.bitcast(register, byte_pointer)])
        return before

    return types.int64(types.int64, types.int64), generate


# A kernel is a C function of the address of 64-bit integers, the call: first the next task, which whichever thread is
# free takes; then the sizes tasks, units of a task, B, T, H, and whether h0 is given; then the arrays: of sequences the
# address, stride of b and stride of t, in elements; of the bias the address and stride of b; all else is contiguous.
#
# Kernels are compiled for the NumPy dtype of sequences (uint16 for bfloat16) and of everything else (`real`), for the
# nonlinearity, for the number D of `features` of W x_t (0: x_t itself), and for the direction of t in memory.


def make_forward(sequence, real, nonlinearity, descending, features, statistics):
    """h_t = σ(x_t + u ⊙ h_{t-1} + bias) for t = 1…T, and the mean and Σ(h − mean)² of each sequence.

    The statistics of a chunk are summed about the mean so far (at first the first value) so that they cannot cancel,
    and are joined by Chan, Golub & LeVeque 1983 (doi:10.1080/00031305.1983.10483115, eq. 2.1).
    """
    relu, leaky = nonlinearity == "relu", nonlinearity == "leaky_relu"

    def forward(address):
        call = pointer(address, np.int64)
        tasks, units, B, T, H = call[1], call[2], call[3], call[4], call[5]
        x, x_b, x_t = pointer(call[7], sequence), call[8], call[9]
        h, h_b, h_t = pointer(call[10], sequence), call[11], call[12]
        bias, bias_b, u, h0 = pointer(call[13], real), call[14], pointer(call[15], real), pointer(call[16], real)
        weight, h_last = pointer(call[17], real), pointer(call[18], real)
        mean, m2 = pointer(call[19], np.float64), pointer(call[20], np.float64)
        state, recurrent, added = row(real), row(real), row(real)
        pivot, total, squares = row(real), row(real), row(real)
        zero, slope = real(0), real(NEGATIVE_SLOPE)
        mode = set_float_mode(-1, FLUSH)
        task = take(call)
        while task < tasks:
            b, first = task % B, task // B * units
            n = min(units, H - first)
            for k in range(n):
                state[k] = h0[b * H + first + k] if call[6] else zero
                recurrent[k], added[k] = u[first + k], bias[b * bias_b + first + k]
                pivot[k], total[k], squares[k] = zero, zero, zero
            for t in range(T):
                x_at, h_at = b * x_b + t * x_t, b * h_b + t * h_t + first
                for i in range(n):
                    k = n - 1 - i if descending else i
                    if features:
                        entering = widen(x[x_at]) * weight[first + k]
                        for d in range(1, features):
                            entering = entering + widen(x[x_at + d]) * weight[d * H + first + k]
                    else:
                        entering = widen(x[x_at + first + k])
                    a = entering + recurrent[k] * state[k] + added[k]
                    if relu:
                        a = zero if a < zero else a  # keeps NaN
                    if leaky:
                        a = a if a > zero else slope * a
                    state[k] = a
                    h[h_at + k] = narrow(a, h)
                    if statistics:
                        apart = a - pivot[k]
                        total[k] = total[k] + apart
                        squares[k] = squares[k] + apart * apart
                if statistics and (t % CHUNK == 0 or t == T - 1):
                    steps, before = np.float64((t - 1) % CHUNK + 1), np.float64(t - (t - 1) % CHUNK)
                    for k in range(n):
                        at = b * H + first + k
                        if t == 0:
                            mean[at], m2[at] = state[k], 0.0
                        else:
                            offset = total[k] / steps
                            apart = np.float64(pivot[k]) + offset - mean[at]
                            m2[at] += squares[k] - total[k] * offset + apart * apart * (before * steps / (t + 1))
                            mean[at] += apart * (steps / (t + 1))
                        pivot[k], total[k], squares[k] = real(mean[at]), zero, zero
            for k in range(n):
                h_last[b * H + first + k] = state[k]
            task = take(call)
        set_float_mode(0, mode)

    return forward


def make_backward(sequence, real, nonlinearity, descending, features, affine):
    """δ_t = σ'_t ⊙ (∂L/∂h_t + u ⊙ δ_{t+1}) for t = T…1; with dh_last instead of u ⊙ δ_{T+1}.

    du = Σ δ_{t+1} ⊙ h_t and dbias = Σ δ_t. With `features`, dweight = Σ δ_t x_tᵀ (D, H); without, dx = δ.
    """
    relu, leaky = nonlinearity == "relu", nonlinearity == "leaky_relu"

    def backward(address):
        call = pointer(address, np.int64)
        tasks, units, B, T, H = call[1], call[2], call[3], call[4], call[5]
        dh, dh_b, dh_t = pointer(call[7], sequence), call[8], call[9]
        h, h_b, h_t = pointer(call[10], sequence), call[11], call[12]
        x, x_b, x_t = pointer(call[13], sequence), call[14], call[15]
        dx, dx_b, dx_t = pointer(call[16], sequence), call[17], call[18]
        dh_last, dh_last_b, u, h0 = pointer(call[19], real), call[20], pointer(call[21], real), pointer(call[22], real)
        dmean, dvariance, mean = pointer(call[23], real), pointer(call[24], real), pointer(call[25], real)
        du, dh0 = pointer(call[26], real), pointer(call[27], real)
        dbias, dweight = pointer(call[28], real), pointer(call[29], real)
        delta, recurrent, constant, factor = row(real), row(real), row(real), row(real)
        du_sum, dbias_sum = row(real), row(real)
        zero, one, negative_slope, values = real(0), real(1), real(NEGATIVE_SLOPE), real(B * T)
        mode = set_float_mode(-1, FLUSH)
        task = take(call)
        while task < tasks:
            b, first = task % B, task // B * units
            n, at = min(units, H - first), b * H + first
            for k in range(n):
                # as if u were 1 and dh_last the gradient of step T + 1
                delta[k], recurrent[k] = dh_last[b * dh_last_b + first + k], one
                factor[k] = dvariance[first + k] * (real(2) / values)
                constant[k] = dmean[first + k] / values - factor[k] * mean[first + k]
                du_sum[k], dbias_sum[k] = zero, zero
            for d in range(features):
                for k in range(n):
                    dweight[(b * features + d) * H + first + k] = zero
            for t in range(T - 1, -1, -1):
                dh_at, h_at, dx_at = b * dh_b + t * dh_t + first, b * h_b + t * h_t + first, b * dx_b + t * dx_t + first
                for i in range(n):
                    k = n - 1 - i if descending else i
                    g, state = delta[k], widen(h[h_at + k])
                    du_sum[k] = du_sum[k] + g * state
                    g = recurrent[k] * g + widen(dh[dh_at + k])
                    if affine:
                        g = g + constant[k] + factor[k] * state
                    if relu:
                        g = g if state > zero else zero
                    if leaky:
                        g = g if state > zero else negative_slope * g
                    delta[k] = g
                    dbias_sum[k] = dbias_sum[k] + g
                    for d in range(features):
                        dweight_at = (b * features + d) * H + first + k
                        dweight[dweight_at] = dweight[dweight_at] + widen(x[b * x_b + t * x_t + d]) * g
                    if not features:
                        dx[dx_at + k] = narrow(g, dx)
                if t == T - 1:
                    for k in range(n):
                        recurrent[k], du_sum[k] = u[first + k], zero
            for k in range(n):
                du[at + k] = du_sum[k] + delta[k] * h0[at + k] if call[6] else du_sum[k]
                dbias[at + k], dh0[at + k] = dbias_sum[k], recurrent[k] * delta[k]
            task = take(call)
        set_float_mode(0, mode)

    return backward
