"""Batch norm and dropout folded into the next layer's weights equal nn.BatchNorm1d and a mask that are computed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import naive
from indrnn.layers import AffineSequence, IndRNNLayer, concatenate, linear

B, T, D, H, K = 3, 12, 2, 7, 4
TOLERANCE = {"rtol": 1e-12, "atol": 1e-13}  # float64


class Slow(nn.Module):
    """Two layers with nn.BatchNorm1d over batch and time and a dropout mask a sequence, step by step."""

    def __init__(self, layers, masks):
        super().__init__()
        self.layers = layers
        self.masks = masks

    def forward(self, x, states):
        for layer, mask, state in zip(self.layers, self.masks, states, strict=True):
            h, _ = naive.recurrence(F.linear(x, layer.weight_ih, layer.bias), layer.weight_hh, state)
            x = layer.norm(h.reshape(B * T, H)).reshape(B, T, H)
            if mask is not None:
                x = x * mask.unsqueeze(1)
        return x


def make(dropout, backend, momentum=0.1, affine=True):
    layers = nn.ModuleList(
        IndRNNLayer(D if k == 0 else H, H, norm="batch", dropout=dropout, backend=backend, dtype=torch.float64)
        for k in range(2)
    )
    for layer in layers:
        layer.norm = nn.BatchNorm1d(H, momentum=momentum, affine=affine, dtype=torch.float64)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -0.9, 0.9)
    return layers


def fast(layers, x, states):
    masks = []
    for layer, state in zip(layers, states, strict=True):
        x, _ = layer(x, state)
        masks.append(x.mask)
    return x, masks


@pytest.mark.parametrize("backend", ["reference", "scan", "numba"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_equals_batch_norm(backend, dropout, momentum):
    """Outputs, running statistics and the gradients of everything, over two updates of the running statistics."""
    layers = make(dropout, backend, momentum)
    slow_layers = copy.deepcopy(layers)
    classifier = torch.randn(K, H, dtype=torch.float64)
    for _ in range(2):
        x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
        states = [torch.rand(B, H, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        sequence, masks = fast(layers, x, states)
        z, slow_z = sequence.materialise(), Slow(slow_layers, masks)(x, states)
        torch.testing.assert_close(z, slow_z, **TOLERANCE)
        torch.testing.assert_close(sequence.last(), slow_z[:, -1], **TOLERANCE)
        y, slow_y = linear(sequence, classifier), slow_z @ classifier.T
        torch.testing.assert_close(y, slow_y, **TOLERANCE)
        cotangent, last_cotangent = torch.randn_like(y), torch.randn_like(sequence.h_last)
        gradients = torch.autograd.grad(
            (y * cotangent).sum() + (sequence.last() * last_cotangent).sum(), [x, *states, *layers.parameters()]
        )
        slow_gradients = torch.autograd.grad(
            (slow_y * cotangent).sum() + (slow_z[:, -1] * last_cotangent).sum(),
            [x, *states, *slow_layers.parameters()],
        )
        for gradient, expected in zip(gradients, slow_gradients, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12)
        for name, expected in slow_layers.named_buffers():
            torch.testing.assert_close(layers.get_buffer(name), expected, **TOLERANCE)


def largest_error(backend, dropout):
    """Of one layer and the linear map that reads it: the outputs, all gradients and the running statistics, each as a
    share of its largest value."""
    layers = make(dropout, backend)[:1]
    slow_layers = copy.deepcopy(layers)
    weight, bias = torch.randn(K, H, dtype=torch.float64), torch.randn(K, dtype=torch.float64)
    x = torch.randn(B, T, D, dtype=torch.float64)
    cotangent = torch.randn(B, T, K, dtype=torch.float64)

    def everything(layers, masks):
        inputs = [each.clone().requires_grad_() for each in (x, weight, bias)]
        if masks is None:
            sequence, masks = fast(layers, inputs[0], [None])
            y = linear(sequence, *inputs[1:])
        else:
            y = F.linear(Slow(layers, masks)(inputs[0], [None]), *inputs[1:])
        gradients = torch.autograd.grad((y * cotangent).sum(), [*inputs, *layers.parameters()])
        statistics = [buffer for buffer in layers.buffers() if buffer.is_floating_point()]
        return [y.detach(), *gradients, *statistics], masks

    actual, masks = everything(layers, None)
    expected, _ = everything(slow_layers, masks)
    assert len(actual) == 1 + 3 + 5 + 2
    return max(float((a - e).abs().max() / e.abs().max()) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", ["reference", "scan", "numba"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_small_cases_are_exact_to_the_last_digits(backend, dropout):
    """Within 1e-14 as a rule; a variance that happens to be small costs some cases a digit."""
    errors = sorted(largest_error(backend, dropout) for _ in range(15))
    assert errors[len(errors) // 2] <= 5e-15
    assert errors[-1] <= 5e-14


def test_a_loss_on_the_last_step_alone():
    layers = make(0.3, "numba")
    slow_layers = copy.deepcopy(layers)
    x = torch.randn(B, T, D, dtype=torch.float64)
    sequence, masks = fast(layers, x, [None, None])
    slow_z = Slow(slow_layers, masks)(x, [None, None])
    gradients = torch.autograd.grad(sequence.last().square().sum(), list(layers.parameters()))
    expected = torch.autograd.grad(slow_z[:, -1].square().sum(), list(slow_layers.parameters()))
    for a, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
def test_evaluation_uses_running_statistics(affine):
    layers = make(0.4, "numba", affine=affine)
    x = torch.randn(B, T, D, dtype=torch.float64)
    for _ in range(3):
        fast(layers, x, [None, None])
    layers.eval()
    before = {name: buffer.clone() for name, buffer in layers.named_buffers()}
    sequence, masks = fast(layers, x, [None, None])
    assert masks == [None, None]
    torch.testing.assert_close(sequence.materialise(), Slow(layers, masks)(x, [None, None]), **TOLERANCE)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layers.named_buffers())


def test_without_running_statistics_the_batch_decides_in_evaluation_too():
    layer = IndRNNLayer(D, H, norm="batch", dtype=torch.float64).eval()
    layer.norm = nn.BatchNorm1d(H, track_running_stats=False, dtype=torch.float64).eval()
    x = torch.randn(B, T, D, dtype=torch.float64)
    z = layer(x)[0].materialise()
    h, _ = naive.recurrence(F.linear(x, layer.weight_ih, layer.bias), layer.weight_hh)
    torch.testing.assert_close(z.flatten(0, 1), F.batch_norm(h.flatten(0, 1), None, None, training=True), **TOLERANCE)


def test_float32_stays_close():
    """Units with a large mean are where folding could lose digits."""
    layers = make(0.0, "numba")
    for layer in layers:
        nn.init.uniform_(layer.bias, 5, 10)
        nn.init.uniform_(layer.weight_hh, 0.5, 0.9)
    x = torch.randn(B, T, D, dtype=torch.float64)
    expected = Slow(layers, [None, None])(x, [None, None])
    actual = fast(layers.float(), x.float(), [None, None])[0].materialise()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-3)


def test_one_value_has_no_variance():
    layer = IndRNNLayer(D, H, norm="batch")
    with pytest.raises(ValueError, match="more than one value per unit"):
        layer(torch.randn(1, 1, D))


def sequences():
    h = torch.randn(B, T, H, dtype=torch.float64)
    scale, shift = torch.rand(2, H, dtype=torch.float64)
    mask = torch.rand(B, H, dtype=torch.float64).round() * 2
    yield AffineSequence(h, h[:, -1])
    yield AffineSequence(h, h[:, -1], scale, shift)
    yield AffineSequence(h, h[:, -1], mask=mask)
    yield AffineSequence(h, h[:, -1], scale, shift, mask)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("bias", [None, torch.randn(K, dtype=torch.float64)])
def test_linear_reads_any_sequence(which, bias):
    sequence = list(sequences())[which]
    weight = torch.randn(K, H, dtype=torch.float64)
    expected = F.linear(sequence.materialise(), weight, bias)
    torch.testing.assert_close(linear(sequence, weight, bias), expected, **TOLERANCE)
    torch.testing.assert_close(linear(sequence.materialise(), weight, bias), expected, **TOLERANCE)
    torch.testing.assert_close(sequence.last(), sequence.materialise()[:, -1], **TOLERANCE)


def test_concatenate_keeps_every_affine_map():
    parts = list(sequences())
    for some in (parts, parts[:1], parts[:2], parts[::2]):
        both = concatenate(some)
        expected = torch.cat([part.materialise() for part in some], dim=-1)
        torch.testing.assert_close(both.materialise(), expected, **TOLERANCE)
        torch.testing.assert_close(both.last(), expected[:, -1], **TOLERANCE)
