"""Initial values of a layer's W and u, and the bounds on the recurrent weights u."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Initialiser = str | Callable[[Tensor], object]


def recurrent_max(T: int, gamma: float = 2.0) -> float:
    """gamma^(1/T): with |u| at most this, a state grows over T steps by at most a factor of `gamma` (Li et al. 2018,
    section 3.2)."""
    _check(T, gamma)
    return float(gamma ** (1.0 / T))


def last_layer_lower_bound(T: int, gamma: float = 2.0) -> float:
    """gamma^(−1/T): with |u| at least this, a state keeps at least 1/gamma of itself over T steps."""
    _check(T, gamma)
    return float(gamma ** (-1.0 / T))


def _check(T: int, gamma: float) -> None:
    if T < 1:
        raise ValueError(f"T must be at least 1 time step, got {T}")
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")


def check_bounds(max_abs: float | None, min_abs: float) -> None:
    """Raise ValueError unless 0 <= min_abs <= max_abs < ∞."""
    if not 0 <= min_abs < math.inf:
        raise ValueError(f"recurrent_min_abs must be at least 0, and finite, got {min_abs}")
    if max_abs == math.inf:
        raise ValueError("recurrent_max_abs must be finite, got inf; None is for no bound")
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


INPUT: dict[str, Callable[[Tensor], object]] = {
    "linear": lambda weight: nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5),
    "kaiming": lambda weight: nn.init.kaiming_uniform_(weight, a=8.0),
    "small_uniform": lambda weight: nn.init.uniform_(weight, -0.001, 0.001),
    "small_normal": lambda weight: nn.init.normal_(weight, 0.0, 0.001),
}


def fill_input(weight: Tensor, how: Initialiser) -> None:
    """W (H, D): "linear" is U(±1/√D) as in nn.Linear, "kaiming" Kaiming uniform with a = 8, "small_uniform"
    U(−0.001, 0.001), "small_normal" N(0, 0.001²)."""
    _choose("input_init", how, INPUT)(weight)


def fill_recurrent(u: Tensor, how: Initialiser, max_abs: float | None) -> None:
    """u (H,): "positive" is U[0, m], "symmetric" U[−m, m] with m = max_abs or 1."""
    largest = 1.0 if max_abs is None else max_abs
    choices: dict[str, Callable[[Tensor], object]] = {
        "positive": lambda u: nn.init.uniform_(u, 0.0, largest),
        "symmetric": lambda u: nn.init.uniform_(u, -largest, largest),
    }
    _choose("recurrent_init", how, choices)(u)


def _choose(key: str, how: Initialiser, choices: dict[str, Callable[[Tensor], object]]) -> Callable[[Tensor], object]:
    if not isinstance(how, str):
        return how
    if how not in choices:
        raise ValueError(f"{key} must be a function or one of {', '.join(choices)}, got {how!r}")
    return choices[how]
