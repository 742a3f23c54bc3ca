"""The TensorBoard events of a run, read with TensorBoard's own code."""

import os
import re
import subprocess
import sys
from contextlib import closing

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from indrnn.errors import RunError
from indrnn.record.tensorboard import TensorBoardWriter


def read(path):
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    return events.Reload()


def test_events_are_readable_while_the_run_continues(tmp_path):
    with closing(TensorBoardWriter(tmp_path, None)) as writer:
        writer.scalars(10, {"train/loss": 0.5, "eval/accuracy": None, "test/loss": 2.0})
        writer.histogram("recurrent_weight/layer1", torch.linspace(0.99, 1.0, 128, dtype=torch.bfloat16), 10)
        writer.text("command", "`indrnn-train model=indrnn`")
        events = read(tmp_path)
    assert events.Tags()["scalars"] == ["train/loss", "test/loss"]
    [point] = events.Scalars("train/loss")
    assert (point.step, point.value) == (10, 0.5)
    [histogram] = events.Histograms("recurrent_weight/layer1")
    assert (histogram.step, histogram.histogram_value.num) == (10, 128)
    assert sum(count > 0 for count in histogram.histogram_value.bucket) > 1
    [text] = events.Tensors("command/text_summary")
    assert text.tensor_proto.string_val[0] == b"`indrnn-train model=indrnn`"


def test_kill_and_resume_give_one_curve(tmp_path):
    with closing(TensorBoardWriter(tmp_path, None)) as writer:
        for step in (10, 20, 30, 40):
            writer.scalars(step, {"train/loss": float(step)})
    for _ in range(2):
        with closing(TensorBoardWriter(tmp_path, 20)) as writer:
            for step in (30, 40, 50):
                writer.scalars(step, {"train/loss": -float(step)})
    points = read(tmp_path).Scalars("train/loss")
    assert [(point.step, point.value) for point in points] == [(10, 10), (20, 20), (30, -30), (40, -40), (50, -50)]


def test_full_disk_is_one_line_and_no_traceback(tmp_path, limited_file_size, capfd):
    def fill():
        with closing(TensorBoardWriter(tmp_path, None)) as writer:
            writer.scalars(1, {"train/loss": 1.0})
            [file] = tmp_path.iterdir()
            with limited_file_size(file.stat().st_size + 10):
                for step in range(2, 10):
                    writer.scalars(step, {"train/loss": 1.0})

    with pytest.raises(RunError, match=re.escape(str(tmp_path))) as error:
        fill()
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
    with closing(TensorBoardWriter(tmp_path, 1)) as writer:
        writer.scalars(2, {"train/loss": 2.0})
    assert [point.value for point in read(tmp_path).Scalars("train/loss")] == [1, 2]


def test_a_partly_uninstalled_tensorflow_is_not_imported(tmp_path):
    (tmp_path / "tensorflow" / "python").mkdir(parents=True)
    code = "import sys; from indrnn.record.tensorboard import *; TensorBoardWriter(sys.argv[1], None).text('a', 'b')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    events = tmp_path / "events"
    ended = subprocess.run([sys.executable, "-c", code, events], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert read(events).Tags()["tensors"] == ["a/text_summary"]
