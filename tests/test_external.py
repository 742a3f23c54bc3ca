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

MODEL_YAML = """\
defaults:
  - /schema/model/external@_here_
  - _self_
name: mygru
_target_: mygru.GRUClassifier     # called as GRUClassifier(task, **args); task.input_size, output_size, length, loss
args:
  hidden_size: 64
"""
MODEL = """\
import torch
from torch import nn

class GRUClassifier(nn.Module):
    def __init__(self, task, hidden_size, dropout=0.5):
        super().__init__()
        self.gru = nn.GRU(task.input_size, hidden_size, batch_first=True)
        self.norm = nn.BatchNorm1d(hidden_size)
        self.head = nn.Linear(hidden_size, task.output_size)
        self.dropout = nn.Dropout(dropout)

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
DATA_YAML = """\
defaults:
  - /schema/data/external@_here_
  - _self_
name: firstbit
_target_: mytask.make_task
args:
  length: 12
"""
DATA = """\
import torch
from indrnn.data import Splits, Task

class Bits:
    def __init__(self, length, size, seed):
        self.size = size
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randint(2, (size, length, 1), generator=generator).float()

    def batch(self, indices):
        x = self.x[indices]
        return x, x[:, 0, 0].long()

class Strange(Bits):
    def batch(self, indices):
        x, y = super().batch(indices)
        return x, y.float()

def make_task(length, bits=Bits, **changes):
    def load(device):
        provenance = {"seed": 0, "length": length}
        return Splits(bits(length, 200, 0), bits(length, 60, 1), provenance, lambda: bits(length, 100, 2))

    known = dict(
        name="firstbit", folder=f"firstbit-T{length}", title=f"The first of {length} bits", length=length,
        input_size=1, output_size=2, loss="cross_entropy", load=load, training_samples=200, test_samples=100,
    )
    return Task(**known | changes)

def strange(length):
    return make_task(length, Strange)

def unsafe(length):
    return make_task(length, folder="../elsewhere")

def nothing(length):
    return None
"""
SMALL = (
    "device=cpu", "trainer.batch_size=16", "trainer.eval_batch_size=32", "trainer.bn_samples=32",
    "trainer.max_steps=20", "trainer.eval_every=10", "trainer.log_every=5", "trainer.checkpoint_every=10",
)  # fmt: skip


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The folder for --config-dir; the modules next to it are importable."""
    folder = tmp_path / "mine"
    for file, text in {"model/mygru.yaml": MODEL_YAML, "data/firstbit.yaml": DATA_YAML}.items():
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text(text)
    (tmp_path / "mygru.py").write_text(MODEL)
    (tmp_path / "mytask.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    forget(folder, monkeypatch)


def forget(mine, monkeypatch):
    """As in a process that was started without PYTHONPATH."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(mine.parent)])
    for name in ("mygru", "mytask"):
        sys.modules.pop(name, None)


def composed(mine, *overrides):
    root = f"output_root={mine.parent / 'outputs'}"
    return load_config(["model=mygru", "data=firstbit", root, *SMALL, *overrides], config_dir=str(mine))


def test_custom_model_and_task_train_resume_and_load(mine):
    result = train(composed(mine, "model.args.hidden_size=8"))
    assert (result.model, result.task, result.name) == ("mygru", "firstbit", "mygru")
    folder = mine.parent / "outputs" / "firstbit-T12" / "mygru" / "seed0"
    model, cfg = load_run(folder)
    assert model.gru.hidden_size == cfg.model.args.hidden_size == 8
    longer = train(composed(mine, "model.args.hidden_size=8", "trainer.max_steps=30"))
    assert longer.steps == 30
    assert [segment["step"] for segment in longer.segments] == [0, 20]


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

    words = ("--config-dir", "mine", "model=mygru", "data=firstbit", "model.args.hidden_size=4", *SMALL)
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
    assert "there is no module mytask" in err.splitlines()[-1]


def test_args_are_settable_checked_and_part_of_the_config(mine):
    for key in ("model.args.hiden_size=8", "model.hidden_size=8"):
        with pytest.raises(UserError, match=key.partition("=")[0]):
            composed(mine, key)
    train(composed(mine, "+model.args.dropout=0.1"))
    with pytest.raises(UserError, match=r"model\.args\.hidden_size: 64 -> 8"):
        train(composed(mine, "+model.args.dropout=0.1", "model.args.hidden_size=8"))


def test_trying_a_model_leaves_no_trace(mine):
    cfg = composed(mine)
    task = make_task(cfg.data)
    torch.manual_seed(3)
    model = build_model(cfg.model, task)
    after = torch.rand(4)
    torch.manual_seed(3)
    fresh = type(model)(task, 64)
    assert torch.equal(after, torch.rand(4))
    expected = fresh.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.norm.num_batches_tracked


def test_recurrent_weights_method_is_used(mine):
    for name, rows in (("GRUClassifier", 3 * 64), ("Shows", 3)):
        cfg = composed(mine, f"model._target_=mygru.{name}")
        (weight,) = recurrent_weights(build_model(cfg.model, make_task(cfg.data)))
        assert weight.shape == (rows, 64)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model._target_=nowhere.Net"], "model._target_=nowhere.Net: there is no module nowhere; .*PYTHONPATH"),
        (["model._target_=Net"], "model._target_=Net: .*write module.Name"),
        (
            ["model._target_=mygru.GRUClasifier"],
            "no attribute 'GRUClasifier'; did you mean mygru.GRUClassifier",
        ),
        (["model._target_=mygru.not_a_module"], "must return a torch.nn.Module, not 3"),
        (["model._target_=torch.nn"], "not a class or function"),
        (["model._target_=mygru.without"], "model.args: got an unexpected keyword .*without takes .task, ., size=3"),
        (["model.args.hidden_size=wide"], "with hidden_size=wide: TypeError: hidden_size should be of type int"),
        (["model._target_=mygru.Wrong"], r"its output must be \(3, 2\), not \(3, 12, 64\)"),
        (["model._target_=mygru.Falls"], r"called with x \(3, 12, 1\): RuntimeError: .*mygru.py, line 21"),
        (["data._target_=mytask.nothing"], "must return an indrnn.data.Task, not None"),
        (["data._target_=mytask.unsafe"], "folder='../elsewhere' of a task: use letters"),
        (["data.args.length=true"], "length=True of the task firstbit: it must be a whole number"),
        (["data._target_=mytask.strange"], r"y of two sequences of train must be \(2,\) torch.int64, not \(2,\)"),
    ],
)
def test_mistake_in_custom_code_is_one_line_before_training(mine, overrides, line):
    with pytest.raises(UserError, match=line) as refused:
        train(composed(mine, *overrides))
    assert "\n" not in str(refused.value)
    assert not list(mine.parent.rglob("metrics.csv"))


def test_recipes_of_contributing_work_as_written(tmp_path, monkeypatch):
    """The files of its checklists for a model and a task, found by the names in front of them."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = re.findall(r"Write `((?:mine/|my)[\w/.]+)`.*?```\w+\n(.*?)\n   ```", text, re.DOTALL)
    assert [name for name, _ in files] == ["mygru.py", "mine/model/mygru.yaml", "mytask.py", "mine/data/firstbit.yaml"]
    for name, content in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(content))
    monkeypatch.syspath_prepend(tmp_path)
    result = train(composed(tmp_path / "mine", "model.args.hidden_size=32"))
    assert (result.model, result.task, result.data) == ("mygru", "firstbit", {"seeds": [0, 1, 2]})
    forget(tmp_path / "mine", monkeypatch)
