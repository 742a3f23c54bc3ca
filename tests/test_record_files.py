"""What a run writes into its folder: metrics, TensorBoard events, the result, where it ran; and reading it again."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import indrnn
from indrnn.errors import RunError, UserError
from indrnn.files import replacing
from indrnn.record.metrics import MetricsWriter, read_metrics
from indrnn.record.result import (
    Result,
    command_line,
    cpu_name,
    environment,
    git,
    read_result,
    running_code,
    wilson_interval,
    write_result,
)

HEADER = "step,epoch,seconds,split,loss,accuracy,lr,grad_norm\n"
RESULT = Result(
    model="indrnn", task="mnist5k", name="indrnn", seed=0, parameters=86_410, best_step=20, steps=30, epochs=0.27,
    val_accuracy=0.5, val_loss=1.2, test_accuracy=0.4, test_loss=1.3, test_ci95=(0.37, 0.43), seconds=9.5,
    steps_per_second=7.25, peak_memory_bytes=123, backend="numba", device_name="cpu", precision="float32",
    data={"sha256": {"a": "0f"}, "split": {"seed": 0}, "permutation": None, "permutation_sha256": None},
    versions={"python": "3.11"}, git={"commit": None, "dirty": None}, command="indrnn-train model=indrnn",
)  # fmt: skip


def full_disk(path):
    """Whatever is written to ``path`` next meets a full disk, for real."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    path.symlink_to("/dev/full")


def test_metrics_can_be_followed_row_by_row(tmp_path):
    path = tmp_path / "metrics.csv"
    with MetricsWriter(path, None) as metrics:
        assert path.read_text() == HEADER
        metrics.row(100, 0.058, 14.21, "train", 2.25, 0.125, 2e-4, 0.75)
        assert path.read_text() == HEADER + "100,0.058,14.210,train,2.25,0.125,0.0002,0.75\n"
        metrics.row(100, 0.058, 15.0, "val", 1 / 3, None)
        assert path.read_text().endswith("\n100,0.058,15.000,val,0.3333333333333333,,,\n")


def test_metrics_are_read_as_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    with MetricsWriter(path, None) as metrics:
        assert read_metrics(path)["step"].shape == (0,)
        metrics.row(1, 0.1, 1.0, "train", 1 / 3, None, 1e-7, math.inf)
        metrics.row(2, 0.2, 2.0, "val", math.nan, 0.1)
    read = read_metrics(path)
    assert read["step"].tolist() == [1, 2]
    assert read["split"].tolist() == ["train", "val"]
    assert read["loss"][0] == 1 / 3
    assert np.isnan(read["loss"][1])
    assert read["grad_norm"][0] == math.inf
    np.testing.assert_array_equal(read["accuracy"], [math.nan, 0.1])


def test_a_resumed_run_writes_the_same_metrics_as_an_unbroken_one(tmp_path):
    def write(metrics, first, last):
        for step in range(first, last + 1):
            metrics.row(step, step / 10, step / 7, "train", 1 / step, 0.5, 2e-4, 1.0)
            if step % 5 == 0:
                metrics.row(step, step / 10, step / 7, "val", 2 / step, 0.4)

    unbroken, broken = tmp_path / "unbroken.csv", tmp_path / "broken.csv"
    with MetricsWriter(unbroken, None) as metrics:
        write(metrics, 1, 30)
    with MetricsWriter(broken, None) as metrics:
        write(metrics, 1, 17)
    with open(broken, "a") as file:
        file.write("18,1.8,2.57")  # the kill came here; the last checkpoint was at step 10
    with MetricsWriter(broken, 10) as metrics:
        write(metrics, 11, 30)
    assert broken.read_bytes() == unbroken.read_bytes()


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_last_line_cut_anywhere_is_dropped(tmp_path, cut):
    path = tmp_path / "metrics.csv"
    row = "2,0.2,2.000,train,0.9734,0.5,0.0002,1.75\n"
    path.write_text(HEADER + "1,0.1,1.000,train,0.5,0.5,0.0002,1.0\n" + row[:cut])
    assert read_metrics(path)["step"].tolist() == [1]
    MetricsWriter(path, 2).close()
    assert path.read_text() == HEADER + "1,0.1,1.000,train,0.5,0.5,0.0002,1.0\n"


def test_starting_again_empties_the_metrics(tmp_path):
    path = tmp_path / "metrics.csv"
    with MetricsWriter(path, None) as metrics:
        metrics.row(1, 0.1, 1.0, "train", 1.0)
    MetricsWriter(path, None).close()
    assert path.read_text() == HEADER


def test_metrics_that_are_gone_do_not_stop_a_resumed_run_but_are_missed(tmp_path, caplog):
    path = tmp_path / "metrics.csv"
    MetricsWriter(path, 10).close()
    assert path.read_text() == HEADER
    assert [str(path) in message and "step 10" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("step,loss\n1,2\n", "does not begin with"),
        ("", "does not begin with"),
        (HEADER + "1,0.1,1.0,train,x,,,\n", "line 2"),
        (HEADER + "1,0.1\n", "line 2"),
        (HEADER + "1,0.1,1.0,train,1.0,,,\n\n", "line 3"),
    ],
)
def test_damaged_metrics_are_named_and_kept(tmp_path, text, said):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    for read in (lambda: read_metrics(path), lambda: MetricsWriter(path, 5)):
        with pytest.raises(UserError, match=said) as failure:
            read()
        assert str(path) in str(failure.value)
        assert "\n" not in str(failure.value)
    assert path.read_text() == text


def test_a_row_that_no_longer_fits_leaves_whole_rows(tmp_path, limited_file_size):
    path = tmp_path / "metrics.csv"
    with MetricsWriter(path, None) as metrics:
        metrics.row(1, 0.1, 1.0, "train", 1 / 3)
        size = path.stat().st_size
        with limited_file_size(size + 10), pytest.raises(RunError, match=re.escape(str(path))) as failure:
            metrics.row(2, 0.2, 2.0, "train", 1 / 3)
        assert "\n" not in str(failure.value)
        assert path.stat().st_size == size


def test_a_full_disk_stops_the_metrics_with_one_line(tmp_path):
    path = tmp_path / "metrics.csv"
    full_disk(tmp_path / "metrics.csv.tmp")
    with pytest.raises(RunError, match=r"metrics\.csv: No space left on device; free some space"):
        MetricsWriter(path, None)
    assert os.listdir(tmp_path) == []


def test_a_result_is_read_as_written(tmp_path):
    path = tmp_path / "result.json"
    write_result(path, RESULT)
    assert read_result(path) == RESULT
    written = json.loads(path.read_text())
    assert next(iter(written)) == "schema_version"
    assert written["schema_version"] == 1
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_task_without_classes_has_no_accuracies(tmp_path):
    path = tmp_path / "result.json"
    result = dataclasses.replace(RESULT, val_accuracy=None, test_accuracy=None, test_ci95=None)
    write_result(path, result)
    assert read_result(path) == result


def test_a_result_from_before_there_were_segments_is_read(tmp_path):
    path = tmp_path / "result.json"
    values = {"schema_version": 1, **dataclasses.asdict(RESULT)}
    del values["segments"]
    path.write_text(json.dumps(values))
    assert read_result(path) == RESULT


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("git", []), ("data", None), ("versions", "3.11"), ("test_ci95", 5), ("test_ci95", [0.1]),
        ("test_ci95", [0.1, "a"]), ("val_loss", None), ("test_loss", "1.3"), ("steps", 1.5), ("seed", True),
        ("model", 1), ("segments", {}), ("segments", [1]), ("seconds", math.inf), ("epochs", math.nan),
    ],
)  # fmt: skip
def test_a_result_with_a_value_of_the_wrong_kind_is_named(tmp_path, name, value):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"schema_version": 1, **dataclasses.asdict(RESULT), name: value}))
    with pytest.raises(UserError, match=f"result\\.json is damaged: {name} is .*; move it away") as failure:
        read_result(path)
    assert "\n" not in str(failure.value)


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    write_result(path, RESULT)
    full_disk(tmp_path / "result.json.tmp")
    with pytest.raises(RunError, match="No space left on device") as failure:
        write_result(path, dataclasses.replace(RESULT, test_accuracy=0.9))
    assert "\n" not in str(failure.value)
    assert read_result(path) == RESULT
    assert os.listdir(tmp_path) == ["result.json"]


def test_an_interrupted_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")

    def interrupted():
        with replacing(path) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "damaged"),
        ("[]", "schema_version None"),
        ("[" * 100_000, "damaged"),
        ('{"schema_version": 2}', "schema_version 2"),
        ('{"schema_version": 1, "model": "lstm"}', "lacks task, name"),
        ("\xff", "damaged"),
    ],
)
def test_a_damaged_result_is_named(tmp_path, text, said):
    path = tmp_path / "result.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=said) as failure:
        read_result(path)
    assert str(path) in str(failure.value)


def test_a_missing_result_is_named(tmp_path):
    with pytest.raises(UserError, match=r"result\.json: No such file"):
        read_result(tmp_path / "result.json")


def test_wilson_interval_of_known_cases():
    # Newcombe 1998 (Statistics in Medicine 17, table I, method 3)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share(case):
    correct, n = case
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    assert low < high
    mirrored = wilson_interval(n - correct, n)
    assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]), abs=1e-12)


@pytest.mark.parametrize(("correct", "n"), [(1, 0), (0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_of_nonsense(correct, n):
    with pytest.raises(ValueError, match=f"correct={correct}, n={n}"):
        wilson_interval(correct, n)


def test_the_environment_has_every_version():
    found = environment("cpu")
    assert set(found["versions"]) == {"python", "torch", "cuda", "numba", "triton", "indrnn"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["indrnn"] == indrnn.__version__
    assert re.fullmatch(r"[0-9.]+\S*", found["versions"]["numba"])
    assert found["num_threads"] == torch.get_num_threads()
    assert found["device_name"]
    json.dumps(found)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "AMX-BF16"),
        ({"amx_bf16": False, "avx512_bf16": True}, "AVX512-BF16"),
        ({}, torch.backends.cpu.get_cpu_capability()),
    ],
)
def test_the_environment_names_the_instructions_for_products(monkeypatch, flags, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert environment("cpu")["instruction_set"] == expected


@pytest.mark.gpu
def test_the_environment_names_the_gpu():
    assert environment("cuda")["device_name"] == torch.cuda.get_device_name()


def test_the_cpu_is_named_also_without_proc(tmp_path):
    listing = tmp_path / "cpuinfo"
    listing.write_text(
        "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nprocessor\t: 1\nmodel name\t: Some CPU @ 2 GHz\n"
    )
    assert cpu_name(listing) == "Some CPU @ 2 GHz"
    assert cpu_name(tmp_path / "absent")


def checkout(root):
    package = root / "src" / "indrnn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "a"],
    ):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    return package


def test_git_tells_the_commit_and_whether_the_code_was_changed(tmp_path, monkeypatch):
    package = checkout(tmp_path)
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    found = git(package)
    assert re.fullmatch("[0-9a-f]{40}", found["commit"])
    assert found["dirty"] is False
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "result.json").write_text("")
    assert git(package)["dirty"] is False  # a run's own files are no change of the code
    (package / "new.py").write_text("")
    assert git(package) == {"commit": found["commit"], "dirty": True}


def test_a_commit_made_while_the_process_runs_is_not_the_code_it_runs(monkeypatch):
    commits = iter(["a" * 40, "b" * 40])
    monkeypatch.setattr(sys.modules[running_code.__module__], "git", lambda: {"commit": next(commits), "dirty": False})
    running_code.cache_clear()
    try:
        assert [running_code()["commit"] for _ in range(2)] == ["a" * 40] * 2
    finally:
        running_code.cache_clear()


def test_ctrl_c_does_not_reach_git(tmp_path, monkeypatch):
    package = checkout(tmp_path)
    program = tmp_path / "bin" / "git"
    program.parent.mkdir()
    # Ctrl-C goes to a process group; here git's sends itself one, which must not be ours.
    program.write_text("#!/bin/sh\ntrap '' INT\nkill -INT 0\necho 0a\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    assert git(package)["commit"] == "0a"


def test_git_does_not_take_the_surrounding_project_for_ours(tmp_path):
    checkout(tmp_path)
    installed = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages" / "indrnn"
    installed.mkdir(parents=True)
    assert git(installed) == {"commit": None, "dirty": None}


def test_git_may_be_missing(tmp_path, monkeypatch):
    package = checkout(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert git(package) == {"commit": None, "dirty": None}


def test_the_command_is_told_without_the_programs_path():
    argv = ["/home/someone/.venv/bin/indrnn-train", "model=indrnn", "tag=two words"]
    assert command_line(argv) == "indrnn-train model=indrnn 'tag=two words'"


def test_the_command_of_a_module_can_be_typed_again(monkeypatch):
    argv = ["/home/someone/indrnn/__main__.py", "model=indrnn"]
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert command_line(argv) == "python -m indrnn model=indrnn"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command_line(argv) == "torchrun --nproc-per-node=2 -m indrnn model=indrnn"
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert command_line(argv) == "torchrun --nnodes=3 --nproc-per-node=2 -m indrnn model=indrnn"
