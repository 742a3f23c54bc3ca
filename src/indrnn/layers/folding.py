"""Batch norm and dropout, folded into the matrix that reads a layer's output.

Letters: B batch, T time steps, H features of the sequence, K features of the product.

Batch norm after a recurrence is z = scale ⊙ h + shift, one pair per unit. Dropout shared over time multiplies z by a
mask (B, H). Neither needs its own pass over memory, because every reader of z first multiplies it by a matrix:

    W (mask ⊙ (scale ⊙ h + shift)) + b = (W ⊙ scale ⊙ mask) h + (W (shift ⊙ mask) + b).

An `AffineSequence` keeps h, scale, shift and mask until then.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_thread = threading.local()  # torch.compile of PyTorch 2.11 cannot read a ContextVar


@contextmanager
def sequences_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Compute the layers' sequences in `dtype` within the block; None: in the dtype of their input and weights.

    With bfloat16, h and the factors of its products are bfloat16, and products are summed in float32. Scale, shift,
    mask, the folded matrix before its product, and h_last keep their dtype.
    """
    before = getattr(_thread, "dtype", None)
    _thread.dtype = dtype
    try:
        yield
    finally:
        _thread.dtype = before


class AffineSequence(NamedTuple):
    """z = mask ⊙ (scale ⊙ h + shift), not yet computed. Factors that are None are left out.

    h: (B, T, H), or (N, H) for sequences of different lengths. h_last: (B, H), a copy of the last step; reading it
    instead of ``h[:, -1]`` never materializes a gradient of h. scale, shift: (H,), both or neither. mask: (B, H).
    """

    h: Tensor
    h_last: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    mask: Tensor | None = None

    def materialise(self) -> Tensor:
        """Return z at every step (B, T, H), in the dtype of h."""
        z = self.h if self.scale is None or self.shift is None else torch.addcmul(self.shift, self.h, self.scale)
        return (z if self.mask is None else z * self.mask.unsqueeze(1)).to(self.h.dtype)

    def last(self) -> Tensor:
        """Return z at the last step (B, H), in the dtype of h_last, without computing the other steps."""
        return self._replace(h=self.h_last.unsqueeze(1)).materialise().squeeze(1)


def linear(sequence: Tensor | AffineSequence, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return z Wᵀ + b for every step: (B, T, H) with weight (K, H) and bias (K,) gives (B, T, K)."""
    h, weight, bias = factors(sequence, weight, bias)
    bias = None if bias is None else bias.to(h.dtype)
    if weight.dim() == 2:
        return F.linear(h, weight, bias)
    y = torch.bmm(h, weight.mT)
    return y if bias is None else y + (bias.unsqueeze(1) if bias.dim() == 2 else bias)


def factors(
    sequence: Tensor | AffineSequence, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors h and weight of a product, cast, and the bias. With a mask, one weight (B, K, H) per sequence."""
    if isinstance(sequence, Tensor):
        return cast_sequence(sequence), cast_sequence(weight), bias
    h, scale, shift, mask = cast_sequence(sequence.h), sequence.scale, sequence.shift, sequence.mask
    if scale is not None and shift is not None:
        weight = weight.to(scale.dtype)
        bias = weight.new_zeros(len(weight)) if bias is None else bias.to(scale.dtype)
        if mask is None:
            weight, bias = call(Fold, weight, bias, scale, shift)
        else:
            bias = F.linear(shift * mask, weight, bias)
            mask = mask * scale
    if mask is not None:
        weight = weight * mask.unsqueeze(1)
    return h, weight.to(h.dtype), bias


def cast_sequence(value: Tensor) -> Tensor:
    """`value` in the dtype of `sequences_in`."""
    dtype = getattr(_thread, "dtype", None)
    return value if dtype is None else value.to(dtype)


def concatenate(sequences: Sequence[AffineSequence]) -> AffineSequence:
    """Join sequences along their features: (B, T, H1 + H2 + …). Factors stay folded if all or none have them."""
    columns: Any = list(zip(*sequences, strict=True))
    if any(len({part is None for part in column}) > 1 for column in columns):
        return concatenate([AffineSequence(sequence.materialise(), sequence.last()) for sequence in sequences])
    return AffineSequence(*[None if column[0] is None else torch.cat(column, -1) for column in columns])  # type: ignore


def call(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Call a Function; in torch.compile, which fuses and differentiates its operations itself, only its forward."""
    return (function.forward if torch.compiler.is_compiling() else function.apply)(*arguments)


class Fold(torch.autograd.Function):
    """(W ⊙ scale, W shift + b). Written out, because autograd would take more operations, as for `Affine`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return weight * scale, torch.addmv(bias, weight, shift).to(bias.dtype)  # which autocast would round

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        weight, _, scale, shift = inputs
        ctx.save_for_backward(weight, scale, shift)

    @staticmethod
    def backward(ctx: Any, dfolded: Tensor, dadded: Tensor) -> tuple[Tensor, ...]:
        weight, scale, shift = ctx.saved_tensors
        dweight = torch.addr(dfolded * scale, dadded, shift)
        return dweight, dadded, (dfolded * weight).sum(0), torch.mv(weight.mT, dadded)


class Affine(torch.autograd.Function):
    """scale = γ / √(variance + ε) and shift = β − mean ⊙ scale; third, 1 / √(variance + ε)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        inverse = torch.rsqrt(variance + eps)
        scale = inverse * weight
        return scale, torch.addcmul(bias, mean, scale, value=-1), inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        scale, _, inverse = output
        ctx.save_for_backward(inputs[0], scale, inverse)
        ctx.mark_non_differentiable(inverse)
        ctx.set_materialize_grads(False)  # inverse needs no gradient; readers use scale and shift together

    @staticmethod
    def backward(ctx: Any, dscale: Tensor, dshift: Tensor, _: None) -> tuple[Tensor | None, ...]:
        mean, scale, inverse = ctx.saved_tensors
        dweight = torch.addcmul(dscale, mean, dshift, value=-1) * inverse
        return -(scale * dshift), dweight * inverse * scale * -0.5, dweight, dshift, None
