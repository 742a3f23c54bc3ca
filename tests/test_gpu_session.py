"""scripts/gpu_session.py: that it asks for what exists, goes on after a failure, and says what it needs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from indrnn.cli.bench import parser

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_session.py"


@pytest.fixture
def session():
    spec = importlib.util.spec_from_file_location("gpu_session", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parts_are_commands_that_exist(session, tmp_path):
    for part in session.LIMITS:
        command = session.command(part, tmp_path)
        assert command[0] == sys.executable
        if part != "tests":
            options = parser().parse_args(command[3:])
            assert (options.what, options.device, options.out) == (part, "cuda", tmp_path)
            assert options.minutes is None or options.minutes * 60 < session.LIMITS[part]
    assert sum(session.LIMITS.values()) <= 600


def test_a_failing_or_endless_part_is_reported_and_the_rest_goes_on(session, tmp_path, monkeypatch):
    programs = {
        "tests": "print('x.py:1: UserWarning: slow'); print('3 passed')",
        "exact": "import sys; sys.exit('wrong')",
        "step": "import threading; threading.Event().wait()",
    }
    monkeypatch.setattr(session, "command", lambda part, out: [sys.executable, "-c", programs[part]])
    monkeypatch.setitem(session.LIMITS, "step", 0.01)
    (tmp_path / "step-gpu.md").write_text("the targets\n")
    ends = {part: session.run(part, tmp_path) for part in programs}
    assert [ended for ended, _ in ends.values()] == ["ok", "exit code 1", "stopped after 0.01 s"]
    text = session.summary(ends, tmp_path)
    assert text.splitlines()[0].endswith("3 passed")
    assert text.splitlines()[1].endswith("UserWarning: slow")
    assert "wrong" in text
    assert text.endswith("the targets\n")


def test_no_part_reads_what_is_typed_meanwhile(session, tmp_path, monkeypatch):
    monkeypatch.setattr(
        session, "command", lambda *_: [sys.executable, "-c", "import sys; print(sys.stdin.readlines())"]
    )
    reading, writing = os.pipe()
    os.write(writing, b"typed\n")
    os.close(writing)
    kept = os.dup(0)
    os.dup2(reading, 0)
    try:
        assert session.run("tests", tmp_path)[0] == "ok"
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(reading)
    assert (tmp_path / "tests.log").read_text() == "[]\n"


@pytest.mark.parametrize(("arguments", "said"), [(["nothing"], "there is no part nothing"), ([], "no CUDA GPU")])
def test_what_cannot_be_done_is_refused(arguments, said, tmp_path):
    if not arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    out = tmp_path / "out"
    found = subprocess.run([sys.executable, SCRIPT, out, *arguments], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert said in found.stderr
    assert not out.exists()
