"""One run in several processes: it computes what one process computes, and ends at once if a process dies.

Weights are float64 here. In float32 the order of a sum moves a gradient's fifth digit, and at T = 784 a network that
has just started multiplies that by about 1.3 an update: after 50, one process with another backend is off by 0.09 in a
weight. A wrong rule shows in float64 as well.

Run as a program it makes small runs one after the other in this process, which the environment makes one of several.
"""

import itertools
import json
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
from indrnn.data import make_task
from indrnn.errors import RunError, UserError
from indrnn.models import build_model
from indrnn.record.result import read_result
from indrnn.training import loop, state
from indrnn.training.distributed import Processes
from small_runs import OVERRIDES, folder_of, rows_of, small_task, trained

SHARED = (
    *(word for word in OVERRIDES if not word.startswith("model.")),
    "optimizer.lr=2e-4", "trainer.max_steps=50", "trainer.eval_every=25",
)  # fmt: skip
INDRNN = ("model.hidden_size=8", "model.num_layers=2", "model.backend=reference")
CASES = {
    "dropout": (*INDRNN, "model.dropout=0.2"),
    "uneven": (*INDRNN, "trainer.batch_size=15", "trainer.bn_samples=47"),
    "dense": ("model=indrnn_dense", "model.hidden_size=8", "model.block_layers=[2]", "model.growth=4"),
    "lstm": ("model=lstm", "model.hidden_size=8", "model.dropout=0.2"),
}
SLOW_CASES = {
    "residual": ("model=indrnn_residual", "model.hidden_size=8", "model.num_blocks=2", "model.dropout=0.1"),
    "plateau": (
        *INDRNN, "schedule=plateau", "schedule.patience=[1]", "schedule.restore_best=true", "trainer.eval_every=5",
    ),
}  # fmt: skip


def run_case(root, case, *overrides):
    """Make, or go on with, the run of a case."""
    words = (*SHARED, *{**CASES, **SLOW_CASES}[case], *overrides, f"output_root={Path(root) / case}")
    return trained(load_config(list(words)))


def float64_model(cfg, task):
    model = build_model(cfg, task).double()
    model.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    return model


@pytest.fixture(autouse=True)
def task(monkeypatch):
    monkeypatch.setattr(state, "make_task", lambda data: small_task())
    monkeypatch.setattr(state, "build_model", float64_model)


def start(root, processes, *arguments):
    """Start this file as a program, in each of several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(root), *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip


def ended(processes):
    """What each said, and its exit code."""
    said = [process.communicate(timeout=900)[1] for process in processes]
    return said, [process.returncode for process in processes]


def assert_equal_runs(one, several, atol=1e-9):
    """Two folders of the same run: one process and several computed the same, to rounding; counts are equal."""
    rows = [
        [{key: float(value or "nan") for key, value in row.items() if key not in ("split", "seconds")} for row in table]
        for table in (rows_of(one), rows_of(several))
    ]
    assert len(rows[0]) == len(rows[1])
    for left, right in zip(*rows, strict=True):
        assert left == pytest.approx(right, rel=max(1e-6, 10 * atol), nan_ok=True)
    ours, theirs = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, several))
    assert torch.equal(ours["random"]["cpu"], theirs["random"]["cpu"])
    for part in (lambda content: content["model"], lambda content: content["best"]["model"]):
        for name, value in part(ours).items():
            torch.testing.assert_close(part(theirs)[name], value, rtol=atol, atol=atol)
    left, right = read_result(one / "result.json"), read_result(several / "result.json")
    assert (left.test_accuracy, left.val_accuracy, left.best_step) == (
        right.test_accuracy, right.val_accuracy, right.best_step,
    )  # fmt: skip


def test_two_processes_compute_what_one_does_and_the_first_alone_writes(tmp_path):
    said, codes = ended(start(tmp_path / "two", 2, *CASES))
    assert codes == [0, 0], said
    assert said[1] == ""
    for case in CASES:
        run_case(tmp_path / "one", case)
        (one,) = (tmp_path / "one" / case).rglob("seed0")
        (two,) = (tmp_path / "two" / case).rglob("seed0")
        assert_equal_runs(one, two)
        assert sorted(file.name.split(".")[0] for file in two.iterdir()) == sorted(
            file.name.split(".")[0] for file in one.iterdir()
        )
        assert json.loads((two / "result.json").read_text())["segments"][0]["processes"] == 2
    # Gone on with in one process.
    for root in ("one", "two"):
        run_case(tmp_path / root, "dropout", "trainer.max_steps=75")
    assert_equal_runs(folder_of(tmp_path / "one" / "dropout"), folder_of(tmp_path / "two" / "dropout"))
    segments = read_result(folder_of(tmp_path / "two" / "dropout") / "result.json").segments
    assert [segment["processes"] for segment in segments] == [2, 1]


@pytest.mark.slow
def test_other_networks_and_schedules_in_two_processes(tmp_path):
    said, codes = ended(start(tmp_path / "two", 2, *SLOW_CASES))
    assert codes == [0, 0], said
    for case in SLOW_CASES:
        run_case(tmp_path / "one", case)
        (one,) = (tmp_path / "one" / case).rglob("seed0")
        (two,) = (tmp_path / "two" / case).rglob("seed0")
        assert_equal_runs(one, two)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_four(tmp_path):
    said, codes = ended(start(tmp_path / "more", 2, "dropout"))
    assert codes == [0, 0], said
    said, codes = ended(start(tmp_path / "more", 4, "dropout", "--longer"))
    assert codes == [0, 0, 0, 0], said
    run_case(tmp_path / "one", "dropout")
    run_case(tmp_path / "one", "dropout", "trainer.max_steps=75")
    assert_equal_runs(folder_of(tmp_path / "one" / "dropout"), folder_of(tmp_path / "more" / "dropout"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_run_with_one_line_and_a_good_checkpoint(tmp_path, victim):
    processes = start(tmp_path / "two", 2, "dropout", f"--kill={victim}")
    said, codes = ended(processes)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1, said
    assert said[victim].count("another process") == 0
    assert said[1 - victim].count("another process of this run has ended or cannot be reached; ") == 1
    assert "continue with the same command" in said[1 - victim].splitlines()[-1]
    folder = folder_of(tmp_path / "two" / "dropout")
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["progressed"]["step"]
    # The first process saves the step before the one that was broken off; without it, the last checkpoint stays.
    assert step == (30 if victim == 1 else 28)
    for root in ("one", "two"):
        run_case(tmp_path / root, "dropout")
    assert_equal_runs(folder_of(tmp_path / "one" / "dropout"), folder)


@pytest.mark.slow
def test_torchrun_leaves_no_process_behind_when_one_is_killed(tmp_path):
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    command = subprocess.run(
        [*program, str(tmp_path), "dropout", "--kill=1"], capture_output=True, text=True, timeout=300, check=False
    )
    assert command.returncode == 1
    assert command.stderr.count("another process of this run has ended") == 1
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in running


@pytest.mark.slow
def test_784_steps_of_time(tmp_path, monkeypatch):
    said, codes = ended(start(tmp_path / "two", 2, "dropout", "uneven", "--mnist5k"))
    assert codes == [0, 0], said
    monkeypatch.setattr(state, "make_task", make_task)
    for case in ("dropout", "uneven"):
        run_case(tmp_path / "one", case)
        assert_equal_runs(folder_of(tmp_path / "one" / case), folder_of(tmp_path / "two" / case), atol=1e-7)


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
    assert_equal_runs(folder_of(tmp_path / "one"), folder_of(tmp_path / "two"), atol=1e-5)


@pytest.fixture
def group(monkeypatch):
    """The first of four processes; nothing is sent."""
    monkeypatch.setattr("indrnn.training.distributed._transfer", lambda work: None)
    return Processes(0, 4)


def test_what_cannot_be_shared_out_is_refused_in_one_line(group):
    model = nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"^trainer\.batch_size leaves 3 sequences for 4 processes, and each needs one"):
        group.share(model, 3, 100)
    with pytest.raises(UserError, match=r"^trainer\.bn_samples leaves 2 sequences for 4 processes"):
        group.share(model, 32, 2)
    with pytest.raises(UserError, match=r"^model\.dropout=0\.5: LSTM itself draws the masks between its layers"):
        group.share(nn.Sequential(nn.LSTM(1, 2, 2, dropout=0.5)), 32, 100)
    with pytest.raises(UserError, match=r"^the batch norm 0 cannot be joined between processes"):
        group.share(nn.Sequential(nn.BatchNorm1d(2)), 32, 100)


def test_the_parts_of_a_batch_are_as_equal_as_can_be_and_leave_nothing_out(group):
    parts = []
    for rank in range(4):
        group.rank = rank
        parts.append(group.part(torch.arange(10)).tolist())
    assert [*itertools.chain(*parts)] == list(range(10))
    assert {len(part) for part in parts} == {2, 3}


def main(root, *words):
    """Make the runs of the named cases; ``--kill=<rank>``: that process dies in the 31st step;
    ``--mnist5k``: with its data, 784 steps of time."""
    torch.set_num_threads(1)
    flags = [word for word in words if word.startswith("--")]
    if "--mnist5k" not in flags:
        state.make_task = lambda data: small_task()
    state.build_model = float64_model
    advance = loop.Training._advance

    def killed(self):
        if self.position.step == 30 and f"--kill={os.environ['RANK']}" in flags:
            os.kill(os.getpid(), signal.SIGKILL)
        advance(self)

    loop.Training._advance = killed
    longer = ("trainer.max_steps=75",) if "--longer" in flags else ()
    try:
        for case in words:
            if case not in flags:
                run_case(root, case, *longer)
    except RunError as failure:
        print(failure, file=sys.stderr)
        sys.exit(failure.exit_code)
    # One that still runs when the interpreter ends may abort it.
    threads = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), threads


if __name__ == "__main__":
    main(*sys.argv[1:])
