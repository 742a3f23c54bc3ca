"""result.json and provenance: written, read again, damaged."""

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from indrnn.errors import RunError, UserError
from indrnn.files import replacing, write_atomically
from indrnn.record.result import Result, environment, git, read_result, wilson_interval, write_result

RESULT = Result(
    model="indrnn", task="mnist5k", name="indrnn", seed=0, parameters=86_410, best_step=20, steps=30, epochs=0.27,
    val_accuracy=0.5, val_loss=1.2, test_accuracy=0.4, test_loss=1.3, test_ci95=(0.37, 0.43), seconds=9.5,
    steps_per_second=7.25, peak_memory_bytes=123, backend="numba", device_name="cpu", precision="float32",
    data={"sha256": {"a": "0f"}, "split": {"seed": 0}, "permutation": None, "permutation_sha256": None},
    versions={"python": "3.11"}, git={"commit": None, "dirty": None}, command="indrnn-train model=indrnn",
)  # fmt: skip


def full_disk(path):
    """Whatever is written to ``path`` next meets a full disk."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    path.symlink_to("/dev/full")


@pytest.mark.parametrize("changes", [{}, dict.fromkeys(("val_accuracy", "test_accuracy", "test_ci95"))])
def test_result_is_read_as_written_or_keeps_the_old_one(tmp_path, changes):
    path = tmp_path / "result.json"
    result = dataclasses.replace(RESULT, **changes)
    write_result(path, result)
    assert read_result(path) == result
    assert next(iter(json.loads(path.read_text()).items())) == ("schema_version", 1)
    full_disk(tmp_path / "result.json.tmp")
    with pytest.raises(RunError, match="No space left on device"):
        write_result(path, dataclasses.replace(RESULT, test_accuracy=0.9))
    assert read_result(path) == result
    assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("\xff", "damaged"),
        ('{"schema_version": 1, "model": "lstm"}', "damaged"),
        (json.dumps(dataclasses.asdict(RESULT) | {"more": 1}), "'more'"),
        (json.dumps(dataclasses.asdict(RESULT) | {"schema_version": 2}), "schema_version=2"),
        (None, "No such file"),
    ],
    ids=range(7),
)
def test_damaged_or_missing_result_is_named(tmp_path, text, message):
    path = tmp_path / "result.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"result.json.*{message}") as error:
        read_result(path)
    assert "\n" not in str(error.value)


def test_interrupted_write_keeps_the_old_file(tmp_path):
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
    write_atomically(path, b"\xc3\xa9".decode("ascii", "surrogateescape"))  # an argument in an ASCII locale
    assert path.read_text(encoding="utf-8") == "é"


def test_wilson_interval():
    # Newcombe 1998 (Statistics in Medicine 17, table I, method 3)
    known = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (correct, n), interval in known.items():
        assert wilson_interval(correct, n) == pytest.approx(interval, abs=5e-5)
        low, high = wilson_interval(n - correct, n)
        assert (1 - high, 1 - low) == pytest.approx(interval, abs=5e-5)
    assert (wilson_interval(0, 7)[0], wilson_interval(7, 7)[1]) == (0, 1)


def test_environment_has_every_version():
    found = environment("cpu")
    assert set(found["versions"]) == {"python", "torch", "cuda", "numba", "triton", "indrnn"}
    assert found["versions"]["torch"] == torch.__version__
    assert (found["num_threads"], bool(found["device_name"])) == (torch.get_num_threads(), True)
    json.dumps(found)


@pytest.fixture
def checkout(tmp_path):
    """The package's folder in a repository with one commit."""
    package = tmp_path / "src" / "indrnn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    return package


def program(tmp_path, monkeypatch, script):
    """Put a shell script called git first on the path."""
    file = tmp_path / "bin" / "git"
    file.parent.mkdir()
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(file.parent), prepend=os.pathsep)


def test_git_reports_the_commit_and_changes_of_the_code(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    found = git(checkout)
    assert re.fullmatch("[0-9a-f]{40}", found["commit"])
    assert found["dirty"] is False
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "result.json").write_text("")
    assert git(checkout)["dirty"] is False
    (checkout / "new.py").write_text("")
    assert git(checkout) == {"commit": found["commit"], "dirty": True}


def test_git_in_the_checkout_of_another_user(checkout, tmp_path, monkeypatch):
    real = subprocess.run(["which", "git"], capture_output=True, text=True).stdout.strip()
    program(tmp_path, monkeypatch, f'GIT_TEST_ASSUME_DIFFERENT_OWNER=1 exec {real} "$@"')
    assert subprocess.run(["git", "-C", str(tmp_path), "status"], capture_output=True).returncode
    assert re.fullmatch("[0-9a-f]{40}", git(checkout)["commit"])


@pytest.mark.parametrize(
    ("failure", "reason"),
    [("exit", "bad object"), ("missing", "git"), ("damaged", "not a git repository"), ("installed", "not a git rep")],
)
def test_reason_is_recorded_if_git_fails(checkout, tmp_path, monkeypatch, failure, reason):
    package = checkout
    if failure == "exit":
        program(tmp_path, monkeypatch, "echo 'fatal: bad object' >&2; exit 128")
    elif failure == "missing":
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    else:  # in both cases the repository around is another project's
        package = tmp_path / ".venv" / "lib" / "site-packages" / "indrnn"
        (package.parents[1] / (".git" if failure == "damaged" else "indrnn")).mkdir(parents=True)
    found = git(package)
    assert (found["commit"], found["dirty"]) == (None, None)
    assert reason in found["reason"]
