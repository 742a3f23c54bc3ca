"""The recurrence on every backend of this machine: outputs, all gradients, and what callers rely on."""

import os
import re
import subprocess
import sys

import pytest
import torch

import naive
from indrnn import IndRNN
from indrnn.errors import UserError
from indrnn.recurrence import available_backends, dispatch, indrnn_recurrence, resolve_backend, warm_up
from indrnn.recurrence.ops import recurrence

# Largest error, relative to the largest element of the float64 result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
# A tree of products rounds differently from a loop: 2e-4 at |u| = 2^(1/784) over 784 steps (see `scan`).
TREE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-4}
BACKENDS = ["reference", "scan", "numba"]
COMPUTES = [(name, sigma) for name in BACKENDS for sigma in dispatch.load_backend(name).NONLINEARITIES]
MAX = 2 ** (1 / 784)
NAMES = ("x", "u", "h0", "bias", "weight")


def assert_close(actual, expected, tolerance):
    scale = expected.abs().max().clamp(min=1e-30)
    error = ((actual.double() - expected).abs().max() / scale).item()
    assert actual.shape == expected.shape
    assert error <= tolerance, f"relative error {error:.2e}"


def all_close(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert_close(a.detach(), e.detach(), tolerance)


def example(B, T, H, dtype=torch.float64, D=None):
    """x, u, h0, bias and, with D, weight. States cross the kink again and again; u includes its bounds, zero, tiny and
    negative values."""
    x = torch.randn(B, T, D or H, dtype=torch.float64)
    u = (2 * torch.rand(H, dtype=torch.float64) - 1) * MAX
    special = torch.tensor([MAX, -MAX, 0.0, 1e-30, -1.0], dtype=torch.float64)[:H]
    u[: len(special)] = special
    h0 = torch.rand(B, H, dtype=torch.float64) * 3
    bias = torch.randn(B, H, dtype=torch.float64) / 10
    if D is None:
        return [tensor.to(dtype) for tensor in (x, u, h0, bias)]
    weight = torch.randn(H, D, dtype=torch.float64) / D**0.5
    return [tensor.to(dtype) for tensor in (x, u, h0, bias[0], weight)]


def cotangents(*outputs):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype) for out in outputs]


def results_and_gradients(function, inputs, first=0):
    """The outputs, and the gradients of inputs[first:] for random cotangents on all outputs."""
    inputs = [tensor.detach().requires_grad_(n >= first) for n, tensor in enumerate(inputs)]
    outputs = [out for out in function(*inputs) if out.numel()]
    gradients = torch.autograd.grad(outputs, inputs[first:], cotangents(*outputs))
    return [tensor.detach() for tensor in (*outputs, *gradients)]


def computed(inputs, first=0, **options):
    """`results_and_gradients` of the recurrence with statistics."""
    return results_and_gradients(lambda *i: recurrence(*i, statistics=True, **options), inputs, first)


def with_statistics(x, u, h0, bias, weight=None, sigma="relu", reverse=False):
    """The definition with the product in memory and PyTorch's own statistics."""
    entering = x if weight is None else x @ weight.mT
    h, last = naive.recurrence(entering.flip(1) if reverse else entering, u, h0, bias, sigma)
    return h.flip(1) if reverse else h, last, h.mean((0, 1)), h.var((0, 1), correction=0)


SHAPES = [(3, 1, 1), (3, 2, 5), (3, 17, 128), (3, 783, 5), (2, 784, 45), (1, 33, 100), (2, 9, 1100)]
# With a fused projection: a shape, D, and whether time is reversed.
FUSED = [((3, 70, 45), 1, 0), ((3, 70, 128), 2, 1), ((2, 33, 5), 8, 0), ((3, 1, 1), 1, 1), ((1, 784, 40), 1, 0)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("shape", "D", "reverse", "first"),
    [
        *((shape, None, reverse, 0) for shape in SHAPES for reverse in (False, True)),
        # With the gradient of x, and without as in a first layer.
        *((shape, D, bool(reverse), first) for shape, D, reverse in FUSED for first in (0, 1)),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_all_gradients(backend, shape, D, reverse, first, dtype):
    inputs = example(*shape, dtype, D)
    doubles = [tensor.double() for tensor in inputs]
    expected = results_and_gradients(lambda *i: with_statistics(*i, reverse=reverse), doubles, first)
    actual = computed(inputs, first, backend=backend, reverse=reverse)
    assert {each.dtype for each in actual} == {dtype}
    all_close(actual, expected, (TREE_TOLERANCE if backend == "scan" else TOLERANCE)[dtype])


def test_fused_projection_is_never_in_memory():
    inputs = example(3, 40, 32, D=1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        recurrence(inputs[0], *(tensor.requires_grad_() for tensor in inputs[1:]), backend="numba")
    assert [size for size in saved if size >= 3 * 40 * 32] == [3 * 40 * 32]  # h


@pytest.mark.parametrize("D", [1, dispatch.SMALL_INPUT_SIZE, dispatch.SMALL_INPUT_SIZE + 1])
def test_layer_is_the_same_with_and_without_fusion(D):
    net, x = IndRNN(D, 6, batch_first=True, dtype=torch.float64), torch.randn(3, 20, D, dtype=torch.float64)
    weight, u, bias = net.parameters()
    expected = naive.recurrence(torch.nn.functional.linear(x, weight, bias), u)[0]
    assert_close(net(x)[0].detach(), expected.detach(), 1e-12)
    with torch.autocast("cpu", torch.bfloat16):  # chooses the dtype of products
        assert IndRNN(D, 5, batch_first=True)(x.float())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("D", [None, 2])
@pytest.mark.parametrize(("backend", "sigma"), COMPUTES)
def test_every_nonlinearity(backend, sigma, D):
    inputs = example(3, 70, 45, D=D)
    expected = results_and_gradients(lambda *i: with_statistics(*i, sigma=sigma), inputs)
    all_close(computed(inputs, nonlinearity=sigma, backend=backend), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_defaults_and_partial_losses(backend):
    x, u, h0, _ = example(3, 17, 5)
    h, last = indrnn_recurrence(x, u, backend=backend)
    assert torch.equal(h, indrnn_recurrence(x, u, torch.zeros_like(h0), backend=backend)[0])
    assert torch.equal(last, h[:, -1])
    for part in (slice(0, 1), slice(1, 2)):  # a loss that reads only h, or only h_last
        actual = results_and_gradients(lambda *i, part=part: indrnn_recurrence(*i, backend=backend)[part], [x, u, h0])
        all_close(actual, results_and_gradients(lambda *i, part=part: naive.recurrence(*i)[part], [x, u, h0]), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_variance_does_not_cancel(backend):
    """States near 1000 that vary by 0.01: Σh² − (Σh)²/n keeps no digit of the variance."""
    x = 1000 + 0.01 * torch.randn(4, 784, 5)
    h, _, mean, variance = recurrence(x, torch.zeros(5), statistics=True, backend=backend)
    assert_close(mean, h.double().mean((0, 1)), 1e-6)
    assert_close(variance, h.double().var((0, 1), correction=0), 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["time-major", "sliced", "expanded", "units apart"])
@pytest.mark.parametrize("D", [None, 2])
def test_strided_input(backend, layout, D):
    x, u, h0, *rest = example(3, 40, 36, D=D)
    width = x.shape[2]
    if layout == "time-major":
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "sliced":
        strided = torch.randn(3, 80, width + 14, dtype=x.dtype)[:, ::2, 5 : 5 + width].copy_(x)
    elif layout == "expanded":
        strided = x = x[:, :1].expand(3, 40, width)
    else:
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    leaf, plain = strided.detach().requires_grad_(), x.contiguous().requires_grad_()
    h = recurrence(leaf, u, h0, *rest, backend=backend)[0]
    expected = with_statistics(plain, u, h0, *rest)[0]
    assert_close(h.detach(), expected.detach(), 1e-12)
    if layout == "time-major" and D is None:
        assert h.stride() == strided.stride()
    # All strides of the gradient of h.sum() are 0.
    all_close(torch.autograd.grad(h.sum(), leaf), torch.autograd.grad(expected.sum(), plain), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [None, 2])
@pytest.mark.parametrize(("B", "T", "H"), [(3, 40, 45), (1, 33, 7), (2, 1, 1)])
def test_every_element_is_written_and_no_input(backend, B, T, H, D, monkeypatch):
    """Fresh memory full of NaN changes nothing."""
    inputs = example(B, T, H, D=D)
    before = [tensor.clone() for tensor in inputs]

    def poison(make):
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(float("nan"))

    expected = computed(inputs, bool(D), backend=backend)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poison(torch.empty))
        patch.setattr(torch, "empty_like", poison(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
        actual = computed(inputs, bool(D), backend=backend)
    assert all(map(torch.equal, actual, expected))
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(backend):
    x, u, _, _ = example(2, 9, 5)
    x[1, 4, 2] = float("nan")
    h, _ = indrnn_recurrence(x, u, backend=backend)
    assert h[1, 4:, 2].isnan().any()
    assert not h[0].isnan().any()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_scan_is_exact_up_to_1e30_and_clamps_there(dtype):
    x, u = torch.ones(1, 6, 3, dtype=dtype), torch.tensor([0.5, 1.0, -1.0], dtype=dtype)
    x[0, 2] = 9e29
    expected = naive.recurrence(x.double(), u.double())[0]
    assert_close(indrnn_recurrence(x, u, backend="scan")[0], expected, TREE_TOLERANCE[dtype])
    for beyond in (1e31, float("inf")):
        x[0, 2] = beyond
        assert indrnn_recurrence(x, u, backend="scan")[0].max() <= 1.0001e30
        assert torch.equal(indrnn_recurrence(x, u, backend="numba")[0].isfinite(), naive.recurrence(x, u)[0].isfinite())


@pytest.mark.parametrize("sigma", ["relu", "leaky_relu", "identity"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("initial", [False, True])
def test_numba_equals_the_reference_for_infinite_states_and_gradients(sigma, affine, initial):
    x, u, h0, _ = example(3, 40, 5)
    x[0, 9, 1:], x[1, 38, :2] = float("inf"), float("inf")
    h, last = indrnn_recurrence(x, u, h0, nonlinearity=sigma, backend="reference")
    dh, dh_last = cotangents(h, last)
    dh[2, 30, 3:], dh_last[0, 2] = float("inf"), float("-inf")
    row = torch.linspace(-1, 1, 5, dtype=h.dtype) if affine else None
    arguments = (dh, dh_last, row, row, row, h, u, h0 if initial else None, None, None, sigma)
    actual = torch.ops.indrnn.recurrence_backward(*arguments, "numba")
    expected = torch.ops.indrnn.recurrence_backward(*arguments, "reference")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert affine or actual[0][1].isfinite().all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # by torch.func.jvp itself
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_no_second_derivative(backend):
    inputs = [tensor.requires_grad_() for tensor in example(2, 9, 5)]
    assert torch.autograd.gradcheck(lambda *i: recurrence(*i, statistics=True, backend=backend), inputs)
    h, _ = indrnn_recurrence(*inputs[:2], backend=backend)
    (gradient,) = torch.autograd.grad(h.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError):
        gradient.sum().backward()
    x, u = (each.detach() for each in inputs[:2])
    rows = torch.func.jacrev(lambda x: indrnn_recurrence(x, u, backend=backend)[1])(x)
    assert rows.shape == (2, 5, 2, 9, 5)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda x: indrnn_recurrence(x, u, backend=backend)[0], (x,), (x,))


@pytest.mark.parametrize("D", [None, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, D):
    inputs = example(2, 9, 5, D=D)
    inputs[0], inputs[2], inputs[3] = inputs[0][:0], inputs[2][:0], torch.zeros(5, dtype=torch.float64)
    for first in (0, 1):
        leaves = [tensor.clone().requires_grad_(i >= first) for i, tensor in enumerate(inputs)]
        h, last, _, _ = recurrence(*leaves, statistics=True, backend=backend)
        assert (h.shape, last.shape) == ((0, 9, 5), (0, 5))
        gradients = torch.autograd.grad(h.sum() + last.sum(), leaves[first:])
        assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves[first:]]
        assert torch.equal(gradients[-1], torch.zeros_like(leaves[-1]))


class TestTorchFunc:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize(
        ("D", "batched"), [(None, "x"), (None, "u"), (None, "x u h0 bias"), (2, "x"), (2, "weight"), (2, "x u weight")]
    )
    def test_vmap_of_grad(self, backend, batched, D):
        """Per-example gradients for any choice of batched inputs, with statistics among the outputs."""
        examples = [example(2, 9, 5, D=D) for _ in range(3)]
        count = len(examples[0])
        dims = tuple(0 if name in batched.split() else None for name in NAMES[:count])

        def loss(*inputs):
            outputs = recurrence(*inputs, statistics=True, backend=backend)
            return sum((out * factor).sum() for out, factor in zip(outputs, factors, strict=True))

        factors = cotangents(*recurrence(*examples[0], statistics=True, backend=backend))
        columns = zip(zip(*examples, strict=True), dims, strict=True)
        stacked = [torch.stack(values) if dim == 0 else values[0] for values, dim in columns]
        for wanted in (tuple(range(count)), (1, count - 1)):
            actual = torch.func.vmap(torch.func.grad(loss, argnums=wanted), dims)(*stacked)
            for n in range(3):
                inputs = [value[n] if dim == 0 else value for value, dim in zip(stacked, dims, strict=True)]
                leaves = [value.clone().requires_grad_() for value in inputs]
                expected = torch.autograd.grad(loss(*leaves), [leaves[i] for i in wanted])
                all_close([each[n] for each in actual], expected, 1e-12)

    @pytest.mark.parametrize("D", [None, 2])
    def test_batched_gradients_of_one_forward(self, D):
        x, *inputs = (tensor.requires_grad_(n > 0) for n, tensor in enumerate(example(2, 9, 5, D=D)))
        h = recurrence(x, *inputs)[0]
        cotangents_ = torch.randn(3, *h.shape, dtype=h.dtype)
        actual = torch.func.vmap(lambda dh: torch.autograd.grad(h, inputs, dh, retain_graph=True))(cotangents_)
        for n in range(3):
            expected = torch.autograd.grad(h, inputs, cotangents_[n], retain_graph=True)
            all_close([each[n] for each in actual], expected, 1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # raised by opcheck
@pytest.mark.parametrize(("backend", "D"), [*((backend, None) for backend in BACKENDS), ("numba", 2)])
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(backend, optional, D):
    x, *inputs = example(2, 9, 5, D=D)
    u, h0, bias, *weight = (tensor.requires_grad_() for tensor in inputs)
    x, weight = (x, weight[0]) if weight else (x.requires_grad_(), None)
    arguments = (x, u, h0 if optional else None, bias if optional else None, weight, optional, "relu", backend)
    torch.library.opcheck(torch.ops.indrnn.recurrence, arguments)
    h = torch.ops.indrnn.recurrence(*arguments)[0].detach()
    row = torch.rand(5, dtype=h.dtype) if optional else None
    product = (x.detach(), weight.detach()) if D else (None, None)
    inputs = (h, u.detach(), h0.detach(), *product)
    arguments = (torch.randn_like(h), None, row, row, row, *inputs, "relu", backend)
    torch.library.opcheck(torch.ops.indrnn.recurrence_backward, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [None, 1])
def test_compiles_into_one_graph(backend, D):
    inputs = example(2, 9, 5, D=D)

    def function(x, *inputs):
        h, *others = recurrence(x * 2, *inputs, statistics=True, backend=backend)
        return h + 1, *others

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for first in (0, 1):
        all_close(*(results_and_gradients(each, inputs, first) for each in (compiled, function)), 1e-14)


class TestNumba:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("openmp", [True, False])
    def test_threads_do_not_change_a_bit(self, dtype, openmp, monkeypatch):
        """Neither PyTorch's own threads nor, where its OpenMP runtime cannot be called, Python's."""
        from indrnn.recurrence import numba_cpu

        inputs = example(3, 200, 128, dtype)
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3):
                if count > 1 and not openmp:
                    monkeypatch.setattr(numba_cpu, "_openmp_parallel", lambda: None)
                torch.set_num_threads(count)
                results.append(computed(inputs, backend="numba"))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(map(torch.equal, other, results[0]))

    @pytest.mark.parametrize("threads", [1, 2])
    def test_flushes_denormals_in_its_threads_only(self, threads):
        h, u, last = torch.ones(4, 60, 128), torch.full((128,), 0.05), torch.full((4, 128), 1e-30)
        before = torch.get_num_threads()
        torch.set_flush_denormal(False)  # earlier tests may have left it on
        torch.set_num_threads(threads)
        try:
            arguments = (None, last, None, None, None, h, u, None, None, None, "relu", "numba")
            dx, *_ = torch.ops.indrnn.recurrence_backward(*arguments)
        finally:
            torch.set_num_threads(before)
        assert (dx > 0).any()
        assert not ((dx != 0) & (dx.abs() < torch.finfo(torch.float32).tiny)).any()
        assert (torch.tensor(1e-30) * torch.tensor(1e-10)).item() > 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_loops_are_vectorized(self, dtype):
        """LLVM leaves a loop scalar, ten times slower, if its arrays may alias."""
        import numba

        from indrnn.recurrence.numba_cpu import NUMPY_DTYPES, make_backward, make_forward

        for make in (make_forward, make_backward):
            function = make(*NUMPY_DTYPES[dtype], "relu", False, 0, True)
            kernel = numba.cfunc(numba.types.void(numba.types.int64), error_model="numpy")(function)
            blocks = re.split(r"\n\S+:.*\n", kernel.inspect_llvm())
            assert any(len(re.findall(r"fm?(?:ul|add) <\d+ x ", block)) >= 4 for block in blocks)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_warm_up_compiles_all_kernels_of_a_training_step(self, dtype):
        from indrnn.recurrence.numba_cpu import _compiled

        warm_up(dtype)
        compiled = _compiled.cache_info().currsize
        for norm in ("batch", "none"):
            net = IndRNN(1, 5, 2, batch_first=True, norm=norm)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                net(torch.randn(3, 4, 1))[0].float().sum().backward()
                net.eval()(torch.randn(3, 4, 1))
        assert _compiled.cache_info().currsize == compiled

    def in_a_new_process(self, environment, setup="", folder=None):
        """Compute a recurrence there; returns stderr."""
        program = """
import torch
from indrnn.recurrence import indrnn_recurrence
print(indrnn_recurrence(torch.ones(1, 3, 2), torch.ones(2), backend="numba")[0][0, :, 0].tolist())
"""
        command = [sys.executable, "-c", setup + program]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
        assert done.stdout.strip() == "[1.0, 2.0, 3.0]", done.stderr
        return done.stderr

    def test_without_a_home_no_folder_named_tilde_is_made(self, tmp_path):
        setup = """
import pwd
from numba.core import caching
def refuse(*arguments): raise KeyError
def unwritable(*arguments): raise OSError
pwd.getpwuid = refuse
for name, kind in list(vars(caching).items()):
    if name.lstrip("_") == "InTreeCacheLocator": kind.ensure_cache_path = unwritable
"""
        environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "NUMBA_CACHE_DIR")}
        self.in_a_new_process(environment, setup, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_damaged_cache_files_are_replaced(self, tmp_path):
        def compiles():
            environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
            return "compiling the CPU kernels" in self.in_a_new_process(environment)

        assert compiles()
        for kind, kept in (("nbi", slice(-9)), ("nbi", slice(0)), ("nbc", slice(999)), ("nbc", slice(0))):
            (path,) = tmp_path.rglob(f"*.{kind}")
            path.write_bytes(path.read_bytes()[kept])
            assert compiles()
        assert not compiles()


def test_import_without_numba_and_triton():
    program = "import sys, indrnn.layers; print(sorted({'numba', 'llvmlite'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def in_bfloat16_and_rounded(x, u, h0, bias, weight=None, sigma="relu", backend="auto", reverse=False):
    """All outputs and gradients for x in bfloat16, and in float32 with h and dx rounded at the end."""
    forward, backward = torch.ops.indrnn.recurrence, torch.ops.indrnn.recurrence_backward
    h, *others = forward(x, u, h0, bias, weight, True, sigma, backend, reverse)
    wide, *expected = forward(x.float(), u, h0, bias, weight, True, sigma, backend, reverse)
    dh, dh_last = cotangents(h, others[0])
    row = torch.linspace(-1, 1, len(u))
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        given = (u, h0, None if weight is None else x.to(dtype), weight, sigma, backend, reverse)
        results.append(backward(dh.to(dtype), dh_last, row, row, row, h.to(dtype), *given))
    (dx, *sums), (wide_dx, *expected_sums) = results
    return [h, *others, dx, *sums], [wide.bfloat16(), *expected, wide_dx.bfloat16(), *expected_sums]


@pytest.mark.parametrize(("backend", "sigma", "D"), [*((*each, None) for each in COMPUTES), ("numba", "relu", 2)])
@pytest.mark.parametrize(("time_major", "reverse"), [(False, False), (True, True)])
def test_bfloat16_equals_float32_rounded_at_the_end(backend, sigma, D, time_major, reverse):
    """Bit for bit: the state is never rounded between steps, nor before the statistics or a sum over time."""
    x, u, h0, bias, *weight = example(3, 70, 45, torch.float32, D)
    if D is None:  # sums of sixteenths, which bfloat16 rounds, ties included
        x[..., :9] = torch.randint(-16, 32, (3, 70, 9)) / 16
        u[:9], h0[:, :9], bias[:, :9] = 1.0, 0.0, 0.0
        x[0, 5, 17], x[1, 9, 13:15], x[2, 0, 9:] = float("nan"), float("inf"), torch.finfo(torch.bfloat16).max
    x, weight = x.bfloat16(), weight[0] if weight else None
    if time_major:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    actual, expected = in_bfloat16_and_rounded(x, u, h0, bias, weight, sigma, backend, reverse)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert D or actual[0].stride() == x.stride()


@pytest.mark.parametrize("D", [None, 2])
@pytest.mark.parametrize(("B", "T", "H"), SHAPES)
def test_bfloat16_of_every_shape_equals_float32_rounded_at_the_end(B, T, H, D):
    x, *others = example(B, T, H, torch.float32, D)
    actual, expected = in_bfloat16_and_rounded(x.bfloat16(), *others, backend="numba")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 5)}, r"x must be .*\(B, T, H\)"),
        ({"x": torch.randn(3, 0, 5)}, "T, H >= 1"),
        ({"x": torch.zeros(3, 4, 5, dtype=torch.int64)}, "x must be floating point"),
        ({"u": torch.randn(4)}, r"u must have shape \(5,\)"),
        ({"u": torch.randn(5).double()}, "u must be torch.float32"),
        ({"h0": torch.randn(5)}, r"h0 must have shape \(3, 5\)"),
        ({"u": torch.randn(5, device="meta")}, "u must be .* on cpu .* got .* on meta"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \(5,\) or \(3, 5\)"),
        ({"weight": torch.zeros(5, 3)}, r"weight must have shape \(5, 5\) .* got \(5, 3\)"),
        ({"weight": torch.zeros(4, 5)}, r"u must have shape \(4,\)"),
    ],
)
def test_tensors_that_do_not_match(change, message):
    arguments = {"x": torch.randn(3, 4, 5), "u": torch.randn(5), "h0": None, **change}
    with pytest.raises(ValueError, match=message):
        recurrence(**arguments)


class TestResolveBackend:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"backend": "cuda"}, "backend='cuda' is unknown; choose one of auto"),
            ({"nonlinearity": "gelu"}, "nonlinearity='gelu' is unknown; choose one of relu"),
            ({"backend": "triton"}, "backend=triton is not available on cpu: .*; choose one of auto, reference"),
            ({"backend": "numba", "nonlinearity": "tanh"}, "it computes relu, identity, leaky_relu, not tanh"),
        ],
    )
    def test_refusals(self, options, message):
        with pytest.raises(UserError, match=message) as error:
            indrnn_recurrence(torch.randn(3, 4, 5), torch.randn(5), **options)
        assert "\n" not in str(error.value)

    def test_auto(self):
        assert resolve_backend("auto", "cpu") == "numba"
        assert resolve_backend("auto", "cpu", nonlinearity="tanh") == "reference"
        assert resolve_backend("auto", "cpu", torch.bfloat16) == "numba"
        assert resolve_backend("auto", "cpu", torch.float16) == "reference"
        assert resolve_backend("scan", "cpu") == "scan"
        for device in ("mps", "xpu"):
            assert resolve_backend("auto", device) == "scan"
            assert resolve_backend("auto", device, nonlinearity="tanh") == "reference"

    def test_missing_library_is_a_reason(self, monkeypatch):
        monkeypatch.setitem(dispatch._MODULES, "numba", ".no_such_module")
        assert "cannot be imported" in available_backends("cpu")["numba"]
