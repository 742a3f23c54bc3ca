"""An interrupted run, gone on with, equals the one that was not interrupted, to the last bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from indrnn.errors import UserError
from indrnn.record import MetricsWriter
from indrnn.train import loop
from small_runs import figures, folder_of, rows_of, run_small, small_task

PROGRAM = Path(__file__).with_name("small_runs.py")


@pytest.fixture(autouse=True)
def task(monkeypatch):
    monkeypatch.setattr(loop, "make_task", lambda data: small_task())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    root = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_task", lambda data: small_task())
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


@pytest.mark.parametrize("step", [1, 4, 10, 13, 29, 30])
def test_a_run_stopped_by_a_signal_goes_on_exactly(tmp_path, unbroken, step):
    advance = loop.Training._advance

    def interrupted(self):
        advance(self)
        if self.at.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Training, "_advance", interrupted)
        with pytest.raises(loop.Interrupted) as caught:
            run_small(tmp_path)
    assert caught.value.exit_code == 143
    run_small(tmp_path)
    assert figures(folder_of(tmp_path)) == unbroken


def test_a_signal_during_an_evaluation_breaks_it_off_without_a_trace(tmp_path, unbroken):
    evaluate = loop.evaluate

    def interrupted(model, split, objective, batch_size, device, between):
        if len(split.read) >= 3:  # the second evaluation
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model, split, objective, batch_size, device, between)

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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Training, "_over", lambda self: self.at.step >= 14 and (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run_small(tmp_path)
    (folder_of(tmp_path) / "best.pt").write_bytes(b"from a later step that no checkpoint knows")
    run_small(tmp_path)
    assert figures(folder_of(tmp_path)) == unbroken


def start(root, *overrides):
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(root), *overrides], stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def kill_at_random(root, generator, kills, *overrides):
    """kill -9 a run again and again, each time at a random moment after it has begun to train, then let it end."""
    folder = folder_of(root)
    for _ in range(kills):
        process = start(root, *overrides)
        before = (folder / "metrics.csv").stat().st_mtime_ns if (folder / "metrics.csv").exists() else 0
        while process.poll() is None:
            if (folder / "metrics.csv").exists() and (folder / "metrics.csv").stat().st_mtime_ns != before:
                time.sleep(generator.uniform(0, 0.2))
                break
            time.sleep(0.01)
        process.kill()
        process.communicate()
    process = start(root, *overrides)
    _, err = process.communicate()
    assert process.returncode == 0, err


def test_kill_9_of_a_process(tmp_path, unbroken):
    kill_at_random(tmp_path, random.Random(0), kills=2)
    assert figures(folder_of(tmp_path)) == unbroken


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
    assert "go on with the same command" in err.splitlines()[-1]


@pytest.mark.parametrize("damage", ["cut", "other model"])
def test_a_checkpoint_that_cannot_be_used_is_refused_and_kept(tmp_path, damage):
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 10)
        with pytest.raises(Killed):
            run_small(tmp_path)
    path = folder_of(tmp_path) / "checkpoint.pt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        other = tmp_path / "other"
        run_small(other, "model.hidden_size=9", "trainer.max_steps=10")
        path.write_bytes((folder_of(other) / "checkpoint.pt").read_bytes())
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        run_small(tmp_path)
    assert str(path) in str(caught.value)
    assert ("is damaged" if damage == "cut" else "belongs to another model") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_going_on_with_another_number_of_threads_is_said(tmp_path, capsys):
    run_small(tmp_path, "trainer.max_steps=10")
    run_small(tmp_path, "trainer.max_steps=20")
    assert "CPU threads" not in capsys.readouterr().err
    path = folder_of(tmp_path) / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "threads": 64}, path)
    run_small(tmp_path, "trainer.max_steps=30")
    assert "step 20, made with 64 CPU threads where there are 1 now" in capsys.readouterr().err
