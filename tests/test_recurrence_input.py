"""A recurrence that forms its own input, W x_t, on every backend of this machine: outputs, gradients, and memory."""

import pytest
import torch
import torch.nn.functional as F

import naive
from indrnn import IndRNN
from indrnn.layers.layer import IndRNNLayer
from indrnn.recurrence import dispatch
from indrnn.recurrence.ops import recurrence
from test_recurrence import BACKENDS, COMPUTES, TOLERANCE, assert_close, cotangents, example, results_and_gradients

NAMES = ("x", "u", "h0", "bias", "weight")


def example_of_width(B, T, D, H, dtype=torch.float64):
    _, u, h0, bias = example(B, T, H, dtype)
    weight = torch.randn(H, D, dtype=torch.float64) / D**0.5
    return [torch.randn(B, T, D, dtype=torch.float64).to(dtype), u, h0, bias[0], weight.to(dtype)]


def by_the_definition(x, u, h0, bias, weight, sigma="relu", reverse=False):
    """The same with the product in memory, and plain statistics."""
    entering = x @ weight.mT
    h, last = naive.recurrence(entering.flip(1) if reverse else entering, u, h0, bias, sigma)
    return h.flip(1) if reverse else h, last, h.mean((0, 1)), h.var((0, 1), correction=0)


def gradients_of_weights(function, inputs):
    """`results_and_gradients`, but none of x, as in a first layer."""
    x, *weights = inputs
    return results_and_gradients(lambda *weights: function(x, *weights), weights)


@pytest.mark.parametrize("gradient", [results_and_gradients, gradients_of_weights])
@pytest.mark.parametrize(
    ("B", "T", "D", "H", "reverse"),
    [(3, 70, 1, 45, False), (3, 70, 2, 128, True), (2, 33, 8, 5, False), (3, 1, 1, 1, True), (1, 784, 1, 40, False)],
)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_outputs_and_all_gradients(backend, dtype, B, T, D, H, reverse, gradient):
    inputs = example_of_width(B, T, D, H, dtype)
    expected = gradient(lambda *i: by_the_definition(*i, reverse=reverse), [tensor.double() for tensor in inputs])
    actual = gradient(lambda *i: recurrence(*i, statistics=True, backend=backend, reverse=reverse), inputs)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert_close(a, e, TOLERANCE[dtype])


@pytest.mark.parametrize("gradient", [results_and_gradients, gradients_of_weights])
@pytest.mark.parametrize(("backend", "nonlinearity"), COMPUTES)
def test_every_nonlinearity(backend, nonlinearity, gradient):
    inputs = example_of_width(3, 70, 2, 45)
    expected = gradient(lambda *i: by_the_definition(*i, nonlinearity), inputs)
    actual = gradient(lambda *i: recurrence(*i, statistics=True, nonlinearity=nonlinearity, backend=backend), inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-12)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_bfloat16_rounds_the_states_and_not_the_product(backend):
    """The states are those of a loop over the unrounded W x_t; they are rounded as they are stored, and the gradients
    are those of the stored ones."""
    x, u, h0, bias, weight = example_of_width(3, 70, 2, 45, torch.float32)
    x = x.bfloat16()
    inputs = [tensor.requires_grad_() for tensor in (u, h0, bias, weight)]
    h, last, _, _ = recurrence(x, *inputs, backend=backend)
    exact, exact_last = naive.recurrence(x.double() @ weight.double().mT, u.double(), h0.double(), bias.double())
    assert h.dtype == torch.bfloat16
    assert_close(last, exact_last, TOLERANCE[torch.float32])
    assert ((h.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5 * exact.max()).all()
    dh, dh_last = cotangents(h, last)
    actual = torch.autograd.grad((h, last), inputs, (dh, dh_last))
    cell = dispatch.Cell(u.double(), h0.double(), "relu", weight=weight.double())
    entering = dispatch.OutputGradients(dh.double(), dh_last.double(), None, None)
    expected = dispatch.load_backend("reference").backward(entering, h.double(), cell, x.double())
    wanted = (expected.du.sum(0), expected.dh0, expected.dbias.sum(0), expected.dweight.sum(0))
    for a, e in zip(actual, wanted, strict=True):
        assert_close(a, e, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_of_x(backend):
    x, *weights = example_of_width(4, 9, 2, 5)
    time_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    features_apart = torch.stack((x, x), dim=-1)[..., 0]
    repeated = x[:1].expand(4, -1, -1)
    for strided in (time_first, features_apart, repeated):
        h, last, _, _ = recurrence(strided, *weights, backend=backend)
        expected, expected_last, _, _ = recurrence(strided.contiguous(), *weights, backend=backend)
        assert_close(h, expected, 1e-14)
        assert_close(last, expected_last, 1e-14)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_the_product_is_never_in_memory(backend):
    B, T, H = 3, 40, 32
    x, *weights = example_of_width(B, T, 1, H)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        recurrence(x, *(tensor.requires_grad_() for tensor in weights), backend=backend)
    assert [size for size in saved if size >= B * T * H] == [B * T * H]  # h


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batched", ["x", "weight", "x u h0 bias weight"])
def test_vmap_of_grad(backend, batched):
    examples = [example_of_width(2, 9, 2, 5) for _ in range(3)]
    dims = tuple(0 if name in batched.split() else None for name in NAMES)

    def loss(*inputs):
        outputs = recurrence(*inputs, statistics=True, backend=backend)
        return sum((out * factor).sum() for out, factor in zip(outputs, factors, strict=True))

    factors = cotangents(*recurrence(*examples[0], statistics=True, backend=backend))
    columns = zip(zip(*examples, strict=True), dims, strict=True)
    stacked = [torch.stack(values) if dim == 0 else values[0] for values, dim in columns]
    for wanted in ((0, 1, 2, 3, 4), (1, 4)):
        actual = torch.func.vmap(torch.func.grad(loss, argnums=wanted), dims)(*stacked)
        for n in range(3):
            inputs = [value[n] if dim == 0 else value for value, dim in zip(stacked, dims, strict=True)]
            leaves = [value.clone().requires_grad_() for value in inputs]
            expected = torch.autograd.grad(loss(*leaves), [leaves[i] for i in wanted])
            for a, e in zip(actual, expected, strict=True):
                assert_close(a[n], e, 1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself looks at it
@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_keep_pytorchs_rules(backend):
    x, *weights = example_of_width(2, 9, 2, 5)
    u, h0, bias, weight = (tensor.requires_grad_() for tensor in weights)
    for given in (x, x.clone().requires_grad_()):
        arguments = (given, u, h0, bias, weight, True, "relu", backend)
        torch.library.opcheck(torch.ops.indrnn.recurrence, arguments)
    h = torch.ops.indrnn.recurrence(*arguments)[0].detach()
    inputs = (h, u.detach(), h0.detach(), x, weight.detach())
    torch.library.opcheck(
        torch.ops.indrnn.recurrence_backward, (torch.randn_like(h), None, None, None, *inputs, "relu", backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend):
    inputs = example_of_width(2, 9, 1, 5)

    def function(*inputs):
        return recurrence(*inputs, statistics=True, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for gradient in (results_and_gradients, gradients_of_weights):
        for a, e in zip(gradient(compiled, inputs), gradient(function, inputs), strict=True):
            assert_close(a, e, 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend):
    inputs = example_of_width(2, 9, 2, 5)
    inputs[0], inputs[2] = inputs[0][:0], inputs[2][:0]
    for first in (0, 1):  # with a gradient of x, and without
        leaves = [tensor.clone().requires_grad_(i >= first) for i, tensor in enumerate(inputs)]
        h, last, _, _ = recurrence(*leaves, statistics=True, backend=backend)
        assert (h.shape, last.shape) == ((0, 9, 5), (0, 5))
        gradients = torch.autograd.grad(h.sum() + last.sum(), leaves[first:])
        assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves[first:]]
        assert torch.equal(gradients[-1], torch.zeros_like(leaves[-1]))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(5, 3), r"weight must have shape \(H, 2\) to fit x, got \(5, 3\)"),
        (torch.zeros(5), r"weight must have shape \(H, 2\) to fit x, got \(5,\)"),
        (torch.zeros(4, 2), r"u must have shape \(4,\) to fit x, got \(5,\)"),
        (torch.zeros(5, 2, dtype=torch.float64), "weight must have the dtype of x"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        recurrence(torch.zeros(2, 9, 2), torch.zeros(5), weight=weight)


class TestLayer:
    @pytest.mark.parametrize("D", [1, dispatch.SMALL_INPUT_SIZE, dispatch.SMALL_INPUT_SIZE + 1])
    def test_is_what_its_formula_says_at_any_width(self, D):
        layer = IndRNNLayer(D, 6, norm="batch", dtype=torch.float64)
        torch.nn.init.normal_(layer.weight_ih)
        torch.nn.init.normal_(layer.bias)
        x = torch.randn(3, 20, D, dtype=torch.float64)

        def formula(x, weight, u, bias):
            h, last = naive.recurrence(F.linear(x, weight, bias), u)
            mean, variance = h.mean((0, 1)), h.var((0, 1), correction=0)
            return (h - mean) / (variance + layer.norm.eps).sqrt(), last

        def ours(x, weight, u, bias):
            parameters = {"weight_ih": weight, "weight_hh": u, "bias": bias}
            sequence, last = torch.func.functional_call(layer, parameters, (x,))
            return sequence.materialise(), last

        inputs = [x, layer.weight_ih, layer.weight_hh, layer.bias]
        for a, e in zip(results_and_gradients(ours, inputs), results_and_gradients(formula, inputs), strict=True):
            assert_close(a, e, 1e-11)

    def test_autocast_still_chooses_the_dtype_of_the_product(self):
        net, x = IndRNN(1, 5, batch_first=True), torch.randn(2, 9, 1)
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x)[0].dtype == torch.bfloat16
