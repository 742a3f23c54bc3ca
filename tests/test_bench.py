"""``indrnn-bench``: every command runs, prints the machine and refuses bad requests; `exact` finds wrong backends."""

import pandas as pd
import pytest
import torch

from indrnn.bench import exact, recurrence
from indrnn.cli.bench import main
from indrnn.recurrence import indrnn_recurrence

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_comparison(monkeypatch):
    monkeypatch.setattr(exact, "SHAPES", ((2, 7, 5), (1, 1, 3)))


def bench(folder, *arguments):
    """Run a command on the CPU and return the rows of its CSV file."""
    main([*arguments, "--device", "cpu", "--out", str(folder)])
    (path,) = folder.glob("*.csv")
    return pd.read_csv(path)


def test_recurrence(tmp_path, capsys):
    rows = bench(tmp_path, "recurrence", "--batch", "32", "--length", "3", "5", "--seconds", "1e-6")
    assert set(rows["status"]) == {"measured"}, rows["reason"].dropna()
    names = {"copy", "loop", "lstm", "lstm_equal_parameters", "reference", "scan"}
    assert names <= set(rows["implementation"])
    assert set(zip(rows["op"], rows["which"], strict=True)) == {
        ("recurrence", "forward"), ("recurrence", "backward"), ("layer", "step")
    }  # fmt: skip
    assert (rows["q20_seconds"] <= rows["median_seconds"]).all()
    assert (rows["median_seconds"] <= rows["q80_seconds"]).all()
    assert {"device", "date", "threads", "torch", "commit"} <= set(rows)
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".md", ".png", ".svg"}
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert "B=32, T=5" in printed


def test_step(tmp_path, capsys):
    rows = bench(tmp_path, "step", "--batch", "2", "--seconds", "1e-6", "--profile")
    assert set(rows["status"]) == {"measured"}
    float32 = rows[rows["precision"] == "float32"]
    networks = ["indrnn 6 128", "indrnn 12 128", "lstm 1 128", "lstm 1 144"]
    assert [f"{row.model} {row.layers} {row.units}" for row in float32.itertuples()] == networks
    assert (rows["over_products"].notna() == (rows["layers"] == 6)).all()
    (profile,) = tmp_path.glob("*-profile.txt")
    assert "IndRNNRecurrence" in profile.read_text()
    assert f"torch {torch.__version__}" in capsys.readouterr().out


def test_exact(tmp_path, capsys):
    rows = bench(tmp_path, "exact")
    assert set(rows["quantity"]) == {"h", "h_last", "dx", "du", "dh0"}
    assert {"float32", "float64", "bfloat16"} == set(rows["dtype"])
    assert (rows["error"] <= rows["tolerance"]).all()
    assert f"torch {torch.__version__}" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [1.01, float("nan")])
@pytest.mark.parametrize("quantity", exact.QUANTITIES)
def test_a_wrong_backend_is_found_and_nothing_is_written(monkeypatch, tmp_path, capsys, quantity, factor):
    def wrong(x, u, h0, *, backend):
        inputs = {"dx": x, "du": u, "dh0": h0}
        if quantity in inputs:
            inputs[quantity].register_hook(lambda gradient: gradient * factor)
        h, h_last = indrnn_recurrence(*inputs.values(), backend=backend)
        return h * factor if quantity == "h" else h, h_last * factor if quantity == "h_last" else h_last

    monkeypatch.setattr(exact, "indrnn_recurrence", wrong)
    out = tmp_path / "bench"
    with pytest.raises(SystemExit) as end:
        main(["recurrence", "--device", "cpu", "--out", str(out)])
    assert end.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("indrnn-bench: reference is wrong in float64: ")
    assert f"{quantity} has an error" in error
    assert not out.exists()


@pytest.mark.parametrize("calls", [0, 2])
def test_an_implementation_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, calls):
    """It fails at once, or only when it is called again."""
    left = {"scan": calls}

    def fails(*inputs, backend):
        left[backend] = left.get(backend, 10**9) - 1
        if left[backend] < 0:
            raise RuntimeError(f"{backend} is out of memory\nmore text")
        return indrnn_recurrence(*inputs, backend=backend)

    monkeypatch.setattr(recurrence, "indrnn_recurrence", fails)
    rows = bench(tmp_path, "recurrence", "--batch", "2", "--length", "3", "--seconds", "1e-6")
    failed = rows[rows["status"] == "failed"]
    assert set(failed["implementation"]) == {"scan"}
    assert set(failed["reason"]) == {"RuntimeError: scan is out of memory"}
    assert {"copy", "loop", "lstm", "reference"} <= set(rows.loc[rows["status"] == "measured", "implementation"])


def test_ratios_of_the_recurrence():
    times = [
        ("recurrence", "copy", "forward", "float32", "eager", 9.0),
        ("recurrence", "copy", "forward", "float32", "graph", 0.5),
        ("recurrence", "numba", "forward", "float32", "eager", 1.5),
        ("recurrence", "numba", "backward", "float32", "eager", 2.5),
        ("recurrence", "loop", "forward", "float32", "eager", 50.0),
        ("recurrence", "loop", "backward", "float32", "eager", 30.0),
        ("layer", "numba", "step", "float32", "eager", 2.0),
        ("layer", "numba", "step", "bfloat16", "eager", 1.0),
        ("layer", "lstm_equal_parameters", "step", "float32", "eager", 5.0),
    ]
    frame = pd.DataFrame(times, columns=["op", "implementation", "which", "dtype", "launch", "median_seconds"])
    assert [*recurrence.ratios(frame.assign(B=32, T=784), CPU)["B=32, T=784"].items()] == [
        ("PyTorch loop over time / numba: recurrence, forward + backward", 20.0),
        ("nn.LSTM of equal parameters, float32 / numba, float32: layer, training step", 2.5),
        ("nn.LSTM of equal parameters, float32 / numba, bfloat16: layer, training step", 5.0),
        ("numba / copy of its input: forward, float32", 3.0),  # the copy's CUDA graph
        ("numba / copy of its input: backward, float32", 5.0),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["exact", "--batch", "3"], "--batch"),
        (["recurrence", "--batch", "0"], "positive"),
        (["step", "--seconds", "soon"], "float"),
        (["exact", "--device", "cpu", "--out", __file__], "--out"),  # not a folder
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("indrnn-bench")
    assert message in last


@pytest.mark.gpu
def test_recurrence_and_step_on_a_gpu(tmp_path):
    main(
        ["recurrence", "--device", "cuda", "--out", str(tmp_path), "--batch", "2", "--length", "3", "--seconds", "0.01"]
    )
    main(["step", "--device", "cuda", "--out", str(tmp_path), "--batch", "2", "--seconds", "0.01", "--profile"])
    for path in tmp_path.glob("*.csv"):
        rows = pd.read_csv(path)
        assert set(rows["status"]) == {"measured"}, rows["reason"].dropna()
        assert set(rows["launch"]) == {"eager", "graph"}
