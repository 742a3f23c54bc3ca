"""A whole run: what it does when, what it writes, how it ends."""

import json
import math
import os
import signal
import threading

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from indrnn.errors import RunError, UserError
from indrnn.record.result import read_result
from indrnn.training import Interrupted, load_run
from indrnn.training.evaluation import Objective, batch_norms, evaluate
from small_runs import (
    BASE,
    READS,
    ArraySplit,
    at,
    checkpoint_of,
    figures,
    folder_of,
    make_small,
    nan,
    reads,
    rows_of,
    run_small,
    send,
)  # fmt: skip

LSTM = (*BASE, "model=lstm", "model.hidden_size=8")


def test_every_interval_and_evaluation_has_a_row(tmp_path):
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


def test_tensorboard_tags_are_the_same_for_every_model(tmp_path):
    run_small(tmp_path)
    assert run_small(tmp_path, base=LSTM).backend == "torch"
    tags = []
    for name, layers in (("indrnn", ["layer1", "layer2"]), ("lstm", ["layer1"])):
        events = EventAccumulator(str(folder_of(tmp_path, name)))
        events.Reload()
        tags.append(set(events.Tags()["scalars"]))
        assert [point.step for point in events.Scalars("eval/accuracy")] == [10, 20, 30]
        assert events.Tags()["histograms"] == [f"recurrent_weight/{layer}" for layer in layers]
    assert tags[0] == tags[1] == {
        "train/loss", "train/accuracy", "eval/loss", "eval/accuracy", "eval/best_loss", "eval/best_accuracy",
        "test/loss", "test/accuracy", "optimizer/lr", "optimizer/grad_norm", "speed/steps_per_second",
    }  # fmt: skip


def test_the_result_is_that_of_the_best_checkpoint_on_validation(tmp_path):
    result = run_small(tmp_path)
    folder = folder_of(tmp_path)
    assert read_result(folder / "result.json") == result
    validation = {int(row["step"]): float(row["accuracy"]) for row in rows_of(folder) if row["split"] == "val"}
    assert result.val_accuracy == max(validation.values())
    assert result.best_step == min(step for step, accuracy in validation.items() if accuracy == result.val_accuracy)
    model, cfg = load_run(folder)
    assert cfg.model.hidden_size == 8
    test = evaluate(model, ArraySplit(90, 3), Objective(make_small()), 32, torch.device("cpu"))
    assert (test.accuracy, test.loss) == (result.test_accuracy, result.test_loss)
    assert result.test_ci95[0] < result.test_accuracy < result.test_ci95[1]
    assert (result.steps, result.epochs, result.backend) == (30, 2.5, "reference")
    assert result.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert result.steps_per_second == pytest.approx(30 / result.seconds)


def test_the_test_split_is_read_once_and_last(tmp_path):
    run_small(tmp_path)
    kinds = [kind for kind, _ in READS]
    assert kinds == sorted(kinds, key=lambda kind: kind == "test")
    assert torch.equal(torch.cat(reads("test")), torch.arange(90))
    # Each evaluation follows the batch-norm statistics, which come from training data.
    without_training = [kind for kind in kinds if kind != "train"]
    assert without_training == [*(["statistics"] * 2 + ["validation"] * 3) * 3, *["test"] * 3]


def test_evaluations_can_use_running_averages(tmp_path):
    result = run_small(tmp_path, "trainer.bn_samples=null")
    model, _ = load_run(folder_of(tmp_path))
    assert {int(norm.num_batches_tracked) for norm in batch_norms(model)} == {result.best_step}


@pytest.mark.parametrize("target", ["target_accuracy=0.0", "target_loss=9.0"])
def test_training_stops_when_validation_reaches_the_target(tmp_path, target):
    result = run_small(tmp_path, f"trainer.{target}")
    assert (result.steps, result.best_step) == (10, 10)


PLATEAU = ("schedule=plateau", "schedule.patience=[1]", "trainer.max_steps=500")


@pytest.mark.parametrize("restore_best", [True, False])
def test_a_drop_of_the_plateau_returns_to_the_best_weights_and_optimizer_state(tmp_path, capsys, restore_best):
    run_small(tmp_path, *PLATEAU, "schedule.minimum_lr=9e-3", f"schedule.restore_best={restore_best}")
    end = checkpoint_of(folder_of(tmp_path))
    best = end["best"]
    assert best["step"] < end["progressed"]["step"] < 500, "the schedule ends training"
    assert ("optimizer" in best) == restore_best
    assert (f"back to the best step, {best['step']}" in capsys.readouterr().err) == restore_best
    assert all(torch.equal(value, best["model"][name]) for name, value in end["model"].items()) == restore_best
    if restore_best:
        now, then = ([state["exp_avg"] for state in each["optimizer"][0]["state"].values()] for each in (end, best))
        assert all(map(torch.equal, now, then))


def test_a_finished_run_is_not_run_again(tmp_path, capsys):
    first = run_small(tmp_path)
    READS.clear()
    assert run_small(tmp_path) == first
    assert READS == []
    assert "is finished: nothing to do" in capsys.readouterr().err


def test_the_seed_determines_the_run(tmp_path):
    for name in ("a", "b"):
        run_small(tmp_path / name)
    run_small(tmp_path / "c", "seed=1")
    assert figures(folder_of(tmp_path / "a")) == figures(folder_of(tmp_path / "b"))
    other = rows_of(tmp_path / "c" / "small" / "indrnn" / "seed1")
    assert rows_of(folder_of(tmp_path / "a"))[0]["loss"] != other[0]["loss"]


def test_default_device_and_dtype_of_the_caller_do_not_matter(tmp_path):
    run_small(tmp_path / "a", "optimizer=muon", "model.num_layers=3")
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        run_small(tmp_path / "b", "optimizer=muon", "model.num_layers=3")
        dtypes = {weight.dtype for weight in load_run(folder_of(tmp_path / "b"))[0].parameters()}
        assert (torch.get_default_device().type, torch.get_default_dtype()) == ("meta", torch.float64)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert dtypes == {torch.float32}
    assert figures(folder_of(tmp_path / "a")) == figures(folder_of(tmp_path / "b"))


def test_dropout_changes_neither_data_order_nor_initial_weights(tmp_path):
    indices, losses = [], []
    for dropout in ("0.0", "0.5"):
        run_small(tmp_path / dropout, f"model.dropout={dropout}", "optimizer.lr=1e-12", "trainer.max_steps=10")
        indices.append([read.tolist() for read in reads("train")])
        rows = rows_of(folder_of(tmp_path / dropout))
        losses.append([[float(row["loss"]) for row in rows if row["split"] == split] for split in ("train", "val")])
    assert indices[0] == indices[1]
    assert losses[0][1] == pytest.approx(losses[1][1], rel=1e-5)
    assert losses[0][0] != pytest.approx(losses[1][0], rel=1e-2), "there was no dropout, so the test shows nothing"


@pytest.mark.parametrize(
    ("kind", "batch", "step", "saved"),
    [("train", 18, 18, 14), ("validation", 4, 20, 14), ("test", 1, 30, 30)],
    ids=["train", "validation", "test"],
)
def test_a_non_finite_loss_ends_the_run_with_its_step_and_keeps_the_checkpoint(tmp_path, kind, batch, step, saved):
    at(kind, batch, nan)
    with pytest.raises(RunError) as caught:
        run_small(tmp_path, "trainer.log_every=1000")
    message, folder = str(caught.value), folder_of(tmp_path)
    assert f"not finite at step {step}; " in message
    assert str(folder / "checkpoint.pt") in message
    assert "\n" not in message
    assert caught.value.exit_code == 1
    assert not (folder / "result.json").exists()
    content = checkpoint_of(folder)
    assert content["progressed"]["step"] == saved
    assert all(value.isfinite().all() for value in content["model"].values())
    assert all(math.isfinite(float(row["loss"])) for row in rows_of(folder))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_saves_a_checkpoint_and_restores_the_handlers(tmp_path, number):
    """SIGUSR2 only if it has a handler, such as submitit's."""
    previous = signal.signal(signal.SIGUSR2, lambda *_: None)
    handler = signal.getsignal(number)
    at("train", 12, send(number))
    try:
        with pytest.raises(Interrupted, match=r"stopped at step 12, saved in .*; rerun the same command") as caught:
            run_small(tmp_path)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert caught.value.exit_code == 128 + number
    assert checkpoint_of(folder_of(tmp_path))["progressed"]["step"] == 12


def test_a_signal_during_the_last_read_stops_after_the_result(tmp_path):
    at("test", 2, send(signal.SIGTERM))
    with pytest.raises(Interrupted, match="was finished") as caught:
        run_small(tmp_path)
    assert caught.value.exit_code == 143
    assert read_result(folder_of(tmp_path) / "result.json").steps == 30


def test_training_works_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run_small(tmp_path)))
    thread.start()
    thread.join()
    assert results[0].steps == 30


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    at("train", 14, lambda x: monkeypatch.setattr(os, "fsync", no_space))
    with pytest.raises(RunError, match=r"checkpoint\.pt: No space left on device"):
        run_small(tmp_path)
    folder = folder_of(tmp_path)
    assert checkpoint_of(folder)["progressed"]["step"] == 7
    assert not list(folder.glob("*.tmp"))


def test_a_task_without_classes_has_no_accuracy(tmp_path):
    result = run_small(
        tmp_path, "data.length=12", "data.validation_size=60", "data.test_size=80",
        base=("data=adding", *BASE[1:], "model.hidden_size=8", "model.num_layers=2"),
    )  # fmt: skip
    assert (result.steps, result.test_accuracy, result.test_ci95) == (30, None, None)
    folder = tmp_path / "adding-T12" / "indrnn" / "seed0"
    losses = {int(row["step"]): float(row["loss"]) for row in rows_of(folder) if row["split"] == "val"}
    assert result.val_loss == min(losses.values()) == losses[result.best_step]
    assert all(math.isfinite(float(row["loss"])) and row["accuracy"] == "" for row in rows_of(folder))
    assert json.loads((folder / "result.json").read_text())["task"] == "adding"


@pytest.mark.gpu
def test_on_a_gpu_nothing_falls_back(tmp_path):
    result = run_small(tmp_path, "device=cuda", "model.backend=auto")
    assert (result.backend, result.segments[-1]["fallbacks"]) == ("triton", {})


def test_an_lstm_in_bfloat16_on_a_cpu_is_reported_and_recorded_as_float32(tmp_path, monkeypatch):
    # A CPU without bfloat16 instructions computes the same, but slowly, and is refused only for that.
    monkeypatch.setattr("indrnn.training.device.bfloat16_refusal", lambda: None)
    with pytest.warns(UserWarning, match="uses float32 instead of bfloat16"):
        result = run_small(tmp_path, "trainer.precision=bfloat16", base=LSTM)
    assert "bfloat16" in result.segments[-1]["fallbacks"]


def test_load_run_refuses_folders_without_a_run_or_weights(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml"):
        load_run(tmp_path)
    run_small(tmp_path, "trainer.max_steps=10")
    folder = folder_of(tmp_path)
    (folder / "best.pt").unlink()
    (folder / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no weights\.safetensors or best\.pt"):
        load_run(folder)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "other", "pickle", "weights"])
def test_load_run_reports_a_damaged_file_in_one_line(tmp_path, damage):
    run_small(tmp_path, "trainer.max_steps=10")
    folder = folder_of(tmp_path)
    path = folder / ("weights.safetensors" if damage == "weights" else "best.pt")
    if damage != "weights":
        (folder / "weights.safetensors").unlink()
    whole = path.read_bytes()
    if damage in ("other", "pickle"):
        torch.save({"weights": 1} if damage == "other" else {"model": os.system}, path)
    else:
        path.write_bytes({"empty": b"", "text": b"not a checkpoint"}.get(damage, whole[: len(whole) // 2]))
    with pytest.raises(UserError, match="damaged") as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_load_run_refuses_the_weights_of_another_model(tmp_path):
    run_small(tmp_path, "trainer.max_steps=10")
    folder = folder_of(tmp_path)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("hidden_size: 8", "hidden_size: 9"))
    with pytest.raises(UserError, match=r"of another run .*\[8, 1\].*\[9, 1\]") as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)
