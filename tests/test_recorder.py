"""metrics.csv and the TensorBoard events of a run, written, read again, damaged."""

import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from indrnn.errors import RunError, UserError
from indrnn.record.metrics import read_metrics
from indrnn.record.recorder import Recorder

HEADER = "step,epoch,seconds,split,loss,accuracy,lr,grad_norm\n"
ROW = "1,0.1,1.000,train,0.5,0.5,0.0002,1.0\n"


def recorder(path, resume_step=None):
    return Recorder(path, "indrnn seed 0", resume_step or 0, 100, resume_step)


def events(path):
    return EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0}).Reload()


def points(path, tag):
    return [(point.step, point.value) for point in events(path).Scalars(tag)]


def test_rows_are_readable_at_once(tmp_path):
    path = tmp_path / "metrics.csv"
    with recorder(tmp_path) as record:
        assert read_metrics(path)["step"].shape == (0,)
        record.row("train", 100, 0.058, 14.21, 2.25, 0.125, 2e-4, math.inf, {"speed/steps_per_second": 7.0})
        assert path.read_text() == HEADER + "100,0.058,14.210,train,2.25,0.125,0.0002,inf\n"
        record.row("val", 100, 0.058, 15.0, 1 / 3)
        assert path.read_text().endswith("\n100,0.058,15.000,val,0.3333333333333333,,,\n")
        assert points(tmp_path, "train/loss") == [(100, 2.25)]
        assert points(tmp_path, "speed/steps_per_second") == [(100, 7.0)]
    read = read_metrics(path)
    assert read["step"].tolist() == [100, 100]
    assert read["split"].tolist() == ["train", "val"]
    assert read["loss"].tolist() == [2.25, 1 / 3]
    np.testing.assert_array_equal(read["accuracy"], [0.125, math.nan])
    assert read["grad_norm"][0] == math.inf
    assert events(tmp_path).Tags()["scalars"].count("eval/accuracy") == 0


def test_histograms_texts_and_hyperparameters_reach_tensorboard(tmp_path):
    with recorder(tmp_path) as record:
        weights = [torch.linspace(0.99, 1.0, 128, dtype=torch.bfloat16), torch.ones(4, dtype=torch.complex64)]
        record.recurrent_weights(10, weights)
        record.row("test", 10, 0.1, 1.0, 0.5, 0.75)
        record.finished("indrnn-train", "seed: 3", {"seed": 3, "model.name": "indrnn", "tag": None}, ["test/accuracy"])
    written = events(tmp_path)
    [histogram] = written.Histograms("recurrent_weight/layer1")
    assert (histogram.step, histogram.histogram_value.num) == (10, 128)
    assert sum(count > 0 for count in histogram.histogram_value.bucket) > 1
    [text] = written.Tensors("configuration/text_summary")
    assert text.tensor_proto.string_val[0] == b"```yaml\nseed: 3```"
    assert points(tmp_path, "test/accuracy") == [(10, 0.75)]
    assert len(list(tmp_path.glob("events*"))) == 1
    session = written.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert all(word in session for word in (b"seed", b"model.name", b"indrnn"))


def test_kill_and_resume_give_one_curve(tmp_path):
    def write(record, steps, sign):
        for step in steps:
            record.row("train", step, 0.1, 1.0, sign * step)
        record.row("test", steps[-1], 0.1, 1.0, 0.0)

    with recorder(tmp_path) as record:
        write(record, (10, 20, 30, 40), 1)
    for _ in range(2):
        with recorder(tmp_path, 20) as record:
            write(record, (30, 40, 50), -1)
    expected = [(10, 10), (20, 20), (30, -30), (40, -40), (50, -50)]
    assert points(tmp_path, "train/loss") == expected
    rows = read_metrics(tmp_path / "metrics.csv")
    assert rows["split"].tolist() == ["train"] * 5 + ["test"]
    assert rows["loss"].tolist() == [*(loss for _, loss in expected), 0.0]


def test_curves_that_are_lost_begin_again_with_a_warning(tmp_path, caplog):
    with recorder(tmp_path, 10):
        assert (tmp_path / "metrics.csv").read_text() == HEADER
    assert "step 10" in caplog.text


@pytest.mark.parametrize("cut", [1, 5, 25, 37, 39])
def test_incomplete_last_line_is_dropped(tmp_path, cut):
    path = tmp_path / "metrics.csv"
    path.write_text(HEADER + ROW + "2,0.2,2.000,train,0.9734,0.5,0.0002,1.75\n"[:cut])
    assert read_metrics(path)["step"].tolist() == [1]
    with recorder(tmp_path, 2):
        assert path.read_text() == HEADER + ROW


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,loss\n1,2\n", "does not begin with"),
        ("", "does not begin with"),
        (HEADER + "1,0.1,1.0,train,x,,,\n", "damaged.*'?x'?"),
        (HEADER + "1,0.1,1.0,val,0.5\n", "damaged"),
        (HEADER + ROW + "\n", "damaged"),
        (HEADER + ROW[:-1] + ",1\n", "damaged"),
    ],
)
def test_damaged_metrics_are_named_and_kept(tmp_path, text, message):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=f"metrics.csv.*{message}") as error:
        recorder(tmp_path, 5)
    assert "\n" not in str(error.value)
    assert path.read_text() == text


@pytest.mark.parametrize("full", ["metrics.csv", "events*"])
def test_full_disk_is_one_line_and_leaves_complete_rows(tmp_path, limited_file_size, capfd, full):
    path = tmp_path / "metrics.csv"
    tags = dict.fromkeys("abcdef", 1.0) if full != "metrics.csv" else {}

    def fill(record, steps):
        for step in steps:
            record.row("train", step, 0.1, 1.0, 1 / 3, lr=1 / 3, grad_norm=1 / 3, tags=tags)

    with recorder(tmp_path) as record:
        fill(record, range(20))
        [larger] = tmp_path.glob(full)
        with (
            limited_file_size(larger.stat().st_size + 100),
            pytest.raises(RunError, match=re.escape(str(tmp_path))) as error,
        ):
            fill(record, range(20, 40))
    assert "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err
    steps = read_metrics(path)["step"].tolist()
    assert steps == list(range(len(steps)))
    assert 20 <= len(steps) < 23


def test_a_partly_uninstalled_tensorflow_is_not_imported(tmp_path):
    (tmp_path / "tensorflow" / "python").mkdir(parents=True)
    code = "import sys; from pathlib import Path; from indrnn.record.recorder import Recorder\n"
    code += "Recorder(Path(sys.argv[1]), 'a', 0, 1, None).row('val', 1, 0.0, 0.0, 0.5)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    folder = tmp_path / "run"
    ended = subprocess.run([sys.executable, "-c", code, folder], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert points(folder, "eval/loss") == [(1, 0.5)]
