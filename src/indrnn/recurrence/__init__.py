"""The operation of this project, h_t = σ(x_t + u ⊙ h_{t-1}), on every backend.

`indrnn_recurrence` is the public function. `dispatch` describes the interface of the backends, and `reference` defines
them. Numba and Triton are imported at their first use.
"""

import torch

from ..config.schema import BACKENDS, NONLINEARITIES
from .dispatch import available_backends, resolve_backend
from .ops import indrnn_recurrence, recurrence

__all__ = ["BACKENDS", "NONLINEARITIES", "available_backends", "indrnn_recurrence", "resolve_backend", "warm_up"]


def warm_up(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
    """Compile the kernels that `indrnn.IndRNN` needs for sequences of a dtype, with and without batch norm.

    The first call on a machine takes some seconds per dtype; later ones load the kernels from a cache on disk. Without
    this call the kernels are compiled at their first use.

    >>> from indrnn.recurrence import warm_up
    >>> warm_up(torch.float32)
    """
    u = torch.zeros(4, device=device, dtype=dtype, requires_grad=True)
    weight = torch.zeros(4, 1, device=device, dtype=dtype)
    for features, fused in ((4, None), (1, weight)):
        x = torch.zeros(1, 2, features, device=device, dtype=dtype)
        for statistics in (False, True):
            outputs = recurrence(x, u, None, u, fused, statistics=statistics)
            torch.stack([each.sum().to(u.dtype) for each in outputs]).sum().backward()
