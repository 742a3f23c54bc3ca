"""Sweeps: every job's end is said in one table, work is shared, and no launcher changes a result."""

import importlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.plugins import Plugins

import test_cli
from indrnn.cli.sweep import JobRecord, table, thread_budget
from indrnn.record.folder import FolderInUseError
from small_runs import figures

run, trained = test_cli.run, test_cli.trained

TRAIN = [sys.executable, "-c", "from indrnn.cli.train import main; main()"]
SMALL = [
    "data=adding", "data.length=8", "data.validation_size=20", "data.test_size=20", "model.hidden_size=4",
    "model.num_layers=2", "model.backend=reference", "trainer.batch_size=4", "trainer.bn_samples=10", "device=cpu",
    "trainer.max_steps=40", "trainer.eval_every=20", "trainer.checkpoint_every=10", "trainer.log_every=5",
    "trainer.target_accuracy=null",
]  # fmt: skip
ENDLESS = [word for word in SMALL if "max_steps" not in word] + ["trainer.max_steps=100000"]
# The same whatever runs the job, for the number of threads may change a last bit.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def sweep(tmp_path):
    """Starts ``indrnn-train -m`` in an empty folder."""
    started = []

    def start(*words: str, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [*TRAIN, "-m", *words], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**ENVIRONMENT, **environment}, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ended(process: subprocess.Popen) -> str:
    """What a sweep that ended well printed."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def running(group: int) -> bool:
    """Whether the group of processes has any."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def folders(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.rglob("result.json"))


# In one process


def test_a_sweep_ends_with_a_table_of_what_became_of_its_jobs(run, trained):
    lines = run("-m", "tag=fine,user,run").out.splitlines()
    begin = lines.index("sweep: 1 done, 2 failed")
    rows = [line.split(maxsplit=3) for line in lines[begin + 2 :]]
    assert [row[:2] for row in rows] == [["0", "done"], ["1", "failed"], ["2", "failed"]]
    assert "50.00%" in lines[begin + 2]
    assert "outputs/mnist/indrnn-user/seed0" in lines[begin + 3]
    assert "the data are missing" in lines[begin + 3]


def test_a_run_that_another_process_has_is_skipped(run, monkeypatch):
    import indrnn.training

    def train(cfg, **_):
        if cfg.seed == 0:
            raise FolderInUseError("in use")
        return test_cli.RESULT

    monkeypatch.setattr(indrnn.training, "train", train)
    answer = run("-m", "seed=0,1")
    assert answer.code == 0
    assert "sweep: 1 done, 1 skipped" in answer.out
    assert "another process has it" in answer.out
    assert "in use by another process" in answer.err
    # Alone, there is nothing else to do.
    assert run("seed=0").code == 2


def test_a_stopped_sweep_says_which_jobs_were_not_run(run, trained):
    answer = run("-m", "tag=stop,fine")
    assert answer.code == 143
    assert "sweep: 1 not run, 1 stopped" in answer.out


def test_a_sweeper_gets_the_validation_score_and_hears_of_failures(run, trained, tmp_path, monkeypatch):
    (tmp_path / "mine" / "hydra" / "sweeper").mkdir(parents=True)
    (tmp_path / "mine" / "hydra" / "sweeper" / "listening.yaml").write_text(
        "# @package hydra.sweeper\n_target_: hydra_plugins.listening.Listening\nmax_batch_size: null\nparams: null\n"
    )
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "listening.py").write_text(
        "from hydra._internal.core_plugins.basic_sweeper import BasicSweeper\n"
        "class Listening(BasicSweeper):\n"
        "    def sweep(self, arguments):\n"
        "        jobs = self.launcher.launch([['tag=fine'], ['tag=user']], initial_job_idx=0)\n"
        "        print([(job.status.name, job._return_value) for job in jobs])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    Plugins.instance().register(importlib.import_module("hydra_plugins.listening").Listening)
    answer = run("-m", "--config-dir", "mine", "hydra/sweeper=listening")
    assert "[('COMPLETED', 0.5), ('FAILED', RunError('the data are missing'))]" in answer.out
    assert "sweep: 1 done, 1 failed" in answer.out
    assert answer.code == 2


@pytest.mark.parametrize(
    ("kind", "settings", "jobs", "threads"),
    [
        ("hydra_plugins.JoblibLauncher", {"n_jobs": -1}, 100, 1),
        ("hydra_plugins.JoblibLauncher", {"n_jobs": -1}, 2, 4),
        ("hydra_plugins.JoblibLauncher", {"n_jobs": 2}, 100, 4),
        ("hydra_plugins.JoblibLauncher", {"n_jobs": 3}, 0, 2),
        ("hydra_plugins.submitit.LocalLauncher", {"cpus_per_task": None}, 4, 2),
        ("hydra_plugins.submitit.LocalLauncher", {"cpus_per_task": 3}, 4, 3),
        ("hydra_plugins.submitit.SlurmLauncher", {"cpus_per_task": 16}, 4, 16),
        ("hydra_plugins.submitit.SlurmLauncher", {"cpus_per_task": None}, 4, None),
        ("hydra_plugins.RayLauncher", {"ray": SimpleNamespace(remote={})}, 4, 1),
        ("hydra_plugins.RayLauncher", {"ray": SimpleNamespace(remote={"num_cpus": 2})}, 4, 2),
    ],
)
def test_jobs_that_run_at_once_share_the_cores(monkeypatch, kind, settings, jobs, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert thread_budget(kind, SimpleNamespace(**settings), jobs) == threads


def test_the_table_shows_losses_where_there_are_no_classes():
    text = table([JobRecord(0, "outputs/adding-T100/lstm/seed0", "done", score=-0.0123)])
    assert "-0.0123" in text


# Several processes


@pytest.mark.slow
def test_a_sweep_on_two_processes_killed_and_started_again_is_the_serial_one(sweep, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = [*SMALL, "seed=0,1,2", "model.dropout=0.1,0.2", "tag=${model.dropout}"]
    assert "sweep: 6 done" in ended(sweep(*words, "output_root=serial"))
    two = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "output_root=parallel"]
    killed = sweep(*words, *two)
    wait_for(lambda: list(tmp_path.glob("parallel/*/*/*/checkpoint.pt")), killed)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    # Its processes notice, save and let go.
    state = "running"
    deadline = time.monotonic() + 120
    while state == "running" and time.monotonic() < deadline:
        out = ended(sweep(*words, *two))
        state = "running" if "another process has it" in out else "over"
    assert "sweep: 6 skipped" in ended(sweep(*words, *two))
    while running(killed.pid):
        assert time.monotonic() < deadline, "a process of the killed sweep is left"
        time.sleep(0.1)
    serial, parallel = folders(tmp_path / "serial"), folders(tmp_path / "parallel")
    assert len(serial) == len(parallel) == 6
    for one, other in zip(serial, parallel, strict=True):
        assert figures(one) == figures(other)


@pytest.mark.slow
def test_two_commands_share_one_sweep(sweep, tmp_path):
    words = [*SMALL, "seed=0,1,2,3"]
    first, second = sweep(*words), sweep(*words)
    answers = [ended(first), ended(second)]
    assert len(folders(tmp_path / "outputs")) == 4
    assert sum(line.split()[1:2] == ["done"] for answer in answers for line in answer.splitlines()) == 4


@pytest.mark.slow
def test_a_signal_lets_every_process_save_its_run(sweep, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = sweep(*ENDLESS, "seed=0,1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    wait_for(lambda: len(list(tmp_path.glob("outputs/*/*/*/checkpoint.pt"))) == 2, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    assert "sweep: 1 not run, 2 stopped" in out
    assert err.count("saved in") == 2


@pytest.mark.slow
def test_submitit_requeues_a_job_that_is_preempted_and_it_goes_on(sweep, tmp_path):
    pytest.importorskip("submitit")
    words = [*(word for word in SMALL if "max_steps" not in word), "trainer.max_steps=400", "seed=0"]
    ended(sweep(*words, "output_root=plain"))
    process = sweep(*words, "hydra/launcher=submitit_local", "output_root=cluster")
    wait_for(lambda: list(tmp_path.glob("cluster/*/*/*/checkpoint.pt")), process)
    (record,) = tmp_path.glob("cluster/sweeps/*/job0.json")
    os.kill(json.loads(record.read_text())["pid"], signal.SIGUSR2)
    assert "sweep: 1 done" in ended(process)
    (one,), (other,) = folders(tmp_path / "plain"), folders(tmp_path / "cluster")
    assert figures(one) == figures(other)
    assert len(json.loads((other / "result.json").read_text())["segments"]) == 2


def processes_with(environment: dict[str, str]) -> list[Path]:
    """The processes, as folders of /proc, that were started with these variables (none where there is no /proc)."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = (path / "environ").read_bytes().split(b"\0")
            if all(f"{name}={value}".encode() in variables for name, value in environment.items()):
                found.append(path)
    return found


@pytest.mark.slow
def test_ray_runs_a_sweep_on_one_machine_and_is_stopped(sweep, tmp_path):
    pytest.importorskip("ray")
    small = [
        f"+hydra.launcher.ray.init.{setting}"
        for setting in ("num_cpus=1", "include_dashboard=false", "object_store_memory=100_000_000")
    ]
    mark = {"INDRNN_TEST_OF_RAY": str(tmp_path)}  # which every process that Ray starts inherits
    process = sweep(*SMALL, "seed=0,1", "hydra/launcher=ray", *small, RAY_USAGE_STATS_ENABLED="0", **mark)
    wait_for(lambda: len(processes_with(mark)) > 2 or process.poll() is not None, process)
    assert "sweep: 2 done" in ended(process)
    assert len(folders(tmp_path / "outputs")) == 2
    deadline = time.monotonic() + 60
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_with(mark)


def test_the_slurm_script_asks_for_what_the_example_says(sweep, tmp_path):
    pytest.importorskip("submitit")
    # A cluster that takes a script and then cannot run it.
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("sbatch", 'cp "$1" script.sh; echo "no such partition" >&2; exit 1'), ("srun", "exit 1")):
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(stat.S_IRWXU)
    process = sweep(
        "seed=0,1,2", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu",
        "hydra.launcher.gpus_per_task=1", "hydra.launcher.cpus_per_task=8", "hydra.launcher.timeout_min=240",
        "hydra.launcher.signal_delay_s=120", "hydra.launcher.max_num_timeout=20",
        PATH=f"{commands}{os.pathsep}{os.environ['PATH']}",
    )  # fmt: skip
    _, err = process.communicate(timeout=300)
    assert process.returncode
    assert "no such partition" in err
    script = (tmp_path / "script.sh").read_text()
    for line in (
        "--partition=gpu", "--gpus-per-task=1", "--cpus-per-task=8", "--time=240", "--signal=USR2@120", "--array=0-2%",
    ):  # fmt: skip
        assert f"#SBATCH {line}" in script
