"""The Triton kernels compared with a float64 loop, on a GPU or, with TRITON_INTERPRET=1, interpreted on the CPU."""

import os
import random
from dataclasses import dataclass
from subprocess import CalledProcessError

import pytest
import torch

import naive
from indrnn import indrnn_recurrence
from indrnn.errors import RunError
from indrnn.recurrence import dispatch, ops
from indrnn.recurrence.dispatch import Cell, OutputGradients

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

from indrnn.recurrence import triton_gpu  # noqa: E402
from indrnn.recurrence.triton_gpu.chooser import Tile  # noqa: E402
from indrnn.recurrence.triton_gpu.primitives import compose_clamped  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()),
        reason="needs a CUDA GPU, or TRITON_INTERPRET=1 (make test)",
    ),
    # The kernels overflow float32 on purpose, about which NumPy warns in the interpreter.
    pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]

# Largest error, relative to the largest value (at least 1).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Case:
    tile: Tile
    nonlinearity: str
    dtype: torch.dtype
    B: int
    T: int
    H: int
    layout: str
    h0: bool
    bias: int | None
    statistics: bool
    gradients: str


def cases() -> list[Case]:
    """Each tile with each nonlinearity and dtype. The other options alternate at different rates. GPUs run a sample."""
    tiles = [Tile(1, 4, 8), Tile(1, 3, 8, ahead=True), Tile(2, 4, 4), Tile(4, 3, 8), Tile(8, 2, 4, ahead=True)]
    sizes = [(2, 13, 5), (1, 24, 8), (3, 1, 3), (2, 17, 4), (1, 12, 1), (2, 2, 9), (1, 48, 8)]
    made = []
    for tile in tiles:
        nonlinearities = ("relu", "identity") if tile.chunks > 1 else ("relu", "identity", "tanh", "leaky_relu")
        for nonlinearity in nonlinearities:
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                k = len(made)
                layout = ("batch", "time", "slice", "expanded")[k % 4]
                gradients = ("both", "h", "last")[(k // 2) % 3]
                options = (k % 2 == 0, (None, 1, 2)[k % 3], k % 5 != 4)
                made.append(Case(tile, nonlinearity, dtype, *sizes[k % 7], layout, *options, gradients))
    return made if INTERPRETED else random.Random(0).sample(made, len(made) // 3)


def laid_out(B: int, T: int, H: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    if layout == "time":
        return torch.randn(T, B, H, dtype=dtype).transpose(0, 1)
    if layout == "slice":
        return torch.randn(B, T, H + 3, dtype=dtype)[..., :H]
    if layout == "expanded":
        return torch.randn(B, 1, H, dtype=dtype).expand(B, T, H)
    return torch.randn(B, T, H, dtype=dtype)


def recurrent_weights(T: int, H: int) -> torch.Tensor:
    bound = 2 ** (1 / T)
    special = torch.tensor([0.5, -0.7, 1.0, bound, -bound, 0.0, -1.0, 1.5 if T < 40 else 1.0, 1e-30])
    return special.repeat(-(-H // len(special)))[:H].double()


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    assert actual.shape == expected.shape, what
    scale = expected.abs().amax().clamp(min=1)
    error = ((actual.cpu().double() - expected).abs().amax() / scale).item()
    assert error <= TOLERANCE[dtype], f"{what}: {error:.2e}"


@pytest.fixture
def _poisoned(monkeypatch):
    """Uninitialized memory is NaN, so that an element that is not written fails the test."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: torch.full_like(x, float("nan"), **options))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda x, *size, **options: x.new_full(size, float("nan"), **options)
    )


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("case", cases(), ids=str)
def test_outputs_and_gradients(case):
    """Compared with the reference in float64, which has the gradients of autograd (see test_recurrence)."""
    B, T, H, dtype = case.B, case.T, case.H, case.dtype
    state = torch.float64 if dtype == torch.float64 else torch.float32
    x = laid_out(B, T, H, dtype, case.layout)
    u = recurrent_weights(T, H).to(state)
    h0 = torch.randn(B, H, dtype=state) if case.h0 else None
    bias = None if case.bias is None else torch.randn((H,) if case.bias == 1 else (B, H), dtype=state)
    dh = laid_out(B, T, H, dtype, case.layout) if case.gradients != "last" else None
    dh_last = torch.randn(B, H, dtype=state) if case.gradients != "h" else None
    statistics = torch.randn(3, H, dtype=state) * B * T if case.statistics else (None, None, None)

    def move(*values):
        return [None if value is None else value.to(DEVICE) for value in values]

    def exact(*values):
        return [None if value is None else value.cpu().double() for value in values]

    reference = dispatch.load_backend("reference")
    cell, exact_cell = Cell(*move(u, h0), case.nonlinearity), Cell(*exact(u, h0), case.nonlinearity)
    outputs = triton_gpu.forward(*move(x, bias), cell, case.statistics, tile=case.tile)
    expected = reference.forward(*exact(x, bias), exact_cell, case.statistics)
    assert outputs.h.stride() == torch.zeros_like(x).stride()
    given = dh, dh_last, *statistics
    gradients = triton_gpu.backward(OutputGradients(*move(*given)), outputs.h, cell, tile=case.tile)
    wanted = reference.backward(OutputGradients(*exact(*given)), *exact(outputs.h), exact_cell)
    for results, right in ((outputs, expected), (gradients, wanted)):
        for name, one, other in zip(results._fields, results, right, strict=True):
            if other is not None:
                assert one.dtype == (dtype if name in ("h", "dx") else state)
                close(one, other, one.dtype, name)


@pytest.mark.parametrize("strategy", ["sequential", "scan"])
@pytest.mark.parametrize(
    ("layout", "reverse", "B", "T", "H"),
    [
        ("batch", True, 2, 37, 6), ("time", True, 2, 37, 6), ("slice", True, 2, 37, 6),
        ("batch", False, 2, 37, 6), ("time", False, 1, 70, 32),
    ],
)  # fmt: skip
def test_operator_equals_the_reference(strategy, layout, reverse, B, T, H):
    x, u = laid_out(B, T, H, torch.float64, layout), recurrent_weights(T, H)
    inputs = x, u, torch.randn(B, H).double(), torch.randn(H).double()
    cotangents = [torch.randn(B, T, H).double(), torch.randn(B, H).double(), *torch.randn(2, H).double()]

    def results(backend):
        leaves = [each.to(DEVICE).requires_grad_() for each in inputs]
        outputs = ops.recurrence(*leaves, statistics=True, backend=backend, reverse=reverse)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [each.to(DEVICE) for each in cotangents])]

    with triton_gpu.forced(strategy):
        actual = results("triton")
    names = ("h", "last", "mean", "variance", "dx", "du", "dh0", "dbias")
    for name, one, other in zip(names, actual, results("reference"), strict=True):
        close(one.detach(), other.detach().cpu(), torch.float64, name)


def test_variance_does_not_cancel():
    # h = relu(x) here; Σh² − (Σh)²/n in float32 would leave no digit of it.
    x = 1000 + torch.randn(2, 200, 4)
    cell = Cell(torch.zeros(4, device=DEVICE), None, "relu")
    _, _, mean, variance = triton_gpu.forward(x.to(DEVICE), None, cell, statistics=True, tile=Tile(4, 8, 4))
    close(mean, x.double().mean((0, 1)), torch.float32, "mean")
    expected = x.double().var((0, 1), correction=0)
    torch.testing.assert_close(variance.cpu().double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("strategy", ["sequential", "scan"])
def test_nan_reaches_all_later_steps_of_its_chain_only(strategy):
    x = torch.randn(2, 40, 3)
    x[0, 11, 1] = float("nan")
    with triton_gpu.forced(strategy):
        h, _ = indrnn_recurrence(x.to(DEVICE), torch.full((3,), 0.9, device=DEVICE), backend="triton")
    expected = torch.zeros(2, 40, 3, dtype=torch.bool)
    expected[0, 11:, 1] = True
    assert torch.equal(h.isnan().cpu(), expected)


@pytest.mark.parametrize("u", [0.0, 1e-30, -1e-30, 1.0, -1.0, 2 ** (1 / 784), -(2 ** (1 / 784)), 1.5, -1.5])
def test_long_scan_stays_finite(u):
    # x < 0 keeps h at 0 while u^784 overflows; a pulse then decays, lasts or, for |u| = 1.5, must not be met.
    x = -torch.rand(1, 784, 2)
    if abs(u) <= 1.01:
        x[0, 5, 0] = 300.0
    expected, _ = naive.recurrence(x.double(), torch.full((2,), u).double())
    cell = Cell(torch.full((2,), u, device=DEVICE), None, "relu")
    h, _, _, _ = triton_gpu.forward(x.to(DEVICE), None, cell, statistics=False, tile=Tile(16, 25, 2))
    close(h, expected, torch.float32, "h")


@triton.jit
def compose_kernel(first_ptr, second_ptr, result_ptr, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a1, s1 = tl.load(first_ptr + i, mask=i < n), tl.load(first_ptr + n + i, mask=i < n)
    lo1, hi1 = tl.load(first_ptr + 2 * n + i, mask=i < n), tl.load(first_ptr + 3 * n + i, mask=i < n)
    a2, s2 = tl.load(second_ptr + i, mask=i < n), tl.load(second_ptr + n + i, mask=i < n)
    lo2, hi2 = tl.load(second_ptr + 2 * n + i, mask=i < n), tl.load(second_ptr + 3 * n + i, mask=i < n)
    a, s, lo, hi = compose_clamped(a1, s1, lo1, hi1, a2, s2, lo2, hi2)
    tl.store(result_ptr + i, a, mask=i < n)
    tl.store(result_ptr + n + i, s, mask=i < n)
    tl.store(result_ptr + 2 * n + i, lo, mask=i < n)
    tl.store(result_ptr + 3 * n + i, hi, mask=i < n)


def composed(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The kernels' own composition of maps (4, ...), elementwise."""
    first, second = first.contiguous().to(DEVICE), second.contiguous().to(DEVICE)
    result = torch.full_like(first, float("nan"))
    n = first[0].numel()
    compose_kernel[(1,)](first, second, result, n, SIZE=triton.next_power_of_2(n))
    return result.cpu()


def test_composition_in_tree_order_equals_the_loop():
    """The interpreter scans from left to right and a GPU in a tree (Hillis & Steele 1986), so here is that order."""
    T, H = 784, 9
    x, u = torch.randn(T, H), recurrent_weights(T, H).float()
    maps = torch.stack([x, u.expand_as(x), torch.zeros_like(x), torch.full_like(x, 1e30)])  # a, s, lo, hi
    distance = 1
    while distance < T:
        # Composing with the identity leaves the first steps as they are, but for the bounds of the line.
        identity = torch.tensor([0.0, 1.0, -1e30, 1e30])[:, None, None].expand(4, distance, H)
        maps = composed(torch.cat([identity, maps[:, :-distance]], dim=1), maps)
        distance *= 2
    assert maps.isfinite().all()
    a, _, lo, hi = maps  # applied to h0 = 0
    expected = naive.recurrence(x[None].double(), u.double())[0][0]
    # A float32 tree is known to lose about 2e-4 where |u| is largest.
    scale = expected.abs().amax(0).clamp(min=1)
    assert ((torch.minimum(torch.maximum(a, lo), hi) - expected).abs() / scale < 2e-4).all()


@pytest.mark.skipif(INTERPRETED, reason="too long to interpret")
@pytest.mark.parametrize("strategy", ["sequential", "scan"])
def test_100_000_steps(strategy):
    x, u = torch.randn(2, 100_000, 128, device=DEVICE), torch.rand(128, device=DEVICE) * 2 - 1
    with triton_gpu.forced("sequential"):
        expected, _ = indrnn_recurrence(x.double(), u.double(), backend="triton")
    with triton_gpu.forced(strategy):
        h, _ = indrnn_recurrence(x, u, backend="triton")
    close(h, expected.cpu(), torch.float32, "h")


@pytest.mark.skipif(INTERPRETED, reason="takes 9 GB")
def test_64_bit_indices():
    B, T, H = 2, 2**23 + 3, 128
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("takes 12 GB of GPU memory")
    x = torch.randn(B, T, H, dtype=torch.bfloat16, device=DEVICE)
    h, _, _, _ = triton_gpu.forward(x, None, Cell(torch.full((H,), 0.5, device=DEVICE), None, "relu"), statistics=False)
    # After 60 steps of halving, where the loop started no longer matters.
    expected, _ = naive.recurrence(x[:, -100:].double().cpu(), torch.full((H,), 0.5).double())
    close(h[:, -40:], expected[:, -40:], torch.bfloat16, "h")


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (triton.runtime.errors.OutOfResources(300_000, 230_000, "shared memory"), "OutOfResources.*300000"),
        (triton.runtime.errors.PTXASError("ptxas failed"), "PTXASError: "),
        (triton.compiler.errors.CompilationError("x = 1", None, "bad\nsource"), "CompilationError"),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "gcc and Python's headers"),
        (CalledProcessError(1, ["gcc", "main.c"]), "gcc and Python's headers"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_kernel_errors_become_one_line(failure, words, direction, monkeypatch):
    def launch(*arguments):
        raise failure

    monkeypatch.setattr(triton_gpu, f"launch_{direction}", launch)
    x, u = torch.randn(1, 3, 2, device=DEVICE, requires_grad=True), torch.rand(2, device=DEVICE)
    with pytest.raises(RunError, match=words) as error:
        indrnn_recurrence(x, u, backend="triton")[0].sum().backward()
    assert "\n" not in str(error.value)
