"""IndRNN against torch.nn.RNN with a diagonal recurrent matrix: outputs, states and every gradient, packed,
in both directions, unbatched and empty."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from indrnn.layers import IndRNN, IndRNNCell

D, H = 3, 5
EXACT = {"rtol": 1e-11, "atol": 1e-12}  # float64


@torch.no_grad()
def twins(num_layers, bidirectional, batch_first, nonlinearity, bias, backend):
    """An IndRNN and the nn.RNN that computes the same."""
    shared = (D, H, num_layers, nonlinearity, bias, batch_first, 0.0, bidirectional)
    ours, torchs = IndRNN(*shared, backend=backend, dtype=torch.float64), nn.RNN(*shared, dtype=torch.float64)
    for layer, (weight_ih, weight_hh, *biases) in zip(ours.layers, torchs.all_weights, strict=True):
        layer.weight_hh.uniform_(-1, 1)
        weight_ih.copy_(layer.weight_ih)
        weight_hh.copy_(layer.weight_hh.diag())
        if biases:
            layer.bias.uniform_(-0.5, 0.5)
            biases[0].copy_(layer.bias)
            biases[1].zero_()
    return ours, torchs


def assert_same_gradients(ours, torchs, our_loss, torch_loss, inputs):
    our_gradients = torch.autograd.grad(our_loss, [*inputs, *ours.parameters()])
    torch_gradients = torch.autograd.grad(torch_loss, [*inputs, *torchs.parameters()])
    count = len(inputs)
    torch.testing.assert_close(our_gradients[:count], torch_gradients[:count], **EXACT)
    theirs = dict(zip((name for name, _ in torchs.named_parameters()), torch_gradients[count:], strict=True))
    for (name, _), gradient in zip(ours.named_parameters(), our_gradients[count:], strict=True):
        _, index, part = name.split(".")
        layer, reverse = divmod(int(index), ours.num_directions)
        suffix = f"_l{layer}" + "_reverse" * reverse
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
    packed=st.booleans(),
    with_h0=st.booleans(),
    backend=st.sampled_from(["auto", "reference", "scan"]),
)
def test_outputs_and_gradients_are_those_of_torch(
    seed, T, batch, num_layers, bidirectional, batch_first, nonlinearity, bias, packed, with_h0, backend
):
    torch.manual_seed(seed)
    if nonlinearity == "tanh" and backend == "scan":
        backend = "auto"
    ours, torchs = twins(num_layers, bidirectional, batch_first, nonlinearity, bias, backend)
    shape = (T, D) if batch is None else (batch, T, D) if batch_first else (T, batch, D)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    states = num_layers * (2 if bidirectional else 1)
    h0 = torch.randn((states, H) if batch is None else (states, batch, H), dtype=torch.float64, requires_grad=True)
    inputs = [x, h0] if with_h0 else [x]
    if not packed or not batch:  # there are no empty PackedSequences
        (output, h_n), (expected, expected_h_n) = ours(*inputs), torchs(*inputs)
    else:
        lengths = torch.randint(1, T + 1, (batch,))
        sequences = [pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False) for _ in range(2)]
        output, h_n = ours(sequences[0], *inputs[1:])
        expected, expected_h_n = torchs(sequences[1], *inputs[1:])
        output, expected = (pad_packed_sequence(each)[0] for each in (output, expected))
    torch.testing.assert_close((output, h_n), (expected, expected_h_n), **EXACT)
    if batch == 0:  # nn.RNN has no backward without sequences
        gradients = torch.autograd.grad(weighted(output, h_n), [*inputs, *ours.parameters()])
        assert all((gradient == 0).all() for gradient in gradients)
        return
    assert_same_gradients(ours, torchs, weighted(output, h_n), weighted(expected, expected_h_n), inputs)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_packed_sequence_equals_its_sequences_alone(norm):
    """Batch norm covers all steps of all sequences."""
    rnn = IndRNN(D, H, batch_first=True, bidirectional=True, norm=norm, dtype=torch.float64)
    plain = IndRNN(D, H, batch_first=True, bidirectional=True, dtype=torch.float64)
    plain.load_state_dict(rnn.state_dict(), strict=False)
    lengths, x = [7, 2, 5], torch.randn(3, 7, D, dtype=torch.float64)
    alone = [plain(row[:length]) for row, length in zip(x, lengths, strict=True)]
    expected, expected_h_n = torch.cat([each for each, _ in alone]), torch.stack([each for _, each in alone], 1)
    output, h_n = rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    output, _ = pad_packed_sequence(output, batch_first=True)
    if norm == "batch":
        theirs = nn.BatchNorm1d(2 * H, dtype=torch.float64)
        expected = theirs(expected)
        running = torch.cat([layer.norm.running_var for layer in rnn.layers])
        torch.testing.assert_close(running, theirs.running_var, **EXACT)
    actual = torch.cat([row[:length] for row, length in zip(output, lengths, strict=True)])
    torch.testing.assert_close((actual, h_n), (expected, expected_h_n), **EXACT)


def test_a_state_that_would_overflow_in_the_padding_does_no_harm():
    rnn = IndRNN(1, 1, batch_first=True)
    for parameter, value in zip(rnn.parameters(), (1.0, 2.0, 0.0), strict=True):
        nn.init.constant_(parameter, value)
    x = torch.zeros(2, 300, 1)
    x[0, :3] = 1
    output, _ = rnn(pack_padded_sequence(x, [3, 300], batch_first=True, enforce_sorted=False))
    output.data.sum().backward()
    assert output.data[[1, 3, 5], 0].tolist() == [1, 3, 7]
    assert rnn.layers[0].weight_hh.grad.item() == 1 + (3 + 2 * 1)  # h2 = x2 + u h1, h3 = x3 + u h2


def test_a_packed_sequence_has_one_dropout_mask_per_sequence():
    rnn, seen = IndRNN(D, 50, 2, dropout=0.5), []
    nn.init.uniform_(rnn.layers[0].bias, 50, 60)
    rnn.layers[0].register_forward_hook(lambda _, __, output: seen.append(output[0].h))
    rnn(pack_padded_sequence(torch.randn(4, 2, D), [4, 4]))
    zeros = seen[0].view(4, 2, 50) == 0
    assert 0.3 < zeros.all(0).float().mean() < 0.7
    assert torch.equal(zeros[0], zeros.all(0))


@pytest.mark.parametrize("backend", ["reference", "scan", "numba"])
@pytest.mark.parametrize("T", [1, 2, 33, 70])
def test_the_backward_direction_equals_the_flipped_sequence(backend, T):
    options = {"batch_first": True, "norm": "batch", "backend": backend, "dtype": torch.float64}
    both, one = IndRNN(D, 40, bidirectional=True, **options), IndRNN(D, 40, **options)
    one.layers[0].load_state_dict(both.layers[1].state_dict())
    x, h0 = torch.randn(2, T, D, dtype=torch.float64), torch.randn(2, 2, 40, dtype=torch.float64)
    output, h_n = both(x, h0)
    actual = output[..., 40:], h_n[1:]
    flipped, last = one(x.flip(1), h0[1:])
    expected = flipped.flip(1), last
    torch.testing.assert_close(actual, expected, **EXACT)
    gradients = torch.autograd.grad(weighted(*actual), list(both.layers[1].parameters()))
    torch.testing.assert_close(
        gradients, torch.autograd.grad(weighted(*expected), list(one.parameters())), rtol=1e-10, atol=1e-10
    )


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
    for name in ("nonlinearity", "bias", "dropout"):
        with pytest.raises(AttributeError):
            setattr(ours, name, getattr(ours, name))


def test_autocast_may_cast():
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = IndRNN(D, H, norm="batch", num_layers=2)(torch.randn(6, 4, D))
    (output.sum() + h_n.sum()).backward()
    assert h_n.dtype == torch.float32
