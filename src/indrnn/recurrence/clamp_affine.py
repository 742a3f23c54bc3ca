"""Maps x ↦ clamp(a + s·x, lo, hi) and their composition: what makes the relu recurrence parallel in time.

One step of the recurrence with relu is such a map with (a, s, lo, hi) = (x_t, u, 0, ∞), and the maps are closed under
composition, so an associative scan (Blelloch 1990, "Prefix sums and their applications") over them yields every state.
The linear case goes back to Martin & Cundy 2018 (arXiv 1709.04057); scanning compositions of function classes to
Fisher & Ghuloum 1994, "Parallelizing complex scans and reductions".

Two traps in tree order: with hi = ∞, a product s that has underflowed to zero gives 0·∞ = NaN, so ∞ is the finite
`UNBOUNDED`; and a map that has become constant (lo ≥ hi) keeps a and s that may overflow and meet as ∞ − ∞, so it
collapses to (a, s) = (lo, 0).
"""

from typing import NamedTuple

import torch
from torch import Tensor

UNBOUNDED = 1e30


class ClampAffine(NamedTuple):
    """x ↦ clamp(a + s·x, lo, hi), elementwise; the four tensors have one shape."""

    a: Tensor
    s: Tensor
    lo: Tensor
    hi: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(self.a + self.s * x, self.lo), self.hi)


def compose(first: ClampAffine, second: ClampAffine) -> ClampAffine:
    """The map that applies `first`, then `second`."""
    a = second.a + second.s * first.a
    s = second.s * first.s
    at_lo = second.a + second.s * first.lo
    at_hi = second.a + second.s * first.hi
    lo = torch.minimum(torch.maximum(torch.minimum(at_lo, at_hi), second.lo), second.hi)
    hi = torch.minimum(torch.maximum(torch.maximum(at_lo, at_hi), second.lo), second.hi)
    constant = lo >= hi
    return ClampAffine(torch.where(constant, lo, a), torch.where(constant, torch.zeros_like(s), s), lo, hi)
