"""The networks: their sizes, their initial values, and that each classifies from the past alone."""

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from indrnn.config.compose import config_dir, load_config
from indrnn.data import make_task
from indrnn.errors import UserError
from indrnn.layers import IndRNNLayer, last_layer_lower_bound, recurrent_layers, recurrent_max
from indrnn.models import MODELS, LSTMClassifier, build_model
from parts import part

INDRNNS = ("indrnn", "indrnn_residual", "indrnn_dense")
SMALL = {
    "indrnn": {"hidden_size": 8, "num_layers": 3},
    "indrnn_residual": {"hidden_size": 8, "num_blocks": 2},
    "indrnn_dense": {"hidden_size": 6, "block_layers": [2, 1], "growth": 4, "bottleneck": 2},
    "lstm": {"hidden_size": 8, "num_layers": 2},
    "lstm_chrono": {"hidden_size": 8, "bias_init": "chrono"},
    "rnn": {"hidden_size": 8},
}
T = 784


def config(name: str, length: int | None = None, **model: object) -> DictConfig:
    """MNIST, or the adding problem of a given length."""
    data = part("data", "mnist") if length is None else part("data", "adding", length=length)
    return OmegaConf.create({"model": part("model", name, **model), "data": data})


def build(name: str, length: int | None = None, seed: int = 0, **model: object) -> nn.Module:
    torch.manual_seed(seed)
    cfg = config(name, length, **model)
    return build_model(cfg.model, make_task(cfg.data))


def parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def ranges(model: nn.Module) -> list[tuple[float, float]]:
    return [(each.weight_hh.min().item(), each.weight_hh.max().item()) for _, each in recurrent_layers(model)]


@pytest.mark.parametrize(
    ("name", "model", "published"),
    [
        ("indrnn", {"num_layers": 6}, 86_410),
        ("indrnn", {"num_layers": 12}, 187_786),
        ("indrnn_residual", {}, 170_890),
        ("indrnn_dense", {}, 256_514),
        ("lstm", {}, 68_362),
        ("lstm_matched", {"hidden_size": 144}, 86_122),
        ("rnn", {}, 18_058),
    ],
)
def test_parameter_counts_are_the_published_ones(name, model, published):
    assert parameters(build(name, **model)) == published


def test_recurrent_layers_come_in_depth_order():
    assert [len(recurrent_layers(build(name))) for name in INDRNNS] == [6, 11, 1 + 2 * 18 + 3]
    sizes = [(each.input_size, each.hidden_size) for _, each in recurrent_layers(build("indrnn_dense"))]
    assert sizes[:4] == [(1, 96), (96, 64), (64, 16), (112, 64)]
    assert sizes[-3:] == [(152, 64), (64, 16), (168, 84)]


@pytest.mark.parametrize("name", INDRNNS)
def test_lower_layers_start_in_zero_to_max_and_the_last_near_one(name):
    model = build(name)
    largest, least = recurrent_max(T), last_layer_lower_bound(T)
    *lower, (low, high) = ranges(model)
    assert all(0 <= smallest < 0.5 < greatest <= largest for smallest, greatest in lower)
    assert least <= low < 1 < high <= largest
    for _, layer in recurrent_layers(model):
        assert layer.recurrent_max_abs == largest


@pytest.mark.parametrize("name", INDRNNS)
def test_the_last_layers_range_can_be_switched_off_or_fixed(name):
    assert ranges(build(name, last_layer_min=False))[-1][0] < 0.5
    *lower, last = ranges(build(name, last_layer_fixed=1.0))
    assert last == (1.0, 1.0)
    assert all(high < 1.01 and low < 0.5 for low, high in lower)


def test_gamma_widens_and_symmetric_mirrors_the_initial_range():
    largest = recurrent_max(T, 5.0)
    model = build("indrnn", gamma=5.0, recurrent_init="symmetric", hidden_size=512)
    *lower, (low, high) = ranges(model)
    assert all(-largest <= smallest < -0.9 and 0.9 < greatest <= largest for smallest, greatest in lower)
    assert last_layer_lower_bound(T, 5.0) <= low < high <= largest
    assert high > recurrent_max(T, 2.0)


@pytest.mark.parametrize(("constraint", "used"), [("clip", recurrent_max(20)), ("project", 3.0), ("none", 3.0)])
def test_constraint_reaches_every_layer(constraint, used):
    model = build("indrnn", 20, constraint=constraint, **SMALL["indrnn"])
    for _, layer in recurrent_layers(model):
        nn.init.constant_(layer.weight_hh, 3.0)
        assert layer.recurrent_weight().max().item() == pytest.approx(used, rel=1e-6)


def test_tutorial_initial_values():
    model = build("indrnn")
    for _, layer in recurrent_layers(model):
        assert 0 < layer.weight_ih.abs().max() <= 0.001
        assert layer.bias.abs().max() == 0
    bound = (6 / (128 + 10)) ** 0.5
    assert 0.95 * bound < model.head.weight.abs().max() <= bound
    assert model.head.bias.abs().max() == 0


def test_paper_initial_values():
    model = build("indrnn_residual", weight_init="kaiming")
    for weight in (model.blocks[0].second.weight_ih, model.blocks[0].linear.weight):
        # Kaiming uniform with a = 8: bound = sqrt(6 / ((1 + 64) fan_in)).
        bound = (6 / (65 * 128)) ** 0.5
        assert 0.95 * bound < weight.abs().max() <= bound
    assert model.head.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.1)


def test_adding_problem_starts_as_in_the_port():
    model = build(
        "indrnn", 100, num_layers=2, norm="none", weight_init="small_normal", recurrent_init="symmetric",
        last_layer_fixed=1.0,
    )  # fmt: skip
    first, second = (layer for _, layer in recurrent_layers(model))
    assert second.weight_ih.std().item() == pytest.approx(0.001, rel=0.05)
    assert first.weight_hh.min() < -0.5
    assert torch.equal(second.weight_hh, torch.ones(128))
    assert model.head.bias.tolist() == pytest.approx([0.1])
    assert model(torch.zeros(3, 100, 2)).shape == (3, 1)
    assert build("lstm", 100).head.bias.tolist() == pytest.approx([0.1])


@pytest.mark.parametrize("num_layers", [1, 2])
def test_lstm_forget_bias_counts_once(num_layers):
    model = build("lstm", num_layers=num_layers, forget_bias=1.5)
    for _, _, bias_ih, bias_hh in model.lstm.all_weights:
        gates = (bias_ih + bias_hh).view(4, 128)
        assert torch.equal(gates[1], torch.full((128,), 1.5))
        assert torch.equal(gates[[0, 2, 3]], torch.zeros(3, 128))


def test_lstm_gates_start_orthogonal():
    model = build("lstm")
    for gate in model.lstm.weight_hh_l0.detach().view(4, 128, 128):
        torch.testing.assert_close(gate @ gate.T, torch.eye(128), atol=1e-5, rtol=0)


def test_relu_rnn_starts_as_the_identity():
    model = build("rnn")
    assert torch.equal(model.rnn.weight_hh_l0, torch.eye(128))
    tanh = build("rnn", nonlinearity="tanh").rnn.weight_hh_l0
    assert not torch.equal(tanh, torch.eye(128))


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward_reach_every_parameter(name):
    model = build(name, 17, **SMALL[name])
    output = model(torch.randn(3, 17, 2))
    assert output.shape == (3, 1)
    output.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", MODELS)
def test_the_same_seed_gives_the_same_network_and_another_seed_another(name):
    first, again, other = (build(name, 17, seed=seed, **SMALL[name]).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", MODELS)
def test_sequences_do_not_influence_each_other_in_evaluation(name):
    model = build(name, 17, weight_init="kaiming", **SMALL[name]) if name in INDRNNS else build(name, 17, **SMALL[name])
    model.eval()
    x = torch.randn(4, 17, 2)
    torch.testing.assert_close(model(x)[1:3], model(x[1:3]))


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("name", INDRNNS)
def test_each_recurrence_has_its_norm(name, norm):
    model = build(name, 17, norm=norm, weight_init="kaiming", **SMALL[name])
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    assert len(norms) == (0 if norm == "none" else len(recurrent_layers(model)))
    output = model(torch.randn(3, 17, 2))
    output.sum().backward()
    assert output.isfinite().all()


@pytest.mark.parametrize("name", INDRNNS)
def test_steps_see_only_the_past(name):
    """The states of a prefix are the first states of the whole sequence, in every layer."""
    model = build(name, 30, weight_init="kaiming", **SMALL[name]).double().eval()
    x = torch.randn(2, 30, 2, dtype=torch.double)
    states: dict[int, list[torch.Tensor]] = {}

    def keep(layer: IndRNNLayer, _: object, output: tuple) -> None:
        states.setdefault(id(layer), []).append(output[0].materialise())

    for _, layer in recurrent_layers(model):
        layer.register_forward_hook(keep)
    model(x)
    model(x[:, :11])
    assert len(states) == len(recurrent_layers(model))
    for whole, prefix in states.values():
        torch.testing.assert_close(whole[:, :11], prefix, rtol=1e-12, atol=1e-12)
        assert not torch.equal(whole[:, 0], whole[:, 10])


def test_recurrent_weights_are_found_by_module_not_by_name():
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias_free = IndRNNLayer(2, 3)
            self.lookalike = nn.Module()
            self.lookalike.weight_hh = nn.Parameter(torch.zeros(3))

    model = Renamed()
    assert [layer for _, layer in recurrent_layers(model)] == [model.bias_free]
    assert recurrent_layers(build("lstm")) == []


def test_unknown_model_names_the_choices():
    cfg = config("lstm")
    cfg.model.name = "gru"
    with pytest.raises(UserError, match=r"model\.name=gru .*indrnn, indrnn_residual, .*lstm"):
        build_model(cfg.model, make_task(cfg.data))


def test_lstm_dropout_acts_in_training_only():
    model = build("lstm", dropout=0.5)
    assert isinstance(model, LSTMClassifier)
    x = torch.randn(4, 12, 1)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("choice", sorted(path.stem for path in (config_dir() / "model").glob("*.yaml")))
def test_every_model_configuration_builds(choice):
    cfg = load_config([f"model={choice}", "data=adding", "data.length=5"])
    torch.manual_seed(0)
    assert build_model(cfg.model, make_task(cfg.data))(torch.randn(2, 5, 2)).shape == (2, 1)


def test_chrono_gates_start_with_memories_of_one_to_t_steps():
    lstm = build("lstm_chrono", bias_init="chrono", hidden_size=512).lstm
    input_gate, forget_gate, cell, output_gate = (lstm.bias_ih_l0 + lstm.bias_hh_l0).detach().chunk(4)
    memories = forget_gate.exp()
    assert 1 <= memories.min() < 20 < 760 < memories.max() <= T - 1
    assert memories.mean() == pytest.approx((1 + T - 1) / 2, rel=0.1)  # uniform
    assert torch.equal(input_gate, -forget_gate)
    assert not cell.any()
    assert not output_gate.any()


def test_an_lstm_may_keep_the_weights_that_pytorch_draws():
    torch.manual_seed(0)
    drawn = nn.LSTM(1, 128).weight_hh_l0
    assert torch.equal(build("lstm", weight_init="pytorch").lstm.weight_hh_l0, drawn)
