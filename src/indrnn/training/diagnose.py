"""Find where a non-finite value first appeared in a step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Split
from ..layers import AffineSequence
from .device import computing
from .evaluation import Objective


def first_non_finite(
    model: nn.Module, objective: Objective, split: Split, indices: Tensor, precision: str, device: torch.device,
    training: bool = True,
) -> str:  # fmt: skip
    """Repeat a training step without its update, from the weights it started from, and name the first parameter, output
    or gradient that is not finite, in the order in which they are computed. Without ``training``, repeat a step of an
    evaluation, up to the loss and with the model's running statistics."""
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"parameter {name}"
    not_finite: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: None if _finite(output) else not_finite.append(name)

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if _is_leaf(module)]
    try:
        model.train(training)
        model.zero_grad(set_to_none=True)
        x, y = split.batch(indices)
        with computing(precision, device):
            output = model(x)
        loss, _ = objective(output, y)
    finally:
        for hook in hooks:
            hook.remove()
    if not_finite:
        return f"output of {not_finite[0]}"
    if not _finite(loss) or not training:
        return "loss"
    loss.backward()
    # Backward visits the last layer first.
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"gradient of {name}"
    # Every gradient is finite, but the sum of their squares overflows; or another dropout mask hides the cause.
    return "norm of all gradients"


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module has parameters of its own, as an IndRNN layer does even with a batch norm in it, or no parts."""
    return any(True for _ in module.parameters(recurse=False)) or not any(True for _ in module.children())


def _finite(value: Any) -> bool:
    """Whether all tensors in a module's output are finite."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, AffineSequence):
        value = tuple(vars(value).values())
    return not isinstance(value, tuple | list) or all(map(_finite, value))
