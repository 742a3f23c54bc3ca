"""The mean and the biased variance of h over batch and time, from one mean and squared deviation a chain."""

import triton
import triton.language as tl
from torch import Tensor

ROWS = 128
UNITS = 32


@triton.jit(do_not_specialize=["B", "T", "H"])
def statistics_kernel(
    mean_ptr, deviation_ptr, mean_out_ptr, variance_out_ptr, B, T, H, ROWS: tl.constexpr, UNITS: tl.constexpr
):
    row = tl.arange(0, ROWS)[:, None]
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[None, :]
    state = mean_ptr.dtype.element_ty
    total = tl.zeros([ROWS, UNITS], state)
    for start in range(0, B, ROWS):
        inside = (start + row < B) & (unit < H)
        total += tl.load(mean_ptr + (start + row).to(tl.int64) * H + unit, mask=inside, other=0.0)
    mean = tl.sum(total, axis=0, keep_dims=True) / B
    total = tl.zeros([ROWS, UNITS], state)
    for start in range(0, B, ROWS):
        inside = (start + row < B) & (unit < H)
        at = (start + row).to(tl.int64) * H + unit
        between = tl.where(inside, tl.load(mean_ptr + at, mask=inside, other=0.0) - mean, 0.0)
        total += tl.load(deviation_ptr + at, mask=inside, other=0.0) / T + between * between
    variance = tl.sum(total, axis=0, keep_dims=True) / B
    tl.store(mean_out_ptr + unit, mean, mask=unit < H)
    tl.store(variance_out_ptr + unit, variance, mask=unit < H)


def combine_chains(mean: Tensor, deviation: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (H,) from the mean and the sum of squared deviations (B, H) of T values each."""
    B, H = mean.shape
    mean_out, variance_out = mean.new_empty(H), mean.new_empty(H)
    statistics_kernel[(triton.cdiv(H, UNITS),)](
        mean,
        deviation,
        mean_out,
        variance_out,
        B,
        T,
        H,
        ROWS=ROWS,
        UNITS=UNITS,
        num_warps=8,
        num_stages=1,
        enable_fp_fusion=True,
    )
    return mean_out, variance_out
