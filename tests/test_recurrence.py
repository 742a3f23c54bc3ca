"""The recurrence on every backend of this machine: outputs, gradients, and what a caller may rely on."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import indrnn
import naive
from indrnn import IndRNN
from indrnn.errors import UserError
from indrnn.recurrence import available_backends, dispatch, indrnn_recurrence, resolve_backend
from indrnn.recurrence.ops import recurrence

# Largest error allowed, relative to the largest element of the float64 result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
# A tree of products rounds differently from a loop: DESIGN says 2e-4 at |u| = 2^(1/784) over 784 steps.
TREE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-4}
BACKENDS = ["reference", "scan", "numba"]
COMPUTES = [(name, sigma) for name in BACKENDS for sigma in dispatch.load_backend(name).NONLINEARITIES]
MAX = 2 ** (1 / 784)


def assert_close(actual, expected, tolerance):
    scale = expected.abs().max().clamp(min=1e-30)
    error = ((actual.double() - expected).abs().max() / scale).item()
    assert actual.shape == expected.shape
    assert error <= tolerance, f"relative error {error:.2e}"


def example(B, T, H, dtype=torch.float64):
    """Inputs whose states cross the kink again and again, and weights at the bounds, zero, tiny and negative."""
    x = torch.randn(B, T, H, dtype=torch.float64)
    u = (2 * torch.rand(H, dtype=torch.float64) - 1) * MAX
    special = torch.tensor([MAX, -MAX, 0.0, 1e-30, -1.0], dtype=torch.float64)[:H]
    u[: len(special)] = special
    h0 = torch.rand(B, H, dtype=torch.float64) * 3
    bias = torch.randn(B, H, dtype=torch.float64) / 10
    return [tensor.to(dtype) for tensor in (x, u, h0, bias)]


def cotangents(*outputs):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype) for out in outputs]


def results_and_gradients(function, inputs):
    """What `function` returns, and the gradients of its inputs for random cotangents on all it returns."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = [out for out in function(*inputs) if out.numel()]
    gradients = torch.autograd.grad(outputs, inputs, cotangents(*outputs))
    return [tensor.detach() for tensor in (*outputs, *gradients)]


def in_float64(inputs):
    return [tensor.double() for tensor in inputs]


SHAPES = [(3, 1, 1), (3, 1, 128), (3, 2, 5), (3, 17, 5), (3, 17, 128), (3, 783, 5), (3, 784, 45), (1, 33, 100)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("B", "T", "H"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_relu_outputs_and_all_gradients(backend, B, T, H, dtype):
    inputs = example(B, T, H, dtype)[:3]
    expected = results_and_gradients(naive.recurrence, in_float64(inputs))
    actual = results_and_gradients(lambda x, u, h0: indrnn_recurrence(x, u, h0, backend=backend), inputs)
    tolerance = (TREE_TOLERANCE if backend == "scan" else TOLERANCE)[dtype]
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert_close(a, e, tolerance)


@pytest.mark.parametrize(("backend", "nonlinearity"), COMPUTES)
def test_every_nonlinearity_with_a_bias(backend, nonlinearity):
    inputs = example(3, 70, 45)
    expected = results_and_gradients(lambda *i: naive.recurrence(*i, nonlinearity), inputs)
    actual = results_and_gradients(lambda *i: recurrence(*i, nonlinearity=nonlinearity, backend=backend), inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_initial_state_is_zeros(backend):
    x, u, h0, _ = example(3, 17, 5)
    h, last = indrnn_recurrence(x, u, backend=backend)
    assert torch.equal(h, indrnn_recurrence(x, u, torch.zeros_like(h0), backend=backend)[0])
    assert torch.equal(last, h[:, -1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared_bias", [False, True])
def test_statistics_and_their_gradients(backend, shared_bias):
    x, u, h0, bias = example(3, 70, 45)
    inputs = [x, u, h0, bias[0] if shared_bias else bias]

    def slow(*inputs):
        h, last = naive.recurrence(*inputs)
        return h, last, h.mean((0, 1)), h.var((0, 1), correction=0)

    def fast(*inputs):
        return recurrence(*inputs, statistics=True, backend=backend)

    for a, e in zip(results_and_gradients(fast, inputs), results_and_gradients(slow, inputs), strict=True):
        assert_close(a, e, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_variance_does_not_cancel(backend):
    """States near 1000 that vary by 0.01: the sum of squares less the square of the sum keeps no digit of that."""
    x = 1000 + 0.01 * torch.randn(4, 784, 5)
    h, _, mean, variance = recurrence(x, torch.zeros(5), statistics=True, backend=backend)
    expected = h.double().var((0, 1), correction=0)
    assert_close(mean, h.double().mean((0, 1)), 1e-6)
    assert_close(variance, expected, 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_step_alone(backend):
    """A loss that reads h_last only has the gradients of one that reads h[:, -1]."""
    inputs = example(3, 17, 5)[:3]
    actual = results_and_gradients(lambda *i: indrnn_recurrence(*i, backend=backend)[1:], inputs)
    expected = results_and_gradients(lambda *i: naive.recurrence(*i)[1:], inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["time-major", "sliced", "expanded", "units apart"])
def test_strided_input(backend, layout):
    x, u, h0, _ = example(3, 40, 36)
    if layout == "time-major":
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "sliced":
        strided = torch.randn(3, 80, 50, dtype=x.dtype)[:, ::2, 5:41].copy_(x)
    elif layout == "expanded":
        strided = x = x[:, :1].expand(3, 40, 36)
    else:
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    expected = naive.recurrence(x, u, h0)[0]
    leaf = strided.detach().requires_grad_()
    h, _ = indrnn_recurrence(leaf, u, h0, backend=backend)
    assert_close(h.detach(), expected, 1e-12)
    if layout == "time-major":
        assert h.stride() == strided.stride()
    # gradients arrive in any layout too: of h.sum() every stride is 0
    (strided_gradient,) = torch.autograd.grad(h.sum(), leaf)
    plain = x.contiguous().requires_grad_()
    (expected_gradient,) = torch.autograd.grad(naive.recurrence(plain, u, h0)[0].sum(), plain)
    assert_close(strided_gradient, expected_gradient, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend):
    inputs = example(3, 40, 36)
    before = [tensor.clone() for tensor in inputs]
    results_and_gradients(lambda *i: recurrence(*i, backend=backend), inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("B", "T", "H"), [(3, 40, 45), (1, 33, 7), (2, 1, 1)])
def test_every_element_is_written(backend, B, T, H, monkeypatch):
    """Fresh memory full of NaN must not show."""
    inputs = example(B, T, H)

    def poison(make):
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(float("nan"))

    expected = results_and_gradients(lambda *i: recurrence(*i, statistics=True, backend=backend), inputs)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poison(torch.empty))
        patch.setattr(torch, "empty_like", poison(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
        actual = results_and_gradients(lambda *i: recurrence(*i, statistics=True, backend=backend), inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_is_not_hidden(backend):
    x, u, _, _ = example(2, 9, 5)
    x[1, 4, 2] = float("nan")
    h, _ = indrnn_recurrence(x, u, backend=backend)
    assert h[1, 4:, 2].isnan().any()
    assert not h[0].isnan().any()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_scan_is_exact_up_to_1e30_and_clamps_there(dtype):
    x, u = torch.ones(1, 6, 3, dtype=dtype), torch.tensor([0.5, 1.0, -1.0], dtype=dtype)
    x[0, 2] = 9e29
    expected = naive.recurrence(x.double(), u.double())[0]
    assert_close(indrnn_recurrence(x, u, backend="scan")[0], expected, TREE_TOLERANCE[dtype])
    for beyond in (1e31, float("inf")):
        x[0, 2] = beyond
        assert indrnn_recurrence(x, u, backend="scan")[0].max() <= 1.0001e30
        assert torch.equal(indrnn_recurrence(x, u, backend="numba")[0].isfinite(), naive.recurrence(x, u)[0].isfinite())


@pytest.mark.parametrize("sigma", ["relu", "leaky_relu", "identity"])
@pytest.mark.parametrize("with_statistics", [False, True])
@pytest.mark.parametrize("initial", [False, True])
def test_numba_follows_the_definition_where_a_state_or_a_gradient_is_infinite(sigma, with_statistics, initial):
    x, u, h0, _ = example(3, 40, 5)
    x[0, 9, 1:], x[1, 38, :2] = float("inf"), float("inf")
    h, last = indrnn_recurrence(x, u, h0, nonlinearity=sigma, backend="reference")
    dh, dh_last = cotangents(h, last)
    dh[2, 30, 3:], dh_last[0, 2] = float("inf"), float("-inf")
    slope = torch.linspace(-1, 1, 5, dtype=h.dtype) if with_statistics else None
    arguments = (dh, dh_last, slope, slope, h, u, h0 if initial else None, None, None, sigma)
    actual = torch.ops.indrnn.recurrence_backward(*arguments, "numba")
    expected = torch.ops.indrnn.recurrence_backward(*arguments, "reference")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert with_statistics or actual[0][1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    inputs = [tensor.requires_grad_() for tensor in example(2, 9, 5)]

    def everything(*inputs):
        return recurrence(*inputs, statistics=True, backend=backend)

    assert torch.autograd.gradcheck(everything, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_refused(backend):
    x, u, _, _ = example(2, 4, 3)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(indrnn_recurrence(x, u, backend=backend)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        gradient.sum().backward()


class TestTorchFunc:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("batched", ["x", "u", "x u h0 bias"])
    def test_vmap_of_grad(self, backend, batched):
        """Gradients an example, whichever inputs differ from one to the next, with statistics among the outputs."""
        examples = [example(2, 9, 5) for _ in range(3)]
        names = ["x", "u", "h0", "bias"]
        dims = tuple(0 if name in batched.split() else None for name in names)

        def loss(*inputs):
            return sum((out * weight).sum() for out, weight in zip(outputs_of(*inputs), weights, strict=True))

        def outputs_of(*inputs):
            return recurrence(*inputs, statistics=True, backend=backend)

        weights = cotangents(*outputs_of(*examples[0]))
        gradient = torch.func.grad(loss, argnums=(0, 1, 2, 3))
        columns = zip(zip(*examples, strict=True), dims, strict=True)
        stacked = [torch.stack(values) if dim == 0 else values[0] for values, dim in columns]
        actual = torch.func.vmap(gradient, dims)(*stacked)
        for n in range(3):
            inputs = [each[n] if dim == 0 else each for each, dim in zip(stacked, dims, strict=True)]
            leaves = [each.clone().requires_grad_() for each in inputs]
            for a, e in zip(actual, torch.autograd.grad(loss(*leaves), leaves), strict=True):
                assert_close(a[n], e, 1e-12)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_jacrev(self, backend):
        x, u, _, _ = example(2, 4, 3)
        actual = torch.func.jacrev(lambda x: indrnn_recurrence(x, u, backend=backend)[0])(x)
        assert_close(actual, torch.func.jacrev(lambda x: naive.recurrence(x, u)[0])(x), 1e-12)

    def test_functional_call_an_example(self):
        """The README's layer, as torch.func's own tutorial on per-sample gradients uses one."""
        net, x = IndRNN(3, 5, 2, batch_first=True), torch.randn(4, 7, 3)
        parameters = dict(net.named_parameters())

        def loss(parameters, one):
            return torch.func.functional_call(net, parameters, (one.unsqueeze(0),))[0].square().sum()

        actual = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        for n in range(4):
            expected = torch.autograd.grad(net(x[n : n + 1])[0].square().sum(), list(parameters.values()))
            for name, e in zip(parameters, expected, strict=True):
                torch.testing.assert_close(actual[name][n], e)

    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # PyTorch's own forward mode
    @pytest.mark.parametrize("transform", ["jvp", "jacfwd", "linearize", "forward_ad", "hessian"])
    def test_forward_mode_is_refused(self, transform):
        x, u, _, _ = example(2, 4, 3)

        def function(x):
            return indrnn_recurrence(x, u)[0].sum()

        def forward_ad():
            with torch.autograd.forward_ad.dual_level():
                function(torch.autograd.forward_ad.make_dual(x, x))

        attempts = {
            "jvp": lambda: torch.func.jvp(function, (x,), (x,)),
            "jacfwd": lambda: torch.func.jacfwd(function)(x),
            "linearize": lambda: torch.func.linearize(function, x),
            "forward_ad": forward_ad,
            "hessian": lambda: torch.func.hessian(function)(x),
        }
        with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*; use reverse mode") as error:
            attempts[transform]()
        assert "\n" not in str(error.value)

    def test_a_second_derivative_is_refused(self):
        x, u, _, _ = example(2, 4, 3)

        def slope(x):
            return torch.func.grad(lambda x: indrnn_recurrence(x, u)[0].square().sum())(x).sum()

        with pytest.raises(RuntimeError, match="once, not twice"):
            torch.func.grad(slope)(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself looks at it
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optional", [False, True])
def test_operators_keep_pytorchs_rules(backend, optional):
    x, u, h0, bias = (tensor.requires_grad_() for tensor in example(2, 9, 5))
    arguments = (x, u, h0 if optional else None, bias if optional else None, None, optional, "relu", backend)
    torch.library.opcheck(torch.ops.indrnn.recurrence, arguments)
    h = torch.ops.indrnn.recurrence(*arguments)[0].detach()
    offset = torch.rand(5, dtype=h.dtype) if optional else None
    inputs = (h, u.detach(), h0.detach(), None, None)
    arguments = (torch.randn_like(h), None, offset, offset, *inputs, "relu", backend)
    torch.library.opcheck(torch.ops.indrnn.recurrence_backward, arguments)


@pytest.mark.parametrize("backend", ["numba", "scan"])
def test_compiles_into_one_graph(backend):
    inputs = example(2, 9, 5)[:3]

    def function(x, u, h0):
        h, last = indrnn_recurrence(x * 2, u, h0, backend=backend)
        return h + 1, last

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, e in zip(results_and_gradients(compiled, inputs), results_and_gradients(function, inputs), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(dtype):
    inputs = example(3, 200, 128, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(results_and_gradients(lambda *i: recurrence(*i, statistics=True, backend="numba"), inputs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, e) for a, e in zip(other, results[0], strict=True))


def test_numba_without_the_openmp_runtime(monkeypatch):
    """Where PyTorch's runtime cannot be called, Python's threads give the same result."""
    from indrnn.recurrence.numba_cpu import launch

    inputs = example(3, 100, 128, torch.float32)
    expected = results_and_gradients(lambda *i: recurrence(*i, backend="numba"), inputs)
    monkeypatch.setattr(launch, "_openmp_parallel", lambda: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        actual = results_and_gradients(lambda *i: recurrence(*i, backend="numba"), inputs)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_numba_flushes_denormals_in_its_threads_and_nowhere_else(threads):
    h = torch.ones(4, 60, 128)
    u = torch.full((128,), 0.05)
    last = torch.full((4, 128), 1e-30)
    before = torch.get_num_threads()
    torch.set_flush_denormal(False)  # a training earlier in this process leaves it on
    torch.set_num_threads(threads)
    try:
        dx, *_ = torch.ops.indrnn.recurrence_backward(None, last, None, None, h, u, None, None, None, "relu", "numba")
    finally:
        torch.set_num_threads(before)
    tiny = torch.finfo(torch.float32).tiny
    assert (dx > 0).any()
    assert not ((dx != 0) & (dx.abs() < tiny)).any()
    assert (torch.tensor(1e-30) * torch.tensor(1e-10)).item() > 0  # denormals live on in the caller's thread


def test_numba_kernels_as_python():
    """The kernels' loops, interpreted: what a debugger and a coverage tool see."""
    program = """
import itertools
import torch
from indrnn.recurrence.ops import recurrence
torch.manual_seed(0)
cases = ((torch.float64, 2, 40, 21, "relu"), (torch.float32, 1, 35, 45, "leaky_relu"),
         (torch.float32, 9, 1, 1, "identity"), (torch.bfloat16, 2, 70, 45, "relu"))
for (dtype, B, T, H, sigma), reverse, D in itertools.product(cases, (False, True), (None, 2)):
    results = []
    inputs = [torch.randn(B, T, D or H, dtype=dtype), torch.rand(H, dtype=dtype) * 1.8 - 0.9,
              torch.rand(B, H, dtype=dtype), torch.randn(H, dtype=dtype)]
    if D is not None:
        inputs.append(torch.randn(H, D, dtype=dtype))
    for backend in ("numba", "reference"):
        # without a gradient of x, which would be formed from one of W x in memory
        leaves = [each.clone().requires_grad_(D is None or each is not inputs[0]) for each in inputs]
        outputs = recurrence(*leaves, statistics=True, nonlinearity=sigma, backend=backend, reverse=reverse)
        loss = sum((out * torch.linspace(-1, 2, out.numel(), dtype=dtype).view_as(out)).sum() for out in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])])
    for a, e in zip(*results):
        tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)
print("same")
"""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "same", done.stderr


def test_numba_compiles_anew_when_any_of_its_sources_changes(tmp_path):
    """Also when the file that Numba itself looks at, kernels.py, stays as it is."""
    package = tmp_path / "indrnn"
    shutil.copytree(Path(indrnn.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    program = """
import torch
from indrnn.recurrence import indrnn_recurrence
print(indrnn_recurrence(-torch.ones(1, 1, 1), torch.zeros(1), backend="numba")[0].item())
"""
    source = package / "recurrence" / "numba_cpu" / "vector.py"
    earlier = source.read_text()
    mirrored = earlier.replace('fcmp_ordered("<", arguments[0], zero)', 'fcmp_ordered(">", arguments[0], zero)')
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    for text, expected in ((earlier, "0.0"), (mirrored, "-1.0")):
        source.write_text(text)
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.stdout.strip() == expected, done.stderr


def test_importing_the_package_does_not_import_numba_or_triton():
    program = "import sys, indrnn.layers; print(sorted({'numba', 'llvmlite'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class TestBfloat16:
    """Sequences in bfloat16, everything else in float32."""

    @pytest.mark.parametrize(("B", "T", "H"), SHAPES)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_outputs_and_all_gradients(self, backend, B, T, H):
        x, u, h0, bias = example(B, T, H, torch.float32)
        inputs = [each.requires_grad_() for each in (x.bfloat16(), u, h0, bias)]
        outputs = recurrence(*inputs, backend=backend)[:2]
        dh = cotangents(*outputs)
        actual = [*outputs, *torch.autograd.grad(outputs, inputs, dh)]
        # the gradients in float64 too, but at the kink on the side where the states that were written are
        exact = in_float64(inputs)
        written = in_float64((*dh, outputs[0].detach()))
        gradients = torch.ops.indrnn.recurrence_backward(
            *written[:2], None, None, written[2], *exact[1:3], None, None, "relu", "reference"
        )
        expected = [*naive.recurrence(*exact), gradients[0], gradients[1].sum(0), *gradients[2:4]]
        float32 = TREE_TOLERANCE[torch.float32] if backend == "scan" else TOLERANCE[torch.float32]
        for a, e in zip(actual, expected, strict=True):
            tolerance = 2**-8 if a.dtype == torch.bfloat16 else float32
            assert_close(a.detach(), e.detach(), tolerance)
        assert [each.dtype == torch.bfloat16 for each in actual] == [True, False, True, False, False, False]

    @pytest.mark.parametrize(("backend", "sigma"), COMPUTES)
    @pytest.mark.parametrize("time_major", [False, True])
    @pytest.mark.parametrize("reverse", [False, True])
    def test_equals_float32_rounded_at_the_end(self, backend, sigma, time_major, reverse):
        """Bit for bit: the state is never rounded between steps, nor before the statistics or a sum over time."""
        x, u, h0, bias = example(3, 70, 45, torch.float32)
        x = x.bfloat16()
        x[0, 5, 7], x[1, 9, 3:5] = float("nan"), float("inf")
        if time_major:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        forward, backward = torch.ops.indrnn.recurrence, torch.ops.indrnn.recurrence_backward
        h, *others = forward(x, u, h0, bias, None, True, sigma, backend, reverse)
        wide, *expected = forward(x.float(), u, h0, bias, None, True, sigma, backend, reverse)
        dh, dh_last = cotangents(h, others[0])
        slope = torch.linspace(-1, 1, 45)
        given = (u, h0, None, None, sigma, backend, reverse)
        dx, *sums = backward(dh, dh_last, slope, slope, h, *given)
        wide_dx, *expected_sums = backward(dh.float(), dh_last, slope, slope, h.float(), *given)
        actual = [h, *others, dx, *sums]
        expected = [wide.bfloat16(), *expected, wide_dx.bfloat16(), *expected_sums]
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        assert h.stride() == x.stride()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_every_backend_gives_the_same_bits_where_float32_is_exact(self, backend):
        """Sixteenths that are added up: no float32 rounds, but bfloat16 does, ties included."""
        x = torch.randint(-16, 32, (3, 70, 45)).bfloat16() / 16
        u = torch.tensor([1.0, -1.0, 0.0]).repeat(15)
        h0 = torch.randint(0, 16, (3, 45)) / 16
        dh, dh_last = torch.randint(-16, 16, x.shape).bfloat16() / 16, torch.randint(-16, 16, h0.shape) / 16
        results = []
        for name in (backend, "reference"):
            leaves = [each.clone().requires_grad_() for each in (x, u, h0)]
            outputs = indrnn_recurrence(*leaves, backend=name)
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, (dh, dh_last))])
        assert all(torch.equal(a, e) for a, e in zip(*results, strict=True))
        exact = naive.recurrence(x.double(), u.double(), h0.double())[0]
        assert torch.equal(results[0][0], exact.bfloat16())
        assert not torch.equal(results[0][0].double(), exact)

    @pytest.mark.parametrize("backend", ["reference", "numba"])
    def test_a_sequence_in_two_parts(self, backend):
        x, u, h0, _ = example(3, 80, 45, torch.float32)
        x = x.bfloat16()
        h, h_last = indrnn_recurrence(x, u, h0, backend=backend)
        first, state = indrnn_recurrence(x[:, :37], u, h0, backend=backend)
        second, state = indrnn_recurrence(x[:, 37:], u, state, backend=backend)
        assert torch.equal(torch.cat([first, second], 1), h)
        assert torch.equal(state, h_last)

    @pytest.mark.parametrize("instruction", [True, False])
    def test_numba_rounds_as_torch_does(self, instruction, monkeypatch):
        """With the processor's instruction, and without it."""
        import numba

        from indrnn.recurrence.numba_cpu import vector

        if not instruction:
            monkeypatch.setattr(vector, "rounds_by_instruction", lambda context: False)

        load, store, lanes = vector.load, vector.store, (0,) * 32

        @numba.njit
        def round_all(values, rounded):
            for k in range(0, len(values), 32):
                store(rounded, k, load(values, k, lanes))

        bits = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int64).to(torch.int32)
        bits[: 1 << 14] = bits[: 1 << 14] & ~0xFFFF | 0x8000  # ties
        # No denormals, which the kernels flush. Whether they equal 0 depends on the mode that earlier tests left.
        bits[bits & 0x7F80_0000 == 0] = 0
        values = bits.view(torch.float32)
        values[:4] = torch.tensor([float("inf"), -float("inf"), float("nan"), torch.finfo(torch.float32).max])
        rounded = torch.empty(values.shape, dtype=torch.bfloat16)
        round_all(values.numpy(), rounded.view(torch.uint16).numpy())
        torch.testing.assert_close(rounded, values.bfloat16(), rtol=0, atol=0, equal_nan=True)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.randn(3, 5)}, r"x must be \(B, T, H\)"),
            ({"x": torch.randn(3, 0, 5)}, "at least one time step and unit"),
            ({"x": torch.zeros(3, 4, 5, dtype=torch.int64)}, "x must be floating point"),
            ({"u": torch.randn(4)}, r"u must have shape \(5,\)"),
            ({"u": torch.randn(5).double()}, "u must have the dtype of x"),
            ({"h0": torch.randn(5)}, r"h0 must have shape \(3, 5\)"),
            ({"h0": torch.randn(3, 5).double()}, "h0 must have the dtype of x"),
            ({"u": torch.randn(5, device="meta")}, "u is on meta"),
        ],
    )
    def test_tensors_that_do_not_fit(self, change, message):
        arguments = {"x": torch.randn(3, 4, 5), "u": torch.randn(5), "h0": None, **change}
        with pytest.raises(ValueError, match=message):
            indrnn_recurrence(**arguments)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"backend": "cuda"}, "backend='cuda' is unknown; choose one of auto"),
            ({"nonlinearity": "gelu"}, "nonlinearity='gelu' is unknown; choose one of relu"),
            ({"backend": "triton"}, "backend=triton is not available on cpu: .*; choose auto or reference"),
            ({"backend": "numba", "nonlinearity": "tanh"}, "it computes relu, identity, leaky_relu, not tanh"),
        ],
    )
    def test_backends_that_cannot(self, options, message):
        with pytest.raises(UserError, match=message) as error:
            indrnn_recurrence(torch.randn(3, 4, 5), torch.randn(5), **options)
        assert "\n" not in str(error.value)


class TestResolveBackend:
    def test_on_the_cpu(self):
        assert resolve_backend("auto", "cpu") == "numba"
        assert resolve_backend("auto", "cpu", nonlinearity="tanh") == "reference"
        assert resolve_backend("auto", "cpu", torch.bfloat16) == "numba"
        assert resolve_backend("auto", "cpu", torch.float16) == "reference"
        assert resolve_backend("scan", "cpu") == "scan"

    def test_a_slow_choice_on_cuda_warns_once(self, monkeypatch):
        monkeypatch.setattr(dispatch, "_refusal", lambda name, *_: "no kernel" if name == "triton" else None)
        monkeypatch.setattr(dispatch, "_warned", set())
        with pytest.warns(
            UserWarning, match="takes scan on cuda, which is slow, because triton cannot be used: no kernel"
        ):
            assert resolve_backend("auto", "cuda") == "scan"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert resolve_backend("auto", "cuda") == "scan"

    @pytest.mark.parametrize("device", ["mps", "xpu"])
    def test_on_devices_without_a_kernel(self, device):
        assert resolve_backend("auto", device) == "scan"
        assert resolve_backend("auto", device, nonlinearity="tanh") == "reference"

    def test_a_missing_library_is_a_reason(self, monkeypatch):
        monkeypatch.setitem(dispatch._MODULES, "numba", ".no_such_module")
        assert "cannot be imported" in available_backends("cpu")["numba"]
        assert resolve_backend("auto", "cpu") == "reference"


class Kernel:
    """Stands for Triton on a GPU: the loop, with a fault in one direction."""

    NONLINEARITIES, DTYPES = ("relu",), (torch.float32,)

    def __init__(self, fault):
        self.fault = fault
        self.reference = dispatch.load_backend("reference")

    def unavailable_reason(self, device):
        return None

    def forward(self, *arguments):
        if self.fault == "does not compile":
            raise ValueError("PassManager::run failed\nwith a long text")
        outputs = self.reference.forward(*arguments)
        return outputs._replace(h=outputs.h * 1.01) if self.fault == "forward" else outputs

    def backward(self, *arguments):
        gradients = self.reference.backward(*arguments)
        return gradients._replace(du=gradients.du * float("nan")) if self.fault == "backward" else gradients


class TestSelfCheck:
    """What happens on a GPU when triton is first used, with the CPU in its place."""

    @pytest.fixture
    def first_use(self, monkeypatch):
        def begin(fault):
            kernel, original = Kernel(fault), dispatch.load_backend
            monkeypatch.setattr(dispatch, "load_backend", lambda name: kernel if name == "triton" else original(name))
            monkeypatch.setitem(dispatch._PREFERRED, "cpu", ("triton", "scan", "reference"))
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
            monkeypatch.setattr(dispatch, "_warned", set())
            dispatch._fault.cache_clear()

        yield begin
        dispatch._fault.cache_clear()

    @pytest.mark.parametrize(
        ("fault", "reason"),
        [
            ("does not compile", r"\(ValueError: PassManager::run failed with a long text\); please report it"),
            ("forward", r"\(h is off by 1\.0e-02 of its largest value\)"),
            ("backward", r"\(du is off by nan of its largest value\)"),
        ],
    )
    def test_kernels_that_fail_give_way_to_scan_with_one_warning(self, first_use, fault, reason):
        first_use(fault)
        x, u = torch.randn(3, 4, 5), torch.rand(5)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            h, _ = indrnn_recurrence(x, u)
            again, _ = indrnn_recurrence(x, u)
        assert len(said) == 1
        assert re.search(f"takes scan on cpu, which is slow.*relu failed {reason}", str(said[0].message))
        assert torch.equal(h, indrnn_recurrence(x, u, backend="scan")[0])
        assert torch.equal(h, again)
        name, reasons = dispatch.auto_backend(x.device)
        assert (name, set(reasons)) == ("scan", {"triton"})

    def test_kernels_that_agree_are_used_and_no_random_number_is_taken(self, first_use):
        first_use(None)
        before = torch.get_rng_state()
        assert dispatch.auto_backend(torch.device("cpu")) == ("triton", {})
        assert torch.equal(before, torch.get_rng_state())

    def test_nothing_is_checked_while_a_graph_is_captured(self, first_use, monkeypatch):
        first_use("forward")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert resolve_backend("auto", "cpu") == "triton"
