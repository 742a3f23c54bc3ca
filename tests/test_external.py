"""Custom models and tasks: a folder of YAML and an importable file are enough."""

import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from indrnn.cli import evaluate as evaluate_command
from indrnn.cli import report as report_command
from indrnn.cli import train as train_command
from indrnn.config.compose import load_config
from indrnn.data import make_task
from indrnn.errors import UserError
from indrnn.models import build_model, recurrent_weights
from indrnn.training import load_run, train

# Appended to the recipes of CONTRIBUTING.md.
MODELS = """
import torch

class Normed(GRUClassifier):
    def __init__(self, task, hidden_size, dropout=0.5):
        super().__init__(task, hidden_size)
        self.norm, self.dropout = nn.BatchNorm1d(hidden_size), nn.Dropout(dropout)

    def forward(self, x):
        return self.head(self.dropout(self.norm(self.gru(x)[0][:, -1])))

class Wrong(GRUClassifier):
    def forward(self, x):
        return self.gru(x)[0]

class Falls(GRUClassifier):
    def forward(self, x):
        return self.head(x)

class Shows(GRUClassifier):
    def recurrent_weights(self):
        return [self.gru.weight_hh_l0[:3]]

def without(task, *, size=3):
    return GRUClassifier(task, size)

def not_a_module(task, hidden_size):
    return 3
"""
TASKS = """
import dataclasses

class Short(Bits):
    def batch(self, indices):
        x, y = super().batch(indices)
        return x[:, ::2], y

def short(length):
    def load(device):
        return dataclasses.replace(make_task(length).load(device), train=Short(length, 1000, 0, device))

    return dataclasses.replace(make_task(length), load=load)

def fails(length):
    return dataclasses.replace(make_task(length), load=lambda device: open("no/such/file"))

def unsafe(length):
    return dataclasses.replace(make_task(length), folder="../elsewhere")

def nothing(length):
    return None
"""
SMALL = (
    "model=mygru", "data=firstbit", "data.args.length=12",
    "device=cpu", "trainer.batch_size=16", "trainer.eval_batch_size=32", "trainer.bn_samples=32",
    "trainer.max_steps=20", "trainer.eval_every=10", "trainer.log_every=5", "trainer.checkpoint_every=10",
)  # fmt: skip


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The folder for --config-dir, from the recipes of CONTRIBUTING.md; the modules next to it are importable."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = re.findall(r"Write `((?:mine/|my)[\w/.]+)`.*?```\w+\n(.*?)\n   ```", text, re.DOTALL)
    assert [name for name, _ in files] == ["mygru.py", "mine/model/mygru.yaml", "mytask.py", "mine/data/firstbit.yaml"]
    for name, content in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(content) + {"mygru.py": MODELS, "mytask.py": TASKS}.get(name, ""))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "mine"
    forget(tmp_path / "mine", monkeypatch)


def forget(mine, monkeypatch):
    """As in a process that was started without PYTHONPATH."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(mine.parent)])
    for name in ("mygru", "mytask"):
        sys.modules.pop(name, None)


def composed(mine, *overrides):
    root = f"output_root={mine.parent / 'outputs'}"
    return load_config([root, *SMALL, *overrides], config_dir=str(mine))


def test_custom_model_and_task_train_resume_and_load(mine):
    result = train(composed(mine, "model.args.hidden_size=8"))
    assert (result.model, result.task, result.data) == ("mygru", "firstbit", {"seeds": [0, 1, 2]})
    folder = mine.parent / "outputs" / "firstbit-T12" / "mygru" / "seed0"
    model, cfg = load_run(folder)
    assert model.gru.hidden_size == cfg.model.args.hidden_size == 8
    (folder / "result.json").unlink()  # as if stopped during the test
    resumed = train(composed(mine, "model.args.hidden_size=8"))
    assert resumed.test_accuracy == result.test_accuracy
    assert [segment["step"] for segment in resumed.segments] == [0, 20]


def test_commands_import_custom_code(mine, monkeypatch, capsys):
    """Training, evaluation and report, as a user runs them."""
    monkeypatch.chdir(mine.parent)

    def run(command, *arguments):
        monkeypatch.setattr(sys, "argv", ["indrnn", *arguments])
        try:
            command()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    words = ("--config-dir", "mine", *SMALL, "model.args.hidden_size=4")
    code, out, err = run(train_command.main, *words)
    assert code == 0, err
    assert "mygru seed 0 on firstbit: test accuracy" in out
    code, out, err = run(evaluate_command.main, "outputs", "--device", "cpu")
    assert "1 of 1 agree" in out, err
    code, out, err = run(report_command.main, "outputs", "--out", "report")
    assert code == 0, err
    table = (mine.parent / "report" / "table.md").read_text()
    assert "The first of 12 bits" in table
    assert "mygru" in table
    forget(mine, monkeypatch)
    code, out, err = run(evaluate_command.main, "outputs")
    assert code == 2
    assert "No module named 'mytask'" in err.splitlines()[-1]


def test_args_are_settable_checked_and_part_of_the_config(mine):
    for key, message in (("args.hiden_size=8", r"append .* \+model"), ("hidden_size=8", "it belongs to model=indrnn,")):
        with pytest.raises(UserError, match=message):
            composed(mine, f"model.{key}")
    assert composed(mine, "model._target_=mygru.Normed", "+model.args.dropout=0.1").model.args.dropout == 0.1


def test_trying_a_model_leaves_no_trace(mine):
    cfg = composed(mine, "model._target_=mygru.Normed")
    task = make_task(cfg.data)
    torch.manual_seed(3)
    model = build_model(cfg.model, task)
    after = torch.rand(4)
    torch.manual_seed(3)
    expected = type(model)(task, 64).state_dict()
    assert torch.equal(after, torch.rand(4))
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert model.training


def test_recurrent_weights_method_is_used(mine):
    cfg = composed(mine, "model._target_=mygru.Shows")
    (weight,) = recurrent_weights(build_model(cfg.model, make_task(cfg.data)))
    assert weight.shape == (3, 64)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model._target_=nowhere.Net"], "model._target_=nowhere.Net: .*No module named 'nowhere'.*PYTHONPATH"),
        (["model._target_=mygru.GRUClasifier"], "no attribute 'GRUClasifier'"),
        (["model._target_=mygru.not_a_module"], "must return a torch.nn.Module, not 3"),
        (["model._target_=mygru.without"], "model.args={'hidden_size': 64}: TypeError: .* unexpected keyword"),
        (["model.args.hidden_size=wide"], "'wide'}: TypeError: hidden_size should be of type int"),
        (["model._target_=mygru.Wrong"], r"its output must be \(3, 2\), not \(3, 12, 64\)"),
        (["model._target_=mygru.Falls"], r"called with x \(3, 12, 1\): RuntimeError: .*mygru.py, line \d+"),
        (["data._target_=mytask.nothing"], "must return an indrnn.data.Task, not None"),
        (["data._target_=mytask.unsafe"], "folder='../elsewhere' of a task: use letters"),
        (["data._target_=mytask.short"], r"x of two sequences must be \(2, 12, 1\), not \(2, 6, 1\)"),
        (["data._target_=mytask.fails"], r"reading the data: FileNotFoundError: .*mytask.py, line \d+"),
    ],
)
def test_mistake_in_custom_code_is_one_line_before_training(mine, overrides, line):
    with pytest.raises(UserError, match=line) as refused:
        train(composed(mine, *overrides))
    assert "\n" not in str(refused.value)
    assert not list(mine.parent.rglob("metrics.csv"))
