"""Sequence classifiers and their registry: each maps x (B, T, D) to logits (B, K), read at the last time step.

`MODELS` maps the name in the configuration to a builder taking the model's configuration and the task's description.
Recurrent weights are found with `indrnn.layers.recurrent_layers`, batch norms as `torch.nn.BatchNorm1d` modules.
"""

from collections.abc import Callable

from omegaconf import DictConfig
from torch import nn

from indrnn.data import Task, make_task
from indrnn.errors import UserError

from .baselines import LSTMClassifier, RNNClassifier
from .indrnn import DenseIndRNN, PlainIndRNN, ResidualIndRNN

__all__ = [
    "MODELS",
    "DenseIndRNN",
    "LSTMClassifier",
    "PlainIndRNN",
    "RNNClassifier",
    "ResidualIndRNN",
    "Task",
    "build_model",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "indrnn": PlainIndRNN,
    "indrnn_residual": ResidualIndRNN,
    "indrnn_dense": DenseIndRNN,
    "lstm": LSTMClassifier,
    # The same network; configs/model/lstm_matched.yaml gives it as many parameters as the IndRNN, and runs of its own.
    "lstm_matched": LSTMClassifier,
    "lstm_chrono": LSTMClassifier,
    "rnn": RNNClassifier,
}


def build_model(cfg: DictConfig) -> nn.Module:
    """Build the network that ``cfg.model`` names for the task that ``cfg.data`` names, in float32 on the CPU.

    The caller seeds torch; nothing else decides the initial values.

    Raises:
        UserError: there is no model of that name.
    """
    name = cfg.model.name
    if name not in MODELS:
        raise UserError(f"model.name={name} does not exist; the choices are {', '.join(MODELS)}")
    return MODELS[name](cfg.model, make_task(cfg.data))
