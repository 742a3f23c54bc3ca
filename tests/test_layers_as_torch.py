"""IndRNN against torch.nn.RNN with a diagonal recurrent matrix: outputs, states and every gradient, packed, padded, in
both directions, unbatched and empty; and the checkpoints of the paper's authors."""

import inspect
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import indrnn.layers
from indrnn.layers import IndRNN, IndRNNCell

D, H = 3, 5
EXACT = {"rtol": 1e-11, "atol": 1e-12}  # float64


def twins(num_layers, bidirectional, batch_first=True, nonlinearity="relu", bias=True, backend="auto", sizes=(D, H)):
    """An IndRNN and the nn.RNN that computes the same."""
    shared = (*sizes, num_layers, nonlinearity, bias, batch_first, 0.0, bidirectional)
    ours, torchs = IndRNN(*shared, backend=backend, dtype=torch.float64), nn.RNN(*shared, dtype=torch.float64)
    copy_to_torch(ours, torchs)
    return ours, torchs


@torch.no_grad()
def copy_to_torch(ours, torchs):
    for layer, (weight_ih, weight_hh, *biases) in zip(ours.layers, torchs.all_weights, strict=True):
        layer.weight_hh.uniform_(-1, 1)
        weight_ih.copy_(layer.weight_ih)
        weight_hh.copy_(layer.weight_hh.diag())
        if biases:
            layer.bias.uniform_(-0.5, 0.5)
            biases[0].copy_(layer.bias)
            biases[1].zero_()


def assert_same_gradients(ours, torchs, our_loss, torch_loss, our_inputs, torch_inputs):
    count = len(our_inputs)
    our_gradients = torch.autograd.grad(our_loss, [*our_inputs, *ours.parameters()])
    torch_gradients = torch.autograd.grad(torch_loss, [*torch_inputs, *torchs.parameters()])
    torch.testing.assert_close(our_gradients[:count], torch_gradients[:count], **EXACT)
    theirs = dict(zip((name for name, _ in torchs.named_parameters()), torch_gradients[count:], strict=True))
    directions = 2 if ours.bidirectional else 1
    for (name, _), gradient in zip(ours.named_parameters(), our_gradients[count:], strict=True):
        index, part = int(name.split(".")[1]), name.split(".")[2]
        suffix = f"_l{index // directions}" + ("_reverse" if index % directions else "")
        expected = theirs[f"bias_ih{suffix}" if part == "bias" else part + suffix]
        torch.testing.assert_close(gradient, expected.diag() if part == "weight_hh" else expected, **EXACT)


def weighted(*outputs):
    """A loss whose gradients are random."""
    generator = torch.Generator().manual_seed(1)
    return sum((out * torch.randn(out.shape, dtype=out.dtype, generator=generator)).sum() for out in outputs)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    T=st.integers(1, 12),
    batch=st.one_of(st.none(), st.integers(0, 4)),
    num_layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    nonlinearity=st.sampled_from(["relu", "tanh"]),
    bias=st.booleans(),
    form=st.sampled_from(["dense", "lengths", "packed"]),
    with_h0=st.booleans(),
    backend=st.sampled_from(["auto", "reference", "scan"]),
)
def test_outputs_and_gradients_are_those_of_torch(
    seed, T, batch, num_layers, bidirectional, batch_first, nonlinearity, bias, form, with_h0, backend
):
    torch.manual_seed(seed)
    if nonlinearity == "tanh" and backend == "scan":
        backend = "auto"
    ours, torchs = twins(num_layers, bidirectional, batch_first, nonlinearity, bias, backend)
    shape = (T, D) if batch is None else (batch, T, D) if batch_first else (T, batch, D)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x_torch = x.detach().clone().requires_grad_()
    states = num_layers * (2 if bidirectional else 1)
    h0 = torch.randn((states, H) if batch is None else (states, batch, H), dtype=torch.float64, requires_grad=True)
    h0_torch = h0.detach().clone().requires_grad_()
    ours_in, torch_in = ([x, h0], [x_torch, h0_torch]) if with_h0 else ([x], [x_torch])
    if form == "dense" or not batch:  # packing knows no empty batch
        output, h_n = ours(*ours_in)
        expected, expected_h_n = torchs(*torch_in)
    else:
        lengths = torch.randint(1, T + 1, (batch,))
        packed = pack_padded_sequence(x_torch, lengths, batch_first=batch_first, enforce_sorted=False)
        expected, expected_h_n = torchs(packed, *torch_in[1:])
        expected, _ = pad_packed_sequence(expected, batch_first=batch_first, total_length=T)
        if form == "lengths":
            output, h_n = ours(*ours_in, lengths=lengths)
        else:
            packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
            output, h_n = ours(packed, *ours_in[1:])
            output, _ = pad_packed_sequence(output, batch_first=batch_first, total_length=T)
    torch.testing.assert_close(output, expected, **EXACT)
    torch.testing.assert_close(h_n, expected_h_n, **EXACT)
    if batch == 0:  # nn.RNN has no backward without sequences
        gradients = torch.autograd.grad(weighted(output, h_n), [*ours_in, *ours.parameters()])
        assert all((gradient == 0).all() for gradient in gradients)
        return
    losses = weighted(output, h_n), weighted(expected, expected_h_n)
    assert_same_gradients(ours, torchs, *losses, ours_in, torch_in)


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_a_packed_sequence_comes_back_as_it_came(enforce_sorted):
    lengths = [6, 4, 4, 1] if enforce_sorted else [4, 1, 6, 4]
    packed = pack_padded_sequence(torch.randn(6, 4, D), lengths, enforce_sorted=enforce_sorted)
    output, h_n = IndRNN(D, H, 2, bidirectional=True)(packed)
    for ours, theirs in zip(output[1:], packed[1:], strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert output.data.shape == (15, 2 * H)
    assert h_n.shape == (4, 4, H)


def test_padding_enters_nothing():
    """Each sequence's output is what it is alone; NaN in the padding reaches no output, statistic or gradient."""
    rnn = IndRNN(D, H, 2, batch_first=True, bidirectional=True, norm="batch", dtype=torch.float64)
    lengths = [7, 2, 5]
    x = torch.randn(3, 7, D, dtype=torch.float64)
    x_nan = x.clone()
    for row, length in zip(x_nan, lengths, strict=True):
        row[length:] = torch.nan
    x_nan.requires_grad_()
    output, h_n = rnn(x_nan, lengths=lengths)
    (output.square().sum() + h_n.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in rnn.parameters())
    assert all(buffer.isfinite().all() for buffer in rnn.buffers())
    for row, gradient, length in zip(output, x_nan.grad, lengths, strict=True):
        assert (row[length:] == 0).all()
        assert (gradient[length:] == 0).all()
        assert gradient[:length].abs().max() > 0
    rnn.eval()
    output, h_n = rnn(x_nan.detach(), lengths=lengths)
    for k, length in enumerate(lengths):
        alone, alone_h_n = rnn(x[k, :length])
        torch.testing.assert_close(output[k, :length], alone, **EXACT)
        torch.testing.assert_close(h_n[:, k], alone_h_n, **EXACT)


def test_a_state_that_would_overflow_in_the_padding_does_no_harm():
    rnn = IndRNN(1, 1, batch_first=True)
    for parameter, value in zip(rnn.parameters(), (1.0, 2.0, 0.0), strict=True):
        nn.init.constant_(parameter, value)
    x = torch.zeros(2, 300, 1)
    x[0, :3] = 1
    output, _ = rnn(x, lengths=[3, 300])
    output.sum().backward()
    assert output[0, :3, 0].tolist() == [1, 3, 7]
    assert rnn.layers[0].weight_hh.grad.item() == 1 + (3 + 2 * 1)  # h2 = x2 + u h1, h3 = x3 + u h2


def test_batch_norm_of_lengths_is_that_of_all_the_steps_there_are():
    rnn = IndRNN(D, H, batch_first=True, norm="batch", dtype=torch.float64)
    plain = IndRNN(D, H, batch_first=True, dtype=torch.float64)
    plain.load_state_dict(rnn.state_dict(), strict=False)
    x, lengths = torch.randn(3, 7, D, dtype=torch.float64), [7, 2, 5]
    there = torch.cat([plain(row[:length])[0] for row, length in zip(x, lengths, strict=True)])
    output, _ = rnn(x, lengths=torch.tensor(lengths))
    norm = nn.BatchNorm1d(H, dtype=torch.float64)
    expected = norm(there)
    actual = torch.cat([row[:length] for row, length in zip(output, lengths, strict=True)])
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(rnn.layers[0].norm.running_var, norm.running_var, **EXACT)


def test_dropout_has_one_mask_a_sequence_with_lengths_too():
    rnn = IndRNN(D, 50, 2, batch_first=True, dropout=0.5)
    layer, seen = rnn.layers[0], []
    nn.init.uniform_(layer.bias, 1, 2)
    layer.register_forward_hook(lambda _, __, output: seen.append(output[0].h))
    rnn(torch.randn(2, 4, D), lengths=[4, 4])
    dropped = (seen[0].view(4, 2, 50) == 0).all(0)
    assert 0.3 < dropped.float().mean() < 0.7
    assert ((seen[0].view(4, 2, 50)[0] == 0) <= dropped).all()


class TestReverse:
    @pytest.mark.parametrize("backend", ["reference", "scan", "numba"])
    @pytest.mark.parametrize("norm", ["none", "batch"])
    @pytest.mark.parametrize("batch_first", [True, False])
    def test_equals_the_flipped_sequence(self, backend, norm, batch_first):
        both = IndRNN(
            D, 40, batch_first=batch_first, bidirectional=True, norm=norm, backend=backend, dtype=torch.float64
        )
        one = IndRNN(D, 40, batch_first=batch_first, norm=norm, backend=backend, dtype=torch.float64)
        one.load_state_dict(
            {name.replace("layers.1", "layers.0"): v for name, v in both.state_dict().items() if "layers.1" in name}
        )
        time = 1 if batch_first else 0
        for T in (1, 2, 33, 70):
            x = torch.randn((2, T, D) if batch_first else (T, 2, D), dtype=torch.float64)
            h0 = torch.randn(2, 2, 40, dtype=torch.float64)
            output, h_n = both(x, h0)
            expected, expected_h_n = one(x.flip(time), h0[1:])
            torch.testing.assert_close(output[..., 40:], expected.flip(time), **EXACT)
            torch.testing.assert_close(h_n[1:], expected_h_n, **EXACT)
            gradients = torch.autograd.grad(weighted(output[..., 40:], h_n[1]), list(both.layers[1].parameters()))
            flipped = torch.autograd.grad(weighted(expected.flip(time), expected_h_n[0]), list(one.parameters()))
            torch.testing.assert_close(gradients, flipped, **EXACT)

    def test_compiles_and_exports(self):
        rnn = IndRNN(D, H, 2, batch_first=True, bidirectional=True, norm="batch").eval()
        x = torch.randn(3, 9, D)
        expected = rnn(x)[0]
        torch.testing.assert_close(torch.compile(rnn, fullgraph=True, backend="aot_eager")(x)[0], expected)
        dynamic = ({0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("time", max=512)},)
        program = torch.export.export(rnn, (x,), dynamic_shapes=dynamic)
        longer = torch.randn(5, 20, D)
        torch.testing.assert_close(program.module()(longer)[0], rnn(longer)[0])


def test_positional_arguments_are_in_torchs_order():
    torchs = list(inspect.signature(nn.RNNBase.__init__).parameters)[2:9]  # without self and mode
    torchs.insert(3, "nonlinearity")
    assert list(inspect.signature(IndRNN).parameters)[:8] == torchs
    assert list(inspect.signature(IndRNN.forward).parameters)[:2] == ["self", "input"]
    cell = list(inspect.signature(nn.RNNCell).parameters)[:4]
    assert list(inspect.signature(IndRNNCell).parameters)[:4] == cell


def test_calls_written_for_torch():
    """Keyword hx, flatten_parameters and attributes; what cannot be changed raises."""
    arguments = {"num_layers": 2, "nonlinearity": "tanh", "bias": False, "dropout": 0.1, "bidirectional": True}
    ours, torchs = IndRNN(D, H, **arguments), nn.RNN(D, H, **arguments)
    ours.flatten_parameters()
    x, h0 = torch.randn(4, 2, D), torch.randn(4, 2, H)
    for a, e in zip(ours(x, hx=h0), torchs(x, hx=h0), strict=True):
        assert a.shape == e.shape
    names = "input_size hidden_size num_layers nonlinearity bias batch_first dropout bidirectional proj_size"
    for name in names.split():
        assert getattr(ours, name) == getattr(torchs, name)
    for name in ("nonlinearity", "bias"):
        with pytest.raises(AttributeError):
            setattr(ours, name, getattr(ours, name))


def test_autocast_may_cast():
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = IndRNN(D, H, norm="batch", num_layers=2)(torch.randn(6, 4, D))
    (output.sum() + h_n.sum()).backward()
    assert h_n.dtype == torch.float32


def shuffled(state):
    return {name: torch.rand_like(value) if value.is_floating_point() else value for name, value in state.items()}


@pytest.mark.parametrize("kernel", ["indrnn1", "indrnn1.indrnn_cell"])  # the CUDA and the plain version's names
def test_the_authors_checkpoints_load(kernel):
    """Linear, recurrence and batch norm, layer by layer, as their plain network names and computes them (T, B, D)."""
    state = {"classifier.weight": torch.zeros(10, H), "classifier.bias": torch.zeros(10)}
    for k, size in enumerate((D, H)):
        norm = nn.BatchNorm1d(H, dtype=torch.float64).state_dict(prefix=f"RNNs.{k}.norm1.bn.")
        weights = {
            f"DIs.{k}.fc.weight": torch.empty(H, size, dtype=torch.float64),
            f"DIs.{k}.fc.bias": torch.empty(H, dtype=torch.float64),
            f"RNNs.{k}.{kernel}.weight_hh": torch.empty(H, dtype=torch.float64),
        }
        state |= shuffled(weights) | shuffled(norm)
    x = torch.randn(9, 4, D, dtype=torch.float64)
    expected = x
    for k in range(2):
        a = F.linear(expected, state[f"DIs.{k}.fc.weight"], state[f"DIs.{k}.fc.bias"])
        h, steps = torch.zeros_like(a[0]), []
        for a_t in a:
            h = torch.relu(a_t + h * state[f"RNNs.{k}.{kernel}.weight_hh"])
            steps.append(h)
        parts = [state[f"RNNs.{k}.norm1.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        expected = F.batch_norm(torch.stack(steps).flatten(0, 1), *parts).view(9, 4, H)
    rnn = IndRNN(D, H, 2, norm="batch", dtype=torch.float64).eval()
    code = indrnn.layers.__doc__
    namespace = {}
    exec(textwrap.dedent(code[code.index("    def from_authors(") :]), namespace)
    rnn.load_state_dict(namespace["from_authors"](state))
    torch.testing.assert_close(rnn(x)[0], expected, **EXACT)
