"""The IndRNN networks: plain, residual and dense stacks, initialized as the protocols prescribe.

B: sequences, T: time steps, D: input features, H: hidden units, K: outputs.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from indrnn.config.schema import IndRNNBaseConfig, IndRNNConfig, IndRNNDenseConfig, IndRNNResidualConfig
from indrnn.data import Task
from indrnn.layers import (
    AffineSequence,
    IndRNN,
    IndRNNLayer,
    concatenate,
    last_layer_lower_bound,
    linear,
    recurrent_layers,
    recurrent_max,
)
from indrnn.layers.init import Initializer, fill_input


def recurrent_layer(
    model: IndRNNBaseConfig,
    task: Task,
    input_size: int | None,
    hidden_size: int,
    *,
    last: bool = False,
    dropout: float | None = None,
) -> IndRNNLayer:
    """One recurrence with its norm and dropout, as configured.

    Args:
        input_size: None for a recurrence without input weights.
        last: whether the classifier reads this layer, whose u has its own initial range.
        dropout: replaces ``model.dropout``.
    """
    return IndRNNLayer(
        input_size,
        hidden_size,
        dropout=model.dropout if dropout is None else dropout,
        recurrent_init=_last_layer(model, task) if last else model.recurrent_init,
        **_settings(model, task),
    )


def _settings(model: IndRNNBaseConfig, task: Task) -> dict[str, Any]:
    return {
        "nonlinearity": model.nonlinearity,
        "norm": model.norm,
        "recurrent_max_abs": recurrent_max(task.length, model.gamma),
        "constraint": model.constraint,
        "input_init": model.weight_init,
        "backend": model.backend,
    }


def _last_layer(model: IndRNNBaseConfig, task: Task) -> Initializer:
    """Initial u of the last layer: a fixed value; U[gamma^(-1/T), gamma^(1/T)], with which it remembers the whole
    sequence from the start (Li et al. 2018, section 5); or as in the lower layers."""
    if model.last_layer_fixed is not None:
        return partial(nn.init.constant_, val=model.last_layer_fixed)
    if not model.last_layer_min:
        return model.recurrent_init
    return last_layer_lower_bound(task.length, model.gamma), recurrent_max(task.length, model.gamma)


def inner_linear(model: IndRNNBaseConfig, input_size: int, output_size: int) -> nn.Linear:
    """A Linear between recurrences, whose weight is initialized as the layers' input weights. Its bias is 0."""
    linear = nn.Linear(input_size, output_size)
    fill_input(linear.weight, model.weight_init)
    nn.init.zeros_(linear.bias)
    return linear


def classifier(input_size: int, task: Task, *, kaiming: bool = False) -> nn.Linear:
    """The output layer: Glorot uniform (the tutorial) or Kaiming normal (the authors' release). Its bias is 0, or 0.1
    for a regression, as in the TensorFlow port's adding problem (batzner/indrnn)."""
    head = nn.Linear(input_size, task.output_size)
    (nn.init.kaiming_normal_ if kaiming else nn.init.xavier_uniform_)(head.weight)
    nn.init.constant_(head.bias, 0.1 if task.loss == "mse" else 0.0)
    return head


class PlainIndRNN(IndRNN):
    """`indrnn`: an `IndRNN` and a classifier on its last step (Li et al. 2018, section 4.1).

    [Linear, recurrence, norm, dropout] × num_layers. On MNIST with 128 units and batch norm: 86,410 parameters with 6
    layers, 187,786 with 12.
    """

    def __init__(self, model: IndRNNConfig, task: Task) -> None:
        super().__init__(
            task.input_size,
            model.hidden_size,
            model.num_layers,
            batch_first=True,
            dropout=model.dropout,
            recurrent_init=[model.recurrent_init] * (model.num_layers - 1) + [_last_layer(model, task)],
            **_settings(model, task),
        )
        recurrent_layers(self)[-1][1].dropout = model.dropout  # before the classifier
        self.head = classifier(model.hidden_size, task, kaiming=model.weight_init == "kaiming")

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        sequence, _ = self.run(x)
        return self.head(sequence.last())


class ResidualBlock(nn.Module):
    """x + [recurrence, norm, dropout, Linear, recurrence, norm, dropout, Linear](x), all (B, T, H)."""

    def __init__(self, model: IndRNNResidualConfig, task: Task) -> None:
        super().__init__()
        size = model.hidden_size
        self.first = recurrent_layer(model, task, None, size)
        # The first Linear belongs to the second recurrence, as its input weight and bias.
        self.second = recurrent_layer(model, task, size, size)
        self.linear = inner_linear(model, size, size)

    def forward(self, x: Tensor) -> Tensor:
        inner, _ = self.first(x)
        inner, _ = self.second(inner)
        return x + linear(inner, self.linear.weight, self.linear.bias)


class ResidualIndRNN(nn.Module):
    """`indrnn_residual`: pre-activation residual blocks (Li et al. 2019, arXiv 1910.06251, section IV).

    Linear, num_blocks residual blocks, [recurrence, norm, dropout], and a classifier on the last step.
    On MNIST with 128 units, 5 blocks and batch norm: 170,890 parameters, eleven recurrences.
    """

    def __init__(self, model: IndRNNResidualConfig, task: Task) -> None:
        super().__init__()
        size = model.hidden_size
        self.stem = inner_linear(model, task.input_size, size)
        self.blocks = nn.Sequential(*(ResidualBlock(model, task) for _ in range(model.num_blocks)))
        self.final = recurrent_layer(model, task, None, size, last=True)
        self.head = classifier(size, task, kaiming=model.weight_init == "kaiming")

    def forward(self, x: Tensor) -> Tensor:
        sequence, _ = self.final(self.blocks(self.stem(x)))
        return self.head(sequence.last())


class DenseLayer(nn.Module):
    """[Linear, recurrence, norm, dropout] to the bottleneck and again to ``growth`` features, joined to the input."""

    def __init__(self, model: IndRNNDenseConfig, task: Task, input_size: int) -> None:
        super().__init__()
        width = model.bottleneck * model.growth
        self.bottleneck = recurrent_layer(model, task, input_size, width)
        self.features = recurrent_layer(model, task, width, model.growth, dropout=model.dropout_features)

    def forward(self, sequence: AffineSequence) -> AffineSequence:
        narrow, _ = self.bottleneck(sequence)
        features, _ = self.features(narrow)
        return concatenate([sequence, features])


class DenseBlock(nn.Module):
    """Dense layers and a transition [Linear, recurrence, norm, dropout] to half the width they end with."""

    def __init__(self, model: IndRNNDenseConfig, task: Task, input_size: int, num_layers: int, *, last: bool) -> None:
        super().__init__()
        widths = [input_size + layer * model.growth for layer in range(num_layers + 1)]
        self.layers = nn.Sequential(*(DenseLayer(model, task, width) for width in widths[:-1]))
        self.transition = recurrent_layer(model, task, widths[-1], widths[-1] // 2, last=last)

    def forward(self, sequence: AffineSequence) -> AffineSequence:
        halved, _ = self.transition(self.layers(sequence))
        return halved


class DenseIndRNN(nn.Module):
    """`indrnn_dense`: densely connected recurrences (Li et al. 2019, arXiv 1910.06251, section IV).

    A recurrence as stem, dense blocks whose transitions halve the width, and a classifier on the last step.
    On MNIST with a stem of 96, blocks of (8, 6, 4) layers, growth 16 and batch norm: 256,514 parameters.
    """

    def __init__(self, model: IndRNNDenseConfig, task: Task) -> None:
        super().__init__()
        width = model.hidden_size
        self.stem = recurrent_layer(model, task, task.input_size, width, dropout=model.dropout_features)
        self.blocks = nn.ModuleList()
        for layers in model.block_layers:
            last = len(self.blocks) == len(model.block_layers) - 1
            self.blocks.append(DenseBlock(model, task, width, layers, last=last))
            width = (width + layers * model.growth) // 2
        self.head = classifier(width, task, kaiming=model.weight_init == "kaiming")

    def forward(self, x: Tensor) -> Tensor:
        sequence, _ = self.stem(x)
        for block in self.blocks:
            sequence = block(sequence)
        return self.head(sequence.last())
