"""scripts/gpu.py: the stages fit the time and do not depend on each other; without a GPU it says so."""

import re
import subprocess
import sys

import gpu
import pytest
import torch

from indrnn.cli.bench import parser


def test_stages_fit_the_time_and_use_commands_that_exist():
    assert sum(limit for limit, _ in gpu.STAGES.values()) <= 540
    for name in ("step", "recurrence", "exact"):
        arguments = re.sub(r".*cli\.bench ", "", gpu.STAGES[name][1]).split()
        assert parser().parse_args(arguments).what == name


@pytest.mark.parametrize(
    ("command", "limit", "ended"),
    [
        ("echo output; echo error >&2", 60, "ok"),
        ("echo output; false", 60, "exit code 1"),
        ("echo output; sleep 1000 & wait", 0.5, "stopped after 0.5 s"),
        ('echo output; [ -z "$(cat)" ]', 60, "ok"),  # stdin is empty
    ],
)
def test_a_stage_reports_how_it_ended_and_appends_to_the_log(tmp_path, command, limit, ended):
    log = tmp_path / "gpu.log"
    log.write_text("earlier\n")
    line = gpu.run_stage("name", limit, command, tmp_path, log)
    assert re.fullmatch(rf"name +{ended} +\d+ s", line)
    text = log.read_text()
    assert text.startswith("earlier\n")
    assert "output" in text


@pytest.mark.slow
def test_training_is_stopped_and_resumed(tmp_path):
    """The training stage with a small network on the CPU."""
    small = "device=cpu model.num_layers=1 model.hidden_size=4 trainer.batch_size=2"
    command = gpu.TRAIN.replace("trainer.cuda_graph=true device=cuda", small)
    assert small in command
    log = tmp_path / "log"
    assert " ok " in gpu.run_stage("train", 600, command, tmp_path, log), log.read_text()
    assert '"segments"' in log.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so(tmp_path):
    environment = {"OUT": str(tmp_path / "out"), "HOME": str(tmp_path)}
    found = subprocess.run([sys.executable, gpu.__file__], capture_output=True, text=True, check=False, env=environment)
    assert found.returncode == 2
    assert re.fullmatch(r"gpu\.py: .*no CUDA GPU.*\n", found.stderr)
    assert not (tmp_path / "out").exists()
