"""Devices, denormal numbers, precision."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from indrnn.config.compose import load_config
from indrnn.data import make_task
from indrnn.errors import RunError, UserError
from indrnn.layers import IndRNNLayer, recurrent_layers
from indrnn.models import build_model
from indrnn.training.device import autocast_context, prepare_process, resolve_device, set_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_an_unavailable_device_is_refused_in_one_line(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        resolve_device(name)
    assert str(caught.value).startswith(f"device={name}: ")
    assert str(caught.value).endswith("use device=cpu")
    assert "\n" not in str(caught.value)


def test_denormals_are_flushed_in_running_workers():
    program = """
import torch
from indrnn.training.device import prepare_process

CPU = torch.device("cpu")

def shares():
    tiny = torch.full((2048, 64), 1e-20)
    return float((tiny @ tiny.T == 0).float().mean()), float((torch.full((1 << 20,), 1e-40) * 1.0 == 0).float().mean())

print(*shares())
prepare_process(CPU)
print(*shares())
x = torch.full((1 << 18,), 1.0, requires_grad=True)
(x * 1e-20).backward(torch.full_like(x, 1e-20))
print(float((x.grad == 0).float().mean()))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["0.0", "0.0", "1.0", "1.0", "1.0"]


def test_a_cpu_that_cannot_prepare_process_refuses_only_runs_on_it(monkeypatch):
    monkeypatch.setattr(torch, "set_flush_denormal", lambda mode: False)
    with pytest.raises(RunError, match="cannot flush denormal numbers"):
        prepare_process(CPU)
    prepare_process(torch.device("cuda"))


@pytest.mark.parametrize(("precision", "mode"), [("float32", "ieee"), ("bfloat16", "ieee"), ("tf32", "tf32")])
def test_precision_is_the_same_for_matmul_and_cudnn(precision, mode):
    set_precision(precision, torch.device("cuda"))
    assert torch.backends.cuda.matmul.fp32_precision == mode
    assert torch.backends.cudnn.rnn.fp32_precision == mode
    # These raise if PyTorch's older and newer switches contradict each other.
    assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is (precision == "tf32")
    with torch.backends.cudnn.flags(enabled=False):
        pass
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    set_precision("float32", CPU)


def test_bfloat16_on_a_cpu_applies_only_to_sequences_of_our_layers():
    lstm, layer, head, x = nn.LSTM(1, 8), IndRNNLayer(1, 8, norm="batch"), nn.Linear(8, 3), torch.randn(4, 9, 1)
    before = lstm(x)[0]
    with autocast_context("bfloat16", CPU):
        sequence, state = layer(x)
        after = lstm(x)[0]
        logits = head(sequence.last())
    assert sequence.h.dtype == torch.bfloat16
    assert {state.dtype, sequence.scale.dtype, sequence.shift.dtype, logits.dtype} == {torch.float32}
    assert torch.equal(before, after)
    with autocast_context("float32", CPU):
        assert layer(x)[0].h.dtype == torch.float32


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize(
    ("model", "depth"),
    [("indrnn", "num_layers=2"), ("indrnn_residual", "num_blocks=1"), ("indrnn_dense", "block_layers=[1]")],
)
def test_bfloat16_gradients_are_close_to_float64(model, depth, norm):
    """Without relu, where a rounded state may be on the other side of the kink."""
    torch.manual_seed(0)
    overrides = [f"model={model}", f"model.{depth}", f"model.norm={norm}", "model.hidden_size=16", "data=adding"]
    cfg = load_config([*overrides, "data.length=30", "model.nonlinearity=identity"])
    network, x = build_model(cfg.model, make_task(cfg.data)).train(), torch.rand(64, 30, 2)
    for _, layer in recurrent_layers(network):
        layer.dropout = 0.0
    for parameter in network.parameters():
        if parameter.dim() == 2:
            nn.init.kaiming_uniform_(parameter)

    def gradients(model, x):
        loss = model(x).double().square().sum()
        return torch.cat([gradient.double().flatten() for gradient in torch.autograd.grad(loss, model.parameters())])

    expected = gradients(copy.deepcopy(network).double(), x.double())
    with autocast_context("bfloat16", CPU):
        error = (gradients(network, x) - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.05


def test_bfloat16_is_refused_without_instructions_for_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with pytest.raises(UserError, match=r"trainer.precision=bfloat16: .*use trainer.precision=float32"):
        set_precision("bfloat16", CPU)


@pytest.mark.parametrize("name", ["cpu", "mps"])
def test_tf32_is_refused_without_an_nvidia_gpu(name):
    with pytest.raises(
        UserError, match=f"^trainer.precision=tf32: only NVIDIA GPUs have it, and this run is on {name}; use"
    ):
        set_precision("tf32", torch.device(name))
