"""IndRNN, its cell and its layers: definition, bounds, initial values, dtypes, devices, pickling, hooks, errors."""

import copy
import doctest
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence

import naive
from indrnn.layers import (
    IndRNN,
    IndRNNCell,
    IndRNNLayer,
    last_layer_lower_bound,
    project_recurrent_weights_,
    recurrent_max,
)
from indrnn.layers import rnn as rnn_module
from indrnn.layers.init import clip_recurrent_weight

EXACT = {"rtol": 1e-12, "atol": 1e-13}  # float64


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
        np.testing.assert_allclose(final.detach().numpy(), last, **EXACT)
    np.testing.assert_allclose(output.detach().numpy(), expected, **EXACT)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_carried_state_continues_the_sequence(norm):
    rnn = IndRNN(4, 6, 3, batch_first=True, norm=norm, dtype=torch.float64)
    x = torch.randn(3, 20, 4, dtype=torch.float64)
    rnn(x)
    rnn.eval()
    whole, final = rnn(x)
    first, carried = rnn(x[:, :7])
    second, end = rnn(x[:, 7:], carried)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, **EXACT)
    torch.testing.assert_close(end, final, **EXACT)


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh", "identity", "leaky_relu"])
def test_the_cell_equals_the_layer(nonlinearity):
    rnn = IndRNN(4, 6, nonlinearity=nonlinearity, recurrent_max_abs=0.5, dtype=torch.float64)
    cell = IndRNNCell(4, 6, nonlinearity=nonlinearity, recurrent_max_abs=0.5, dtype=torch.float64)
    cell.load_state_dict({name.removeprefix("layers.0."): value for name, value in rnn.state_dict().items()})
    x = torch.randn(9, 3, 4, dtype=torch.float64)
    state, steps = None, []
    for x_t in x:
        state = cell(x_t, hx=state)
        steps.append(state)
    torch.testing.assert_close(torch.stack(steps), rnn(x)[0], **EXACT)
    torch.testing.assert_close(cell(x[0, 0]), steps[0][0])


def test_dropout_draws_one_mask_per_sequence():
    layer = IndRNNLayer(4, 200, dropout=0.5)
    sequence, _ = layer(torch.randn(3, 9, 4))
    z = sequence.materialise()
    assert torch.equal(z, sequence.h * sequence.mask.unsqueeze(1))
    assert set(sequence.mask.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (sequence.mask > 0).float().mean() < 0.6
    assert layer.eval()(torch.randn(3, 9, 4))[0].mask is None


def test_dropout_is_between_layers():
    rnn = IndRNN(4, 6, 3, dropout=0.5, bidirectional=True)
    assert [layer.dropout for layer in rnn.layers] == [0.5] * 4 + [0.0] * 2


class TestBounds:
    def test_values(self):
        assert recurrent_max(784) == pytest.approx(2 ** (1 / 784))
        assert recurrent_max(784, gamma=5) == pytest.approx(1.00205, abs=1e-5)
        assert last_layer_lower_bound(784) == pytest.approx(1 / recurrent_max(784))
        for arguments in ((0, 2), (784, 0)):
            with pytest.raises(ValueError, match="T must be at least 1 and gamma positive"):
                last_layer_lower_bound(*arguments)

    def test_the_minimum_keeps_the_sign_and_comes_first(self):
        u = torch.tensor([-2.0, -0.5, -0.1, -0.0, 0.0, 0.1, 0.5, 2.0])
        clipped = clip_recurrent_weight(u, 1.0, 0.3)
        assert torch.equal(clipped, torch.tensor([-1.0, -0.5, -0.3, 0.3, 0.3, 0.3, 0.5, 1.0]))

    def test_no_gradient_outside(self):
        layer = IndRNNLayer(2, 4, recurrent_max_abs=1.0, recurrent_min_abs=0.2)
        layer.weight_hh.data = torch.tensor([1.5, 0.5, -0.1, -0.9])
        layer(torch.rand(1, 5, 2))[0].h.sum().backward()
        layer.recurrent_weight().sum().backward()
        assert (layer.weight_hh.grad != 0).tolist() == [False, True, False, True]

    @pytest.mark.parametrize("module", [IndRNNLayer, IndRNNCell])
    def test_project_clamps_the_stored_weight_and_clip_does_not(self, module):
        model = nn.ModuleDict(
            {name: module(2, 3, recurrent_max_abs=1.0, constraint=name) for name in ("project", "clip", "none")}
        )
        u = torch.tensor([3.0, -3.0, 0.5])
        for layer in model.values():
            layer.weight_hh.data.copy_(u)
        project_recurrent_weights_(model)
        assert torch.equal(model["project"].weight_hh.data, u.clamp(-1, 1))
        assert torch.equal(model["clip"].weight_hh.data, u)
        assert torch.equal(model["clip"].recurrent_weight(), u.clamp(-1, 1))
        assert torch.equal(model["none"].recurrent_weight(), u)

    def test_project_refuses_a_parametrized_weight(self):
        rnn = IndRNN(2, 3, recurrent_max_abs=1.0, constraint="project")
        parametrize.register_parametrization(rnn.layers[0], "weight_hh", nn.Softplus())
        with pytest.raises(ValueError, match=r"layers\.0\.weight_hh"):
            project_recurrent_weights_(rnn)


class TestInitialValues:
    @pytest.mark.parametrize(
        ("how", "largest"),
        [("linear", 0.05), ("small_uniform", 0.001), ("kaiming", (6 / (65 * 400)) ** 0.5), ((-0.2, 0.2), 0.2)],
    )
    def test_of_the_input_weight(self, how, largest):
        weight = IndRNNLayer(400, 300, input_init=how).weight_ih
        assert weight.abs().max().item() == pytest.approx(largest, rel=0.02)
        assert weight.min() < -0.9 * largest

    @pytest.mark.parametrize(
        ("how", "low", "high"),
        [
            ("positive", 0, 1.5),
            ("symmetric", -1.5, 1.5),
            ("last_layer", 1 / 1.5, 1.5),
            ((0.2, 0.4), 0.2, 0.4),
            ((1, 1), 1, 1),
        ],
    )
    def test_of_the_recurrent_weight(self, how, low, high):
        rnn = IndRNN(4, 500, recurrent_max_abs=1.5, recurrent_init=how)
        u = rnn.layers[0].weight_hh
        assert low <= u.min() <= low + 0.05
        assert high - 0.05 <= u.max() <= high
        assert (rnn.layers[0].bias == 0).all()

    @pytest.mark.parametrize("how", ["last_layer", [(0, 1.2), (1 / 1.2, 1.2)], [nn.init.zeros_, "last_layer"]])
    def test_per_layer_and_pickled(self, how):
        rnn = pickle.loads(pickle.dumps(IndRNN(4, 99, 2, recurrent_max_abs=1.2, recurrent_init=how)))
        rnn.reset_parameters()
        assert rnn.layers[0].weight_hh.min() < 0.5
        assert rnn.layers[1].weight_hh.min() > 0.8


def test_state_dict_keys_are_stable():
    names = ["weight_ih", "weight_hh", "bias", "norm.weight", "norm.bias"]
    names += ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert list(IndRNN(4, 6, 1, norm="batch").state_dict()) == [f"layers.0.{name}" for name in names]
    assert list(IndRNNLayer(4, 6, bias=False).state_dict()) == ["weight_ih", "weight_hh"]


def test_compiles_into_one_graph_and_trains():
    options = {"recurrent_max_abs": 1.0, "recurrent_min_abs": 0.1, "dtype": torch.float64}
    rnn = IndRNN(4, 6, 2, bidirectional=True, norm="batch", **options)
    twin, x = copy.deepcopy(rnn), torch.randn(5, 3, 4, dtype=torch.float64)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        twin.train(training)
        rnn.train(training)
        expected, actual = twin(x)[0], compiled(x)[0]
        torch.testing.assert_close(actual, expected)
        gradients = [
            torch.autograd.grad(y.square().sum(), list(m.parameters())) for m, y in ((rnn, actual), (twin, expected))
        ]
        torch.testing.assert_close(*gradients)
    torch.testing.assert_close(rnn.state_dict(), twin.state_dict())


def test_func_transforms_train_an_ensemble():
    models = [IndRNN(2, 3, 2, batch_first=True, norm="batch", dtype=torch.float64) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(4, 5, 2, dtype=torch.float64)

    def loss(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))[0].sin().sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(parameters, buffers)
    for k, model in enumerate(models):
        expected = torch.autograd.grad(model(x)[0].sin().sum(), list(model.parameters()))
        torch.testing.assert_close([gradient[k] for gradient in gradients.values()], list(expected))
        torch.testing.assert_close({name: buffer[k] for name, buffer in buffers.items()}, dict(model.named_buffers()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["dense", "packed", "bidirectional"])
def test_states_have_the_dtype_of_the_module(dtype, form):
    rnn = IndRNN(2, 3, 2, norm="batch", dropout=0.5, bidirectional=form == "bidirectional").to(dtype)
    x = torch.randn(5, 4, 2, dtype=dtype)
    given = pack_padded_sequence(x, [5, 4, 2, 1]) if form == "packed" else x
    output, h_n = rnn(given)
    output, h_n = rnn(given, hx=h_n)
    output = output.data if form == "packed" else output
    assert output.dtype == h_n.dtype == dtype
    (nn.Linear(3, 1).to(dtype)(h_n).sum() + output.sum()).backward()
    assert all(parameter.grad.dtype == dtype for parameter in rnn.parameters())


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float64), ("meta", torch.float32)])
@pytest.mark.parametrize("backend", ["numba", "scan", "reference"])
def test_default_device_and_dtype_do_not_matter(device, dtype, backend):
    """Every tensor that the package creates names its device and dtype."""
    options = {"norm": "batch", "dropout": 0.5, "bidirectional": True, "backend": backend}
    rnn = IndRNN(2, 3, 2, device="cpu", dtype=torch.float32, **options)
    x = torch.randn(5, 4, 2)
    packed, head = pack_padded_sequence(x, torch.tensor([5, 4, 2, 1])), nn.Linear(6, 1)
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        for output, h_n in (rnn(x), rnn(packed)):
            data = output if isinstance(output, torch.Tensor) else output.data
            (head(data).sum() + h_n.sum()).backward()
            assert (h_n.device.type, h_n.dtype, data.dtype) == ("cpu", torch.float32, torch.float32)
        assert all(parameter.grad.isfinite().all() for parameter in rnn.parameters())
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_a_module_can_be_saved_and_copied():
    rnn, file = IndRNN(2, 3, 2, norm="batch", dropout=0.5, recurrent_init="symmetric").eval(), io.BytesIO()
    torch.save(rnn, file)
    file.seek(0)
    x = torch.randn(5, 4, 2)
    for same in (torch.load(file, weights_only=False), copy.deepcopy(rnn)):
        assert torch.equal(same(x)[0], rnn(x)[0])


def test_backward_hooks_fire_or_are_refused():
    rnn, seen = IndRNN(2, 3, 2), []
    rnn.register_full_backward_hook(lambda *arguments: seen.append(arguments))
    rnn(torch.randn(5, 4, 2, requires_grad=True))[0].sum().backward()
    assert len(seen) == 1
    for name in ("register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook"):
        with pytest.raises(NotImplementedError, match="register the hook on the IndRNN"):
            getattr(rnn.layers[0], name)(print)


def test_the_examples_in_the_docstrings_run():
    results = doctest.testmod(rnn_module)
    assert results.attempted >= 8
    assert results.failed == 0


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"input_size": 0}, "must be at least 1, got 0"),
            ({"nonlinearity": "gelu"}, "nonlinearity must be one of relu"),
            ({"backend": "cuda"}, "backend must be one of auto, .*, got 'cuda'"),
            ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
            ({"recurrent_max_abs": 0.5, "recurrent_min_abs": 0.6}, "must hold, got 0.6 and 0.5"),
            ({"recurrent_min_abs": -0.1}, "got -0.1"),
            ({"recurrent_min_abs": math.inf}, "got inf"),
            ({"recurrent_max_abs": math.inf}, "got 0.0 and inf"),
            ({"recurrent_max_abs": 0.9, "recurrent_init": "last_layer"}, "recurrent_init must be"),
            ({"recurrent_init": (1.0, 0.5)}, "recurrent_init must be"),
            ({"recurrent_init": (0.5,)}, "recurrent_init must be"),
            ({"input_init": "magic"}, "input_init must be one of linear"),
            ({"recurrent_init": "magic"}, "recurrent_init must be one of positive"),
            ({"recurrent_init": ["positive"], "num_layers": 2}, "must have 2 entries, one per layer, got 1"),
        ],
    )
    def test_of_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            IndRNN(**{"input_size": 4, "hidden_size": 6, **arguments})

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda x, h: IndRNN(4, 5)(x), r"4 features, got \(6, 4, 3\)"),
            (lambda x, h: IndRNN(3, 5)(x[0, 0]), "2 or 3 dimensions"),
            (lambda x, h: IndRNN(2, 5)(pack_padded_sequence(x, [6, 5, 2, 1])), "2 features"),
            (lambda x, h: IndRNN(3, 5)(x, (h, h)), "no cell state"),
            (lambda x, h: IndRNNCell(3, 5)(x), r"input must be \(B, D\)"),
            (lambda x, h: IndRNNCell(3, 5)(x[0], h[0].double()), r"hx must be torch\.float32 \(4, 5\)"),
            (lambda x, h: IndRNN(3, 5)(x, h[:, :2]), r"hx must have shape \(1, 4, 5\), got \(1, 2, 5\)"),
            (lambda x, h: IndRNN(3, 5)(x[:, 0], h), r"hx must have shape \(1, 5\)"),
            *(
                (lambda x, h, to=to: IndRNN(3, 5)(x.to(to)), f"input is {to}, but the weights are torch.float32")
                for to in (torch.float64, torch.bfloat16, torch.int64)
            ),
            (lambda x, h: IndRNN(3, 5)(x, h.double()), r"h0 must be torch\.float32 .* got torch\.float64"),
            (lambda x, h: IndRNN(3, 5)(x[:0]), "T, H >= 1"),
            (lambda x, h: IndRNNLayer(3, 5)(x[0]), r"x must be .*\(B, T, H\)"),
            (lambda x, h: IndRNNCell(3, 5)(x[0], h[0, 0]), r"hx must be torch\.float32 \(4, 5\)"),
        ],
    )
    def test_of_calls(self, call, message):
        with pytest.raises(ValueError, match=message):
            call(torch.randn(6, 4, 3), torch.randn(1, 4, 5))
