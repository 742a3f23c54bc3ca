"""Initial values of W and u, and bounds on u."""

from collections.abc import Callable, Mapping
from functools import partial
from math import inf

import torch
from torch import Tensor, nn

Initializer = str | tuple[float, float] | Callable[[Tensor], object]


def recurrent_max(T: int, gamma: float = 2.0) -> float:
    """Return gamma^(1/T), the |u| with which a state grows by a factor of `gamma` over T steps.

    Source: Li et al. 2018, arXiv 1803.04831, section 3.2.

    Raises:
        ValueError: T < 1 or gamma <= 0.
    """
    if not (T >= 1 and gamma > 0):
        raise ValueError(f"T must be at least 1 and gamma positive, got T={T} and gamma={gamma}")
    return float(gamma ** (1 / T))


def last_layer_lower_bound(T: int, gamma: float = 2.0) -> float:
    """Return gamma^(−1/T), the |u| with which a state keeps 1/gamma of its value over T steps.

    Raises:
        ValueError: T < 1 or gamma <= 0.
    """
    recurrent_max(T, gamma)  # raises the same errors
    return float(gamma ** (-1 / T))


def clip_recurrent_weight(u: Tensor, max_abs: float | None, min_abs: float = 0.0) -> Tensor:
    """Clip |u| to [min_abs, max_abs]. The minimum comes first and keeps the sign (0 counts as positive).

    No gradient reaches a weight outside the bounds.
    """
    if min_abs > 0:
        u = torch.where(u >= 0, u.clamp(min=min_abs), u.clamp(max=-min_abs))
    if max_abs is not None:
        u = nn.functional.hardtanh(u, -max_abs, max_abs)  # its backward is one operation; clamp's is five
    return u


def fill_input(weight: Tensor, how: Initializer) -> None:
    """Fill W (H, D) in place by a name (see `IndRNN`), from a range (low, high) or with a function."""
    bound = weight.shape[1] ** -0.5
    named: dict[str, Initializer] = {
        "linear": (-bound, bound),
        "kaiming": partial(nn.init.kaiming_uniform_, a=8.0),
        "small_uniform": (-0.001, 0.001),
        "small_normal": partial(nn.init.normal_, std=0.001),
    }
    _fill(weight, "input_init", how, named)


def fill_recurrent(u: Tensor, how: Initializer, max_abs: float | None) -> None:
    """Fill u (H,) in place by a name (see `IndRNN`), from a range (low, high) or with a function."""
    m = 1.0 if max_abs is None else max_abs
    _fill(
        u, "recurrent_init", how, {"positive": (0.0, m), "symmetric": (-m, m), "last_layer": (1 / m if m else inf, m)}
    )


@torch.no_grad()
def _fill(tensor: Tensor, key: str, how: Initializer, named: Mapping[str, Initializer]) -> None:
    if isinstance(how, str):
        how = named.get(how, how)
    if callable(how):
        how(tensor)
    elif isinstance(how, tuple) and len(how) == 2 and -inf < how[0] <= how[1] < inf:
        nn.init.uniform_(tensor, *how)
    else:
        raise ValueError(f"{key} must be one of {', '.join(named)}, a range (low, high) or a function, got {how!r}")
