"""A resumed run equals an uninterrupted one, to the last bit."""

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
from torch import nn

import small_runs
from indrnn.errors import UserError
from indrnn.record.result import read_result
from indrnn.training import Interrupted
from small_runs import (
    BASE,
    Killed,
    at,
    figures,
    folder_of,
    kill,
    reads,
    rows_of,
    run_small,
    send,
)  # fmt: skip

PROGRAM = Path(__file__).with_name("small_runs.py")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    root = tmp_path_factory.mktemp("unbroken")
    run_small(root)
    return figures(folder_of(root))


def stopped(root, step, *overrides, **more):
    """Stop a run after a step, by a signal."""
    at("train", step, send(signal.SIGTERM))
    with pytest.raises(Interrupted) as caught:
        run_small(root, *overrides, **more)
    assert caught.value.exit_code == 143


def killed(root, step):
    """Kill a run in a step; return the path of its last checkpoint."""
    at("train", step, kill)
    with pytest.raises(Killed):
        run_small(root)
    return folder_of(root) / "checkpoint.pt"


@pytest.mark.slow
def test_a_run_killed_between_any_two_writes_resumes_exactly(tmp_path, unbroken, monkeypatch):
    replace, written = os.replace, []

    def counted(source, target):
        if len(written) == limit:
            raise Killed
        written.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", counted)
    limit = -1
    run_small(tmp_path / "all")
    names = written
    assert {"checkpoint.pt", "best.pt", "metrics.csv", "weights.safetensors", "result.json"} < set(names)
    for limit in range(len(names)):
        root, written = tmp_path / str(limit), []
        with pytest.raises(Killed):
            run_small(root)
        limit, killed_before = -1, names[limit]
        run_small(root)
        assert figures(folder_of(root)) == unbroken, f"killed before {killed_before}"


@pytest.mark.parametrize("step", [1, 10, 13, 30])
def test_a_run_stopped_by_a_signal_resumes_exactly(tmp_path, unbroken, step):
    stopped(tmp_path, step)
    run_small(tmp_path)
    assert figures(folder_of(tmp_path)) == unbroken


class Alternating(nn.Module):
    """Some parameters get no gradient in some steps: one of two heads, an expert chosen by the input, a layer that is
    dropped at random, and one that is never used."""

    def __init__(self, task, hidden_size=8):
        super().__init__()
        self.first = nn.Linear(task.input_size, hidden_size)
        self.experts = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(2))
        self.dropped = nn.Linear(hidden_size, hidden_size)
        self.heads = nn.ModuleList(nn.Linear(hidden_size, task.output_size) for _ in range(2))
        self.unused = nn.Linear(hidden_size, hidden_size)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        z = torch.tanh(self.first(x)).mean(1)
        z = self.experts[int(z.mean() > 0)](z)
        if not self.training or torch.rand(()) > 0.5:
            z = z + self.dropped(z)
        if self.training:
            self.calls += 1
        # The second head is trained only from step 20 on.
        return self.heads[int(self.calls > 20)](z)


class Complex(nn.Module):
    """A linear recurrence with complex parameters, as in LRU or S4."""

    def __init__(self, task, hidden_size=8):
        super().__init__()
        self.decay = nn.Parameter(torch.polar(torch.full((hidden_size,), 0.9), torch.linspace(0, 3, hidden_size)))
        self.weight = nn.Parameter(torch.randn(hidden_size, task.input_size, dtype=torch.complex64))
        self.head = nn.Linear(hidden_size, task.output_size)

    def recurrent_weights(self):
        return [self.decay]

    def forward(self, x):
        h = 0
        for x_t in x.to(torch.complex64).unbind(1):
            h = self.decay * h + x_t @ self.weight.mT
        return self.head(h.real)


def custom_model(name):
    return (*BASE, "model=custom", f"model._target_=test_resume.{name}")


INDRNN = (*BASE, *small_runs.INDRNN)
PLATEAU = ("schedule=plateau", "schedule.patience=[1]", "schedule.minimum_lr=1e-9")
CASES = {
    "muon": (INDRNN, "optimizer=muon", "model.num_layers=3"),
    "muon-plateau": (INDRNN, "optimizer=muon", "model.num_layers=3", *PLATEAU),
    "adamw": (INDRNN, "optimizer=adamw", "schedule=one_cycle", "trainer.label_smoothing=0.1"),
    "sgd": (INDRNN, "optimizer=sgd", "optimizer.args.momentum=0.8", "optimizer.weight_decay=1e-3"),
    "custom": (INDRNN, "optimizer=custom", "optimizer._target_=torch.optim.RMSprop", "+optimizer.args.momentum=0.5"),
    "schedule": (
        INDRNN, "schedule=custom", "schedule._target_=torch.optim.lr_scheduler.CosineAnnealingLR",
        "+schedule.args.T_max=30",
    ),
    "bfloat16": (INDRNN, "trainer.precision=bfloat16"),
    "alternating": (custom_model("Alternating"),),
    "alternating-plateau": (custom_model("Alternating"), *PLATEAU, "optimizer.lr=0.3"),
    "alternating-muon": (custom_model("Alternating"), "optimizer=muon"),
    "complex": (custom_model("Complex"), "trainer.clip_value=0.1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_any_optimizer_network_and_precision_resumes_exactly(tmp_path, monkeypatch, case):
    # A CPU without bfloat16 instructions computes the same, but slowly, and is refused only for that.
    monkeypatch.setattr("indrnn.training.device.bfloat16_refusal", lambda: None)
    base, *overrides = CASES[case]
    result = run_small(tmp_path / "unbroken", *overrides, base=base)
    stopped(tmp_path / "broken", 13, *overrides, base=base)
    stopped(tmp_path / "broken", 10, *overrides, base=base)  # counted from the second start
    run_small(tmp_path / "broken", *overrides, base=base)
    one, two = (figures(folder_of(tmp_path / name, result.name)) for name in ("broken", "unbroken"))
    assert one == two


def test_a_signal_during_an_evaluation_ends_it_without_a_trace(tmp_path, unbroken):
    at("validation", 4, send(signal.SIGTERM))
    with pytest.raises(Interrupted, match="stopped at step 20"):
        run_small(tmp_path)
    assert [row["step"] for row in rows_of(folder_of(tmp_path)) if row["split"] == "val"] == ["10"]
    # The evaluation is repeated; the run is killed after its row, before the next checkpoint.
    killed(tmp_path, 1)
    run_small(tmp_path)
    assert figures(folder_of(tmp_path)) == unbroken


def test_best_weights_newer_than_the_checkpoint_do_not_matter(tmp_path, path, unbroken):
    (folder_of(tmp_path) / "best.pt").write_bytes(b"from a later step that no checkpoint knows")
    run_small(tmp_path)
    assert figures(folder_of(tmp_path)) == unbroken


def stop_at_random(root, generator, signals, *overrides):
    """Send signals to a run, each at a random moment after it has begun to train, then finish it."""
    metrics = folder_of(root) / "metrics.csv"

    def start():
        words = [sys.executable, str(PROGRAM), str(root), *overrides]
        return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)

    def written():
        try:
            return metrics.stat().st_mtime_ns
        except FileNotFoundError:  # a run that was killed before its first checkpoint removes it and starts again
            return None

    for number in signals:
        before, process = written(), start()
        while process.poll() is None:
            if written() not in (None, before):
                time.sleep(generator.uniform(0, 0.2))
                break
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate()
    process = start()
    _, err = process.communicate()
    assert process.returncode == 0, err


MUON = ("optimizer=muon", "model.num_layers=3")
LONGER = ("trainer.max_steps=400", "trainer.eval_every=50", "trainer.checkpoint_every=20")


@pytest.mark.parametrize(
    ("seed", "signals", "overrides"),
    [
        (0, [signal.SIGKILL, signal.SIGTERM], MUON),
        pytest.param(None, [signal.SIGKILL, signal.SIGKILL, signal.SIGINT] * 4, LONGER, marks=pytest.mark.slow),
    ],
)
def test_processes_stopped_by_kill_9_and_by_signals_resume_exactly(tmp_path, seed, signals, overrides):
    run_small(tmp_path / "unbroken", *overrides)
    stop_at_random(tmp_path / "stopped", random.Random(seed), signals, *overrides)
    assert figures(folder_of(tmp_path / "stopped")) == figures(folder_of(tmp_path / "unbroken"))


@pytest.fixture(scope="module")
def at_14(tmp_path_factory):
    root = tmp_path_factory.mktemp("half_done")
    killed(root, 15)
    return root


@pytest.fixture
def path(at_14, tmp_path):
    """The checkpoint of a run below tmp_path that was killed after step 14, and so after its first evaluation."""
    shutil.copytree(at_14, tmp_path, dirs_exist_ok=True)
    return folder_of(tmp_path) / "checkpoint.pt"


def refusal(root, path, *overrides):
    """The one line with which the run is not resumed; its checkpoint is kept."""
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        run_small(root, *overrides)
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert len(reads("train")) <= 1, "it was refused before the first step"
    return str(caught.value)


@pytest.mark.parametrize("other", [["seed=1"], ["model.hidden_size=9"], ["trainer.max_steps=31"]])
def test_the_checkpoint_of_another_run_is_refused_and_kept(tmp_path, path, other):
    run_small(tmp_path / "other", "trainer.max_steps=10", *other)
    path.write_bytes(next((tmp_path / "other").rglob("checkpoint.pt")).read_bytes())
    assert other[0].replace("=", ": ") + " -> " in refusal(tmp_path, path)


def test_data_that_changed_since_the_checkpoint_are_refused(tmp_path, path, monkeypatch):
    monkeypatch.setitem(small_runs.PROVENANCE, "a.npz", "0b")
    assert "data.sha256.a.npz: 0a -> 0b" in refusal(tmp_path, path)
    monkeypatch.undo()
    assert run_small(tmp_path).steps == 30


DAMAGE = {
    "meter": lambda content: content.pop("meter"),
    "meter shape": lambda content: content.update(meter=torch.zeros(4)),
    "best": lambda content: content.pop("best"),
    "position": lambda content: content["progressed"].pop("seconds"),
    "random": lambda content: content["random"].update(cpu=torch.zeros(3, dtype=torch.uint8)),
    "optimizer": lambda content: content["optimizer"][0]["param_groups"].pop(),
    "optimizers": lambda content: content["optimizer"].append({}),
    "fingerprint": lambda content: content["fingerprint"].pop("data"),
    "weight": lambda content: content["model"].pop("layers.0.bias"),
    "format": lambda content: content.update(format=2),
}


@pytest.mark.parametrize("part", ["cut", *DAMAGE])
def test_a_damaged_checkpoint_is_refused_and_kept(tmp_path, path, part):
    if part == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        content = torch.load(path, weights_only=True)
        DAMAGE[part](content)
        torch.save(content, path)
    message = refusal(tmp_path, path)
    assert "damaged" in message


def test_every_segment_is_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("indrnn.training.result.running_code", lambda: {"commit": "a" * 40, "dirty": False})
    killed(tmp_path, 8)
    monkeypatch.setattr("indrnn.training.result.running_code", lambda: {"commit": "b" * 40, "dirty": False})
    result = run_small(tmp_path)
    assert "resuming from the checkpoint at step 7" in capsys.readouterr().err
    assert [(each["step"], each["git"]["commit"][0]) for each in result.segments] == [(0, "a"), (7, "b")]
    assert {"device", "device_name", "num_threads", "versions", "precision", "backend"} < set(result.segments[0])
    assert (result.backend, result.git["commit"]) == ("reference", "b" * 40)
    assert read_result(folder_of(tmp_path) / "result.json") == result
