"""Sizes for a GPU: long sequences, more than 2^20 chains, more elements than a 32-bit index reaches.

Each check also runs small on the CPU, which tests the check.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from indrnn.layers import recurrent_max
from indrnn.recurrence import indrnn_recurrence
from indrnn.recurrence.dispatch import Cell, OutputGradients, load_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def sizes(small: tuple[int, int, int], large: tuple[int, int, int]):
    """auto on the CPU, and every strategy with the large size on a GPU."""
    on_gpu = [pytest.param(CUDA, large, strategy, marks=pytest.mark.gpu) for strategy in ("auto", "sequential", "scan")]
    return pytest.mark.parametrize(("device", "size", "strategy"), [(CPU, small, "auto"), *on_gpu])


def run(device: torch.device, strategy: str, *inputs: Tensor, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """h, h_last and the gradients of the inputs."""
    forced = nullcontext()
    if device.type == "cuda":
        from indrnn.recurrence import triton_gpu

        forced = triton_gpu.forced(strategy)
    inputs = tuple(each.requires_grad_() for each in inputs)
    with forced:
        outputs = indrnn_recurrence(*inputs)
        found = torch.autograd.grad(outputs, inputs, grads)
    return *(each.detach() for each in outputs), *found


def uniform_weights(H: int, T: int, device: torch.device) -> Tensor:
    return torch.linspace(-1, 1, H, device=device) * recurrent_max(T)


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 5e-4 * expected.abs().max()


@sizes((2, 500, 8), (2, 100_000, 64))
def test_long_sequences(device, size, strategy):
    """Against float64, and the gradients against float64 from the same output."""
    B, T, H = size
    torch.manual_seed(0)
    u, h0 = uniform_weights(H, T, device), torch.randn(B, H, device=device)
    x, dh = torch.randn(B, T, H, device=device), torch.randn(B, T, H, device=device)
    dh_last = torch.randn(B, H, device=device)
    h, last, dx, du, dh0 = run(device, strategy, x, u, h0, grads=(dh, dh_last))
    # A loop of 100,000 steps would be too slow.
    reference = load_backend("reference" if device.type == "cpu" else "scan")
    cell = Cell(u.double(), h0.double(), "relu")
    exact, *_ = reference.forward(x.double(), None, cell, statistics=False)
    assert_near(h, exact)
    assert torch.equal(last, h[:, -1])
    gradients = reference.backward(OutputGradients(dh.double(), dh_last.double()), h.double(), cell)
    assert_near(dx, gradients.dx)
    assert_near(du, gradients.du.sum(0))
    assert_near(dh0, gradients.dh0)


@sizes((300, 3, 8), (20_000, 3, 128))
def test_many_chains(device, size, strategy):
    """The same results as in three smaller batches."""
    B, T, H = size
    torch.manual_seed(0)
    u = uniform_weights(H, T, device)
    x, grad = torch.randn(B, T, H, device=device), torch.randn(B, T, H, device=device)
    h, _, dx, du = run(device, strategy, x, u, grads=(grad, torch.zeros(B, H, device=device)))
    shares = torch.zeros(H, dtype=torch.float64, device=device)
    for part in torch.arange(B, device=device).split(B // 3):
        h_part, _, dx_part, du_part = run(
            device, strategy, x[part], u, grads=(grad[part], torch.zeros(len(part), H, device=device))
        )
        torch.testing.assert_close(h[part], h_part)
        torch.testing.assert_close(dx[part], dx_part)
        shares += du_part
    assert_near(du, shares)


@sizes((1, 3000, 8), (1, 2**24 + 1000, 128))
def test_more_elements_than_a_32_bit_index(device, size, strategy):
    """The last steps follow from the state before them, and the gradients of the first steps from those after them."""
    B, T, H = size
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 8 * 4 * B * T * H:
        pytest.skip("needs 69 GB of GPU memory")
    torch.manual_seed(0)
    u = uniform_weights(H, T, device) * 0.9  # gradients vanish over the distance between the parts
    x = torch.randn(B, T, H, device=device)
    grad, grad_last = torch.randn_like(x), torch.zeros(B, H, device=device)
    h, last, dx, _ = run(device, strategy, x, u, grads=(grad, grad_last))
    n = 1000
    end, end_last, dx_end, _, _ = run(
        device, strategy, x[:, -n:].detach(), u, h[:, -n - 1], grads=(grad[:, -n:], grad_last)
    )
    torch.testing.assert_close(h[:, -n:], end)
    torch.testing.assert_close(last, end_last)
    torch.testing.assert_close(dx[:, -n:], dx_end)
    start, _, dx_start, _ = run(device, strategy, x[:, :n].detach(), u, grads=(grad[:, :n], grad_last))
    torch.testing.assert_close(h[:, :n], start)
    torch.testing.assert_close(dx[:, : n // 2], dx_start[:, : n // 2])
