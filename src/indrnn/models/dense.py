"""``indrnn_dense``: densely connected recurrences (Li et al. 2019, arXiv 1910.06251, section IV)."""

from torch import Tensor, nn

from indrnn.config.schema import IndRNNDenseConfig
from indrnn.data import Task
from indrnn.layers import AffineSequence, concatenate

from .initial import classifier, recurrent_layer


class DenseLayer(nn.Module):
    """[Linear, recurrence, norm, dropout] to the bottleneck and again to ``growth`` features, beside the input."""

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
    """A recurrence as stem, dense blocks that each end at half the width they reached, and a classifier on
    the last step.

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
        """Map x (B, T, D) to logits (B, K)."""
        sequence, _ = self.stem(x)
        for block in self.blocks:
            sequence = block(sequence)
        return self.head(sequence.last())
