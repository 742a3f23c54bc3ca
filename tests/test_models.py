"""The networks: their sizes, their initial values, and that each classifies from the past alone."""

import pickle

import pytest
import torch
from torch import nn

from indrnn.config.compose import CONFIG_DIR, load_config
from indrnn.data import make_task
from indrnn.errors import UserError
from indrnn.layers import last_layer_lower_bound, recurrent_layers, recurrent_max
from indrnn.models import MODELS, build_model
from indrnn.models.baselines import MinGRU
from parts import part

INDRNNS = ("indrnn", "indrnn_residual", "indrnn_dense")
SMALL = {
    "indrnn": {"hidden_size": 8, "num_layers": 3, "weight_init": "kaiming"},
    "indrnn_residual": {"hidden_size": 8, "num_blocks": 2, "weight_init": "kaiming"},
    "indrnn_dense": {"hidden_size": 6, "block_layers": [2, 1], "growth": 4, "bottleneck": 2},
    "lstm": {"hidden_size": 8, "num_layers": 2},
    "rnn": {"hidden_size": 8, "num_layers": 2},
    "gru": {"hidden_size": 8, "num_layers": 2},
    "mingru": {"hidden_size": 8, "num_layers": 2},
}
T = 784


def build(name: str, length: int | None = None, seed: int = 0, **model: object) -> nn.Module:
    """For MNIST, or for the adding problem of a given length."""
    torch.manual_seed(seed)
    data = part("data", "mnist") if length is None else part("data", "adding", length=length)
    return build_model(part("model", name, **model), make_task(data))


def ranges(model: nn.Module) -> list[tuple[float, float]]:
    return [(each.weight_hh.min().item(), each.weight_hh.max().item()) for _, each in recurrent_layers(model)]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("indrnn", 86_410),
        ("indrnn_12layer", 187_786),
        ("indrnn_residual", 170_890),
        ("indrnn_dense", 256_514),
        ("lstm", 68_362),
        ("rnn", 18_058),
    ],
)
def test_parameter_counts_are_the_published_ones(name, published):
    assert sum(each.numel() for each in build(name).parameters()) == published


@pytest.mark.parametrize("gamma", [2.0, 5.0])
@pytest.mark.parametrize("name", INDRNNS)
def test_lower_layers_start_in_zero_to_max_and_the_last_near_one(name, gamma):
    model = build(name, gamma=gamma)
    largest, least = recurrent_max(T, gamma), last_layer_lower_bound(T, gamma)
    *lower, (low, high) = ranges(model)
    assert all(0 <= smallest < 0.5 < greatest <= largest for smallest, greatest in lower)
    assert least <= low < 1 < high <= largest
    assert all(layer.recurrent_max_abs == largest for _, layer in recurrent_layers(model))


@pytest.mark.parametrize("name", INDRNNS)
def test_the_last_layers_range_can_be_switched_off_or_fixed(name):
    assert ranges(build(name, last_layer_min=False))[-1][0] < 0.5
    *lower, last = ranges(build(name, last_layer_fixed=1.0))
    assert last == (1.0, 1.0)
    assert all(high < 1.01 and low < 0.5 for low, high in lower)


@pytest.mark.parametrize(("constraint", "used"), [("clip", recurrent_max(20)), ("project", 3.0), ("none", 3.0)])
def test_constraint_reaches_every_layer(constraint, used):
    for _, layer in recurrent_layers(build("indrnn", 20, constraint=constraint, **SMALL["indrnn"])):
        nn.init.constant_(layer.weight_hh, 3.0)
        assert layer.recurrent_weight().max().item() == pytest.approx(used, rel=1e-6)


def test_initial_values_of_the_tutorial_and_of_the_paper():
    model = build("indrnn")
    for _, layer in recurrent_layers(model):
        assert 0 < layer.weight_ih.abs().max() <= 0.001
        assert layer.bias.abs().max() == 0
    bound = (6 / (128 + 10)) ** 0.5
    assert 0.95 * bound < model.head.weight.abs().max() <= bound
    assert model.head.bias.abs().max() == 0
    model = build("indrnn_residual", weight_init="kaiming")
    for weight in (model.blocks[0].second.weight_ih, model.blocks[0].linear.weight):
        # Kaiming uniform with a = 8: bound = sqrt(6 / ((1 + 64) fan_in))
        bound = (6 / (65 * 128)) ** 0.5
        assert 0.95 * bound < weight.abs().max() <= bound
    assert model.head.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.1)


def test_adding_problem_starts_as_in_the_port():
    adding = {"weight_init": "small_normal", "recurrent_init": "symmetric", "last_layer_fixed": 1.0}
    model = build("indrnn", 100, num_layers=2, norm="none", **adding)
    first, second = (layer for _, layer in recurrent_layers(model))
    assert second.weight_ih.std().item() == pytest.approx(0.001, rel=0.05)
    assert first.weight_hh.min() < -0.5
    assert torch.equal(second.weight_hh, torch.ones(128))
    for network in (model, build("lstm", 100)):
        assert network.head.bias.tolist() == pytest.approx([0.1])


@pytest.mark.parametrize("num_layers", [1, 2])
def test_lstm_gates_start_open_and_orthogonal(num_layers):
    model = build("lstm", num_layers=num_layers, forget_bias=1.5)
    for _, weight_hh, bias_ih, bias_hh in model.lstm.all_weights:
        gates = (bias_ih + bias_hh).view(4, 128)
        assert torch.equal(gates[1], torch.full((128,), 1.5))
        assert torch.equal(gates[[0, 2, 3]], torch.zeros(3, 128))
        for gate in weight_hh.detach().view(4, 128, 128):
            torch.testing.assert_close(gate @ gate.T, torch.eye(128), atol=1e-5, rtol=0)
    torch.manual_seed(0)
    drawn = nn.LSTM(1, 128).weight_hh_l0
    assert torch.equal(build("lstm", weight_init="pytorch").lstm.weight_hh_l0, drawn)


def test_chrono_gates_start_with_memories_of_one_to_t_steps():
    lstm = build("lstm_chrono", hidden_size=512).lstm
    input_gate, forget_gate, cell, output_gate = (lstm.bias_ih_l0 + lstm.bias_hh_l0).detach().chunk(4)
    memories = forget_gate.exp()
    assert 1 <= memories.min() < 20 < 760 < memories.max() <= T - 1
    assert memories.mean() == pytest.approx((1 + T - 1) / 2, rel=0.1)  # uniform
    assert torch.equal(input_gate, -forget_gate)
    assert not torch.cat([cell, output_gate]).any()


def test_relu_rnn_starts_as_the_identity():
    assert torch.equal(build("rnn").rnn.weight_hh_l0, torch.eye(128))
    assert not torch.equal(build("rnn", nonlinearity="tanh").rnn.weight_hh_l0, torch.eye(128))


@pytest.mark.parametrize("name", MODELS)
def test_every_network_trains_is_seeded_and_sees_sequences_apart(name):
    model, again, other = (build(name, 17, seed=seed, **SMALL[name]) for seed in (1, 1, 2))
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert not all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    x = torch.randn(4, 17, 2)
    output = model(x)
    assert output.shape == (4, 1)
    output.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    model.eval()
    torch.testing.assert_close(model(x)[1:3], model(x[1:3]))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("name", INDRNNS)
def test_each_recurrence_has_its_norm_and_sees_only_the_past(name, norm):
    """The states of a prefix are the first states of the whole sequence, in every layer."""
    model = build(name, 30, norm=norm, **SMALL[name]).double().eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    assert len(norms) == (0 if norm == "none" else len(recurrent_layers(model)))
    x = torch.randn(2, 30, 2, dtype=torch.double)
    states: dict[str, list[torch.Tensor]] = {}
    for key, layer in recurrent_layers(model):
        kept = states.setdefault(key, [])
        layer.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output[0].materialise()))
    model(x)
    model(x[:, :11])
    for whole, prefix in states.values():
        torch.testing.assert_close(whole[:, :11], prefix, rtol=1e-12, atol=1e-12)
        assert not torch.equal(whole[:, 0], whole[:, 10])


def test_unknown_model_names_the_choices():
    model = part("model", "lstm")
    model.name = "gpt"
    with pytest.raises(UserError, match=r"model\.name=gpt .*indrnn, indrnn_residual, .*lstm"):
        build_model(model, make_task(part("data", "adding")))


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONFIG_DIR / "model").glob("*.yaml")))
def test_every_model_configuration_builds_with_one_key_for_its_width(choice):
    cfg = load_config([f"model={choice}", "data=adding", "data.length=5", "model.hidden_size=20"])
    model = build_model(cfg.model, make_task(cfg.data))
    assert model(torch.randn(2, 5, 2)).shape == (2, 1)


@pytest.mark.parametrize("length", [1, 17, 784])
def test_minGRU_equals_its_definition(length):  # noqa: N802
    """One state after another, without logarithms (equations of section 3.1.1)."""
    layer = MinGRU(3, 5).double()
    x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    state, states = x.new_zeros(2, 5), []
    for x_t in x.unbind(1):
        z, a = layer.gate(x_t).sigmoid(), layer.candidate(x_t)
        state = (1 - z) * state + z * torch.where(a >= 0, a + 0.5, a.sigmoid())
        states.append(state)
    pairs = layer(x), torch.stack(states, 1)
    torch.testing.assert_close(*pairs, rtol=1e-9, atol=1e-9)
    inputs = (x, *layer.parameters())
    gradients = [torch.autograd.grad(h.sin().sum(), inputs) for h in pairs]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


def test_mingru_keeps_its_gradients_finite_with_closed_gates():
    layer = MinGRU(1, 4)
    nn.init.constant_(layer.gate.bias, -30.0)
    x = torch.randn(2, 784, 1, requires_grad=True)
    h = layer(x)
    h.sum().backward()
    assert h.isfinite().all()
    assert x.grad.isfinite().all()
