"""Initial values of W and u, bounds on u, and checks of arguments."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Initializer = str | tuple[float, float] | Callable[[Tensor], object]

INPUT_INITS = ("linear", "kaiming", "small_uniform", "small_normal")
RECURRENT_INITS = ("positive", "symmetric", "last_layer")


def recurrent_max(T: int, gamma: float = 2.0) -> float:
    """Return gamma^(1/T), the |u| with which a state grows by a factor of `gamma` over T steps.

    Source: Li et al. 2018, arXiv 1803.04831, section 3.2.

    Raises:
        ValueError: T < 1 or gamma <= 0.
    """
    _check(T, gamma)
    return float(gamma ** (1.0 / T))


def last_layer_lower_bound(T: int, gamma: float = 2.0) -> float:
    """Return gamma^(−1/T), the |u| with which a state keeps 1/gamma of its value over T steps.

    Raises:
        ValueError: T < 1 or gamma <= 0.
    """
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
        raise ValueError(f"recurrent_min_abs must be finite and at least 0, got {min_abs}")
    if max_abs == math.inf:
        raise ValueError("recurrent_max_abs must be finite, got inf; use None for no bound")
    if max_abs is not None and not max_abs >= min_abs:
        raise ValueError(f"recurrent_max_abs must be at least recurrent_min_abs={min_abs}, got {max_abs}")


def clip_recurrent_weight(u: Tensor, max_abs: float | None, min_abs: float = 0.0) -> Tensor:
    """Clip |u| to [min_abs, max_abs]. The minimum comes first and keeps the sign (0 counts as positive).

    No gradient reaches a weight outside the bounds.
    """
    if min_abs > 0:
        u = torch.where(u >= 0, u.clamp(min=min_abs), u.clamp(max=-min_abs))
    if max_abs is not None:
        u = nn.functional.hardtanh(u, -max_abs, max_abs)  # its backward is one operation; clamp's is five
    return u


@torch.no_grad()
def fill_input(weight: Tensor, how: Initializer) -> None:
    """Fill W (H, D) in place: an entry of INPUT_INITS (see `IndRNN`), a range (low, high) or a function."""
    if how == "linear":
        how = (-(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
    elif how == "small_uniform":
        how = (-0.001, 0.001)
    if how == "kaiming":
        nn.init.kaiming_uniform_(weight, a=8.0)
    elif how == "small_normal":
        nn.init.normal_(weight, 0.0, 0.001)
    else:
        _fill(weight, "input_init", how, INPUT_INITS)


@torch.no_grad()
def fill_recurrent(u: Tensor, how: Initializer, max_abs: float | None) -> None:
    """Fill u (H,) in place: an entry of RECURRENT_INITS (see `IndRNN`), a range (low, high) or a function."""
    largest = 1.0 if max_abs is None else max_abs
    if how == "last_layer" and (max_abs is None or max_abs < 1):
        raise ValueError(f"recurrent_init='last_layer' needs recurrent_max_abs of at least 1, got {max_abs}")
    if isinstance(how, str) and how in RECURRENT_INITS:
        how = ({"positive": 0.0, "symmetric": -largest, "last_layer": 1 / largest}[how], largest)
    _fill(u, "recurrent_init", how, RECURRENT_INITS)


def is_range(how: object) -> bool:
    """Whether `how` is (low, high)."""
    return isinstance(how, tuple | list) and len(how) == 2 and all(isinstance(end, int | float) for end in how)


def _fill(tensor: Tensor, key: str, how: Initializer, names: tuple[str, ...]) -> None:
    if callable(how):
        how(tensor)
    elif isinstance(how, str) or not is_range(how) or not -math.inf < how[0] <= how[1] < math.inf:
        raise ValueError(f"{key} must be one of {', '.join(names)}, a range (low, high) or a function, got {how!r}")
    elif how[0] == how[1]:
        nn.init.constant_(tensor, how[0])
    else:
        nn.init.uniform_(tensor, *how)


def check_size(name: str, size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name} must be an int, got {size!r}")
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


def check_tensor(name: str, value: object, dtype: torch.dtype) -> None:
    """Raise ValueError unless `value` is a tensor of the dtype of the weights, or of any dtype under autocast."""
    if not isinstance(value, Tensor):
        hint = "; an IndRNN has no cell state: pass h alone" if isinstance(value, tuple) else ""
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}{hint}")
    if value.dtype != dtype and not autocasts(value.device):
        fix = f"convert it by {name}.to({dtype})"
        if value.is_floating_point():
            fix += f", or the module by .to({value.dtype})"
        raise ValueError(f"{name} is {value.dtype}, but the weights are {dtype}: {fix}")


def autocasts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # raises for meta
