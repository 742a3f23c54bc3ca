"""IndRNN layers, inner Linears and classifiers with the initial values that the protocols ask for."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from indrnn.config.schema import IndRNNBaseConfig
from indrnn.data import Task
from indrnn.layers import IndRNNLayer, last_layer_lower_bound, recurrent_max
from indrnn.layers.initial import fill_input

# Where the TensorFlow port starts the output of the adding problem, for every network (batzner/indrnn).
REGRESSION_BIAS = 0.1


def recurrent_layer(
    model: IndRNNBaseConfig,
    task: Task,
    input_size: int | None,
    hidden_size: int,
    *,
    last: bool = False,
    dropout: float | None = None,
) -> IndRNNLayer:
    """One recurrence with its norm and dropout, as the configuration describes them.

    Args:
        input_size: None for a recurrence without a Linear of its own.
        last: the layer that the classifier reads, whose u starts in a range of its own.
        dropout: instead of ``model.dropout``.
    """
    largest = recurrent_max(task.length, model.gamma)
    return IndRNNLayer(
        input_size,
        hidden_size,
        nonlinearity=model.nonlinearity,
        norm=model.norm,
        norm_position=model.norm_position,
        dropout=model.dropout if dropout is None else dropout,
        recurrent_max_abs=largest,
        constraint=model.constraint,
        input_init=model.weight_init,
        recurrent_init=_last_layer(model, task) if last else model.recurrent_init,
        backend=model.backend,
    )


def _last_layer(model: IndRNNBaseConfig, task: Task) -> str | Callable[[Tensor], Tensor]:
    """Initial u of the last layer: one value, or U[gamma^(-1/T), gamma^(1/T)], so that it remembers the whole sequence
    from the start (Li et al. 2018, section 5), or as in the lower layers."""
    fixed = model.last_layer_fixed
    if fixed is not None:
        return lambda u: nn.init.constant_(u, fixed)
    if not model.last_layer_min:
        return model.recurrent_init
    low = last_layer_lower_bound(task.length, model.gamma)
    high = recurrent_max(task.length, model.gamma)
    return lambda u: nn.init.uniform_(u, low, high)


def inner_linear(model: IndRNNBaseConfig, input_size: int, output_size: int) -> nn.Linear:
    """A Linear between recurrences, its weight drawn like the input weights of the layers, its bias 0."""
    linear = nn.Linear(input_size, output_size)
    with torch.no_grad():
        fill_input(linear.weight, model.weight_init)
        nn.init.zeros_(linear.bias)
    return linear


def classifier(input_size: int, task: Task, *, kaiming: bool = False) -> nn.Linear:
    """The output layer: Glorot uniform (the tutorial) or Kaiming normal (the authors' release). Its bias is 0, or 0.1
    for a regression (the port's adding problem)."""
    head = nn.Linear(input_size, task.output_size)
    with torch.no_grad():
        if kaiming:
            nn.init.kaiming_normal_(head.weight)
        else:
            nn.init.xavier_uniform_(head.weight)
        nn.init.constant_(head.bias, REGRESSION_BIAS if task.loss == "mse" else 0.0)
    return head
