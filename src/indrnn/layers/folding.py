"""Batch norm and dropout folded into the matrix that reads them: what one hidden layer hands to the next.

Letters: B batch, T time steps, H features of the sequence, K features of the product.

Batch norm after a recurrence is z = scale ⊙ h + shift, one pair a unit, and dropout shared over time multiplies z by
a mask (B, H). Neither needs its own pass over memory, because every reader of z multiplies it by a matrix first:

    W (mask ⊙ (scale ⊙ h + shift)) + b = (W ⊙ scale ⊙ mask) h + (W (shift ⊙ mask) + b).

`AffineSequence` keeps h, scale, shift and mask apart until then. Autograd differentiates the small factors.

Within `sequences_in(torch.bfloat16)` h is bfloat16, and so are the factors of its products, which are summed in
float32; scale, shift, mask, the folded matrix until it is multiplied, h_last and everything else keep their dtype.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_dtype: ContextVar[torch.dtype | None] = ContextVar("sequences_in", default=None)


@contextmanager
def sequences_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Within it the layers compute their sequences in `dtype`; None: in that of their input and weights."""
    before = _dtype.set(dtype)
    try:
        yield
    finally:
        _dtype.reset(before)


@dataclass(frozen=True)
class AffineSequence:
    """z = mask ⊙ (scale ⊙ h + shift), not yet computed. What is None is left out.

    h (B, T, H), or (N, H), the N steps there are, where sequences differ in length; h_last (B, H), a copy of the last
    step, unrounded (reading that, not ``h[:, -1]``, keeps the gradient of h from being materialised); scale and shift
    (H,), both or neither; mask (B, H), one a sequence for all time steps.
    """

    h: Tensor
    h_last: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    mask: Tensor | None = None

    def materialise(self) -> Tensor:
        """z for every step (B, T, H), in the dtype of h."""
        return _apply(self, self.h, 1)

    def last(self) -> Tensor:
        """z at the last step (B, H), in the dtype of h_last; the other steps are not computed."""
        return _apply(self, self.h_last, 0)


def _apply(sequence: AffineSequence, h: Tensor, time_dims: int) -> Tensor:
    z = h
    if sequence.scale is not None and sequence.shift is not None:
        z = torch.addcmul(sequence.shift, z, sequence.scale)
    if sequence.mask is not None:
        z = z * (sequence.mask.unsqueeze(1) if time_dims else sequence.mask)
    return z.to(h.dtype)


def materialise(sequence: Tensor | AffineSequence) -> Tensor:
    """The tensor (B, T, H) of a sequence in either form."""
    return sequence.materialise() if isinstance(sequence, AffineSequence) else _cast(sequence)


def linear(sequence: Tensor | AffineSequence, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """z Wᵀ + b for every step: (B, T, H) with weight (K, H) and bias (K,) gives (B, T, K)."""
    if not isinstance(sequence, AffineSequence):
        return _product(sequence, weight, bias)
    if sequence.mask is None:
        return _product(sequence.h, *_fold(sequence, weight, bias))
    y, added = project(sequence, weight, bias)
    return y if added is None else y + (added.unsqueeze(1) if added.dim() == 2 else added)


def project(sequence: Tensor | AffineSequence, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`linear` with the last addition left to the reader: y (B, T, K) and what to add, (K,) or (B, K) or None."""
    if not isinstance(sequence, AffineSequence):
        return _product(sequence, weight), bias
    if sequence.mask is None:
        weight, bias = _fold(sequence, weight, bias)
        return _product(sequence.h, weight), bias
    mask = sequence.mask
    factor = mask if sequence.scale is None else mask * sequence.scale
    folded = (weight * factor.unsqueeze(1)).to(weight.dtype)  # (B, K, H): a matrix a sequence
    y = torch.bmm(_cast(sequence.h), _cast(folded).mT)
    if sequence.shift is None:
        return y, bias
    return y, F.linear((sequence.shift * mask).to(weight.dtype), weight, bias)


def factors(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, T, D) and weight (K, D) as `project` would multiply them, for a recurrence that does so itself."""
    return _cast(x), _cast(weight)


def _cast(value: Tensor) -> Tensor:
    dtype = _dtype.get()
    return value if dtype is None else value.to(dtype)


def _product(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(_cast(h), _cast(weight), None if bias is None else _cast(bias))


def _fold(sequence: AffineSequence, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(W ⊙ scale, W shift + b)."""
    if sequence.scale is None or sequence.shift is None:
        return weight, bias
    return (weight * sequence.scale).to(weight.dtype), F.linear(sequence.shift.to(weight.dtype), weight, bias)


def concatenate(sequences: Sequence[AffineSequence]) -> AffineSequence:
    """The sequences side by side along their features, still unnormalised: (B, T, H1 + H2 + …)."""
    h = torch.cat([sequence.h for sequence in sequences], dim=-1)
    last = torch.cat([sequence.h_last for sequence in sequences], dim=-1)
    scale = shift = mask = None
    if any(sequence.scale is not None for sequence in sequences):
        scale = torch.cat([_or_full(sequence.scale, sequence, 1.0) for sequence in sequences])
        shift = torch.cat([_or_full(sequence.shift, sequence, 0.0) for sequence in sequences])
    if any(sequence.mask is not None for sequence in sequences):
        masks = [torch.ones_like(part.h_last) if part.mask is None else part.mask for part in sequences]
        mask = torch.cat(masks, -1)
    return AffineSequence(h, last, scale, shift, mask)


def _or_full(value: Tensor | None, sequence: AffineSequence, default: float) -> Tensor:
    return sequence.h.new_full((sequence.h.shape[-1],), default) if value is None else value
