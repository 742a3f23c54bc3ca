"""Folded batch norm and dropout equal nn.BatchNorm1d and masks on materialized tensors, and cost few operations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import naive
from indrnn.data import make_task
from indrnn.layers import AffineSequence, IndRNN, IndRNNLayer, concatenate, linear
from indrnn.models import build_model
from parts import part

B, T, D, H, K = 3, 12, 2, 7, 4
EXACT = {"rtol": 1e-12, "atol": 1e-13}  # float64
NETWORKS = {
    "indrnn": {"num_layers": 3, "hidden_size": 7},
    "indrnn_residual": {"num_blocks": 2, "hidden_size": 6},
    "indrnn_dense": {"hidden_size": 6, "block_layers": [2, 1], "growth": 4, "bottleneck": 2},
}


def network(name: str, dropout: float, backend: str = "auto") -> nn.Module:
    model = part("model", name, weight_init="kaiming", recurrent_init="symmetric", dropout=dropout, backend=backend)
    model = part("model", name, **{**model, **NETWORKS[name]})
    if name == "indrnn_dense":
        model.dropout_features = dropout / 2
    built = build_model(model, make_task(part("data", "adding", length=T))).double()
    # Kaiming's a = 8 gives small activations, and new batch norms have weight 1 and bias 0: neither tests much.
    with torch.no_grad():
        for key, parameter in built.named_parameters():
            if not key.endswith("weight_hh"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return built


class Unfolded:
    """The three networks written out with materialized tensors, over the modules of another copy."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def recurrence(self, layer: IndRNNLayer, x: Tensor) -> Tensor:
        if layer.weight_ih is not None:
            x = F.linear(x, layer.weight_ih, layer.bias)
        h, _ = naive.recurrence(x, layer.weight_hh.clamp(-layer.recurrent_max_abs, layer.recurrent_max_abs))
        z = layer.norm(h.flatten(0, 1)).view(h.shape)
        if layer.training and layer.dropout > 0:
            keep = 1 - layer.dropout
            z = z * (torch.empty_like(h[:, 0]).bernoulli_(keep) / keep).unsqueeze(1)  # one mask per sequence
        return z

    def indrnn(self, x: Tensor) -> Tensor:
        for layer in self.model.layers:
            x = self.recurrence(layer, x)
        return self.model.head(x[:, -1])

    def indrnn_residual(self, x: Tensor) -> Tensor:
        x = self.model.stem(x)
        for block in self.model.blocks:
            x = x + block.linear(self.recurrence(block.second, self.recurrence(block.first, x)))
        return self.model.head(self.recurrence(self.model.final, x)[:, -1])

    def indrnn_dense(self, x: Tensor) -> Tensor:
        x = self.recurrence(self.model.stem, x)
        for block in self.model.blocks:
            for layer in block.layers:
                x = torch.cat([x, self.recurrence(layer.features, self.recurrence(layer.bottleneck, x))], -1)
            x = self.recurrence(block.transition, x)
        return self.model.head(x[:, -1])


def assert_equal(name: str, model: nn.Module, twin: nn.Module, training: bool, seed: int) -> None:
    model.train(training)
    twin.train(training)
    x = torch.randn(5, T, 2, dtype=torch.double, requires_grad=True)
    results = []
    for each, forward in ((model, model), (twin, getattr(Unfolded(twin), name))):
        torch.manual_seed(seed)
        output = forward(x)
        gradients = torch.autograd.grad(output.square().sum(), [x, *each.parameters()])
        results.append((output.detach(), gradients, dict(each.named_buffers())))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    assert all(gradient.abs().max() > 1e-6 for gradient in results[0][1])
    assert len(results[0][2]) == 3 * sum(isinstance(each, nn.BatchNorm1d) for each in model.modules())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "auto") for name in NETWORKS), ("indrnn", "reference"), ("indrnn", "scan")],
)
def test_folded_networks_equal_the_written_out_ones(name, backend, dropout):
    """Outputs, all gradients and running statistics over two training steps, and then evaluation."""
    model = network(name, dropout, backend)
    assert {each.dropout > 0 for each in model.modules() if isinstance(each, IndRNNLayer)} == {dropout > 0}
    twin = copy.deepcopy(model)
    assert_equal(name, model, twin, training=True, seed=1)
    assert_equal(name, model, twin, training=True, seed=2)
    assert_equal(name, model, twin, training=False, seed=3)


@pytest.mark.parametrize("momentums", [[None, None, None], [0.3, 0.3, 0.3], [0.1, None, 0.3]])
def test_running_statistics_follow_the_momentum(momentums):
    model = network("indrnn", 0.0)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        for layer, momentum in zip(each.layers, momentums, strict=True):
            layer.norm.reset_running_stats()
            layer.norm.momentum = momentum
    for _ in range(3):
        x = torch.randn(4, T, 2, dtype=torch.double)
        model(x)
        Unfolded(twin).indrnn(x)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=1e-10, atol=1e-12)


def test_a_layer_equals_its_norm():
    """A carried state, and readers of all steps and of the last step alone."""
    layer = IndRNNLayer(D, H, norm="batch", dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -0.9, 0.9)
    norm, weight = copy.deepcopy(layer.norm), torch.randn(K, H, dtype=torch.float64)
    for training in (True, False):
        layer.train(training)
        norm.train(training)
        x, h0 = torch.randn(B, T, D, dtype=torch.float64), torch.rand(B, H, dtype=torch.float64, requires_grad=True)
        h, state = naive.recurrence(F.linear(x, layer.weight_ih, layer.bias), layer.weight_hh, h0)
        expected = norm(h.flatten(0, 1)).view_as(h)
        sequence, last = layer(x, h0)
        torch.testing.assert_close(last, state, **EXACT)
        pairs = [
            (sequence.materialise(), expected),
            (linear(sequence, weight), expected @ weight.T),
            (sequence.last(), expected[:, -1]),
        ]
        inputs = [h0, layer.weight_ih, layer.weight_hh, layer.bias]
        for actual, wanted in pairs:
            torch.testing.assert_close(actual, wanted, **EXACT)
            gradients = [torch.autograd.grad(y.sin().sum(), inputs, retain_graph=True) for y in (actual, wanted)]
            torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_float32_stays_close():
    """Units with a large mean, where folding could lose digits."""
    rnn = IndRNN(D, H, 2, batch_first=True, norm="batch", dtype=torch.float64)
    for layer in rnn.layers:
        nn.init.uniform_(layer.bias, 5, 10)
        nn.init.uniform_(layer.weight_hh, 0.5, 0.9)
    x = torch.randn(B, T, D, dtype=torch.float64)
    expected, _ = rnn(x)
    actual, _ = rnn.float()(x.float())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm(H), nn.LayerNorm(H), nn.BatchNorm1d(H, affine=False)])
def test_only_batch_norm_can_be_folded(norm):
    layer = IndRNNLayer(D, H, norm="batch")
    with pytest.raises(ValueError, match="more than one value per unit"):
        layer(torch.randn(1, 1, D))
    layer.norm = norm
    with pytest.raises(ValueError, match="norm must be a BatchNorm1d"):
        layer(torch.randn(2, 3, D))


def sequences():
    h = torch.randn(B, T, H, dtype=torch.float64)
    scale, shift = torch.rand(2, H, dtype=torch.float64)
    mask = torch.rand(B, H, dtype=torch.float64).round() * 2
    return [
        AffineSequence(h, h[:, -1], *factors)
        for factors in ((), (scale, shift), (None, None, mask), (scale, shift, mask))
    ]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("bias", [None, torch.randn(K, dtype=torch.float64)])
def test_linear_reads_any_sequence(which, bias):
    sequence = sequences()[which]
    weight = torch.randn(K, H, dtype=torch.float64)
    expected = F.linear(sequence.materialise(), weight, bias)
    torch.testing.assert_close(linear(sequence, weight, bias), expected, **EXACT)
    torch.testing.assert_close(linear(sequence.materialise(), weight, bias), expected, **EXACT)
    torch.testing.assert_close(sequence.last(), sequence.materialise()[:, -1], **EXACT)


@pytest.mark.parametrize("which", [[0, 1, 2, 3], [0, 0], [1, 1], [3, 3], [0, 2]])
def test_concatenate_keeps_every_affine_map(which):
    parts = [sequences()[k] for k in which]
    both = concatenate(parts)
    torch.testing.assert_close(both.materialise(), torch.cat([each.materialise() for each in parts], -1), **EXACT)
    torch.testing.assert_close(both.last(), torch.cat([each.last() for each in parts], -1), **EXACT)
    assert (both.scale is None) == (len({each.scale is None for each in parts}) > 1 or parts[0].scale is None)
