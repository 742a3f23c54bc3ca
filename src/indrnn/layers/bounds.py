"""Bounds on the recurrent weights u, and how a layer keeps them."""

import torch
from torch import Tensor


def recurrent_max(T: int, gamma: float = 2.0) -> float:
    """gamma^(1/T): with |u| at most this, T steps grow a state by at most `gamma` (Li et al. 2018, section 3.2)."""
    _check(T, gamma)
    return float(gamma ** (1.0 / T))


def last_layer_lower_bound(T: int, gamma: float = 2.0) -> float:
    """gamma^(−1/T): from this on, a state keeps at least 1/gamma of itself over T steps."""
    _check(T, gamma)
    return float(gamma ** (-1.0 / T))


def _check(T: int, gamma: float) -> None:
    if T < 1:
        raise ValueError(f"T must be at least 1 time step, got {T}")
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")


def check_bounds(max_abs: float | None, min_abs: float) -> None:
    """Raise ValueError unless 0 <= min_abs <= max_abs."""
    if not min_abs >= 0:
        raise ValueError(f"recurrent_min_abs must be at least 0, got {min_abs}")
    if max_abs is not None and not max_abs >= min_abs:
        raise ValueError(f"recurrent_max_abs must be at least recurrent_min_abs={min_abs}, got {max_abs}")


def clip_recurrent_weight(u: Tensor, max_abs: float | None, min_abs: float = 0.0) -> Tensor:
    """u with |u| moved into [min_abs, max_abs]: the minimum first, keeping the sign (0 counts as positive).

    As for any clip, no gradient reaches a weight outside the bounds.
    """
    if min_abs > 0:
        u = torch.where(u >= 0, u.clamp(min=min_abs), u.clamp(max=-min_abs))
    if max_abs is not None:
        u = u.clamp(-max_abs, max_abs)
    return u
