"""The networks that others compare with: GRU and minGRU."""

import pytest
import torch

from indrnn.config.compose import load_config
from indrnn.data import make_task
from indrnn.models.baselines import GRUClassifier
from indrnn.models.mingru import MinGRU, MinGRUClassifier, log_g
from indrnn.training import train
from parts import adding as adding_data
from parts import mnist5k as mnist5k_data


def step_by_step(layer: MinGRU, x: torch.Tensor) -> torch.Tensor:
    """The definition: one state after another, no logarithms (equations of section 3.1.1)."""
    state = x.new_zeros(len(x), layer.gate.out_features)
    states = []
    for x_t in x.unbind(1):
        z = layer.gate(x_t).sigmoid()
        a = layer.candidate(x_t)
        candidate = torch.where(a >= 0, a + 0.5, a.sigmoid())
        state = (1 - z) * state + z * candidate
        states.append(state)
    return torch.stack(states, 1)


@pytest.mark.parametrize("length", [1, 2, 17, 784])
def test_the_parallel_mingru_is_the_sequential_one(length):
    torch.manual_seed(0)
    layer = MinGRU(3, 5).double()
    x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    cotangent = torch.randn(2, length, 5, dtype=torch.float64)
    found, expected = layer(x), step_by_step(layer, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = (torch.autograd.grad(h, inputs, cotangent) for h in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_mingru_in_float32_keeps_its_gradients_finite_where_gates_are_shut():
    layer = MinGRU(1, 4)
    with torch.no_grad():
        layer.gate.bias.fill_(-30.0)
    x = torch.randn(2, 784, 1, requires_grad=True)
    h = layer(x)
    h.sum().backward()
    assert h.isfinite().all()
    assert x.grad.isfinite().all()


def test_g_is_continuous_and_positive():
    a = torch.tensor([-100.0, -1e-6, 0.0, 1e-6, 5.0], dtype=torch.float64)
    torch.testing.assert_close(
        log_g(a).exp()[1:], torch.tensor([0.5, 0.5, 0.5, 5.5], dtype=torch.float64), atol=1e-5, rtol=0
    )
    assert log_g(a).isfinite().all()


@pytest.mark.parametrize(("network", "num_layers"), [(GRUClassifier, 1), (MinGRUClassifier, 3)])
@pytest.mark.parametrize("data", [mnist5k_data(), adding_data(length=30)])
def test_a_network_has_one_output_a_class_and_trains(network, num_layers, data):
    task = make_task(data)
    model = network(task, hidden_size=8, num_layers=num_layers)
    output = model(torch.randn(3, task.length, task.input_size))
    assert output.shape == (3, task.output_size)
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("model", ["gru", "mingru", "lstm_chrono"])
def test_a_network_trains_under_the_protocol_of_the_table(model, tmp_path):
    """The table's own settings, but for a shorter sequence and fewer updates."""
    words = [f"model={model}", "experiment=length_study", "data.length=20", "data.validation_size=100"]
    words += [
        "data.test_size=100",
        "device=cpu",
        "trainer.max_steps=6",
        "trainer.eval_every=3",
        "trainer.bn_samples=50",
    ]
    result = train(load_config([*words, f"output_root={tmp_path}"]))
    assert (result.name, result.steps) == (f"length_study_{model}", 6)
    for protocol in ("demo", "fast"):
        assert load_config([f"experiment={protocol}", f"model={model}"]).name == f"{protocol}_{model}"
