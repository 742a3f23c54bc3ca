"""Sweeps: one table of all jobs at the end, shared work, equal results with every launcher."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

import indrnn.training
import test_cli
from indrnn.cli.sweep import JobError, run_job
from indrnn.config.compose import load_config
from indrnn.record.folder import open_run
from small_runs import figures

run, trained = test_cli.run, test_cli.trained

SMALL = [word for word in test_cli.TINY if "max_steps" not in word and "eval_every" not in word] + [
    "trainer.max_steps=40", "trainer.eval_every=20", "trainer.checkpoint_every=10", "trainer.log_every=5",
]  # fmt: skip
# The same for every launcher, because the number of threads may change the last bit.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def sweep(tmp_path):
    """Starts ``indrnn-train -m`` in an empty folder."""
    started = []

    def start(*words: str, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "indrnn", "-m", *words], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**ENVIRONMENT, **environment}, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ended(process: subprocess.Popen) -> str:
    """What a sweep that succeeded printed."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def folders(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.rglob("result.json"))


# In this process


def test_sweep_trains_every_combination_and_ends_with_a_table(run, tmp_path):
    first = run("-m", *test_cli.TINY, "model=indrnn,rnn", "model.backend=reference", "seed=0")
    assert first.code == 2  # rnn has no backend
    words = [word for word in test_cli.TINY if "backend" not in word]
    for more in ([], ["hydra.job.chdir=true", "hydra.sweep.dir=fixed"]):
        answer = run("-m", *words, "model=indrnn,rnn", "seed=0", *more)
        assert answer.code == 0, answer.err
        assert all(f"| {name} " in answer.out for name in ("IndRNN", "RNN"))
    assert [folder.parent.name for folder in folders(tmp_path)] == ["indrnn", "rnn"]
    assert folders(tmp_path)[0] == tmp_path / "outputs" / "adding-T8" / "indrnn" / "seed0"
    # A fixed folder is reused, and a failing job does not stop the others.
    answer = run("-m", *words, "model=indrnn,lstm", "optimizer.lr=0.1", "hydra.job.chdir=true",
                 "hydra.sweep.dir=fixed")  # fmt: skip
    assert answer.code == 1
    assert "| LSTM " in answer.out
    assert "optimizer.lr: 0.0002 -> 0.1" in answer.err


def test_text_keys_keep_their_text_in_a_sweep(run, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run("tag=5e41726,1.10,null", "-m", "output_root=~/runs", "name=1e5")
    assert [cfg.tag for cfg, *_ in trained] == ["5e41726", "1.10", None]
    assert {cfg.name for cfg, *_ in trained} == {"1e5"}
    assert shlex.split(trained[0][1]) == ["indrnn-train", "tag='5e41726'", "output_root='~/runs'", "name='1e5'"]
    assert [path.name for path in (tmp_path / "home" / "runs").iterdir()] == ["sweeps"]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_job_of_a_sweep_records_a_command_that_repeats_it(run, trained, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "short.yaml").write_text("# @package _global_\ntrainer:\n  max_steps: 7\n")
    run("-m", "--config-dir", "mine", "experiment=short", "seed=4,5")
    cfg, typed = trained[1]
    assert (cfg.name, cfg.trainer.max_steps) == ("short_indrnn", 7)
    assert typed == f"indrnn-train --config-dir {tmp_path / 'mine'} experiment=short seed=5"


def test_failed_job_does_not_stop_the_others_but_a_signal_does(run, trained):
    ended = run("-m", "tag=user,run,fine")
    assert len(trained) == 3
    assert ended.err.startswith("indrnn-train: the data are missing\nindrnn-train: the loss is nan\n")
    assert ended.code == 1
    ended = run("-m", "tag=stop,fine")
    assert len(trained) == 4
    assert (ended.code, ended.err) == (143, "indrnn-train: stopped\n")


def test_run_of_another_process_is_skipped(run, tmp_path):
    with open_run(load_config([*test_cli.TINY, f"output_root={tmp_path}/outputs"])):
        answer = run("-m", *test_cli.TINY, "seed=0,1")
        assert answer.code == 0
        assert "| IndRNN" in answer.out
        assert "in use by another process" in answer.err
        # Alone, there is nothing else to do.
        assert run(*test_cli.TINY).code == 2


def test_job_returns_the_validation_score_or_fails(trained):
    hydra = OmegaConf.create({"launcher": {"_target_": "any.BasicLauncher"}})

    def job(tag):
        return run_job(lambda: indrnn.training.train(SimpleNamespace(tag=tag, name="a", seed=0), command=""), hydra)

    assert job("fine") == 0.5
    with pytest.raises(JobError, match="the data are missing"):
        job("user")


# In several processes


@pytest.mark.slow
def test_parallel_sweep_equals_the_serial_one(sweep, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = [*SMALL, "seed=0,1", "model.dropout=0.1,0.2", "tag=${model.dropout}"]
    ended(sweep(*words, "output_root=serial"))
    two = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "output_root=parallel"]
    assert ended(sweep(*words, *two)).count("| IndRNN") == 2
    serial, parallel = folders(tmp_path / "serial"), folders(tmp_path / "parallel")
    assert len(serial) == len(parallel) == 4
    for one, other in zip(serial, parallel, strict=True):
        assert figures(one) == figures(other)


@pytest.mark.slow
def test_signal_lets_every_process_save_its_run(sweep, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    endless = [*SMALL, "trainer.max_steps=100000", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    process = sweep(*endless, "seed=0,1,2")
    wait_for(lambda: len(list(tmp_path.glob("outputs/*/*/*/checkpoint.pt"))) == 2, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    assert out.count("unfinished") == 2
    assert err.count("saved in") == 2


@pytest.mark.slow
def test_submitit_requeues_a_preempted_job_which_resumes(sweep, tmp_path):
    pytest.importorskip("submitit")
    words = [*SMALL, "trainer.max_steps=400", "seed=0"]
    ended(sweep(*words, "output_root=plain"))
    process = sweep(*words, "hydra/launcher=submitit_local", "output_root=cluster")
    wait_for(lambda: list(tmp_path.glob("cluster/*/*/*/checkpoint.pt")), process)
    # submitit's folder of a job is named after the process that starts it.
    (log,) = tmp_path.glob("cluster/sweeps/*/.submitit/*/*_log.out")
    job = int(subprocess.run(["pgrep", "-P", log.parent.name], capture_output=True, text=True, check=True).stdout)
    os.kill(job, signal.SIGUSR2)
    assert "| IndRNN" in ended(process)
    (one,), (other,) = folders(tmp_path / "plain"), folders(tmp_path / "cluster")
    assert figures(one) == figures(other)
    assert len(json.loads((other / "result.json").read_text())["segments"]) == 2
