"""indrnn-report --inspect: memory, gradients and predictions agree with the networks themselves."""

import math

import pytest
import torch
from torch import nn

from indrnn.cli.report import main
from indrnn.config.compose import load_config
from indrnn.data import make_task
from indrnn.models import build_model
from indrnn.report.inspection import gradient_norms, half_life, layer_memories
from indrnn.training import train

CPU = torch.device("cpu")
ADDING = ["data=adding", "data.length=9", "data.validation_size=8"]
NETWORKS = {
    "indrnn": ["model=indrnn", "model.num_layers=2", "model.hidden_size=5"],
    "dense": ["model=indrnn_dense", "model.block_layers=[1,1]", "model.growth=2", "model.hidden_size=4"],
    "lstm": ["model=lstm", "model.num_layers=2", "model.hidden_size=5"],
    "rnn": ["model=rnn", "model.hidden_size=5"],
}


def _network(overrides, task=ADDING):
    """A network with weights large enough that every path counts, and the first validation sequences of its task."""
    cfg = load_config([*task, *overrides])
    torch.manual_seed(3)
    task = make_task(cfg.data)
    model = build_model(cfg.model, task)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            weight = getattr(module, "weight_ih", None)
            if weight is not None:
                weight.normal_()
    x, y = task.load(CPU).validation.batch(torch.arange(4))
    return model.double().eval().requires_grad_(False), x.double(), y


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_norms_agree_with_central_differences(name):
    model, x, y = _network(NETWORKS[name])
    t, epsilon = 4, 1e-6

    def losses(feature, amount):
        moved = x.clone()
        moved[:, t, feature] += amount
        return (model(moved).squeeze(1) - y.double()).square()

    columns = [(losses(feature, epsilon) - losses(feature, -epsilon)) / (2 * epsilon) for feature in range(2)]
    expected = torch.stack(columns, dim=1).norm(dim=1).mean()
    assert expected > 0
    torch.testing.assert_close(gradient_norms(model, x, y)[t], expected, rtol=1e-4, atol=1e-9)


def test_memory_of_an_indrnn_is_the_bounded_weight():
    assert half_life(torch.tensor([0.5, 1.0, 1.001, 0.0])).tolist() == [1.0, math.inf, math.inf, 0.0]
    model, x, _ = _network(NETWORKS["indrnn"])
    model.layers[-1].weight_hh.fill_(-1.5)
    assert layer_memories(model, x)[-1].max() == pytest.approx(2 ** (1 / 9))


def test_memory_of_an_lstm_is_that_of_its_forget_gates():
    """Compares with c_t = f c_{t-1} + i g: the share of a small change in one layer's c that is left after a step."""
    model, x, _ = _network(NETWORKS["lstm"])
    memories = layer_memories(model, x)
    assert len(memories) == 2
    for depth, memory in enumerate(memories):
        h, c = (torch.zeros(2, len(x), 5).double() for _ in range(2))
        nudge, kept = torch.zeros_like(c), torch.ones(len(x), 5).double()
        nudge[depth] = 1e-6
        for t in range(x.shape[1]):
            more = model.lstm(x[:, t : t + 1], (h, c + nudge))[1][1]
            _, (h, c) = model.lstm(x[:, t : t + 1], (h, c))
            kept *= (more - c)[depth] / 1e-6
        torch.testing.assert_close(memory, kept.log().mean(0).div(x.shape[1]).exp(), rtol=1e-5, atol=0)
    assert layer_memories(_network(NETWORKS["rnn"])[0], x) == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two updates."""
    root = tmp_path_factory.mktemp("runs")
    common = [f"output_root={root}", "device=cpu", "trainer.max_steps=2", "trainer.eval_every=1"]
    common += ["trainer.batch_size=2", "trainer.bn_samples=8", "model.hidden_size=6"]
    subset = ["data=mnist5k", "data.validation_size=20", "data.test_size=20"]
    train(load_config([*common, *subset, "model=indrnn", "model.num_layers=2"]))
    train(load_config([*common, *subset, "model=lstm"]))
    train(load_config([*common, *ADDING, "model=rnn"]))
    return root


@pytest.mark.parametrize("report", [False, True])
def test_networks_are_compared_in_one_figure_and_in_the_report(runs, tmp_path, report, capsys):
    networks = [str(runs / f"mnist5k/{model}/seed0") for model in ("indrnn", "lstm")]
    main([*[str(runs)] * report, "--out", str(tmp_path), "--inspect", *networks])
    assert "half-life" in capsys.readouterr().out
    assert {path.stem for path in (tmp_path / "mnist5k").glob("*.svg")} >= {"memory", "gradients"}
    assert (tmp_path / "report.html").exists() == report


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--inspect", "mnist5k"], "is not a run folder"),
        (["--inspect", "mnist5k/lstm/seed0", "adding-T9/rnn/seed0"], "runs of one task"),
        (["--data-root", "x", "--inspect", "adding-T9/rnn/seed0"], "reads no files"),
        (["--open", "--inspect", "mnist5k/lstm/seed0"], "--open"),
        (["--data-root", "x", "mnist5k"], "--inspect"),
        (["--playground", "mnist5k"], "is not a run folder"),
        (["--playground", "mnist5k/lstm/seed0", "--inspect", "mnist5k/lstm/seed0"], "--inspect"),
    ],
)
def test_wrong_request_is_one_line_and_code_2(runs, arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
