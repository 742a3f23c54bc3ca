"""IndRNN, its cell and its layers: drop-in for torch.nn.RNN, bounds, initial values, refusals."""

import numpy as np
import pytest
import torch
from torch import nn

import naive
from indrnn.layers import (
    IndRNN,
    IndRNNCell,
    IndRNNLayer,
    clip_recurrent_weight,
    last_layer_lower_bound,
    project_recurrent_weights_,
    recurrent_layers,
    recurrent_max,
)


def test_the_published_example_has_three_parameters_and_an_lstms_shape():
    rnn = IndRNN(200, 100, batch_first=True)
    assert {name: tuple(p.shape) for name, p in rnn.named_parameters()} == {
        "layers.0.weight_ih": (100, 200),
        "layers.0.weight_hh": (100,),
        "layers.0.bias": (100,),
    }
    output, h_n = rnn(torch.randn(64, 40, 200))
    assert output.shape == (64, 40, 100)
    assert h_n.shape == (1, 64, 100)


@pytest.mark.parametrize("max_abs", [None, 0.7])
def test_equals_the_published_per_step_formula(max_abs):
    rnn = IndRNN(4, 6, num_layers=2, batch_first=True, recurrent_max_abs=max_abs, dtype=torch.float64)
    for parameter in rnn.parameters():
        nn.init.uniform_(parameter, -1, 1)
    x, h0 = torch.randn(3, 17, 4, dtype=torch.float64), torch.rand(2, 3, 6, dtype=torch.float64)
    output, h_n = rnn(x, h0)
    expected = x.numpy()
    for layer, state, final in zip(rnn.layers, h0, h_n, strict=True):
        kernel = layer.weight_ih.detach().numpy().T
        recurrent_kernel, bias = layer.weight_hh.detach().numpy(), layer.bias.detach().numpy()
        expected, last = naive.tensorflow_layer(expected, kernel, recurrent_kernel, bias, state.numpy(), max_abs)
        np.testing.assert_allclose(final.detach().numpy(), last, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(output.detach().numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_h0", [False, True])
def test_shapes_are_those_of_torch_nn_rnn(batch_first, with_h0):
    ours = IndRNN(4, 6, 3, batch_first=batch_first)
    torchs = nn.RNN(4, 6, 3, batch_first=batch_first)
    for shape, state in (((5, 2, 4), (3, 2 if not batch_first else 5, 6)), ((5, 4), (3, 6))):
        arguments = (torch.randn(shape), torch.randn(state)) if with_h0 else (torch.randn(shape),)
        for a, e in zip(ours(*arguments), torchs(*arguments), strict=True):
            assert a.shape == e.shape


def test_layouts_agree():
    first = IndRNN(4, 6, 2, batch_first=True, norm="batch").eval()
    second = IndRNN(4, 6, 2, norm="batch").eval()
    second.load_state_dict(first.state_dict())
    x, h0 = torch.randn(3, 9, 4), torch.rand(2, 3, 6)
    output, h_n = first(x, h0)
    transposed, transposed_h_n = second(x.transpose(0, 1), h0)
    torch.testing.assert_close(transposed.transpose(0, 1), output)
    torch.testing.assert_close(transposed_h_n, h_n)
    single, single_h_n = first(x[1], h0[:, 1])
    torch.testing.assert_close(single, output[1])
    torch.testing.assert_close(single_h_n, h_n[:, 1])


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_carried_state_continues_the_sequence(norm):
    rnn = IndRNN(4, 6, 3, batch_first=True, norm=norm, dtype=torch.float64)
    x = torch.randn(3, 20, 4, dtype=torch.float64)
    rnn(x)
    rnn.eval()
    whole, final = rnn(x)
    first, carried = rnn(x[:, :7])
    second, end = rnn(x[:, 7:], carried)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(end, final, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh", "identity", "leaky_relu"])
def test_the_cell_walks_as_the_layer_does(nonlinearity):
    rnn = IndRNN(4, 6, nonlinearity=nonlinearity, recurrent_max_abs=0.5, dtype=torch.float64)
    cell = IndRNNCell(4, 6, nonlinearity=nonlinearity, recurrent_max_abs=0.5, dtype=torch.float64)
    cell.load_state_dict({name.removeprefix("layers.0."): value for name, value in rnn.state_dict().items()})
    x = torch.randn(9, 3, 4, dtype=torch.float64)
    state, steps = None, []
    for x_t in x:
        state = cell(x_t, state)
        steps.append(state)
    torch.testing.assert_close(torch.stack(steps), rnn(x)[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(cell(x[0, 0]), steps[0][0])


def test_one_dropout_mask_a_sequence():
    layer = IndRNNLayer(4, 200, dropout=0.5)
    x = torch.randn(3, 9, 4)
    sequence, _ = layer(x)
    kept = sequence.materialise() != 0
    assert torch.equal(sequence.materialise(), sequence.h * sequence.mask.unsqueeze(1))
    assert set(sequence.mask.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (sequence.mask > 0).float().mean() < 0.6
    assert not torch.equal(kept[0, 5], kept[1, 5])
    assert layer.eval()(x)[0].mask is None


def test_dropout_stands_between_layers_only():
    rnn = IndRNN(4, 6, 3, dropout=0.5)
    assert [layer.dropout for layer in rnn.layers] == [0.5, 0.5, 0.0]


class TestBounds:
    def test_values(self):
        assert recurrent_max(784) == pytest.approx(2 ** (1 / 784))
        assert recurrent_max(784, gamma=5) == pytest.approx(1.00205, abs=1e-5)
        assert last_layer_lower_bound(784) == pytest.approx(1 / recurrent_max(784))
        assert recurrent_max(10) > recurrent_max(100) > 1 > last_layer_lower_bound(100) > last_layer_lower_bound(10)

    def test_the_minimum_keeps_the_sign_and_comes_first(self):
        u = torch.tensor([-2.0, -0.5, -0.1, -0.0, 0.0, 0.1, 0.5, 2.0])
        clipped = clip_recurrent_weight(u, 1.0, 0.3)
        assert torch.equal(clipped, torch.tensor([-1.0, -0.5, -0.3, 0.3, 0.3, 0.3, 0.5, 1.0]))

    def test_no_gradient_outside(self):
        layer = IndRNNLayer(2, 4, recurrent_max_abs=1.0, recurrent_min_abs=0.2)
        with torch.no_grad():
            layer.weight_hh.copy_(torch.tensor([1.5, 0.5, -0.1, -0.9]))
        layer(torch.ones(1, 5, 2) + torch.rand(1, 5, 2))[0].h.sum().backward()
        assert torch.equal(layer.recurrent_weight(), torch.tensor([1.0, 0.5, -0.2, -0.9]))
        layer.recurrent_weight().sum().backward()
        gradient = layer.weight_hh.grad
        assert gradient[0] == 0
        assert gradient[2] == 0
        assert gradient[1] != 0

    def test_project_clamps_the_stored_weight_and_clip_does_not(self):
        model = nn.ModuleDict(
            {name: IndRNNLayer(2, 3, recurrent_max_abs=1.0, constraint=name) for name in ("project", "clip", "none")}
        )
        u = torch.tensor([3.0, -3.0, 0.5])
        for _, layer in recurrent_layers(model):
            layer.weight_hh.data.copy_(u)
        project_recurrent_weights_(model)
        assert torch.equal(model["project"].weight_hh.data, u.clamp(-1, 1))
        assert torch.equal(model["clip"].weight_hh.data, u)
        assert torch.equal(model["clip"].recurrent_weight(), u.clamp(-1, 1))
        assert torch.equal(model["none"].recurrent_weight(), u)


class TestInitialValues:
    def test_names(self):
        layer = IndRNNLayer(400, 300, input_init="small_uniform", recurrent_max_abs=1.5)
        assert 0.0009 < layer.weight_ih.abs().max() <= 0.001
        assert layer.weight_hh.min() >= 0
        assert 1.4 < layer.weight_hh.max() <= 1.5
        assert (layer.bias == 0).all()
        layer = IndRNNLayer(400, 300, input_init="small_normal", recurrent_init="symmetric")
        assert layer.weight_ih.std().item() == pytest.approx(0.001, rel=0.05)
        assert -1 <= layer.weight_hh.min() < -0.9
        kaiming = IndRNNLayer(400, 300, input_init="kaiming").weight_ih
        assert kaiming.abs().max().item() == pytest.approx((6 / (65 * 400)) ** 0.5, rel=0.02)
        assert IndRNNLayer(400, 300).weight_ih.abs().max().item() == pytest.approx(0.05, rel=0.02)

    def test_one_for_each_layer(self):
        rnn = IndRNN(4, 6, 2, recurrent_init=["positive", lambda u: nn.init.constant_(u, 0.25)])
        assert (rnn.layers[1].weight_hh == 0.25).all()
        assert not (rnn.layers[0].weight_hh == 0.25).all()

    def test_the_seed_decides(self):
        weights = []
        for _ in range(2):
            torch.manual_seed(3)
            weights.append(IndRNN(4, 6).layers[0].weight_ih)
        assert torch.equal(*weights)


def test_state_dict_keys_are_stable():
    assert list(IndRNN(4, 6, 1, norm="batch").state_dict()) == [
        "layers.0.weight_ih",
        "layers.0.weight_hh",
        "layers.0.bias",
        "layers.0.norm.weight",
        "layers.0.norm.bias",
        "layers.0.norm.running_mean",
        "layers.0.norm.running_var",
        "layers.0.norm.num_batches_tracked",
    ]
    assert list(IndRNNLayer(None, 6).state_dict()) == ["weight_hh"]
    assert list(IndRNNLayer(4, 6, bias=False).state_dict()) == ["weight_ih", "weight_hh"]


def test_a_recurrence_alone():
    layer = IndRNNLayer(None, 6, dtype=torch.float64)
    x = torch.randn(3, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0].h, naive.recurrence(x, layer.weight_hh)[0])


def test_layers_are_listed_in_depth_order():
    model = nn.Sequential(IndRNN(4, 6, 2), nn.ModuleDict({"last": IndRNNLayer(6, 3)}))
    assert [name for name, _ in recurrent_layers(model)] == ["0.layers.0", "0.layers.1", "1.last"]


def test_repr_names_what_matters():
    text = repr(IndRNN(4, 6, 2, norm="batch", dropout=0.1, recurrent_max_abs=1.5, bias=False))
    for part in ("num_layers=2", "dropout=0.1", "|u| in [0, 1.5] by clip", "bias=False", "BatchNorm1d"):
        assert part in text


def test_compiles_into_one_graph_with_folded_norm_and_dropout():
    rnn = IndRNN(4, 6, 2, norm="batch", recurrent_max_abs=1.0, recurrent_min_abs=0.1)
    x = torch.randn(5, 3, 4)
    expected = rnn.eval()(x)[0]
    actual = torch.compile(rnn, fullgraph=True, backend="aot_eager")(x)[0]
    torch.testing.assert_close(actual, expected)


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"input_size": 0}, "input_size must be at least 1, got 0"),
            ({"hidden_size": -1}, "hidden_size must be at least 1, got -1"),
            ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
            ({"nonlinearity": "gelu"}, "nonlinearity must be one of relu"),
            ({"norm": "group"}, "norm must be one of none, batch, got 'group'"),
            ({"constraint": "hope"}, "constraint must be one of clip"),
            ({"dropout": 1.0, "num_layers": 2}, r"dropout must be in \[0, 1\), got 1.0"),
            ({"recurrent_max_abs": 0.5, "recurrent_min_abs": 0.6}, "at least recurrent_min_abs=0.6, got 0.5"),
            ({"recurrent_min_abs": -0.1}, "recurrent_min_abs must be at least 0, and finite, got -0.1"),
            ({"input_init": "magic"}, "input_init must be a function or one of linear"),
            ({"recurrent_init": "magic"}, "recurrent_init must be a function or one of positive"),
            ({"recurrent_init": ["positive"], "num_layers": 2}, "one entry for each of 2 layers, got 1"),
        ],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            IndRNN(**{"input_size": 4, "hidden_size": 6, **arguments})

    @pytest.mark.parametrize(
        ("shape", "h0", "message"),
        [
            ((5,), None, "input must have 2 dimensions"),
            ((9, 3, 5), None, r"input must have 4 features, got shape \(9, 3, 5\)"),
            ((9, 3, 4), (2, 3, 6), r"h0 must have shape \(1, 3, 6\), got \(2, 3, 6\)"),
            ((9, 4), (1, 3, 6), r"h0 must have shape \(1, 6\)"),
        ],
    )
    def test_shapes(self, shape, h0, message):
        with pytest.raises(ValueError, match=message):
            IndRNN(4, 6)(torch.randn(shape), None if h0 is None else torch.randn(h0))

    def test_the_cell(self):
        with pytest.raises(ValueError, match=r"input must be \(B, 4\)"):
            IndRNNCell(4, 6)(torch.randn(3, 5))
        with pytest.raises(ValueError, match=r"h must have shape \(3, 6\)"):
            IndRNNCell(4, 6)(torch.randn(3, 4), torch.randn(6))

    def test_bounds(self):
        with pytest.raises(ValueError, match="T must be at least 1"):
            recurrent_max(0)
        with pytest.raises(ValueError, match="gamma must be positive"):
            last_layer_lower_bound(784, gamma=0)
