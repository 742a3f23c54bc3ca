"""One run in several processes: it equals a single process up to rounding, and ends at once if a process dies.

Networks are float64 here: in float32 the order of a sum changes a gradient's fifth digit, which training amplifies.

As a program this file makes small runs one after the other in this process, one of several by its environment.
"""

import itertools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from indrnn.config.compose import load_config
from indrnn.errors import RunError, UserError
from indrnn.models import build_model
from indrnn.record.result import read_result
from indrnn.training.distributed import Processes, joined_processes
from small_runs import BASE, checkpoint_of, rows_of, run_small

INDRNN = ("choice=indrnn", "hidden_size=8", "num_layers=2", "backend=reference")
CASES = {
    "dropout": (*INDRNN, "dropout=0.2"),
    "uneven": (*INDRNN, "trainer.batch_size=15", "trainer.bn_samples=47"),
    "dense": ("choice=indrnn_dense", "hidden_size=8", "block_layers=[2]", "growth=4"),
    "lstm": ("choice=lstm", "hidden_size=8", "dropout=0.2"),
    "residual": ("choice=indrnn_residual", "hidden_size=8", "num_blocks=2", "dropout=0.1"),
    "plateau": (*INDRNN, "schedule=plateau", "schedule.patience=[1]", "trainer.eval_every=5"),
}
FAST_CASES = ("dropout", "uneven", "lstm")


def double(task, choice, **values):
    """A custom network: a built-in one in float64."""
    words = [f"model.{key}={value}".replace(" ", "") for key, value in values.items()]
    model = build_model(load_config([f"model={choice}", "data=mnist5k", *words]).model, task).double()
    model.unused = nn.Parameter(torch.ones(2, 2))  # without a gradient, so weight decay must not change it
    model.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    return model


def run_case(root, case, *overrides):
    """Make or resume the run of a case."""
    # A word without a group is an argument of the network.
    words = [
        word if "." in word.split("=")[0] or word.startswith("schedule") else f"+model.args.{word}"
        for word in CASES[case]
    ]
    base = (*BASE, "model=custom", "model._target_=test_distributed.double")
    more = ("optimizer.lr=2e-4", "optimizer.weight_decay=0.1", "trainer.max_steps=50", "trainer.eval_every=25")
    return run_small(Path(root) / case, *more, *words, *overrides, base=base)


def start(root, processes, *arguments, **environment):
    """Start this file as a program, in each of several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(root), *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "OMP_NUM_THREADS": "1", **environment},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip


def ended(processes):
    """What each printed, and its exit code."""
    printed = [process.communicate(timeout=900)[1] for process in processes]
    return printed, [process.returncode for process in processes]


def folder(root, case):
    (found,) = (Path(root) / case).rglob("seed0")
    return found


def assert_equal_runs(one, several, atol=1e-9):
    """The same run in one and in several processes: equal up to rounding; counts are equal."""
    tables = [
        [{key: float(value or "nan") for key, value in row.items() if key not in ("split", "seconds")} for row in table]
        for table in (rows_of(one), rows_of(several))
    ]
    for left, right in zip(*tables, strict=True):
        assert left == pytest.approx(right, rel=max(1e-6, 10 * atol), nan_ok=True)
    ours, theirs = checkpoint_of(one), checkpoint_of(several)
    assert torch.equal(ours["random"]["cpu"], theirs["random"]["cpu"])
    for left, right in ((ours["model"], theirs["model"]), (ours["best"]["model"], theirs["best"]["model"])):
        for name, value in left.items():
            torch.testing.assert_close(right[name], value, rtol=atol, atol=atol)
    left, right = read_result(one / "result.json"), read_result(several / "result.json")
    for name in ("test_accuracy", "val_accuracy", "best_step"):
        assert getattr(left, name) == getattr(right, name)


def test_two_processes_equal_one_and_only_rank_zero_writes(tmp_path):
    printed, codes = ended(start(tmp_path / "two", 2, *FAST_CASES))
    assert codes == [0, 0], printed
    assert printed[1] == ""
    for case in FAST_CASES:
        run_case(tmp_path / "one", case)
        one, two = folder(tmp_path / "one", case), folder(tmp_path / "two", case)
        assert_equal_runs(one, two)
        assert read_result(two / "result.json").segments[0]["processes"] == 2
        assert torch.equal(checkpoint_of(two)["model"]["unused"], torch.ones(2, 2))
        names = [sorted(file.name.split(".")[0] for file in each.iterdir()) for each in (one, two)]
        assert names[0] == names[1]


@pytest.mark.slow
def test_other_networks_and_schedules_in_two_processes(tmp_path):
    cases = CASES.keys() - FAST_CASES
    printed, codes = ended(start(tmp_path / "two", 2, *cases))
    assert codes == [0, 0], printed
    for case in cases:
        run_case(tmp_path / "one", case)
        assert_equal_runs(folder(tmp_path / "one", case), folder(tmp_path / "two", case))


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_run_with_one_line_and_a_checkpoint(tmp_path, victim):
    printed, codes = ended(start(tmp_path / "two", 2, "dropout", SMALL_RUNS_KILL=f"{victim}:31"))
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1, printed
    assert "another process" not in printed[victim]
    assert printed[1 - victim].count("another process of this run has ended") == 1
    assert "rerun the same command" in printed[1 - victim].splitlines()[-1]
    two = folder(tmp_path / "two", "dropout")
    assert checkpoint_of(two)["progressed"]["step"] == 28
    for root in ("one", "two"):  # both in a single process
        run_case(tmp_path / root, "dropout")
    assert_equal_runs(folder(tmp_path / "one", "dropout"), two)
    assert [segment["processes"] for segment in read_result(two / "result.json").segments] == [2, 1]


@pytest.mark.slow
def test_torchrun_leaves_no_process_behind_when_one_is_killed(tmp_path):
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "SMALL_RUNS_KILL": "1:31"}
    done = subprocess.run(
        [*program, str(tmp_path), "dropout"], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 1
    assert done.stderr.count("another process of this run has ended") == 1
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in running


@pytest.mark.slow
def test_the_command_trains_mnist5k_under_torchrun(tmp_path):
    """In float32, and so for five updates only."""
    words = [
        "data=mnist5k", "model.hidden_size=8", "model.num_layers=2", "model.dropout=0.1", "trainer.max_steps=5",
        "trainer.eval_every=5", "device=cpu",
    ]  # fmt: skip
    for root, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        command = [sys.executable, *launch, "-m", "indrnn", *words, f"output_root={tmp_path / root}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("test accuracy") == 1
    assert_equal_runs(folder(tmp_path, "one"), folder(tmp_path, "two"), atol=1e-5)


@pytest.mark.parametrize(
    ("model", "batch_size", "message"),
    [
        (nn.Linear(1, 1), 3, r"^trainer\.batch_size=3: 4 processes"),
        (nn.Sequential(nn.LSTM(1, 2, 2, dropout=0.5)), 32, r"^0 \(LSTM\) .* model\.dropout=0"),
        (nn.Sequential(nn.BatchNorm1d(2)), 32, r"^0 \(BatchNorm1d\) cannot be synchronized"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(model, batch_size, message):
    with pytest.raises(UserError, match=message):
        Processes(0, 4).share(model, batch_size)


def test_the_rows_of_a_batch_are_balanced_and_complete():
    rows = [range(10)[Processes(rank, 4).rows(10)] for rank in range(4)]
    assert [*itertools.chain(*rows)] == list(range(10))
    assert {len(each) for each in rows} == {2, 3}


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "", "RANK": "3"}, {"RANK": "3"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"LOCAL_RANK": "2"},
        {"WORLD_SIZE": "4", "RANK": ""},
    ],
)  # fmt: skip
def test_leftover_variables_of_a_scheduler_mean_a_single_process(tmp_path, monkeypatch, environment):
    set_environment(monkeypatch, environment)
    with joined_processes("cpu") as processes:
        assert (processes.rank, processes.size) == (0, 1)
        assert processes.all_reduce_max(5) == 5


@pytest.mark.parametrize("environment", [{}, {"MASTER_ADDR": ""}, {"MASTER_PORT": "http"}, {"RANK": "first"}])
def test_inconsistent_variables_are_refused_in_one_line(monkeypatch, environment):
    complete = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    set_environment(monkeypatch, {**complete, **environment} if environment else {"RANK": "0", "WORLD_SIZE": "4"})
    with pytest.raises(UserError, match=r"RANK .*WORLD_SIZE .*torchrun") as caught, joined_processes("cpu"):
        pass
    assert "\n" not in str(caught.value)


def set_environment(monkeypatch, environment):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def main(root, *words):
    """Make the runs of the named cases with the overrides, which contain a =."""
    torch.set_num_threads(1)
    try:
        for case in (word for word in words if "=" not in word):
            run_case(root, case, *(word for word in words if "=" in word))
    except RunError as failure:
        print(failure, file=sys.stderr)
        sys.exit(failure.exit_code)


if __name__ == "__main__":
    from test_distributed import main as imported_main

    imported_main(*sys.argv[1:])
