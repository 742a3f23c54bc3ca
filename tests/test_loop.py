"""A whole run: what it does when, what it writes, how it ends."""

import json
import math
import os
import signal
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from indrnn.config.compose import load_config
from indrnn.errors import RunError, UserError
from indrnn.record.result import read_result
from indrnn.training import Interrupted, checkpoint, load_run, loop, state
from indrnn.training.checkpoint import read_checkpoint
from indrnn.training.evaluation import Objective, evaluate
from indrnn.training.order import DataOrder
from indrnn.training.step import CaptureError
from small_runs import (
    OVERRIDES,
    ArraySplit,
    figures,
    folder_of,
    rows_of,
    run_small,
    small_task,
    task_with,
    trained,
)


@pytest.fixture(autouse=True)
def task(monkeypatch):
    task = small_task()
    for module in (state, checkpoint):
        monkeypatch.setattr(module, "make_task", lambda data: task)
    return task


def test_every_interval_and_evaluation_has_its_row(tmp_path):
    run_small(tmp_path)
    rows = rows_of(folder_of(tmp_path))
    found = [(row["split"], int(row["step"])) for row in rows]
    train = [("train", step) for step in (4, 8, 12, 16, 20, 24, 28, 30)]
    val = [("val", step) for step in (10, 20, 30)]
    assert sorted(found[:-1]) == sorted(train + val)
    assert found[-1] == ("test", 30)
    assert [int(row["step"]) for row in rows] == sorted(int(row["step"]) for row in rows)
    epochs = [float(row["epoch"]) for row in rows if row["split"] == "val"]
    assert epochs == pytest.approx([10 / 12, 20 / 12, 30 / 12], rel=1e-5)
    assert all(row["lr"] and row["grad_norm"] for row in rows if row["split"] == "train")


LSTM = ("data=mnist5k", "model=lstm", "model.hidden_size=8", *OVERRIDES[6:], "device=cpu")


def test_tensorboard_has_the_same_tags_for_indrnn_and_lstm(tmp_path):
    run_small(tmp_path)
    assert trained(load_config([*LSTM, f"output_root={tmp_path}"])).backend == "torch"
    tags = []
    for name in ("indrnn", "lstm"):
        events = EventAccumulator(str(folder_of(tmp_path, name)))
        events.Reload()
        tags.append(set(events.Tags()["scalars"]))
        assert [point.step for point in events.Scalars("eval/accuracy")] == [10, 20, 30]
        layers = ["layer1", "layer2"] if name == "indrnn" else ["layer1"]
        assert events.Tags()["images"] == ["test/confusion", "test/digits"]
        text = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0]
        assert b"max_steps: 30" in text
        assert events.Tags()["histograms"] == [f"recurrent_weight/{layer}" for layer in layers]
    assert tags[0] == tags[1]
    assert min(tags[0]) == "eval/accuracy", "what one sees first"
    assert tags[0] == {
        "train/loss", "train/accuracy", "eval/loss", "eval/accuracy", "eval/best_loss", "eval/best_accuracy",
        "test/loss", "test/accuracy", "optimizer/lr", "optimizer/grad_norm", "speed/steps_per_second",
    }  # fmt: skip


def test_the_result_is_that_of_the_best_checkpoint_on_validation(tmp_path, task):
    result = run_small(tmp_path)
    folder = folder_of(tmp_path)
    assert read_result(folder / "result.json") == result
    rows = rows_of(folder)
    validation = {int(row["step"]): float(row["accuracy"]) for row in rows if row["split"] == "val"}
    assert result.val_accuracy == max(validation.values())
    assert result.best_step == min(step for step, accuracy in validation.items() if accuracy == result.val_accuracy)
    model, cfg = load_run(folder)
    assert cfg.model.hidden_size == 8
    test = evaluate(model, ArraySplit(90, 3), Objective(task), 32, torch.device("cpu"))
    assert (test.accuracy, test.loss) == (result.test_accuracy, result.test_loss)
    assert result.test_ci95[0] < result.test_accuracy < result.test_ci95[1]
    assert (result.steps, result.epochs, result.backend) == (30, 2.5, "reference")
    assert result.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert result.steps_per_second == pytest.approx(30 / result.seconds)


def test_the_test_split_is_read_once_and_last_and_statistics_come_from_training_data(tmp_path, monkeypatch):
    test, log = ArraySplit(90, 3), []

    def load_test():
        log.append("test")
        return test

    spied = task_with(load_test=load_test)
    splits = spied.load(torch.device("cpu"))
    monkeypatch.setattr(state, "make_task", lambda data: spied)
    reestimate = loop.reestimate_batch_norm

    def spy(model, split, indices, *rest):
        assert split is splits.train
        log.append("statistics")
        read = len(splits.validation.read)
        reestimate(model, split, indices, *rest)
        assert len(splits.validation.read) == read

    monkeypatch.setattr(loop, "reestimate_batch_norm", spy)
    run_small(tmp_path)
    assert log == ["statistics"] * 3 + ["test"]
    assert torch.equal(torch.cat(test.read), torch.arange(90))


def test_training_stops_once_validation_exceeds_the_target(tmp_path):
    result = run_small(tmp_path, "trainer.target_accuracy=0.0")
    assert (result.steps, result.best_step) == (10, 10)


def test_training_stops_when_the_plateau_is_over(tmp_path):
    result = run_small(
        tmp_path, "schedule=plateau", "schedule.patience=[1]", "schedule.minimum_lr=9e-3", "trainer.max_steps=500",
        "optimizer.lr=1e-2",
    )  # fmt: skip
    validation = [float(row["accuracy"]) for row in rows_of(folder_of(tmp_path)) if row["split"] == "val"]
    assert result.steps == 10 * len(validation) < 500
    assert validation[-1] <= max(validation[:-1])


@pytest.mark.parametrize("restore_best", [True, False])
def test_a_drop_of_the_plateau_goes_back_to_the_best_weights_and_their_optimizer_state(
    tmp_path, monkeypatch, capsys, restore_best
):
    accuracies = iter([0.5, 0.4, 0.3])
    monkeypatch.setattr(
        loop, "evaluate", lambda *arguments, **_: replace(evaluate(*arguments), accuracy=next(accuracies))
    )
    run_small(
        tmp_path, "schedule=plateau", "schedule.patience=[1]", f"schedule.restore_best={restore_best}",
        "trainer.max_steps=20",
    )  # fmt: skip
    end = read_checkpoint(folder_of(tmp_path) / "checkpoint.pt")
    assert (end["best"]["step"], end["progressed"]["step"]) == (10, 20)
    assert ("optimizer" in end["best"]) == restore_best
    said = "step 20: the learning rate drops; back to the best step, 10" in capsys.readouterr().err
    assert said == restore_best
    for part in ("model", "optimizer") if restore_best else ("model",):
        pairs = zip(_leaves(end[part]), _leaves(end["best"][part]), strict=True)
        assert all(torch.equal(now, best) for now, best in pairs) == restore_best, part


def _leaves(tree):
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return [tree] if isinstance(tree, torch.Tensor) else [leaf for each in branches for leaf in _leaves(each)]


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch, capsys):
    first = run_small(tmp_path)
    monkeypatch.setattr(state, "make_task", None)
    assert run_small(tmp_path) == first
    assert "is finished: nothing to do" in capsys.readouterr().err


def test_a_finished_run_goes_on_to_more_steps_as_if_it_had_not_ended(tmp_path):
    short, straight = tmp_path / "short", tmp_path / "straight"
    run_small(short, "trainer.max_steps=20")
    run_small(short, "trainer.max_steps=40")
    run_small(straight, "trainer.max_steps=40")
    rows = rows_of(folder_of(short))
    assert [row["step"] for row in rows if row["split"] == "test"] == ["20", "40"]
    one, two = figures(folder_of(short)), figures(folder_of(straight))
    for each in (one, two):
        each["rows"] = [row for row in each["rows"] if row["split"] != "test" or row["step"] == "40"]
    assert one == two


def test_the_same_seed_gives_the_same_run_and_another_one_another(tmp_path):
    for name in ("a", "b"):
        run_small(tmp_path / name)
    run_small(tmp_path / "c", "seed=1")
    assert figures(folder_of(tmp_path / "a")) == figures(folder_of(tmp_path / "b"))
    other = rows_of(tmp_path / "c" / "mnist5k" / "indrnn" / "seed1")
    assert rows_of(folder_of(tmp_path / "a"))[0]["loss"] != other[0]["loss"]


def test_dropout_changes_neither_the_order_of_the_data_nor_the_initial_weights(tmp_path, monkeypatch):
    reads, losses = [], []
    for dropout in ("0.0", "0.5"):
        task = small_task()
        monkeypatch.setattr(state, "make_task", lambda data, task=task: task)
        run_small(tmp_path / dropout, f"model.dropout={dropout}", "optimizer.lr=1e-12", "trainer.max_steps=10")
        reads.append([read.tolist() for read in task.load(torch.device("cpu")).train.read])
        rows = rows_of(folder_of(tmp_path / dropout))
        losses.append([[float(row["loss"]) for row in rows if row["split"] == split] for split in ("train", "val")])
    assert reads[0] == reads[1]
    assert losses[0][1] == pytest.approx(losses[1][1], rel=1e-5)
    assert losses[0][0] != pytest.approx(losses[1][0], rel=1e-2), "there was no dropout, so the test shows nothing"


class NaNSplit(ArraySplit):
    """One training sequence has become NaN."""

    def __init__(self, bad: int) -> None:
        super().__init__(200, 1)
        self.x[bad] = float("nan")


def test_a_non_finite_loss_stops_the_run_with_the_step_and_the_checkpoint(tmp_path, monkeypatch):
    order = DataOrder(200, 16, 0, torch.device("cpu"))
    # Sequences that neither the first epoch nor the first evaluation sees, so that there is a checkpoint before.
    seen = {int(i) for step in range(12) for i in order.indices(step)} | {int(i) for i in order.norm_samples(48, 10)}
    later = ((step, int(i)) for step in range(12, 24) for i in order.indices(step))
    step, bad = next((step, i) for step, i in later if i not in seen)
    broken = task_with(train=NaNSplit(bad))
    monkeypatch.setattr(state, "make_task", lambda data: broken)
    with pytest.raises(RunError) as caught:
        run_small(tmp_path, "trainer.log_every=1000")
    message, folder = str(caught.value), folder_of(tmp_path)
    assert f"not finite at step {step + 1}; " in message
    assert f"the last good checkpoint is {folder / 'checkpoint.pt'}" in message
    assert "\n" not in message
    assert caught.value.exit_code == 1
    assert not (folder / "result.json").exists()
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert content["progressed"]["step"] <= step
    assert all(value.isfinite().all() for value in content["model"].values())


class BadSplit(ArraySplit):
    """The evaluation after the first `good` ones meets an infinite value."""

    def __init__(self, size: int, seed: int, good: int) -> None:
        super().__init__(size, seed)
        self.good = good

    def batch(self, indices):
        x, y = super().batch(indices)
        begun = sum(int(read[0]) == 0 for read in self.read)
        return (x + math.inf if begun > self.good and 0 not in indices else x), y


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_evaluation_that_is_not_finite_fails_the_run_with_the_step_and_keeps_the_checkpoint(
    tmp_path, monkeypatch, split
):
    validation, test = BadSplit(70, 2, 1 if split == "validation" else 9), BadSplit(90, 3, 0)
    broken = task_with(validation=validation, load_test=lambda: test)
    monkeypatch.setattr(state, "make_task", lambda data: broken)
    with pytest.raises(RunError) as caught:
        run_small(tmp_path)
    message, folder = str(caught.value), folder_of(tmp_path)
    step = 20 if split == "validation" else 30
    assert f"the {split} loss is not finite at step {step}; " in message
    assert f"the last good checkpoint is {folder / 'checkpoint.pt'}" in message
    assert "\n" not in message
    assert caught.value.exit_code == 1
    assert not (folder / "result.json").exists()
    assert read_checkpoint(folder / "checkpoint.pt")["best"]["step"] in (10, 20, 30)
    assert all(math.isfinite(float(row["loss"])) for row in rows_of(folder))


def test_a_network_that_has_learnt_nothing_is_named_once(tmp_path, capsys):
    run_small(tmp_path, "optimizer.lr=1e-12")
    err = capsys.readouterr().err
    assert err.count("the network has learnt nothing yet") == 1
    assert "at step 10: the share of the most frequent class is" in err


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(tmp_path, monkeypatch):
    advance = loop.Training._advance
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(self):
        advance(self)
        if self.position.step == 12:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop.Training, "_advance", interrupted)
    with pytest.raises(Interrupted, match=r"stopped at step 12, saved in .*; continue with the same command") as caught:
        run_small(tmp_path)
    assert caught.value.exit_code == 130
    assert torch.load(folder_of(tmp_path) / "checkpoint.pt", weights_only=True)["progressed"]["step"] == 12
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_moments_lets_the_run_finish_and_then_stops(tmp_path, monkeypatch, number):
    write = loop.write_result

    def interrupted(path, result):
        os.kill(os.getpid(), number)
        write(path, result)

    monkeypatch.setattr(loop, "write_result", interrupted)
    with pytest.raises(Interrupted, match="stopped after indrnn seed 0 was finished") as caught:
        run_small(tmp_path)
    assert caught.value.exit_code == 128 + number
    assert read_result(folder_of(tmp_path) / "result.json").steps == 30


def test_a_damaged_result_is_not_called_finished(tmp_path, capsys):
    run_small(tmp_path, "trainer.max_steps=10")
    (folder_of(tmp_path) / "result.json").write_text('{"schema_version": 1}')
    with pytest.raises(UserError, match=r"result\.json is damaged"):
        run_small(tmp_path, "trainer.max_steps=10")
    assert "finished" not in capsys.readouterr().err


def test_training_works_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run_small(tmp_path)))
    thread.start()
    thread.join()
    assert results[0].steps == 30


def test_a_full_disk_ends_the_run_and_spares_the_last_checkpoint(tmp_path, monkeypatch):
    saves = []
    write = loop.save_checkpoint

    def full(path, content):
        if path.name == "checkpoint.pt":
            saves.append(path)
            if len(saves) == 2:
                monkeypatch.setattr(os, "fsync", no_space)
        write(path, content)

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "save_checkpoint", full)
    with pytest.raises(RunError, match=r"cannot write .*checkpoint\.pt: No space left on device; free some space"):
        run_small(tmp_path)
    folder = folder_of(tmp_path)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["progressed"]["step"] == 7
    assert not list(folder.glob("*.tmp"))


def test_figures_of_a_task_without_classes(tmp_path, monkeypatch):
    monkeypatch.undo()
    result = run_small(
        tmp_path, "data=adding", "data.length=12", "data.validation_size=60", "data.test_size=80",
        "trainer.target_accuracy=null",
    )  # fmt: skip
    assert result.steps == 30
    assert result.test_accuracy is None
    assert result.test_ci95 is None
    folder = tmp_path / "adding-T12" / "indrnn" / "seed0"
    losses = {int(row["step"]): float(row["loss"]) for row in rows_of(folder) if row["split"] == "val"}
    assert result.val_loss == min(losses.values()) == losses[result.best_step]
    assert all(math.isfinite(float(row["loss"])) and row["accuracy"] == "" for row in rows_of(folder))
    assert json.loads((folder / "result.json").read_text())["task"] == "adding"


def test_a_folder_that_is_no_run_and_one_without_checkpoint_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.yaml"):
        load_run(tmp_path)
    run_small(tmp_path, "trainer.max_steps=10")
    folder = folder_of(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint='last' is unknown; choose from best, latest"):
        load_run(folder, "last")
    (folder / "best.pt").unlink()
    (folder / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no weights\.safetensors or best\.pt: the run has not written one yet"):
        load_run(folder)
    assert load_run(folder, "latest")[1].seed == 0


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "other", "pickle"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, damage):
    run_small(tmp_path, "trainer.max_steps=10")
    folder = folder_of(tmp_path)
    (folder / "weights.safetensors").unlink()
    path = folder / "best.pt"
    whole = path.read_bytes()
    if damage == "other":
        torch.save({"weights": 1}, path)
    elif damage == "pickle":
        torch.save({"model": os.system}, path)
    else:
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"not a checkpoint"}[damage])
    with pytest.raises(UserError) as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert "move the file away, or start the run again with overwrite=true" in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run_small(tmp_path, "trainer.max_steps=10")
    folder = folder_of(tmp_path)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("hidden_size: 8", "hidden_size: 9"))
    with pytest.raises(UserError, match=r"safetensors belongs to another model: .* shape \(8, 1\) there and \(9, 1\)"):
        load_run(folder)


@pytest.fixture
def _without_graphs(monkeypatch):
    """As on a GPU where no step can be captured; the steps run on the CPU."""
    warm_up = state.TrainingState._warm_up

    def on_a_gpu(self, fallbacks):
        device, self.device = self.device, SimpleNamespace(type="cuda")
        try:
            warm_up(self, fallbacks)
        finally:
            self.device = device

    def refuse(*_):
        raise CaptureError("operation not permitted")

    monkeypatch.setattr(state.TrainingState, "_warm_up", on_a_gpu)
    monkeypatch.setattr(state, "GraphedGradients", refuse)
    monkeypatch.setattr(state, "synchronise", lambda device: None)


@pytest.mark.usefixtures("_without_graphs")
def test_a_step_that_cannot_be_captured_runs_eagerly_says_so_and_is_recorded(tmp_path):
    with pytest.warns(UserWarning, match=r"without a CUDA graph, which is slow: .*\(operation not permitted\)"):
        result = run_small(tmp_path / "auto")
    assert result.segments[-1]["fallbacks"] == {"cuda_graph": "operation not permitted"}
    assert read_result(folder_of(tmp_path / "auto") / "result.json").segments == result.segments
    eager = run_small(tmp_path / "false", "trainer.cuda_graph=false")
    assert eager.segments[-1]["fallbacks"] == {}
    assert rows_without_seconds(tmp_path / "auto") == rows_without_seconds(tmp_path / "false")


@pytest.mark.usefixtures("_without_graphs")
def test_a_graph_that_is_insisted_on_is_made_or_ends_the_run(tmp_path):
    with pytest.raises(
        RunError, match=r"captured as a CUDA graph \(operation not permitted\); use trainer.cuda_graph=auto"
    ):
        run_small(tmp_path, "trainer.cuda_graph=true")


def rows_without_seconds(root):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows_of(folder_of(root))]


@pytest.mark.gpu
def test_on_a_gpu_nothing_falls_back(tmp_path, monkeypatch):
    task = small_task()
    splits = task.load(torch.device("cuda"))
    for split in (splits.train, splits.validation, splits.test):
        split.x, split.y = split.x.cuda(), split.y.cuda()
    monkeypatch.setattr(state, "make_task", lambda data: task)
    result = run_small(tmp_path, "device=cuda", "model.backend=auto")
    assert (result.backend, result.segments[-1]["fallbacks"]) == ("triton", {})


def test_an_lstm_in_bfloat16_on_a_cpu_says_and_records_that_it_is_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr("indrnn.training.device.bfloat16_refusal", lambda: None)
    with pytest.warns(UserWarning, match="changes nothing, the run is in float32: on a CPU only IndRNN layers"):
        result = trained(load_config([*LSTM, "trainer.precision=bfloat16", f"output_root={tmp_path}"]))
    assert "bfloat16" in result.segments[-1]["fallbacks"]
