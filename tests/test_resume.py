"""An interrupted run, gone on with, equals the one that was not interrupted, to the last bit."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from indrnn.errors import UserError
from indrnn.record.metrics import MetricsWriter
from indrnn.record.result import read_result
from indrnn.training import loop, state
from small_runs import (
    figures,
    folder_of,
    rows_of,
    run_small,
    small_splits,
    small_task,
    task_with,
)

PROGRAM = Path(__file__).with_name("small_runs.py")


@pytest.fixture(autouse=True)
def task(monkeypatch):
    monkeypatch.setattr(state, "make_task", lambda data: small_task())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    root = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "make_task", lambda data: small_task())
        run_small(root)
    return figures(folder_of(root))


class Killed(BaseException):
    """Stands for kill -9: nothing of the package catches it."""


def crash_at(patch, count):
    """Raise Killed before the count-th write of a file, and tell the writes' names."""
    writes = []

    def counted(name, function):
        def wrapped(*args, **kwargs):
            if len(writes) == count:
                raise Killed
            writes.append(name)
            return function(*args, **kwargs)

        return wrapped

    patch.setattr(loop, "save_checkpoint", counted("checkpoint", loop.save_checkpoint))
    patch.setattr(loop, "write_result", counted("result", loop.write_result))
    patch.setattr(MetricsWriter, "row", counted("row", MetricsWriter.row))
    return writes


@pytest.mark.slow
def test_a_run_killed_between_any_two_writes_goes_on_exactly(tmp_path, unbroken):
    with pytest.MonkeyPatch.context() as patch:
        writes = crash_at(patch, -1)
        run_small(tmp_path / "all")
    assert {"checkpoint", "result", "row"} == set(writes)
    for count in range(len(writes)):
        root = tmp_path / str(count)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, count)
            with pytest.raises(Killed):
                run_small(root)
        run_small(root)
        assert figures(folder_of(root)) == unbroken, f"killed before write {count} ({writes[count]})"


def stop_after(patch, step):
    """A signal after that many steps, as a scheduler sends it."""
    advance = loop.Training._advance

    def interrupted(self):
        advance(self)
        if self.position.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(loop.Training, "_advance", interrupted)


@pytest.mark.parametrize("step", [1, 4, 10, 13, 29, 30])
def test_a_run_stopped_by_a_signal_goes_on_exactly(tmp_path, unbroken, step):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(loop.Interrupted) as caught:
            run_small(tmp_path)
    assert caught.value.exit_code == 143
    run_small(tmp_path)
    assert figures(folder_of(tmp_path)) == unbroken


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=muon", "model.num_layers=3"],
        ["optimizer=muon", "schedule=plateau", "schedule.patience=[1]", "schedule.minimum_lr=1e-9"],
        ["optimizer=adamw", "schedule=one_cycle", "trainer.label_smoothing=0.1"],
        ["optimizer=sgd", "optimizer.args.momentum=0.8", "optimizer.weight_decay=1e-3"],
        ["optimizer=custom", "optimizer._target_=torch.optim.RMSprop", "+optimizer.args.momentum=0.5"],
    ],
)
def test_a_run_with_any_optimizer_resumes_exactly(tmp_path, overrides):
    run_small(tmp_path / "unbroken", *overrides)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 13)
        with pytest.raises(loop.Interrupted):
            run_small(tmp_path / "broken", *overrides)
    run_small(tmp_path / "broken", *overrides)
    assert figures(folder_of(tmp_path / "broken")) == figures(folder_of(tmp_path / "unbroken"))


def test_a_run_in_bfloat16_goes_on_exactly(tmp_path, monkeypatch):
    """On any CPU: one without the instructions computes the same, but slowly, and is refused for that alone."""
    monkeypatch.setattr("indrnn.training.device.bfloat16_refusal", lambda: None)
    run_small(tmp_path / "unbroken", "trainer.precision=bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 13)
        with pytest.raises(loop.Interrupted):
            run_small(tmp_path / "broken", "trainer.precision=bfloat16")
    run_small(tmp_path / "broken", "trainer.precision=bfloat16")
    assert figures(folder_of(tmp_path / "broken")) == figures(folder_of(tmp_path / "unbroken"))


def test_a_signal_during_an_evaluation_breaks_it_off_without_a_trace(tmp_path, unbroken):
    evaluate = loop.evaluate

    def interrupted(model, split, objective, batch_size, device, between, **processes):
        if len(split.read) >= 3:  # the second evaluation
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model, split, objective, batch_size, device, between, **processes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted)
        with pytest.raises(loop.Interrupted, match="stopped at step 20"):
            run_small(tmp_path)
    assert [row["step"] for row in rows_of(folder_of(tmp_path)) if row["split"] == "val"] == ["10"]
    # Killed after the row of the evaluation that was made up for, before any other checkpoint.
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 2)
        with pytest.raises(Killed):
            run_small(tmp_path)
    run_small(tmp_path)
    assert figures(folder_of(tmp_path)) == unbroken


def test_best_weights_newer_than_the_checkpoint_do_not_matter(tmp_path, unbroken):
    stopped(tmp_path, 14)
    (folder_of(tmp_path) / "best.pt").write_bytes(b"from a later step that no checkpoint knows")
    run_small(tmp_path)
    assert figures(folder_of(tmp_path)) == unbroken


def start(root, *overrides):
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(root), *overrides], stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def kill_at_random(root, generator, kills, *overrides):
    """kill -9 a run again and again, each time at a random moment after it has begun to train, then let it end."""
    metrics = folder_of(root) / "metrics.csv"

    def written():
        try:
            return metrics.stat().st_mtime_ns
        except FileNotFoundError:  # a run that was killed before its first checkpoint removes it and begins anew
            return None

    for _ in range(kills):
        before = written()
        process = start(root, *overrides)
        while process.poll() is None:
            if written() not in (None, before):
                time.sleep(generator.uniform(0, 0.2))
                break
            time.sleep(0.01)
        process.kill()
        process.communicate()
    process = start(root, *overrides)
    _, err = process.communicate()
    assert process.returncode == 0, err


def test_kill_9_of_a_process(tmp_path):
    muon = ("optimizer=muon", "model.num_layers=3")
    run_small(tmp_path / "unbroken", *muon)
    kill_at_random(tmp_path / "killed", random.Random(0), 2, *muon)
    assert figures(folder_of(tmp_path / "killed")) == figures(folder_of(tmp_path / "unbroken"))


@pytest.mark.slow
def test_kill_9_ten_times_at_random_moments(tmp_path):
    more = ("trainer.max_steps=400", "trainer.eval_every=50", "trainer.checkpoint_every=20")
    run_small(tmp_path / "unbroken", *more)
    kill_at_random(tmp_path / "killed", random.Random(), 10, *more)
    assert figures(folder_of(tmp_path / "killed")) == figures(folder_of(tmp_path / "unbroken"))


def test_sigterm_ends_a_process_with_143_and_its_message(tmp_path):
    process = start(tmp_path, "trainer.max_steps=100000")
    metrics = folder_of(tmp_path) / "metrics.csv"
    while process.poll() is None and not (metrics.exists() and "val" in metrics.read_text()):
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 143, err
    assert "continue with the same command" in err.splitlines()[-1]


def stopped(root, step):
    """A run killed before the checkpoint of `step`; its last checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop.Training, "_has_ended", lambda self: self.position.step >= step and (_ for _ in ()).throw(Killed)
        )
        with pytest.raises(Killed):
            run_small(root)
    return folder_of(root) / "checkpoint.pt"


@pytest.fixture(scope="module")
def at_14(tmp_path_factory):
    root = tmp_path_factory.mktemp("half_done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "make_task", lambda data: small_task())
        stopped(root, 15)
    return root


@pytest.fixture
def path(at_14, tmp_path):
    """The checkpoint of a run below tmp_path that was killed after step 14, and so after its first evaluation."""
    shutil.copytree(at_14, tmp_path, dirs_exist_ok=True)
    return folder_of(tmp_path) / "checkpoint.pt"


def refusal(root, path, *overrides):
    """The one line with which the run is not gone on with; its checkpoint is kept."""
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        run_small(root, *overrides)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    return str(caught.value)


def test_a_checkpoint_that_was_cut_is_refused_and_kept(tmp_path, path):
    path.write_bytes(path.read_bytes()[:-100])
    assert "is damaged" in refusal(tmp_path, path)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (["seed=1"], "seed: 1 -> 0"),
        (["model.hidden_size=9"], "model.hidden_size: 9 -> 8"),
        (["trainer.max_steps=31"], "trainer.max_steps: 31 -> 30"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused_and_kept(tmp_path, path, other, said):
    run_small(tmp_path / "other", "trainer.max_steps=10", *other)
    path.write_bytes(next((tmp_path / "other").rglob("checkpoint.pt")).read_bytes())
    message = refusal(tmp_path, path)
    assert "is of another run: " in message
    assert said in message


@pytest.mark.parametrize("key", ["permutation_sha256", "sha256"])
def test_data_that_changed_since_the_checkpoint_is_refused(tmp_path, monkeypatch, key):
    def with_hash(digest):
        value = {"a.npz": digest} if key == "sha256" else digest
        provenance = {**small_splits().provenance, key: value}
        monkeypatch.setattr(state, "make_task", lambda data: task_with(provenance=provenance))

    with_hash("0a")
    path = stopped(tmp_path, 8)
    with_hash("0b")
    assert f"of another run: data.{key}{'.a.npz' if key == 'sha256' else ''}: 0a -> 0b" in refusal(tmp_path, path)
    with_hash("0a")
    assert run_small(tmp_path).steps == 30


ALTERATIONS = {
    "meter": lambda content: content.pop("meter"),
    "best": lambda content: content.pop("best"),
    "schedule": lambda content: content.update(schedule=[1]),
    "progressed.step": lambda content: content["progressed"].update(step="14"),
    "progressed": lambda content: content["progressed"].update(step=-1),
    "progressed.seconds": lambda content: content["progressed"].pop("seconds"),
    "random.cpu": lambda content: content["random"].update(cpu=torch.zeros(3, dtype=torch.uint8)),
    "random": lambda content: content["random"]["cpu"].zero_(),
    "optimizer": lambda content: content["optimizer"][0]["param_groups"].pop(),
    "best.model.layers.0.bias": lambda content: content["best"]["model"].pop("layers.0.bias"),
    "best.step": lambda content: content["best"].update(step=None),
    "best.score": lambda content: content["best"].pop("score"),
    "segments[0]": lambda content: content.update(segments=[1]),
    "fingerprint": lambda content: content.update(fingerprint=1),
    "fingerprint.data": lambda content: content["fingerprint"].pop("data"),
}


@pytest.mark.parametrize("part", ALTERATIONS)
def test_a_checkpoint_with_a_missing_or_misshapen_part_is_refused_by_the_parts_name(tmp_path, path, part):
    content = torch.load(path, weights_only=True)
    ALTERATIONS[part](content)
    torch.save(content, path)
    assert f"is damaged in its part {part}; move the file away" in refusal(tmp_path, path)


@pytest.mark.parametrize("model", [None, [], {}, {"layers.0.bias": 1}])
def test_a_checkpoint_without_its_weights_is_refused(tmp_path, path, model):
    torch.save({**torch.load(path, weights_only=True), "model": model}, path)
    refusal(tmp_path, path)


def test_a_checkpoint_from_before_there_were_fingerprints_is_gone_on_with(tmp_path, path, unbroken):
    content = torch.load(path, weights_only=True)
    del content["fingerprint"], content["segments"]
    torch.save({**content, "threads": 1}, path)
    run_small(tmp_path)
    assert figures(folder_of(tmp_path)) == unbroken


def test_every_segment_is_recorded_as_it_began(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(state, "running_code", lambda: {"commit": "a" * 40, "dirty": False})
    stopped(tmp_path, 8)
    stopped(tmp_path, 15)
    assert "written elsewhere" not in capsys.readouterr().err
    monkeypatch.setattr(state, "running_code", lambda: {"commit": "b" * 40, "dirty": False})
    monkeypatch.setattr("indrnn.training.state.backend_of", lambda *_: "numba")
    result = run_small(tmp_path)
    err = capsys.readouterr().err
    assert f"step 14, written elsewhere (git.commit: {'a' * 40} -> {'b' * 40}, backend: reference -> nu" in err
    assert err.count("written elsewhere") == 1
    assert [(each["step"], each["git"]["commit"][0]) for each in result.segments] == [(0, "a"), (7, "a"), (14, "b")]
    assert {"device", "device_name", "num_threads", "versions", "precision", "backend"} < set(result.segments[0])
    assert (result.backend, result.git["commit"]) == ("reference+numba", "b" * 40)
    assert read_result(folder_of(tmp_path) / "result.json") == result


def test_going_on_with_another_number_of_threads_is_said(tmp_path, path, capsys):
    content = torch.load(path, weights_only=True)
    content["segments"][0]["num_threads"] = 64
    torch.save(content, path)
    run_small(tmp_path)
    assert "step 14, written elsewhere (num_threads: 64 -> 1)" in capsys.readouterr().err
