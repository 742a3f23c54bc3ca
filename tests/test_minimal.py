"""scripts/indrnn_minimal.py agrees with the package, and learns."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from indrnn import build_model, indrnn_recurrence
from indrnn.config.compose import load_config
from indrnn.data import make_task

FILE = Path(__file__).resolve().parents[1] / "scripts" / "indrnn_minimal.py"

pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="needs the source tree")


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("indrnn_minimal", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("T", [1, 17])
def test_scan_agrees_with_the_recurrence(minimal, T):
    x = torch.randn(3, T, 5, dtype=torch.float64, requires_grad=True)
    u = torch.tensor([-1.01, -0.5, 0.0, 0.9, 1.02], dtype=torch.float64, requires_grad=True)
    h, (expected, _) = minimal.Recurrence.apply(x, u), indrnn_recurrence(x, u, backend="reference")
    torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(h)
    gradients = (torch.autograd.grad(each, (x, u), cotangent) for each in (h, expected))
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_network_loads_the_weights_of_the_package_and_agrees(minimal):
    cfg = load_config(["model=indrnn", "model.num_layers=3", "model.hidden_size=8"])
    theirs = build_model(cfg.model, make_task(cfg.data)).double()
    ours = minimal.Classifier(hidden_size=8, num_layers=3).double()
    for name, parameter in ours.named_parameters():
        assert parameter.abs().max().item() == pytest.approx(theirs.get_parameter(name).abs().max().item(), rel=0.6), (
            name
        )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 784, 1, dtype=torch.float64)
    torch.testing.assert_close(ours.train()(x), theirs.train()(x), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-9, atol=1e-10)


def test_training_learns_the_sign_of_the_first_of_12_pixels(minimal, capsys):
    torch.manual_seed(0)
    x = torch.randn(600, 12, 1)
    y = (x[:, 0, 0] > 0).long()
    model = minimal.Classifier(hidden_size=16, num_layers=2, T=12, classes=2)
    for parameter in (model.layers[0].weight_ih, model.layers[1].weight_ih):
        torch.nn.init.kaiming_uniform_(parameter)
    torch.nn.init.constant_(model.layers[0].weight_hh, 1.0)
    minimal.train(model, x, y, x[:200], y[:200], steps=300, batch=64, every=150)
    reached = re.findall(r"step (\d+): loss [\d.]+, test accuracy ([\d.]+)%", capsys.readouterr().out)
    assert [step for step, _ in reached] == ["150", "300"]
    assert float(reached[-1][1]) > 55
