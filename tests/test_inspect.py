"""indrnn-report --inspect: memory, gradients and step-by-step answers agree with the networks themselves."""

from pathlib import Path

import pytest
import torch
from torch import nn

from indrnn.cli.report import main
from indrnn.config.compose import load_config
from indrnn.data import make_task
from indrnn.models import build_model
from indrnn.report.inspection import (
    LayerMemory,
    _replaced_output,
    class_probabilities,
    gradient_norms,
    last_recurrence,
    layer_memories,
    load_inspected,
    some_sequences,
)
from indrnn.training import train

CPU = torch.device("cpu")
ADDING = ["data=adding", "data.length=9", "data.validation_size=8"]
NETWORKS = {
    "indrnn": ["model=indrnn", "model.num_layers=2", "model.hidden_size=5"],
    "indrnn, no norm": ["model=indrnn", "model.num_layers=2", "model.hidden_size=5", "model.norm=none"],
    "residual": ["model=indrnn_residual", "model.num_blocks=1", "model.hidden_size=4"],
    "dense": ["model=indrnn_dense", "model.block_layers=[1,1]", "model.growth=2", "model.hidden_size=4"],
    "lstm": ["model=lstm", "model.num_layers=2", "model.hidden_size=5"],
    "rnn": ["model=rnn", "model.hidden_size=5"],
}


def _network(overrides, task=ADDING):
    """A network with weights large enough that every path counts, and its configuration."""
    cfg = load_config([*task, *overrides])
    torch.manual_seed(3)
    model = build_model(cfg.model, make_task(cfg.data))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            weight = getattr(module, "weight_ih", None)
            if weight is not None:
                weight.normal_()
    return model.double().eval().requires_grad_(False), cfg


@pytest.mark.parametrize("name", NETWORKS)
def test_running_the_last_recurrence_step_by_step_gives_the_networks_output(name):
    model, cfg = _network(NETWORKS[name])
    x = make_task(cfg.data).load(CPU).validation.batch(torch.arange(4))[0].double()
    states = []
    with _replaced_output(last_recurrence(model), states), torch.enable_grad():
        stepwise = model(x)
    assert len(states) == 9
    torch.testing.assert_close(stepwise.detach(), model(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_gradient_of_every_state_is_that_of_nudging_it(name):
    """Central differences: the loss when one state, and with it all later ones, is moved a little."""
    model, cfg = _network(NETWORKS[name])
    x, y = some_sequences(make_task(cfg.data).load(CPU).validation)
    norms = gradient_norms(model, x, y)
    module = last_recurrence(model)
    lstm = isinstance(module, nn.LSTM)
    t, epsilon = 4, 1e-6
    seen = []
    handle = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(x)
    handle.remove()

    def loss(which, unit, amount):
        sequence = seen[0]

        def cut(start, stop):
            if torch.is_tensor(sequence):
                return sequence[:, start:stop]
            h = sequence.h[:, start:stop]
            return type(sequence)(h, h[:, -1], sequence.scale, sequence.shift)

        state = module(cut(0, t))[1]
        parts = [part.clone() for part in (state if lstm else (state,))]
        top = parts[which][-1] if isinstance(module, nn.RNNBase) else parts[which]
        top[:, unit] += amount
        result = module(cut(t, 9), tuple(parts) if lstm else parts[0])
        handle = module.register_forward_hook(lambda *_: result)
        output = model(x)
        handle.remove()
        return (output.squeeze(1) - y.double()).square()

    moved = [(which, unit) for which in range(1 + lstm) for unit in range(module.hidden_size)]
    columns = [(loss(*place, epsilon) - loss(*place, -epsilon)) / (2 * epsilon) for place in moved]
    expected = torch.stack(columns, dim=1).norm(dim=1).mean()
    assert expected > 0
    torch.testing.assert_close(norms[t - 1], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_answer_after_each_step_is_the_answer_to_the_prefix(name):
    model, cfg = _network(NETWORKS[name], ["data=mnist5k"])
    x = make_task(cfg.data).load(CPU).validation.batch(torch.tensor([5]))[0][0, 300:317]
    probabilities = class_probabilities(model, x)
    assert probabilities.shape == (17, 10)
    for steps in (1, 2, 16, 17):
        torch.testing.assert_close(probabilities[steps - 1], model(x[None, :steps].double())[0].softmax(-1))


def test_memory_is_the_steps_until_half_is_forgotten():
    u = torch.tensor([0.5, -0.5, 2 ** (-1 / 784), 1.0, -1.001, 0.0, 1 - 1e-15], dtype=torch.float64)
    life = LayerMemory("a", u.abs()).half_life
    torch.testing.assert_close(life[:3], torch.tensor([1.0, 1.0, 784.0], dtype=torch.float64))
    assert life[3:5].isinf().all()
    assert life[5] == 0
    assert life[6].isfinite()
    assert LayerMemory("a", u.abs()).share_forever == pytest.approx(2 / 7)


def test_memory_is_that_of_the_weight_in_use_after_clipping():
    model, _ = _network(NETWORKS["indrnn"])
    last_recurrence(model).weight_hh.fill_(-1.5)
    assert layer_memories(model, torch.zeros(1, 9, 2).double())[-1].keeps.max() == pytest.approx(2 ** (1 / 9))


def test_of_several_recurrences_the_last_is_looked_at():
    first, second = nn.GRU(1, 2), nn.LSTM(2, 2)
    assert last_recurrence(nn.ModuleList([first, second])) is second


def test_memory_of_an_lstm_is_that_of_its_forget_gates_as_it_reads():
    """Against c_t = f c_{t-1} + i g: how much of a little more in one layer's c is left after a step."""
    model, cfg = _network(["model=lstm", "model.num_layers=2", "model.hidden_size=5"])
    x, _ = some_sequences(make_task(cfg.data).load(CPU).validation)
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
        torch.testing.assert_close(memory.keeps, kept.log().mean(0).div(x.shape[1]).exp(), rtol=1e-5, atol=0)
    assert layer_memories(_network(NETWORKS["rnn"])[0], x) == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short runs on mnist5k and one of another task; the learning rate is next to nothing."""
    root = tmp_path_factory.mktemp("runs")
    common = [f"output_root={root}", "device=cpu", "trainer.max_steps=2", "trainer.eval_every=1", "optimizer.lr=1e-12"]
    common += ["trainer.batch_size=2", "trainer.bn_samples=8", "model.hidden_size=6"]
    subset = ["data=mnist5k", "data.validation_size=20", "data.test_size=20"]
    train(load_config([*common, *subset, "model=indrnn", "model.num_layers=2"]))
    train(load_config([*common, *subset, "model=lstm"]))
    train(load_config([*common, *subset, "model=indrnn", "model.num_layers=2", "data.permutation=bitrev"]))
    train(load_config([*common, *ADDING, "model=rnn"]))
    return root


def test_untrained_is_the_network_before_its_first_update(runs):
    inspected, *_ = load_inspected([runs / "mnist5k/indrnn/seed0", runs / "mnist5k/lstm/seed0"], None)
    assert [run.label for run in inspected] == ["IndRNN", "LSTM"]
    for run in inspected:
        for trained, untrained in zip(run.trained.parameters(), run.untrained.parameters(), strict=True):
            torch.testing.assert_close(trained, untrained, rtol=0, atol=1e-8)
        assert all(
            (module.running_var != 1).all() for module in run.untrained.modules() if isinstance(module, nn.BatchNorm1d)
        )


def test_the_pictures_of_two_models_are_drawn_together(runs, tmp_path, capsys):
    folders = [str(runs / f"mnist5k/{model}/seed0") for model in ("indrnn", "lstm")]
    main(["--out", str(tmp_path), "--inspect", *folders])
    printed = capsys.readouterr().out
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    stems = ("memory", "gradients", "digit")
    assert made == {f"mnist5k/{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert "## IndRNN: memory of each layer" in printed
    assert "layers.1" in printed
    assert "## LSTM: memory of each layer" in printed
    gradients = (tmp_path / "mnist5k/gradients.svg").read_text(encoding="utf-8")
    for text in ("IndRNN, trained", "LSTM, untrained", "log scale", "5,000-image subset"):
        assert text in gradients
    assert "LSTM: after the last step" in (tmp_path / "mnist5k/digit.svg").read_text(encoding="utf-8")


def test_a_published_run_needs_no_checkpoint(tmp_path, capsys):
    published = Path(__file__).parents[1] / "results/runs/mnist5k/demo_indrnn-verify/seed0"
    assert not list(published.glob("*.pt"))
    main(["--out", str(tmp_path), "--inspect", str(published)])
    assert "half forgotten" in capsys.readouterr().out
    assert (tmp_path / "mnist5k/memory.png").exists()


def test_a_permuted_task_shows_the_image_as_it_looks(runs, tmp_path):
    main(["--out", str(tmp_path), "--inspect", str(runs / "mnist5k_permuted-bitrev/indrnn/seed0")])
    assert (tmp_path / "mnist5k_permuted-bitrev/digit.png").exists()


def test_a_task_without_classes_has_no_digit(runs, tmp_path):
    main(["--out", str(tmp_path), "--inspect", str(runs / "adding-T9/rnn/seed0")])
    assert {path.stem for path in (tmp_path / "adding-T9").iterdir()} == {"gradients"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--inspect", "mnist5k"], "is not a run folder"),
        (["--inspect", "mnist5k/lstm/seed0", "adding-T9/rnn/seed0"], "runs of one task"),
        (["--data-root", "x", "--inspect", "adding-T9/rnn/seed0"], "reads no files"),
        (["mnist5k", "--inspect", "mnist5k/lstm/seed0"], "takes all folders"),
        (["--data-root", "x", "mnist5k"], "--inspect"),
    ],
)
def test_a_wrong_request_is_one_line_and_code_2(runs, arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert said in line
