"""The TensorBoard events of a run, read with TensorBoard's own code."""

import json
import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from indrnn.errors import RunError
from indrnn.record.tensorboard import (
    TensorBoardWriter,
    confusion_matrix,
    digits_page,
    drawing,
    tensorboard_command,
    tensorboard_link,
)  # fmt: skip


def read(path):
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    return events.Reload()


def hparams_of(path):
    metadata = read(path).summary_metadata["_hparams_/session_start_info"]
    return HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info


def test_events_are_readable_while_the_run_continues(tmp_path):
    with TensorBoardWriter(tmp_path, "indrnn", "mnist", None) as writer:
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
    assert b"eval/accuracy$" in events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]


def test_kill_and_resume_give_one_curve(tmp_path):
    with TensorBoardWriter(tmp_path, "indrnn", "mnist", None) as writer:
        for step in (10, 20, 30, 40):
            writer.scalars(step, {"train/loss": float(step)})
    for _ in range(2):
        with TensorBoardWriter(tmp_path, "indrnn", "mnist", 20) as writer:
            for step in (30, 40, 50):
                writer.scalars(step, {"train/loss": -float(step)})
    points = read(tmp_path).Scalars("train/loss")
    assert [(point.step, point.value) for point in points] == [(10, 10), (20, 20), (30, -30), (40, -40), (50, -50)]


def test_each_run_folder_is_one_run_with_its_hyperparameters(tmp_path):
    for name, model in (("indrnn", {"gamma": 2.0}), ("lstm", {"forget_bias": 1.0})):
        folder = tmp_path / "mnist" / name / "seed0"
        for resume_step in (None, 10):
            with TensorBoardWriter(folder, name, "mnist", resume_step) as writer:
                values = {"model": {"name": name, **model}, "tag": None, "patience": [2, 1], "seed": 0, "graph": True}
                writer.scalars(20, {"test/accuracy": 0.75})
                writer.hparams(values)
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    assert sorted(runs.Runs()) == ["mnist/indrnn/seed0", "mnist/lstm/seed0"]
    session = hparams_of(tmp_path / "mnist" / "indrnn" / "seed0")
    assert session.group_name == "mnist/indrnn/seed0"
    shown = {key: value.string_value or value.number_value for key, value in session.hparams.items()}
    assert shown == {
        "model": "indrnn", "model.gamma": 2.0, "task": "mnist", "tag": "none", "patience": "[2, 1]", "seed": "0",
        "graph": "True",
    }  # fmt: skip
    # A summary of the whole experiment in one run would hide the hyperparameters that only other models have.
    assert "_hparams_/experiment" not in runs.GetAccumulator("mnist/lstm/seed0").summary_metadata


def test_full_disk_is_one_line_and_no_traceback(tmp_path, limited_file_size, capfd):
    def fill():
        with TensorBoardWriter(tmp_path, "indrnn", "mnist", None) as writer:
            writer.scalars(1, {"train/loss": 1.0})
            [file] = tmp_path.iterdir()
            with limited_file_size(file.stat().st_size + 10):
                for step in range(2, 10):
                    writer.scalars(step, {"train/loss": 1.0})

    with pytest.raises(RunError, match=re.escape(str(tmp_path))) as error:
        fill()
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
    with TensorBoardWriter(tmp_path, "indrnn", "mnist", 1) as writer:
        writer.scalars(2, {"train/loss": 2.0})
    assert [point.value for point in read(tmp_path).Scalars("train/loss")] == [1, 2]


DRAW = """
import sys, numpy as np
from indrnn.record.tensorboard import TensorBoardWriter, confusion_matrix, digits_page
predictions, labels = np.array([1, 1, 0]), np.array([1, 0, 0])
with TensorBoardWriter(sys.argv[1], "indrnn", "mnist", None) as writer:
    writer.picture("test/confusion", confusion_matrix(predictions, labels, 2), 10)
    writer.picture("test/digits", digits_page(np.zeros((3, 4, 5)), predictions, np.ones(3), labels), 10)
"""


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "qtagg"])
def test_pictures_are_independent_of_the_users_matplotlib(tmp_path, backend):
    settings = tmp_path / "matplotlibrc"
    settings.write_text("text.usetex: True\nbackend: qtagg\nfont.family: no such font\nfigure.dpi: 3\n")
    package = tmp_path / "partly uninstalled" / "tensorflow" / "python"
    package.mkdir(parents=True)
    path = os.pathsep.join([str(package.parents[1]), *sys.path])
    environment = os.environ | {"MPLBACKEND": backend, "MATPLOTLIBRC": str(settings), "PYTHONPATH": path}
    events = tmp_path / "events"
    ended = subprocess.run([sys.executable, "-c", DRAW, events], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert read(events).Tags()["images"] == ["test/confusion", "test/digits"]


def test_drawing_restores_the_users_settings():
    import matplotlib

    with matplotlib.rc_context({"font.size": 5, "text.usetex": True}):
        with drawing({"font.size": 7}):
            assert (matplotlib.rcParams["font.size"], matplotlib.rcParams["text.usetex"]) == (7, False)
        assert (matplotlib.rcParams["font.size"], matplotlib.rcParams["text.usetex"]) == (5, True)


def test_digits_page_marks_wrong_predictions():
    predictions, labels = np.array([1, 1, 0]), np.array([1, 0, 0])
    page = digits_page(np.zeros((3, 4, 5)), predictions, np.array([0.9, 0.6, 1.0]), labels)
    assert [axes.get_title() for axes in page.axes] == ["1, 90 %", "1, 60 % (a 0)", "0, 100 %"]
    assert [text.get_text() for text in confusion_matrix(predictions, labels, 2).axes[0].texts] == ["1", "1", "1"]


def test_link_pins_the_curves_of_a_tensorboard_that_is_alive(tmp_path, monkeypatch):
    with socket.create_server(("localhost", 0)) as alive, socket.create_server(("localhost", 0)) as dead:
        dead_port, port = dead.getsockname()[1], alive.getsockname()[1]
        dead.close()
        folders = [(6007, "/elsewhere"), (dead_port, str(tmp_path)), (port, f"{tmp_path}/")]
        servers = [SimpleNamespace(port=number, logdir=folder) for number, folder in folders]
        monkeypatch.setattr("tensorboard.manager.get_all", lambda: servers)
        monkeypatch.chdir(tmp_path.parent)
        assert urlsplit(tensorboard_link(tmp_path.name)).port == port
        assert urlsplit(tensorboard_link("outputs")).netloc == "localhost:6006"
    link = tensorboard_link(tmp_path)
    state = parse_qs(urlsplit(link).query, strict_parsing=True)
    pinned = json.loads(state["pinnedCards"][0])
    assert pinned == [{"plugin": "scalars", "tag": "eval/accuracy"}, {"plugin": "scalars", "tag": "train/loss"}]
    # A terminal makes all of it clickable, and a shell may be given it unquoted but for the &.
    assert not set(link) & set('"{}[]()|<> ')
    assert tensorboard_command("my runs") == "tensorboard --logdir 'my runs'"
    pattern = state["runColorGroup"][0].removeprefix("regex:")
    for name in ("indrnn", "lstm-seed5", "fast_lstm+x@1"):
        assert [re.search(pattern, run)[1] for run in (f"mnist/{name}/seed0", f"{name}/seed12")] == [name, name]
