"""Where a run that is no longer finite first went wrong."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Split
from .device import computing
from .evaluate import Objective


def first_non_finite(
    model: nn.Module, objective: Objective, split: Split, indices: Tensor, precision: str, device: torch.device,
    training: bool = True,
) -> str:  # fmt: skip
    """Runs one training step without its update and names the first module whose parameter, output or gradient is not
    finite, in the order in which they are computed. Meant for the weights that the bad step itself started from.
    Without ``training``, the step of an evaluation: up to the loss, with the statistics that the model keeps."""
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"parameter {name}"
    seen: list[str] = []
    hooks = [
        module.register_forward_hook(_watch(name, seen)) for name, module in model.named_modules() if _is_leaf(module)
    ]
    try:
        model.train(training)
        model.zero_grad(set_to_none=True)
        x, y = split.batch(indices)
        with computing(precision, device):
            output = model(x)
        loss, _ = objective(output.float(), y)
    finally:
        for hook in hooks:
            hook.remove()
    if seen:
        return f"output of {seen[0]}"
    if not _finite(loss) or not training:
        return "loss"
    loss.backward()
    # Backward visits the last layer first.
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"gradient of {name}"
    # Each gradient is finite, but the sum of their squares overflows; or another dropout mask hides the cause.
    return "norm of all gradients"


def _is_leaf(module: nn.Module) -> bool:
    """Modules with parameters of their own (an IndRNN layer may hold a batch norm and is still one)."""
    return any(True for _ in module.parameters(recurse=False)) or not any(True for _ in module.children())


def _watch(name: str, seen: list[str]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if not all(_finite(tensor) for tensor in _tensors(output)):
            seen.append(name)

    return hook


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
