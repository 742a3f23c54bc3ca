"""What TensorBoard shows of a run, read with TensorBoard's own code."""

import json
import os
import re
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from indrnn.errors import RunError
from indrnn.record.tensorboard import (
    SCALARS,
    TensorBoardWriter,
    confusion_matrix,
    digits_page,
    tensorboard_command,
    tensorboard_link,
)


def read(path):
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    return events.Reload()


def steps_of(path, tag):
    return [point.step for point in read(path).Scalars(tag)]


def hparams_of(path):
    metadata = read(path).summary_metadata["_hparams_/session_start_info"]
    return HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info


def test_scalars_and_histograms_arrive(tmp_path):
    with TensorBoardWriter(tmp_path, "indrnn", "mnist", None) as writer:
        writer.scalars(10, {"train/loss": 0.5, "eval/accuracy": None})
        assert steps_of(tmp_path, "train/loss") == [10]  # at once, not when the writer is closed
        writer.histogram("recurrent_weight/layer0", torch.linspace(0.99, 1.0, 128), 10)
        writer.histogram("recurrent_weight/layer0", torch.ones(128, requires_grad=True), 20)
    events = read(tmp_path)
    assert events.Tags()["scalars"] == ["train/loss"]
    assert events.Scalars("train/loss")[0].value == 0.5
    first, second = events.Histograms("recurrent_weight/layer0")
    assert (first.step, second.step) == (10, 20)
    assert first.histogram_value.num == 128
    assert sum(count > 0 for count in first.histogram_value.bucket) == 30


def test_a_scalar_says_what_it_is_and_pictures_and_text_arrive(tmp_path):
    with TensorBoardWriter(tmp_path, "indrnn", "mnist", None) as writer:
        writer.scalars(10, dict.fromkeys(SCALARS, 1.0))
        writer.text("command", "`indrnn-train model=indrnn`")
        answers, targets = np.array([1, 1, 0]), np.array([1, 0, 0])
        writer.picture("test/confusion", confusion_matrix(answers, targets, 2), 10)
        digits = digits_page(np.zeros((3, 4, 5)), answers, np.array([0.9, 0.6, 1.0]), targets)
        writer.picture("test/digits", digits, 10)
    events = read(tmp_path)
    described = {tag: events.summary_metadata[tag].summary_description for tag in SCALARS}
    assert described == SCALARS
    assert events.Tags()["images"] == ["test/confusion", "test/digits"]
    assert [axes.get_title() for axes in digits.axes] == ["1, 90 %", "1, 60 % (a 0)", "0, 100 %"]
    text = events.Tensors("command/text_summary")[0].tensor_proto.string_val[0]
    assert text == b"`indrnn-train model=indrnn`"


def test_a_resumed_run_does_not_zigzag(tmp_path):
    with TensorBoardWriter(tmp_path, "indrnn", "mnist", None) as writer:
        for step in (10, 20, 30, 40):
            writer.scalars(step, {"train/loss": float(step)})
    for _ in range(2):  # twice in one second: the files still sort in the order they were written
        with TensorBoardWriter(tmp_path, "indrnn", "mnist", 20) as writer:
            for step in (30, 40, 50):
                writer.scalars(step, {"train/loss": -float(step)})
    points = read(tmp_path).Scalars("train/loss")
    assert [(point.step, point.value) for point in points] == [(10, 10), (20, 20), (30, -30), (40, -40), (50, -50)]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 3


def test_files_sort_in_order_even_if_the_clock_goes_back(tmp_path):
    (tmp_path / "events.out.tfevents.9999999000.indrnn").write_bytes(b"")
    with TensorBoardWriter(tmp_path, "indrnn", "mnist", 1) as writer:
        pass
    assert sorted(os.listdir(tmp_path))[-1] == writer.path.name == "events.out.tfevents.9999999001.indrnn"


def test_each_run_folder_is_one_run_with_one_line_of_hyperparameters(tmp_path):
    for name in ("indrnn", "lstm"):
        folder = tmp_path / "mnist" / name / "seed0"
        folder.mkdir(parents=True)
        for resume_step in (None, 10):
            with TensorBoardWriter(folder, name, "mnist", resume_step) as writer:
                model = {"name": name, "gamma": 2.0} if name == "indrnn" else {"name": name, "forget_bias": 1.0}
                values = {"model": model, "tag": None, "patience": [2, 1], "seed": 0, "lr": 2e-4, "graph": True}
                writer.scalars(20, {"train/loss": 1.0})
                writer.scalars(20, {"test/accuracy": 0.75, "test/loss": None})
                writer.hparams(values)
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    assert sorted(runs.Runs()) == ["mnist/indrnn/seed0", "mnist/lstm/seed0"]
    session = hparams_of(tmp_path / "mnist" / "indrnn" / "seed0")
    assert session.group_name == "mnist/indrnn/seed0"
    shown = {key: value.string_value or value.number_value for key, value in session.hparams.items()}
    assert shown == {
        "model": "indrnn", "model.gamma": 2.0, "task": "mnist", "tag": "none", "patience": "[2, 1]", "seed": "0",
        "lr": 2e-4, "graph": "True",
    }  # fmt: skip
    assert "model.forget_bias" in hparams_of(tmp_path / "mnist" / "lstm" / "seed0").hparams
    accuracy = runs.Scalars("mnist/lstm/seed0", "test/accuracy")[-1]
    assert (accuracy.step, accuracy.value) == (20, 0.75)
    # One summary of the whole experiment in one run would hide the hyperparameters that only other models have.
    assert "_hparams_/experiment" not in runs.GetAccumulator("mnist/lstm/seed0").summary_metadata


def test_the_layout_overlays_the_runs_by_tags_that_exist(tmp_path):
    with TensorBoardWriter(tmp_path, "indrnn", "mnist", None):
        pass
    content = read(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    [category] = layout_pb2.Layout.FromString(content).category
    assert category.title == "comparison"
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert charts["validation accuracy"] == ["eval/accuracy$"]
    assert charts["training loss"] == ["train/loss$"]


def test_the_file_name_does_not_tell_the_machines_name(tmp_path, monkeypatch):
    """torch's SummaryWriter puts it there, and offers no way to leave it out."""
    monkeypatch.setattr("socket.gethostname", lambda: "secret-host")
    with TensorBoardWriter(tmp_path, "indrnn", "mnist", None) as writer:
        writer.scalars(1, {"train/loss": 1.0})
    [name] = os.listdir(tmp_path)
    assert "secret-host" not in name
    assert b"secret-host" not in (tmp_path / name).read_bytes()


def test_a_full_disk_stops_the_run_where_it_happens(tmp_path, limited_file_size):
    """With torch's SummaryWriter a thread prints a traceback of its own, and nothing can be written afterwards."""
    with TensorBoardWriter(tmp_path, "indrnn", "mnist", None) as writer:
        writer.scalars(1, {"train/loss": 1.0})
        size = writer.path.stat().st_size
        with limited_file_size(size + 10), pytest.raises(RunError, match=r"events\.out\.tfevents") as failure:
            writer.scalars(2, {"train/loss": 1.0})
        assert "\n" not in str(failure.value)
        assert writer.path.stat().st_size == size  # no half record, which would hide all that follows
        writer.scalars(3, {"train/loss": 1.0})
    assert steps_of(tmp_path, "train/loss") == [1, 3]


def test_the_link_pins_the_curves_and_the_command_finds_the_folder(monkeypatch):
    monkeypatch.setattr("tensorboard.manager.get_all", list)
    link = urlsplit(tensorboard_link("outputs"))
    assert (link.scheme, link.netloc, link.fragment) == ("http", "localhost:6006", "timeseries")
    state = parse_qs(link.query, strict_parsing=True)
    pinned = json.loads(state["pinnedCards"][0])
    assert pinned == [{"plugin": "scalars", "tag": "eval/accuracy"}, {"plugin": "scalars", "tag": "train/loss"}]
    assert state["smoothing"] == ["0"]
    # A terminal makes all of it clickable, and a shell may be given it unquoted but for the &.
    assert not set(tensorboard_link("outputs")) & set('"{}[]()|<> ')
    assert tensorboard_command("my runs") == "tensorboard --logdir 'my runs'"


def test_the_link_takes_the_port_of_the_tensorboard_that_shows_the_folder(tmp_path, monkeypatch):
    servers = [SimpleNamespace(port=6006, logdir="/elsewhere"), SimpleNamespace(port=7007, logdir=f"{tmp_path}/")]
    monkeypatch.setattr("tensorboard.manager.get_all", lambda: servers)
    monkeypatch.chdir(tmp_path.parent)
    assert urlsplit(tensorboard_link(tmp_path.name)).port == 7007


@pytest.mark.parametrize("name", ["indrnn", "seedling", "lstm-seed5", "fast_lstm+x@1"])
def test_the_link_colours_runs_by_their_name(name):
    [group] = parse_qs(urlsplit(tensorboard_link("outputs")).query)["runColorGroup"]
    pattern = group.removeprefix("regex:")
    for run in (f"mnist/{name}/seed0", f"{name}/seed12"):
        assert re.search(pattern, run)[1] == name
