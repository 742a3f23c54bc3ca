"""Sequence classifiers: each maps x (B, T, D) to logits (B, K), read at the last time step.

`MODELS` maps ``model.name`` to a class that takes the model's configuration and the task.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from indrnn.config.schema import ModelConfig
from indrnn.data import Task
from indrnn.errors import UserError
from indrnn.external import call_target, explained
from indrnn.layers import recurrent_layers

from .baselines import LSTMClassifier, MinGRUClassifier, RNNClassifier
from .indrnn import DenseIndRNN, PlainIndRNN, ResidualIndRNN

__all__ = ["MODELS", "build_model", "recurrent_weights"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "indrnn": PlainIndRNN,
    "indrnn_residual": ResidualIndRNN,
    "indrnn_dense": DenseIndRNN,
    "lstm": LSTMClassifier,
    "rnn": RNNClassifier,
    "gru": RNNClassifier,
    "mingru": MinGRUClassifier,
}


def build_model(model: ModelConfig, task: Task) -> nn.Module:
    """Build the network that ``model`` (cfg.model) describes for ``task``, in float32 on the CPU.

    ``model`` names an entry of `MODELS` or, with ``_target_``, a class on Python's path. The initial values depend only
    on torch's random state, which the caller seeds.

    Raises:
        UserError: unknown name, or a class that cannot be imported or called, or does not map x (B, T, D) to (B, K).
    """
    target = getattr(model, "_target_", None)
    if target is not None:
        network = call_target("model", model, task)
        _check_network(network, target, task)
        return network
    if model.name not in MODELS:
        raise UserError(f"model.name={model.name} is unknown; choose one of {', '.join(MODELS)}")
    return MODELS[model.name](model, task)


def _check_network(network: Any, target: str, task: Task) -> None:
    """Run a copy of a custom model once in evaluation mode, without changing the random state.

    Raises:
        UserError: its output does not fit the task.
    """
    where = f"model._target_={target}"
    if not isinstance(network, nn.Module):
        raise UserError(f"{where}: it must return a torch.nn.Module, not {network!r}")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(f"{where}: it has no parameter to train")
    batch = 3
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        x = torch.rand(batch, task.length, task.input_size)
        shape = tuple(x.shape)
        copied = copy.deepcopy(network).eval()
        output = explained(f"{where}, called with x {shape}", type(network), lambda: copied(x))
        weights = explained(f"{where}, recurrent_weights()", type(network), lambda: recurrent_weights(copied))
    if not isinstance(output, Tensor) or tuple(output.shape) != (batch, task.output_size):
        actual = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UserError(f"{where}: given x {shape}, its output must be {(batch, task.output_size)}, not {actual}")
    if not all(isinstance(weight, Tensor) for weight in weights):
        raise UserError(f"{where}: recurrent_weights() must return a list of tensors")


def recurrent_weights(model: nn.Module) -> list[Tensor]:
    """Return the recurrent weights per layer: u (H,) as the recurrence uses it, or the matrix of an LSTM, GRU or RNN.

    A model's own method ``recurrent_weights()`` takes precedence.
    """
    custom = getattr(model, "recurrent_weights", None)
    if callable(custom):
        return list(custom())
    weights = [layer.recurrent_weight() for _, layer in recurrent_layers(model)]
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            weights += [getattr(module, f"weight_hh_l{number}") for number in range(module.num_layers)]
    return weights
