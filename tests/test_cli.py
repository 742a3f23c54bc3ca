"""The commands as a user runs them: exit codes, one line for a mistake, no stray files."""

import os
import pkgutil
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import yaml

import indrnn.cli
import indrnn.training
from indrnn.cli import info
from indrnn.cli import train as command
from indrnn.errors import RunError, UserError
from indrnn.record.result import read_result
from indrnn.training import Interrupted

# sweep is a part of train.
COMMANDS = sorted(module.name for module in pkgutil.iter_modules(indrnn.cli.__path__) if module.name != "sweep")
HEAVY = ("torch", "torchvision", "numba", "triton", "tensorboard", "matplotlib", "pandas")
TINY = [
    "data=adding", "data.length=8", "data.validation_size=20", "data.test_size=20", "model.hidden_size=4",
    "model.num_layers=1", "model.backend=reference", "trainer.batch_size=4", "trainer.bn_samples=10", "device=cpu",
    "trainer.max_steps=2", "trainer.eval_every=2", "trainer.target_accuracy=null",
]  # fmt: skip
FAILURES = {
    "user": UserError("the data\n  are missing"),
    "run": RunError("the loss is nan"),
    "bug": ZeroDivisionError("a bug"),
    "memory": MemoryError(),
    "allocator": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    "stop": Interrupted("stopped", 15),
}


@dataclass
class Ended:
    code: int
    out: str
    err: str

    def refused(self) -> str:
        """The one line on stderr of a bad request."""
        assert self.code == 2
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("indrnn-train: ")
        assert self.out == ""
        return self.err


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """indrnn-train in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["/somewhere/indrnn-train", *words])
        code = 0
        try:
            command.main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return run


@pytest.fixture
def trained(monkeypatch):
    """Replaces training: the list of its calls. A tag that names an entry of FAILURES makes it fail."""
    calls = []

    def train(cfg, *, command):
        calls.append((cfg, command))
        if cfg.tag in FAILURES:
            raise FAILURES[cfg.tag]
        return SimpleNamespace(
            name=cfg.name, seed=cfg.seed, task="mnist", val_accuracy=0.5, val_loss=1.0, test_accuracy=0.845,
            test_loss=1.0, test_ci95=(0.82, 0.87), best_step=2, steps=2, parameters=68_362,
        )  # fmt: skip

    monkeypatch.setattr(indrnn.training, "train", train)
    return calls


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name, tmp_path):
    code = (
        f"import sys; sys.argv = ['indrnn-{name}', '--help']\n"
        f"from indrnn.cli.{name} import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        f"print('heavy:', [name for name in {HEAVY} if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert answer.stdout.splitlines()[-1] == "heavy: []"
    assert ("indrnn-eval" if name == "evaluate" else f"indrnn-{name}") in answer.stdout


def test_help_lists_the_choices_and_the_keys_of_the_chosen_model(run, tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "wide.yaml").write_text("defaults: [lstm, _self_]\nhidden_size: 300\n")
    text = run("model=wide", "--config-dir", "mine", "--help", "seed=1").out
    for word in ("lstm_chrono", "wide", "one_cycle", "demo", "model.hidden_size=300", "seed=1", "tag="):
        assert word in text
    assert "\n  model.gamma" not in text
    assert "lstm_chrono" in run("model=lsmt", "--help").refused()
    assert run("--version").out == f"indrnn {indrnn.__version__}\n"


def test_cfg_job_prints_the_configuration_without_running(run, trained, tmp_path):
    printed = run("model=lstm", "seed=3", "--cfg", "job", "--resolve")
    assert "68,362 parameters" in printed.err
    shown = yaml.safe_load(printed.out)
    assert (shown["model"]["name"], shown["seed"], shown["name"]) == ("lstm", 3, "lstm")
    assert "hydra" not in shown
    assert not trained
    assert not list(tmp_path.iterdir())


def test_run_leaves_its_folder_and_nothing_else(tmp_path):
    words = [sys.executable, "-m", "indrnn", *TINY, "tag=5e41726"]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.splitlines()[0] == "indrnn-train: loading PyTorch ..."
    folder = tmp_path / "outputs" / "adding-T8" / "indrnn-5e41726" / "seed0"
    result = read_result(folder / "result.json")
    assert result.steps == 2
    assert result.command == shlex.join(["indrnn-train", *TINY, "tag='5e41726'"])
    assert "outputs/adding-T8/indrnn-5e41726/seed0" in ended.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file() and folder not in path.parents] == []


@pytest.mark.parametrize(
    ("tag", "code", "text"),
    [("user", 2, "the data are missing"), ("run", 1, "loss is nan"), ("stop", 143, "stopped"),
     ("allocator", 1, "trainer.batch_size"), ("memory", 1, "trainer.batch_size"), ("bug", 1, "Traceback")],
)  # fmt: skip
def test_failure_is_one_line_and_an_exit_code_and_a_bug_a_traceback(run, trained, tag, code, text):
    ended = run(f"tag={tag}")
    assert ended.code == code
    assert text in ended.err
    assert (ended.err.count("\n") == 1) == (tag != "bug")


def test_ctrl_c_before_training_is_one_line(run, monkeypatch):
    # A background process ignores Ctrl-C, and so would this one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(indrnn.training, "train", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    try:
        ended = run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ended.code, ended.err.count("\n"), "SIGINT" in ended.err) == (130, 1, True)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("optimizer.lrr=1", "did you mean optimizer.lr"), ("seed=1,2", "multirun"), ("seed=-1", "at least 0"),
        *((f"{flag} nowhere{more}", "nowhere")
          for flag in ("--config-dir", "--config-name") for more in ("", " --cfg job", " --help")),
        ("-r -m", "Only one"),
        ("optimizer.lrr=1 --cfg job", "did you mean"), ("+zzz=1 --cfg all", "zzz"), ("seed=-1 --cfg job", "least 0"),
        ("-m model=indrnn,lsmt", "lstm_chrono"), ("-m optimizer.lr=1e-3,-1 tag=a", "above 0"),
        ("-m model=indrnn,lstm model.gamma=3", "model.gamma"), ("-m seed=0,x", "seed=x"),
        ("-m seed=0,1 +optimizer.lrr=1", "did you mean optimizer.lr"), ("-m seed=interval(0,1)", "INTERVAL"),
        ("-m optimizer.lr=1e-3,1e-4", "'tag=${optimizer.lr}'"),
    ],
)  # fmt: skip
def test_mistake_is_one_line_and_leaves_nothing_behind(run, trained, tmp_path, words, text):
    assert text in run(*words.split()).refused()
    assert not trained
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rank", "size", "address", "port", "lines"),
    [("0", "4", "host", "1", 1), ("3", "4", "host", "1", 0), ("3", "4", "", "1", 1), ("1", "", "host", "1", 1),
     *((rank, "4", "host", "1", 1) for rank in ("4", "-1", "x", "\u00b2", ""))],
)  # fmt: skip
def test_every_process_prints_except_the_other_ranks_of_torchrun(run, monkeypatch, rank, size, address, port, lines):
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("MASTER_ADDR", address), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, value)
    assert run("optimizer.lr=-1").err.count("\n") == lines


def test_output_works_on_an_ascii_terminal(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-m", "indrnn", "data.root='\u00fcbung'", "--help"]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert r"data.root=\xfcbung" in ended.stdout


def test_info_names_versions_backends_and_data(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("INDRNN_DATA", str(tmp_path))
    info.main([])
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["indrnn"].strip() == indrnn.__version__
    assert lines["reference on cpu"].strip() == "works"
    assert "not in" in lines["mnist"]
