"""torch.export with dynamic batch and time, ONNX, and what else sees the operators."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim

from indrnn import IndRNN
from indrnn.recurrence import indrnn_recurrence

BACKENDS = ["auto", "reference", "scan", "numba"]
OPEN = ({0: Dim("B", max=512), 1: Dim("T")},)


class Recurrence(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.u = torch.nn.Parameter(torch.rand(3))
        self.backend = backend

    def forward(self, x):
        return indrnn_recurrence(x, self.u, backend=self.backend)


@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_dynamic_batch_and_time(backend):
    """One node per layer. None: a network of two layers."""
    module = Recurrence(backend) if backend else IndRNN(3, 4, 2, batch_first=True, norm="batch").eval()
    program = torch.export.export(module, (torch.randn(4, 40, 3),), dynamic_shapes=OPEN)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.indrnn.recurrence.default) == (1 if backend else 2)
    for B, T in ((1, 1), (7, 64), (512, 3)):
        x = torch.randn(B, T, 3)
        for actual, expected in zip(program.module()(x), module(x), strict=True):
            assert torch.equal(actual, expected)


def test_fake_tensors_run_no_kernel():
    with FakeTensorMode():
        h, last = indrnn_recurrence(torch.empty(2, 5, 3), torch.empty(3))
    assert (type(h), h.shape, last.shape) == (FakeTensor, (2, 5, 3), (2, 3))
    outside, _ = indrnn_recurrence(h, last[0])
    assert (type(outside), outside.shape) == (FakeTensor, (2, 5, 3))


def test_saved_program_in_a_new_process(tmp_path):
    module, x = IndRNN(3, 4, 2, batch_first=True, norm="batch").eval(), torch.randn(7, 64, 3)
    program = torch.export.export(module, (torch.randn(4, 40, 3),), dynamic_shapes=OPEN)
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((x, *(out.detach() for out in module(x))), tmp_path / "expected.pt")
    run = """
import sys, torch, indrnn.recurrence
program = torch.export.load(sys.argv[1] + "/model.pt2")
x, h, h_n = torch.load(sys.argv[1] + "/expected.pt")
output = program.module()(x)
print(torch.equal(output[0], h) and torch.equal(output[1], h_n))
"""
    done = subprocess.run([sys.executable, "-c", run, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


@pytest.fixture
def exporting(monkeypatch):
    """As torch.onnx.export traces a model, by torch.export with this flag; ONNX has no operator of ours."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    yield
    monkeypatch.undo()


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
def test_onnx_decomposes_into_pytorch_operators(nonlinearity, exporting, monkeypatch):
    model = IndRNN(3, 4, 2, nonlinearity, batch_first=True, bidirectional=True, norm="batch").eval()
    program = torch.export.export(model, (torch.randn(2, 7, 3),), dynamic_shapes=({0: Dim("B", max=512)},))
    assert not [node for node in program.graph.nodes if "indrnn" in str(node.target)]
    monkeypatch.undo()
    x = torch.randn(5, 7, 3)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
@pytest.mark.parametrize("how", ["dynamic shapes", "automatic", "TorchScript"])
@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
def test_onnx_refuses_a_dynamic_time_dimension(how, nonlinearity, exporting):
    """The number of passes would be that of the example. TorchScript does not say which dimensions are dynamic."""
    model, x = IndRNN(3, 4, 2, nonlinearity, batch_first=True).eval(), torch.randn(2, 7, 3)
    exports = {
        "dynamic shapes": lambda: torch.export.export(model, (x,), dynamic_shapes=OPEN),
        "automatic": lambda: torch.export.export(model, (x,), dynamic_shapes=({1: Dim.DYNAMIC},)),
        "TorchScript": lambda: torch.jit.trace(model, (x,)),
    }
    with pytest.raises(Exception, match="ONNX export needs a fixed number of time steps"):
        exports[how]()


def test_onnx_runtime(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    model = IndRNN(3, 4, batch_first=True).eval()
    x = torch.randn(2, 7, 3)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    output, _ = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x)[0])
