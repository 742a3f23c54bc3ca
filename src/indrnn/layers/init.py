"""Initial values of a layer's three parameters, by name or as a function that fills a tensor in place."""

from collections.abc import Callable

from torch import Tensor, nn

Initialiser = str | Callable[[Tensor], object]

INPUT = ("linear", "kaiming", "small_uniform", "small_normal")
RECURRENT = ("positive", "symmetric", "ones")
BIAS = ("zeros",)


def fill_input(weight: Tensor, how: Initialiser) -> None:
    """W (H, D): "linear" is U(±1/√D) as in nn.Linear, "kaiming" Kaiming uniform with a = 8, "small_uniform"
    U(−0.001, 0.001), "small_normal" N(0, 0.001²)."""
    if callable(how):
        how(weight)
    elif how == "linear":
        bound = weight.shape[1] ** -0.5
        nn.init.uniform_(weight, -bound, bound)
    elif how == "kaiming":
        nn.init.kaiming_uniform_(weight, a=8.0)
    elif how == "small_uniform":
        nn.init.uniform_(weight, -0.001, 0.001)
    elif how == "small_normal":
        nn.init.normal_(weight, 0.0, 0.001)
    else:
        raise ValueError(_unknown("input_init", how, INPUT))


def fill_recurrent(u: Tensor, how: Initialiser, max_abs: float | None) -> None:
    """u (H,): "positive" is U[0, m], "symmetric" U[−m, m] with m = max_abs or 1, "ones" is 1."""
    largest = 1.0 if max_abs is None else max_abs
    if callable(how):
        how(u)
    elif how == "positive":
        nn.init.uniform_(u, 0.0, largest)
    elif how == "symmetric":
        nn.init.uniform_(u, -largest, largest)
    elif how == "ones":
        nn.init.ones_(u)
    else:
        raise ValueError(_unknown("recurrent_init", how, RECURRENT))


def fill_bias(bias: Tensor, how: Initialiser) -> None:
    """b (H,): "zeros"."""
    if callable(how):
        how(bias)
    elif how == "zeros":
        nn.init.zeros_(bias)
    else:
        raise ValueError(_unknown("bias_init", how, BIAS))


def _unknown(key: str, value: str, choices: tuple[str, ...]) -> str:
    return f"{key} must be a function or one of {', '.join(choices)}, got {value!r}"
