"""The benchmark: what it refuses, what it skips and says so, and what it writes."""

import csv
import dataclasses
import itertools
import math
import sys

import pytest
import torch

from indrnn.bench import clock, exactness, grid, scaling, training_steps
from indrnn.bench.clock import Clock, Timing, peak_memory, timing
from indrnn.bench.commands import provenance, slug, write_rows
from indrnn.bench.grid import DEFAULT, FULL, Plan, Row, draw, ratio_table, recurrence_ratios
from indrnn.bench.implementations import (
    COPY,
    LOOP,
    LOOP_UNBIND,
    LSTM,
    LSTM_EQUAL_PARAMETERS,
    Implementation,
    Size,
    implementations,
    loop,
    loop_unbind,
    lstm_units,
    prepare,
)
from indrnn.cli.bench import main
from indrnn.errors import UserError
from indrnn.layers import IndRNNLayer
from indrnn.recurrence import indrnn_recurrence
from indrnn.recurrence.dispatch import load_backend

CPU = torch.device("cpu")
TINY = Plan((3, 5), (1, 2), seconds=0.0, call_seconds=math.inf, minutes=math.inf)
SOME = [
    Implementation("recurrence", COPY),
    Implementation("recurrence", LOOP),
    Implementation("recurrence", "scan", "scan"),
    Implementation("layer", LSTM),
]


def measured(seconds: float, name: str = "numba", op: str = "recurrence", which: str = "forward", **more) -> Row:
    values = {"launch": "eager", "B": 32, "T": 784, "H": 128, "dtype": "float32", "status": "measured"} | more
    return Row(op=op, implementation=name, which=which, median_seconds=seconds, **values)


def run_grid(*arguments) -> list[Row]:
    *_, rows = grid.run_grid(*arguments)
    return rows


def test_timing_is_the_median_with_quantiles():
    found = timing([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert dataclasses.astuple(found) == (3.5, 2.0, 5.0, 6)
    assert dataclasses.astuple(found.of(2)) == (1.75, 1.0, 2.5, 12)


def test_on_a_cpu_no_accelerator_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "stream", None)
    assert Clock(CPU).once(lambda: None) >= 0
    with Clock(CPU).scope():
        pass


class FixedClock(Clock):
    """Does the work and reports seconds that no machine changes."""

    SECONDS = {"step": 8.0, "products": 2.0, "copy": 0.1}  # noqa: RUF012

    def once(self, work):
        work()
        return 0.001

    def together(self, works, seconds, least=3):
        found = super().together(works, seconds, least)
        return {name: Timing(*3 * [self.SECONDS.get(name, 0.001)], each.repeats) for name, each in found.items()}


def test_implementations_take_turns_until_each_has_enough():
    order = []
    found = FixedClock(CPU).together(
        {name: lambda name=name: order.append(name) for name in "ab"}, seconds=0.0, least=6
    )
    assert {name: each.repeats for name, each in found.items()} == {"a": 8, "b": 8}
    turns = "".join(order)
    assert turns == "aaaaabbbbb" * 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_what_a_call_allocates():
    kept = torch.ones(2_000_000)
    found = peak_memory(lambda: [kept + 1 for _ in range(4)], CPU)
    assert 0.9 * 32e6 < found < 1.5 * 32e6


def test_loop_is_the_recurrence():
    x, u = torch.randn(2, 9, 4), torch.rand(4)
    expected = indrnn_recurrence(x, u, backend="reference")[0]
    torch.testing.assert_close(loop(x, u), expected)
    torch.testing.assert_close(loop_unbind(x, u), expected)


def test_every_implementation_of_this_machine_can_be_prepared():
    able, unable = implementations(CPU)
    assert {"reference", "scan"} <= {each.name for each in able}
    assert not {each.backend for each in able} & set(unable)
    for each in able:
        works = prepare(each, Size(2, 3, 8), CPU)
        assert tuple(works) == each.passes
        for work in works.values():
            work()
            work()


def test_each_triton_strategy_is_an_implementation(monkeypatch):
    monkeypatch.setattr(
        "indrnn.bench.implementations.available_backends", lambda device: {"triton": None, "numba": "no"}
    )
    able, unable = implementations(torch.device("cuda"))
    names = [each.name for each in able if (each.op, each.dtype) == ("recurrence", "float32")]
    assert names == [COPY, LOOP, LOOP_UNBIND, "triton", "triton/sequential", "triton/scan"]
    assert unable == {"numba": "no"}


def test_lstm_of_equal_parameters():
    units = lstm_units(DEFAULT)
    layer = sum(each.numel() for each in IndRNNLayer(128, 128).parameters())
    counts = {n: sum(each.numel() for each in torch.nn.LSTM(128, n).parameters()) for n in range(units - 1, units + 2)}
    assert min(counts, key=lambda n: abs(counts[n] - layer)) == units


def test_grid_starts_with_the_default_size_and_grows():
    sizes = FULL.sizes()
    assert sizes[0] == DEFAULT
    assert len(sizes) == len(set(sizes)) == 35
    assert [each.tensor_bytes() for each in sizes[1:]] == sorted(each.tensor_bytes() for each in sizes[1:])


def test_grid_measures_every_implementation_and_pass():
    rows = run_grid(TINY, SOME, CPU)
    assert len(rows) == 4 * (1 + 2 + 2 + 1)
    for row in rows:
        assert row.status == "measured", row
        assert 0 < row.q20_seconds <= row.median_seconds <= row.q80_seconds
        assert row.repeats >= 3
    copies = [row for row in rows if row.implementation == COPY]
    assert all(row.share_of_limit == pytest.approx(1.0) for row in copies)
    for row in rows:
        if (row.implementation, row.which) == ("scan", "backward"):
            copy = next(each for each in copies if (each.B, each.T) == (row.B, row.T))
            assert row.limit_seconds == pytest.approx(1.5 * copy.median_seconds)
        assert (row.share_of_limit is None) == (row.op == "layer")


def test_slow_calls_are_skipped_by_expectation():
    plan = dataclasses.replace(TINY, call_seconds=1e-9)
    rows = run_grid(plan, SOME[:1], CPU)
    assert [row.status for row in rows] == ["measured", "skipped", "skipped", "skipped"]
    assert "call: expected to take" in rows[-1].reason
    assert rows[-1].median_seconds is None


def test_points_after_the_budget_are_skipped():
    rows = run_grid(dataclasses.replace(TINY, minutes=-1), SOME, CPU)
    assert {row.status for row in rows} == {"skipped"}
    assert {row.reason.split(":")[0] for row in rows} == {"budget"}


def test_points_that_do_not_fit_are_skipped(monkeypatch):
    monkeypatch.setattr(clock, "free_memory", lambda device: 100)
    rows = run_grid(TINY, SOME, CPU)
    assert {(row.status, row.reason.split(":")[0]) for row in rows} == {("skipped", "memory")}


def test_an_implementation_that_fails_is_recorded_and_the_others_go_on(monkeypatch):
    def prepare_or_fail(implementation, *arguments):
        if implementation.name == "scan":
            raise RuntimeError("out of memory\nmuch more text")
        return prepare(implementation, *arguments)

    monkeypatch.setattr(grid, "prepare", prepare_or_fail)
    rows = run_grid(TINY, SOME, CPU)
    assert {(row.implementation, row.reason) for row in rows if row.status == "failed"} == {("scan", "out of memory")}
    assert {row.implementation for row in rows if row.status == "measured"} == {COPY, LOOP, LSTM}


def test_every_backend_passes_the_exactness_check():
    checks = exactness.require_exact(implementations(CPU)[0], CPU)
    assert {check.quantity for check in checks} == set(exactness.QUANTITIES)
    assert {torch.float32, torch.float64} <= {check.dtype for check in checks}


class Broken:
    """The scan backend with a fault in its forward or its backward pass."""

    def __init__(self, fault: str) -> None:
        self._scan, self._fault = load_backend("scan"), fault
        self.DTYPES = (torch.float32,)

    def forward(self, *arguments):
        outputs = self._scan.forward(*arguments)
        return outputs._replace(h=outputs.h * 1.001) if self._fault == "forward" else outputs

    def backward(self, *arguments):
        gradients = self._scan.backward(*arguments)
        return gradients._replace(du=gradients.du * float("nan")) if self._fault == "backward" else gradients

    def __getattr__(self, name):
        return getattr(self._scan, name)


@pytest.mark.parametrize(("fault", "quantity"), [("forward", "h"), ("backward", "du")])
def test_nothing_is_written_for_a_backend_that_is_wrong(monkeypatch, tmp_path, capsys, fault, quantity):
    broken, original = Broken(fault), load_backend
    for module in ("indrnn.recurrence.dispatch", "indrnn.recurrence.ops", "indrnn.bench.exactness"):
        monkeypatch.setattr(f"{module}.load_backend", lambda name: broken if name == "scan" else original(name))
    monkeypatch.setattr(exactness, "implementations", lambda device: (SOME, {}))
    with pytest.raises(SystemExit) as end:
        main(["--quick", "--device", "cpu", "--out", str(tmp_path / "bench")])
    assert end.value.code == 1
    doing, error = capsys.readouterr().err.splitlines()
    assert doing.endswith(" ...")
    assert error.startswith(f"indrnn-bench: scan is wrong in torch.float32: {quantity} is off by")
    assert not (tmp_path / "bench").exists()


def test_a_run_writes_table_figure_and_ratios(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(grid, "QUICK", dataclasses.replace(TINY, batches=(1, 32)))
    monkeypatch.setattr(exactness, "implementations", lambda device: (SOME, {"triton": "no GPU"}))
    main(["recurrence", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    stem = f"recurrence-quick-{slug(provenance(CPU))}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{stem}.{end}" for end in ("csv", "md", "png", "svg")]
    with (tmp_path / f"{stem}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 6
    assert all(row["device"] and row["torch"] == torch.__version__ and row["date"] for row in rows)
    said = capsys.readouterr().out
    assert "triton is left out: no GPU" in said
    assert "exact: scan, float32: largest error" in said
    assert "not measured" in said


def test_steps_are_measured_against_their_products(tmp_path, monkeypatch):
    monkeypatch.setattr(training_steps, "Clock", FixedClock)
    rows = [
        training_steps.StepRow("indrnn", 2, 128, 2, "float32", "eager"),
        training_steps.StepRow("lstm", 1, 128, 2, "float32", "eager"),
    ]
    *_, (ours, lstm) = training_steps.run_steps(rows, CPU, seconds=0.0)
    assert ours.status == lstm.status == "measured"
    assert (ours.median_seconds, ours.steps_per_second) == (8.0, 1 / 8)
    assert (ours.products_seconds, ours.over_products) == (2.0, 4.0)
    # Two layers, each of which moves five tensors; a copy moves two.
    assert ours.floor_seconds == pytest.approx(2.0 + 2 * 0.1 * 5 / 2)
    assert (lstm.products_seconds, lstm.parameters) == (None, 68_362)
    write_rows(tmp_path / "step.csv", [ours, lstm], provenance(CPU))
    report = training_steps.profile(ours, CPU)
    assert "IndRNNRecurrence " in report
    assert "IndRNNRecurrenceGradients " in report


def test_gpu_cases_cover_precisions_and_launches():
    rows = training_steps.cases(torch.device("cuda"), quick=False)
    assert len(rows) == len(set(rows)) == 4 * 2 * 3 * 2
    networks = {(row.model, row.layers, row.units) for row in rows}
    assert networks == {("indrnn", 6, 128), ("indrnn", 12, 128), ("lstm", 1, 128), ("lstm", 1, 144)}
    assert {row.launch for row in training_steps.cases(CPU, quick=False)} == {"eager"}


def test_ratios_on_a_cpu_put_the_fair_comparisons_first():
    rows = [
        measured(1.0, COPY),
        measured(1.5),
        measured(3.2, which="backward"),
        measured(0.5, COPY, dtype="bfloat16"),
        measured(1.0, dtype="bfloat16"),
        measured(500.0, LOOP),
        measured(600.0, LOOP, which="backward"),
        measured(50.0, LOOP_UNBIND),
        measured(44.0, LOOP_UNBIND, which="backward"),
        measured(2.0, op="layer", which="step"),
        measured(15.0, LSTM, "layer", "step"),
        measured(7.0, LSTM, "layer", "step", T=28),
    ]
    found = recurrence_ratios(rows, "cpu")
    assert [ratio for _, ratio in found] == [
        pytest.approx(94 / 4.7), None, 7.5, pytest.approx(1100 / 4.7), 1.5, 3.2, 2.0, None,
    ]  # fmt: skip
    assert [text.split(" / ")[0] for text, _ in found[:3]] == [
        "PyTorch loop over x.unbind(1)", "nn.LSTM of equal parameters", "nn.LSTM of equal units",
    ]  # fmt: skip
    assert found[-1] == ("numba / copy of its input: backward, bfloat16", None)


def test_ratios_in_bfloat16_are_those_of_the_layers():
    layer = {"op": "layer", "which": "step"}
    rows = [
        measured(2.0, **layer),
        measured(0.5, dtype="bfloat16", **layer),
        measured(5.0, LSTM_EQUAL_PARAMETERS, **layer),
        measured(3.0, LSTM_EQUAL_PARAMETERS, dtype="bfloat16", **layer),
    ]
    assert [ratio for _, ratio in recurrence_ratios(rows, "cpu")[1:4]] == [2.5, 10.0, 6.0]


def test_layers_are_timed_in_bfloat16_where_the_cpu_gains_from_it(monkeypatch):
    for refusal, dtypes in ((None, {"float32", "bfloat16"}), ("slower", {"float32"})):
        monkeypatch.setattr("indrnn.bench.implementations.bfloat16_refusal", lambda refusal=refusal: refusal)
        able = [each for each in implementations(CPU)[0] if each.op == "layer" and each.name in ("numba", LSTM)]
        assert {each.dtype for each in able} == dtypes
        for each in able:
            prepare(each, Size(2, 3, 8), CPU)["step"]()


def test_ratios_on_a_gpu_use_graphs_for_kernels_and_eager_for_the_loop():
    graph = {"launch": "graph"}
    rows = [
        measured(1.0, COPY, **graph),
        measured(1.9, "triton", **graph),
        measured(2.0, "triton"),
        measured(3.0, "triton", which="backward"),
        measured(800.0, LOOP),
        measured(800.0, LOOP, which="backward"),
        measured(1.0, "triton", "layer", "step", **graph),
        measured(51.0, LSTM, "layer", "step", **graph),
        measured(99.0, LSTM, "layer", "step"),
    ]
    ratios = [ratio for _, ratio in recurrence_ratios(rows, "cuda")]
    assert ratios == [None, None, 51.0, 320.0, 1.9, None]


def test_step_ratios():
    ours = training_steps.StepRow("indrnn", 6, 128, 32, "float32", "eager", median_seconds=2.0, over_products=1.4)
    lstm = training_steps.StepRow("lstm", 1, 144, 32, "float32", "eager", median_seconds=3.0)
    slower = dataclasses.replace(lstm, B=128)  # nothing to compare it with
    bfloat16 = dataclasses.replace(ours, precision="bfloat16", median_seconds=1.0, over_products=0.7)
    assert [ratio for _, ratio in training_steps.step_ratios([ours, lstm, slower])] == [1.4, 1.5]
    assert [ratio for _, ratio in training_steps.step_ratios([ours, bfloat16, lstm])] == [1.4, 0.7, 1.5, 3.0]


SCALED = scaling.Plan((1, 2), (3, 6), (1, 2), most_processes=2, seconds=0.0, update_seconds=math.inf, minutes=math.inf)


def test_each_size_is_held_against_proportional_growth(monkeypatch):
    started = []

    def cost(point, device, seconds):
        started.append(point)
        taken = 0.1 + point.B * point.T * point.layers / point.processes
        return {"status": "measured", "median_seconds": taken, "updates_per_second": 1 / taken}

    monkeypatch.setattr(scaling, "_started", cost)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    *_, rows = scaling.run_scaling(dataclasses.replace(SCALED, most_processes=4), CPU)
    assert [(row.axis, row.size) for row in rows[:6]] == [*itertools.product(("strong", "weak"), (1, 2, 4))]
    assert [row.B for row in rows[:6]] == [32, 32, 32, 32, 64, 128]
    assert {row.threads for row in rows[:6]} == {2}
    assert all(row.of_ideal == pytest.approx(1.0, rel=0.1) for row in rows)
    # One process on the same batch is the same work in both.
    assert len(started) == len(rows) - 1
    lines = scaling.scaling_table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert "Same batch for all processes: 4" in lines[4]


@pytest.mark.parametrize(
    ("change", "free", "reason"),
    [
        ({"minutes": -1}, None, "budget: -1 minutes were used up"),
        ({"update_seconds": 1e-9}, None, "update: expected to take"),
        ({}, 100, "memory: needs about"),
    ],
)
def test_sizes_that_do_not_fit_are_skipped_by_rule(monkeypatch, change, free, reason):
    columns = {"status": "measured", "median_seconds": 1.0, "updates_per_second": 1.0}
    monkeypatch.setattr(scaling, "_started", lambda *_: columns)
    monkeypatch.setattr(clock, "free_memory", lambda device: free)
    *_, rows = scaling.run_scaling(dataclasses.replace(SCALED, **change), CPU)
    assert (rows[-1].status, rows[-1].updates_per_second) == ("skipped", None)
    assert rows[-1].reason.startswith(reason)


def test_a_point_is_measured():
    found = scaling.measure(scaling.Row("length", 1, 1, B=2, T=790, layers=1), CPU, seconds=0.0)
    assert found["status"] == "measured"
    assert found["repeats"] == 3
    assert found["updates_per_second"] == 1 / found["median_seconds"]


@pytest.mark.slow
def test_scaling_writes_table_and_figure_and_says_what_failed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling, "QUICK", dataclasses.replace(SCALED, batches=(2,), lengths=(8,), depths=(0,)))
    monkeypatch.setattr(exactness, "implementations", lambda device: (SOME[:1], {}))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    main(["scaling", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    stem = f"scaling-quick-{slug(provenance(CPU))}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{stem}.{end}" for end in ("csv", "md", "png", "svg")]
    with (tmp_path / f"{stem}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["measured"] * 6 + ["failed"], rows
    assert "num_layers" in rows[-1]["reason"]
    assert all(int(row["peak_memory_bytes"]) > 0 for row in rows[:-1])
    assert "Same batch a process: 2" in capsys.readouterr().out


@pytest.mark.gpu
def test_grid_and_steps_on_a_gpu(tmp_path):
    """Every implementation, eager and as a CUDA graph; a training step in every precision."""
    device = torch.device("cuda", torch.cuda.current_device())
    rows = run_grid(TINY, implementations(device)[0], device)
    assert {row.status for row in rows} == {"measured"}, [row.reason for row in rows]
    assert {row.launch for row in rows if row.implementation.startswith("triton")} == {"eager", "graph"}
    cases = [
        training_steps.StepRow("indrnn", 2, 128, 2, precision, launch)
        for precision in ("float32", "tf32", "bfloat16")
        for launch in ("graph", "eager")
    ]
    cases.append(training_steps.StepRow("lstm", 1, 128, 2, "float32", "graph"))
    *_, measured_cases = training_steps.run_steps(cases, device, 0.01)
    assert {case.status for case in measured_cases} == {"measured"}, [case.reason for case in measured_cases]
    assert "IndRNNRecurrence " in training_steps.profile(cases[1], device)


def test_ratio_table():
    assert ratio_table([("a / b", 1.254), ("c / d", None)]).splitlines()[2:] == [
        "| a / b |         1.25 |",
        "| c / d | not measured |",
    ]


def test_no_figure_without_measurements(tmp_path):
    assert draw([measured(1.0, B=8)], provenance(CPU), tmp_path, "stem") == []
    assert list(tmp_path.iterdir()) == []


def test_the_figure_says_in_words_what_was_timed(tmp_path):
    names = ("numba", "loop_unbind", "lstm")
    quantiles = {"q20_seconds": 1.0, "q80_seconds": 1.0}
    draw([measured(1.0, name, **quantiles) for name in names], provenance(CPU), tmp_path, "stem")
    svg = (tmp_path / "stem.svg").read_text(encoding="utf-8")
    for words in ("IndRNN, numba", "PyTorch loop over x.unbind(1)", "nn.LSTM of equal units"):
        assert words in svg
    assert "loop_unbind" not in svg


def test_unwritable_folder_is_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"cannot write .*--out"):
        write_rows(file / "rows.csv", [measured(1.0)], provenance(CPU))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["step", "--minutes", "3"], "--minutes has no use with step"),
        (["--minutes", "0"], "must be above 0"),
        (["--minutes", "soon"], "invalid"),
        (["--device", "tpu"], "device=tpu"),
    ],
)
def test_bad_requests_exit_with_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert said in capsys.readouterr().err
