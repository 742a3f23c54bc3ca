"""The commands as a user meets them: answers at once, exit codes, one line for a mistake, no junk in the folder."""

import os
import pkgutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

import indrnn.cli
import indrnn.training
from indrnn.cli import info
from indrnn.cli import train as command
from indrnn.errors import RunError, UserError
from indrnn.record.result import Result, read_result
from indrnn.training import Interrupted

# sweep is a part of train.
COMMANDS = sorted(module.name for module in pkgutil.iter_modules(indrnn.cli.__path__) if module.name != "sweep")
HEAVY = ("torch", "torchvision", "numba", "triton", "tensorboard", "matplotlib", "numpy")
TINY = [
    "data=mnist5k", "model.hidden_size=4", "trainer.max_steps=2", "trainer.eval_every=2", "trainer.batch_size=4",
    "data.validation_size=20", "data.test_size=20", "trainer.bn_samples=10", "device=cpu",
]  # fmt: skip

RESULT = Result(
    model="lstm", task="mnist5k", name="lstm", seed=0, parameters=68_362, best_step=2, steps=2, epochs=0.1,
    val_accuracy=0.5, val_loss=1.0, test_accuracy=0.845, test_loss=1.0, test_ci95=(0.82, 0.87), seconds=1.0,
    steps_per_second=2.0, peak_memory_bytes=None, backend="torch", device_name="cpu", precision="float32", data={},
    versions={}, git={}, command="",
)  # fmt: skip


@dataclass
class Ended:
    code: int
    out: str
    err: str

    def refused(self) -> str:
        """The one line on stderr of a request that cannot be met."""
        assert self.code == 2
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("indrnn-train: ")
        assert self.out == ""
        return self.err


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """indrnn-train in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

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
    """Stands in for the training: what it was called with. An override tag=<word> makes it fail in that way."""
    calls = []
    failures = {
        "user": UserError("the data\n  are missing"),
        "run": RunError("the loss is nan"),
        "bug": ZeroDivisionError("a bug"),
        "memory": MemoryError(),
        "allocator": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        "stop": Interrupted("stopped", 15),
    }

    def train(cfg, *, overrides, command):
        calls.append((cfg, list(overrides), command))
        if cfg.tag in failures:
            raise failures[cfg.tag]
        return replace(RESULT, name=cfg.name)

    monkeypatch.setattr(indrnn.training, "train", train)
    return calls


# Answering at once


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


def test_help_lists_choices_and_keys_of_the_model_at_hand(run):
    text = run("model=lstm", "--help").out
    assert "lstm_matched" in text
    assert "indrnn_12layer" in text
    assert "demo_indrnn" in text
    assert "model.num_layers=3" in text
    assert "model.forget_bias=1.0" in text
    assert "\n  model.gamma" not in text
    assert "schema" not in text


def test_version_is_the_projects(run):
    assert run("--version").out == f"indrnn {indrnn.__version__}\n"


def test_tab_completion_knows_groups_choices_and_keys(run, monkeypatch):
    for typed, offered in (("model=ls", "model=lstm_matched"), ("optimizer.l", "optimizer.lr="), ("opt", "optimizer=")):
        monkeypatch.setenv("COMP_LINE", f"indrnn-train {typed}")
        assert offered in run("-sc", "query=bash").out
    assert "indrnn-train" in run("-sc", "install=bash").out


def test_the_configuration_can_be_printed_without_running(run, trained, tmp_path):
    shown = yaml.safe_load(run("model=lstm", "seed=3", "--cfg", "job", "--resolve").out)
    assert (shown["model"]["name"], shown["seed"], shown["name"]) == ("lstm", 3, "lstm")
    assert "hydra" not in shown
    assert not trained
    assert not list(tmp_path.iterdir())


# Running


def test_a_run_leaves_its_folder_and_nothing_else(tmp_path):
    words = [sys.executable, "-m", "indrnn.cli.train", *TINY, "model.num_layers=1"]
    first = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "outputs" / "mnist5k" / "indrnn" / "seed0"
    result = read_result(folder / "result.json")
    assert result.steps == 2
    assert "model.num_layers=1" in result.command
    assert "test accuracy" in first.stdout
    assert "outputs/mnist5k/indrnn/seed0" in first.stdout
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and folder not in path.parents]
    assert not outside
    assert yaml.safe_load((folder / "overrides.yaml").read_text()) == [*TINY, "model.num_layers=1"]


def test_the_job_gets_its_configuration_overrides_and_command(run, trained):
    ended = run("model=lstm", "seed=3")
    assert ended.code == 0
    ((cfg, overrides, typed),) = trained
    assert (cfg.model.name, cfg.seed) == ("lstm", 3)
    assert overrides == ["model=lstm", "seed=3"]
    assert typed == "indrnn-train model=lstm seed=3"
    assert "84.50%" in ended.out
    assert "outputs/mnist/lstm/seed3" in ended.out


def test_a_sweep_runs_every_combination_in_the_folder_it_was_started_in(run, trained, tmp_path):
    assert run("-m", "model=lstm,indrnn", "seed=0,1").code == 0
    assert [(cfg.model.name, cfg.seed) for cfg, *_ in trained] == [
        ("lstm", 0), ("lstm", 1), ("indrnn", 0), ("indrnn", 1)
    ]  # fmt: skip
    assert trained[1][2] == "indrnn-train model=lstm seed=1"
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parts[:2] for path in files} <= {("outputs", "sweeps")}
    assert Path.cwd() == tmp_path


def test_a_job_of_a_sweep_records_a_command_that_repeats_it(run, trained, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "short.yaml").write_text("# @package _global_\ntrainer:\n  max_steps: 7\n")
    assert run("-m", "--config-dir", "mine", "experiment=short", "seed=4,5").code == 0
    cfg, _, typed = trained[1]
    assert cfg.trainer.max_steps == 7
    assert typed == f"indrnn-train --config-dir {tmp_path / 'mine'} experiment=short seed=5"


def test_flags_may_stand_between_overrides(run, trained):
    assert run("model=lstm", "-m", "seed=0,1").code == 0
    assert [(cfg.model.name, cfg.seed) for cfg, *_ in trained] == [("lstm", 0), ("lstm", 1)]
    assert "model.forget_bias" in run("model=lstm", "--help", "seed=1").out


def test_a_variant_of_ones_own_has_a_run_folder_of_its_own(run, trained, tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "lstm_wide.yaml").write_text("defaults: [lstm, _self_]\nhidden_size: 300\n")
    for words in (["model=lstm_wide"], ["-m", "model=lstm_wide"]):
        ended = run("--config-dir", "mine", *words)
        assert ended.code == 0, ended.err
        assert (trained[-1][0].name, trained[-1][0].model.name) == ("lstm_wide", "lstm")
        assert "outputs/mnist/lstm_wide/seed0" in ended.out


def test_a_command_says_what_it_is_doing_before_it_loads_pytorch(tmp_path):
    code = (
        "import sys, types\n"
        "from indrnn.cli import train as command\n"
        "class Stop:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch': print('torch', file=sys.stderr); raise SystemExit(0)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "sys.argv = ['indrnn-train', 'data=mnist5k']\n"
        "command.main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ended.stderr.splitlines()[:2] == ["indrnn-train: loading PyTorch ...", "torch"]


def test_a_failed_job_of_a_sweep_does_not_stop_the_others(run, trained):
    ended = run("-m", "tag=user,run,fine")
    assert len(trained) == 3
    assert ended.err == "indrnn-train: the data are missing\nindrnn-train: the loss is nan\n"
    assert ended.code == 2


def test_a_signal_stops_the_whole_sweep(run, trained):
    ended = run("-m", "tag=stop,fine")
    assert len(trained) == 1
    assert (ended.code, ended.err) == (143, "indrnn-train: stopped\n")


@pytest.mark.parametrize(("tag", "code", "text"), [("user", 2, "the data are missing"), ("run", 1, "loss is nan"),
                                                   ("allocator", 1, "trainer.batch_size"),
                                                   ("memory", 1, "trainer.batch_size")])  # fmt: skip
def test_what_stops_a_job_is_one_line_and_an_exit_code(run, trained, tag, code, text):
    ended = run(f"tag={tag}")
    assert ended.code == code
    assert text in ended.err
    assert ended.err.count("\n") == 1


def test_a_bug_shows_its_traceback(run, trained):
    ended = run("tag=bug")
    assert ended.code == 1
    assert "Traceback" in ended.err


def test_a_traceback_can_be_asked_for(run, trained, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    ended = run("optimizer.lr=-1")
    assert ended.code == 2
    assert "Traceback" in ended.err
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_training_is_one_line(run, monkeypatch, number):
    before = signal.getsignal(signal.SIGTERM)
    # A process that was started in the background ignores Ctrl-C, and so would this one.
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(command, "_check_jobs", lambda *_: os.kill(os.getpid(), number))
    try:
        ended = run()
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
    assert ended.code == 128 + number
    assert number.name in ended.err
    assert ended.err.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) is before


# What is refused


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["optimizer.lrr=1"], "did you mean optimizer.lr"),
        (["+optimizer.lrr=1"], "did you mean optimizer.lr"),
        (["model=lsmt"], "indrnn_dense"),
        (["optimizer.lr=fast"], "not a number"),
        (["trainer.batch_size=1"], "at least 2"),
        (["seed=1,2"], "-m"),
        (["model.num_layers=[1"], "cannot be read"),
        (["hydra.nothing=1"], "hydra.nothing"),
        (["hydra/launcher=joblb"], "hydra/launcher"),
        (["optimizer.lr=${model}"], "optimizer.lr=${model}: a group of keys is not a number\n"),
        (["model=lstm", "model.name=lstm_matched"], "write model=lstm_matched"),
        (["optimizer.lr=1" + "0" * 400], "optimizer.lr"),
        (["--bogus"], "--help"),
        (["--cfg"], "--cfg"),
        (["-r", "-m"], "Only one"),
        (["--config-dir", "nowhere"], "nowhere"),
        (["--config-path", "nowhere"], "--config-dir"),
        (["--config-name", "nothing"], "nothing"),
        (["model=lsmt", "--help"], "indrnn_dense"),
        (["optimizer.lrr=1", "--cfg", "job"], "did you mean"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(run, trained, tmp_path, words, text):
    assert text in run(*words).refused()
    assert not trained
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [["model=indrnn,lsmt"], ["optimizer.lr=1e-3,-1", "tag=a"], ["model=indrnn,lstm", "model.gamma=3"],
     ["seed=0,x"], ["seed=interval(0,1)"]],
)  # fmt: skip
def test_every_job_of_a_sweep_is_checked_before_the_first_runs(run, trained, tmp_path, words):
    run("-m", *words).refused()
    assert not trained
    assert not list(tmp_path.iterdir())


def test_jobs_that_would_share_a_run_folder_are_refused_with_a_way_out(run, trained):
    assert "'tag=lr-${optimizer.lr}'" in run("-m", "optimizer.lr=1e-3,1e-4").refused()
    assert run("-m", "optimizer.lr=1e-3,1e-4", "tag=lr-${optimizer.lr}").code == 0
    assert len(trained) == 2


def test_a_sweep_that_cannot_write_is_refused(run, trained, tmp_path):
    (tmp_path / "taken").touch()
    assert "output_root=" in run("-m", "seed=0,1", "output_root=taken").refused()


# indrnn-info


def test_info_names_versions_backends_and_data(capsys, tmp_path):
    info.main(["--data-root", str(tmp_path)])
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["indrnn"].strip() == indrnn.__version__
    assert lines["reference on cpu"].strip() == "works"
    assert {"python", "torch", "cpu", "configuration", "numba on cpu", "triton on cpu"} <= set(lines)
    assert "not in" in lines["mnist"]


@pytest.mark.parametrize(
    ("refusal", "said"), [("this CPU lacks it", "no: this CPU lacks it"), (None, "times as fast as in float32")]
)
def test_info_says_whether_bfloat16_pays_on_this_cpu(capsys, monkeypatch, refusal, said):
    monkeypatch.setattr("indrnn.training.device.bfloat16_refusal", lambda: refusal)
    info.main([])
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert said in lines["bfloat16 on cpu"]


def test_info_finds_mnist(capsys, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte.gz").touch()
    info.main(["--data-root", str(tmp_path)])
    assert f"found in {raw}" in capsys.readouterr().out
