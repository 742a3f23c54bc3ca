"""One training step: what it updates and clips, and its capture as a CUDA graph."""

import copy
import weakref
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from indrnn.config.compose import load_config
from indrnn.data import make_task
from indrnn.errors import RunError
from indrnn.layers import recurrent_layers
from indrnn.models import build_model
from indrnn.training.evaluation import Objective
from indrnn.training.optimizer import build_optimizers, decayed_parameters, set_rates
from indrnn.training.step import WARM_UP, Meter, TrainingStep
from small_runs import ArraySplit, make_small, small_config

CPU = torch.device("cpu")
BATCH = torch.arange(16)


def make_step(tmp_path, *overrides, device=CPU):
    cfg = small_config(tmp_path, "model.dropout=0", *overrides)
    torch.manual_seed(0)
    model = build_model(cfg.model, make_task(cfg.data)).to(device)
    split = ArraySplit(200, 1, device=device)
    return TrainingStep(
        model, build_optimizers(model, cfg.optimizer), Objective(make_small()), split, cfg.trainer, device
    )


def test_a_step_is_adam_on_clipped_gradients(tmp_path):
    step = make_step(tmp_path, "trainer.clip_norm=0.5", "optimizer.lr=0.01")
    model = copy.deepcopy(step.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, foreach=False, fused=False)
    norms = 0.0
    for batch in (BATCH, BATCH + 16, BATCH + 32):
        step(batch)
        x, y = step.split.batch(batch)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        norms += float(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
    assert norms > 1.5, "nothing was clipped, so the test shows nothing"
    for (name, ours), theirs in zip(step.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
    assert step.meter.read()["grad_norm"] == pytest.approx(norms, rel=1e-5)


def test_gradients_are_clipped_by_value_and_then_by_norm(tmp_path):
    step = make_step(tmp_path, "trainer.clip_value=1e-3", "trainer.clip_norm=1e-2")
    model = copy.deepcopy(step.model)
    step(BATCH)
    x, y = step.split.batch(BATCH)
    nn.functional.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    before = float(nn.utils.clip_grad_norm_(model.parameters(), 1e-2))
    assert before > 1e-2, "the norm was not clipped, so the test shows nothing"
    for ours, theirs in zip(step.parameters, model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("model", ["indrnn", "indrnn_residual", "indrnn_dense", "lstm", "rnn"])
def test_weight_decay_applies_to_all_but_u_and_biases(model):
    cfg = load_config([f"model={model}", "data=mnist5k", "optimizer.weight_decay=0.1"])
    network = build_model(cfg.model, make_task(cfg.data))
    decayed = {id(parameter) for parameter in decayed_parameters(network)}
    scales = {id(module.weight) for module in network.modules() if isinstance(module, nn.BatchNorm1d)}
    assert bool(scales) == model.startswith("indrnn")
    for name, parameter in network.named_parameters():
        assert (id(parameter) in decayed) == (parameter.dim() == 2 or id(parameter) in scales), name
    assert all(id(layer.weight_hh) not in decayed for _, layer in recurrent_layers(network))
    (optimizer,) = build_optimizers(network, cfg.optimizer)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len({id(each) for each in grouped}) == len(list(network.parameters()))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=indrnn", "model.dropout=0.1"),
        ("model=indrnn", "model.constraint=project", "trainer.clip_value=1.0", "optimizer.weight_decay=0.1"),
        ("model=indrnn_residual",),
        ("model=indrnn_dense", "model.dropout=0.1", "data=adding"),
        ("model=lstm",),
    ],
)
def test_a_step_never_waits_for_the_device(overrides):
    """Tensors on the meta device have no content, so nothing that needs one can run."""
    cfg = load_config(["data=mnist5k", "trainer.target_accuracy=null", *overrides])
    device = torch.device("meta")
    task = make_task(cfg.data)
    model = build_model(cfg.model, task).to(device).train()
    split = task.load(CPU).train if cfg.data.name == "adding" else ArraySplit(200, 1, device=device)
    # float32 needs no autocast, which has no meta device.
    step = TrainingStep(model, [], Objective(task), split, cfg.trainer, CPU)
    step.meter = Meter(device)
    step(torch.arange(16, device=device))
    with pytest.raises(RuntimeError, match="meta"):
        step.meter.read()


def test_projection_keeps_the_stored_weight_in_its_bounds(tmp_path):
    step = make_step(tmp_path, "model.constraint=project")
    set_rates(step.optimizers, 50.0)
    step(BATCH)
    for _, layer in recurrent_layers(step.model):
        assert layer.weight_hh.abs().max() <= layer.recurrent_max_abs


@pytest.mark.parametrize("graph", ["auto", True])
def test_a_step_that_cannot_be_captured_runs_eagerly_with_a_warning(tmp_path, monkeypatch, graph):
    """With stand-ins for CUDA's objects the passes run on the CPU. Nothing keeps the failed pass alive."""
    step = make_step(tmp_path)
    step.device = torch.device("cuda")
    names = ("CUDAGraph", "Stream", "current_stream", "default_generators", "get_rng_state", "synchronize")
    for module, name in [(torch, "Generator"), *((torch.cuda, name) for name in names)]:
        monkeypatch.setattr(module, name, MagicMock())
    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    outputs = []

    def fail_in_the_capture(module, inputs, output):
        outputs.append(weakref.ref(output))
        if len(outputs) == WARM_UP + 1:
            raise torch.OutOfMemoryError("operation not permitted")

    step.model.register_forward_hook(fail_in_the_capture)
    if graph is True:
        with pytest.raises(RunError, match=r"not permitted.*use trainer.cuda_graph=false"):
            step.warm_up(BATCH, graph)
        return
    with pytest.warns(UserWarning, match="without a CUDA graph, .*not permitted"):
        assert "operation not permitted" in step.warm_up(BATCH, graph)["cuda_graph"]
    step(BATCH)
    assert len(outputs) == WARM_UP + 3
    assert outputs[WARM_UP]() is None
    assert step.warm_up(BATCH, False) == {}


@pytest.mark.gpu
def test_the_graph_equals_eager_passes(tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    steps = [make_step(tmp_path, "model.backend=auto", device=device) for _ in range(2)]
    steps[1].warm_up(BATCH.to(device), True)
    for step in steps:
        for number in range(3):
            step(BATCH.to(device) + 16 * number)
    for ours, theirs in zip(*(step.model.parameters() for step in steps), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_after_a_failed_capture_the_step_runs_eagerly(tmp_path):
    """Dropout's generator, the allocator and the current stream are as before."""
    device = torch.device("cuda", torch.cuda.current_device())
    step = make_step(tmp_path, "model.backend=auto", "model.dropout=0.5", device=device)
    step.model.register_forward_hook(lambda module, inputs, output: output + 0 * output.sum().item())
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        step.warm_up(BATCH.to(device), "auto")
    assert torch.cuda.current_stream() == stream
    losses = []
    for _ in range(2):
        torch.cuda.manual_seed(0)
        losses.append(float(step.gradients(BATCH.to(device))[0]))
    assert losses[0] == losses[1]


def test_the_meter_sums_over_its_interval_and_counts_finite_steps(tmp_path):
    step = make_step(tmp_path, "optimizer.lr=1e-12")
    for number in range(3):
        step(BATCH + 16 * number)
    x, y = step.split.batch(torch.arange(48))
    with torch.no_grad():
        outputs = torch.cat([step.model(part) for part in x.split(16)])
    sums = step.meter.read()
    assert sums["loss"] / 3 == pytest.approx(float(nn.functional.cross_entropy(outputs, y)), rel=1e-5)
    assert sums["correct"] == int((outputs.argmax(1) == y).sum())
    assert (sums["count"], sums["finite"]) == (3, 3)
    for loss, norm in ((torch.nan, 1.0), (1.0, torch.inf), (-torch.inf, torch.inf), (1.0, 1.0)):
        step.meter.add(torch.tensor(loss), torch.tensor(0), torch.tensor(norm))
    sums = step.meter.read()
    assert (sums["count"], sums["finite"]) == (7, 3)
    step.meter.clear()
    assert set(step.meter.read().values()) == {0.0}


class CountCalls(TorchDispatchMode):
    """Counts the dispatched operations that compute something: no views."""

    count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        views = ("aten::detach", "aten::_unsafe_view")
        self.count += not (operator.is_view or operator.name() in views or operator.namespace == "profiler")
        return operator(*arguments, **keywords or {})


def test_a_step_of_the_default_network_stays_below_200_calls(tmp_path):
    """Each is a kernel launch on a GPU. The product W x is counted, which numba fuses."""
    size = ["model.num_layers=6", "model.hidden_size=128", "model.backend=reference", "schedule=constant"]
    step = make_step(tmp_path, *size)
    step(BATCH)  # creates the optimizer's state
    with CountCalls() as calls:
        step(BATCH)
    assert calls.count < 200
