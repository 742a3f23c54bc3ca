"""The networks equal the same networks written out with materialised tensors: nn.Linear, a loop over time,
nn.BatchNorm1d, and dropout masks multiplied in. Outputs, every gradient and the running statistics, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from indrnn.data import make_task
from indrnn.layers import IndRNNLayer
from indrnn.models import build_model
from parts import part

T = 13
NETWORKS = {
    "indrnn": part("model", "indrnn", num_layers=3, hidden_size=7),
    "indrnn_residual": part("model", "indrnn_residual", num_blocks=2, hidden_size=6),
    "indrnn_dense": part("model", "indrnn_dense", hidden_size=6, block_layers=[2, 1], growth=4, bottleneck=2),
}


def network(name: str, dropout: float) -> nn.Module:
    model = copy.deepcopy(NETWORKS[name])
    model.weight_init = "kaiming"
    model.recurrent_init = "symmetric"
    model.dropout = dropout
    if name == "indrnn_dense":
        model.dropout_features = dropout / 2
    cfg = OmegaConf.create({"model": model, "data": part("data", "adding", length=T)})
    torch.manual_seed(0)
    built = build_model(cfg.model, make_task(cfg.data)).double()
    # Kaiming's a = 8 leaves small activations, and fresh batch norms have weight 1 and bias 0: neither tests much.
    with torch.no_grad():
        for key, parameter in built.named_parameters():
            if not key.endswith("weight_hh"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return built


class Unfolded:
    """The three networks, written out over the modules of another copy."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def recurrence(self, layer: IndRNNLayer, x: Tensor) -> Tensor:
        if layer.weight_ih is not None:
            x = F.linear(x, layer.weight_ih, layer.bias)
        u = layer.weight_hh.clamp(-layer.recurrent_max_abs, layer.recurrent_max_abs)
        state, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = torch.relu(x[:, t] + u * state)
            states.append(state)
        h = torch.stack(states, 1)
        z = layer.norm(h.flatten(0, 1)).view(h.shape)
        if layer.training and layer.dropout > 0:
            keep = 1 - layer.dropout
            # One mask a sequence: the same for every time step.
            z = z * (torch.empty_like(h[:, 0]).bernoulli_(keep) / keep).unsqueeze(1)
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
    x = torch.randn(5, T, 2, dtype=torch.double)
    x_model, x_twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(seed)
    output = model(x_model)
    torch.manual_seed(seed)
    expected = getattr(Unfolded(twin), name)(x_twin)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    cotangent = torch.randn_like(output)
    model.zero_grad()
    twin.zero_grad()
    output.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(x_model.grad, x_twin.grad, rtol=1e-9, atol=1e-11)
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    torch.testing.assert_close(
        gradients, {key: parameter.grad for key, parameter in twin.named_parameters()}, rtol=1e-9, atol=1e-11
    )
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients.values())
    buffers = dict(model.named_buffers())
    assert len(buffers) == 3 * sum(isinstance(each, nn.BatchNorm1d) for each in model.modules())
    torch.testing.assert_close(buffers, dict(twin.named_buffers()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", NETWORKS)
def test_folded_network_equals_the_written_out_one(name, dropout):
    """In training, where running statistics move and masks are drawn, and then in evaluation with those statistics."""
    model = network(name, dropout)
    twin = copy.deepcopy(model)
    assert_equal(name, model, twin, training=True, seed=1)
    assert_equal(name, model, twin, training=True, seed=2)
    assert_equal(name, model, twin, training=False, seed=3)


@pytest.mark.parametrize("name", NETWORKS)
def test_statistics_can_be_estimated_anew(name):
    """momentum=None and a reset make running statistics the averages over what follows, as in nn.BatchNorm1d."""
    model = network(name, 0.0)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        for norm in each.modules():
            if isinstance(norm, nn.BatchNorm1d):
                norm.reset_running_stats()
                norm.momentum = None
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(4, T, 2, dtype=torch.double)
            model(x)
            getattr(Unfolded(twin), name)(x)
    assert_equal(name, model, twin, training=False, seed=0)
