"""The run folder: when a run starts, goes on, is skipped or refused, and that nothing is lost on the way."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from indrnn.config.compose import load_config
from indrnn.errors import RunError, UserError
from indrnn.record.folder import load_config_file, open_run, run_folder
from indrnn.record.metrics import MetricsWriter, read_metrics


def config(root, *overrides):
    data = [] if any(override.startswith("data=") for override in overrides) else ["data=mnist5k"]
    cfg = load_config([*data, *overrides])
    cfg.output_root = str(root)
    return cfg


def opened(root, *overrides):
    return open_run(config(root, *overrides), list(overrides), "indrnn-train")


def leave(root, *overrides, steps=10, checkpoint=True, result=False):
    """A run folder as a process leaves it that was stopped at ``steps``, or ended there."""
    with opened(root, *overrides) as run:
        run.begin()
        with MetricsWriter(run.metrics_path, None) as metrics:
            metrics.row(steps, 0.1, 1.0, "train", 2.3)
        if checkpoint:
            run.checkpoint_path.write_bytes(b"state")
            run.best_path.write_bytes(b"weights")
        if result:
            run.result_path.write_text('{"schema_version": 1}')
    return run.path


def contents(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def one_line(failure):
    text = str(failure.value)
    assert "\n" not in text
    return text


def test_the_path_names_task_name_tag_and_seed(tmp_path):
    assert run_folder(config(tmp_path)) == tmp_path / "mnist5k" / "indrnn" / "seed0"
    named = config(tmp_path, "name=paper", "tag=lr-1e-3", "seed=7", "data=adding", "data.length=500")
    assert run_folder(named) == tmp_path / "adding-T500" / "paper-lr-1e-3" / "seed7"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["name", "tag"])
@pytest.mark.parametrize("value", ["../elsewhere", "a/b", "..", ".hidden", "a b", "", "a\nb", "x\0"])
def test_a_name_cannot_leave_the_folder(tmp_path, key, value):
    cfg = config(tmp_path)
    cfg[key] = value
    with pytest.raises(UserError, match=f"^{key}=") as failure:
        run_folder(cfg)
    one_line(failure)


def test_a_fresh_run_writes_its_configuration(tmp_path):
    with opened(tmp_path, "seed=3", "optimizer.lr=1e-3") as run:
        assert run.state == "fresh"
        assert run.path == tmp_path / "mnist5k" / "indrnn" / "seed3"
        run.begin()
        stored = OmegaConf.load(run.config_path)
        assert (stored.optimizer.lr, stored.name, stored.seed) == (1e-3, "indrnn", 3)
        assert list(OmegaConf.load(run.overrides_path)) == ["seed=3", "optimizer.lr=1e-3"]


def test_a_finished_run_is_skipped_untouched_even_with_other_neutral_keys(tmp_path):
    path = leave(tmp_path, result=True)
    before = contents(path)
    run = opened(tmp_path, "trainer.checkpoint_every=7", "trainer.log_every=3", "resume=never")
    assert run.state == "finished"
    run.begin()
    run.close()
    assert contents(path) == before


def test_an_unfinished_run_goes_on_from_its_checkpoint(tmp_path):
    path = leave(tmp_path)
    with opened(tmp_path, "trainer.checkpoint_every=7") as run:
        run.begin()
        assert run.state == "resume"
        assert run.checkpoint_path.read_bytes() == b"state"
        assert read_metrics(run.metrics_path)["step"].tolist() == [10]
        assert load_config_file(path / "config.yaml")["trainer"]["checkpoint_every"] == 7


def test_an_unfinished_run_without_checkpoint_starts_again(tmp_path):
    path = leave(tmp_path, checkpoint=False)
    (path / "events.out.tfevents.1.indrnn").write_bytes(b"old")
    (path / "checkpoint.pt.tmp").write_bytes(b"half")
    with opened(tmp_path) as run:
        assert run.state == "fresh"
        assert run.metrics_path.exists()  # nothing is removed before the run begins
        run.begin()
        assert set(contents(path)) == {".lock", "config.yaml", "overrides.yaml"}


@pytest.mark.parametrize("result", [False, True])
def test_another_configuration_is_refused_and_named(tmp_path, result):
    path = leave(tmp_path, result=result)
    before = contents(path)
    with pytest.raises(UserError) as failure:
        opened(tmp_path, "optimizer.lr=1e-3", "model.num_layers=12")
    message = one_line(failure)
    for part in (str(path), "optimizer.lr: 0.0002 -> 0.001", "model.num_layers: 6 -> 12", "tag=", "overwrite=true"):
        assert part in message
    assert contents(path) == before


def test_many_differences_are_counted(tmp_path):
    leave(tmp_path)
    with pytest.raises(UserError) as failure:
        opened(tmp_path, "model=lstm", "name=indrnn")
    message = one_line(failure)
    assert "model.name: indrnn -> lstm" in message
    assert " more" in message
    assert len(message) < 600


def test_a_run_that_never_trained_blocks_nothing(tmp_path):
    with opened(tmp_path) as run:
        run.begin()
    with opened(tmp_path, "optimizer.lr=1e-3") as run:
        assert run.state == "fresh"
        run.begin()
        assert load_config_file(run.config_path)["optimizer"]["lr"] == 1e-3


def test_a_key_added_to_the_schema_later_does_not_disown_old_runs(tmp_path):
    for model, earlier in (("lstm", "lstm"), ("lstm_matched", "lstm_matched"), ("indrnn", "indrnn")):
        choices = (f"model={model}", "schedule=plateau", "schedule.restore_best=false")
        path = leave(tmp_path, *choices)
        stored = OmegaConf.load(path / "config.yaml")
        stored.model.name = earlier
        if model == "indrnn":
            stored.model.norm_position = "after"
        else:
            del stored.model["weight_init"], stored.model["bias_init"]
        del stored.schedule["restore_best"]
        OmegaConf.save(stored, path / "config.yaml")
        with opened(tmp_path, *choices) as run:
            assert run.state == "resume"
        with pytest.raises(UserError, match="restore_best: false -> true"):
            opened(tmp_path, *choices[:-1])


def test_a_network_that_moved_to_another_module_is_the_same_run(tmp_path):
    path = leave(tmp_path, "model=gru")
    stored = OmegaConf.load(path / "config.yaml")
    stored.model._target_ = "indrnn.models.gru.GRUClassifier"
    OmegaConf.save(stored, path / "config.yaml")
    with opened(tmp_path, "model=gru") as run:
        assert run.state == "resume"


def test_a_former_choice_that_is_left_out_is_another_run(tmp_path):
    path = leave(tmp_path)
    stored = OmegaConf.load(path / "config.yaml")
    stored.model.norm_position = "before"
    OmegaConf.save(stored, path / "config.yaml")
    with pytest.raises(UserError, match="norm_position: before -> "):
        opened(tmp_path)


def test_a_key_that_is_gone_from_the_schema_counts_as_a_difference(tmp_path):
    path = leave(tmp_path)
    stored = OmegaConf.load(path / "config.yaml")
    stored.model.zoneout = 0.1
    OmegaConf.save(stored, path / "config.yaml")
    with pytest.raises(UserError, match=r"model\.zoneout: 0\.1 -> \(absent\)"):
        opened(tmp_path)


@pytest.mark.parametrize("result", [False, True])
def test_a_larger_max_steps_continues(tmp_path, result):
    path = leave(tmp_path, "trainer.max_steps=10", result=result)
    before = contents(path)
    with opened(tmp_path, "trainer.max_steps=20") as run:
        assert run.state == "resume"
        assert {**contents(path), ".lock": b""} == {**before, ".lock": b""}  # nothing has happened yet
        run.begin()
        assert not run.result_path.exists()
        assert load_config_file(run.config_path)["trainer"]["max_steps"] == 20
    if result:
        assert (path / "result.max_steps10.json").read_bytes() == before["result.json"]
    with opened(tmp_path, "trainer.max_steps=20") as run:
        assert run.state == "resume"


def test_a_smaller_max_steps_is_another_run(tmp_path):
    leave(tmp_path, "trainer.max_steps=20", result=True)
    with pytest.raises(UserError, match=r"trainer\.max_steps: 20 -> 10"):
        opened(tmp_path, "trainer.max_steps=10")


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_a_larger_max_steps_is_another_run_where_the_schedule_depends_on_it(tmp_path, schedule):
    leave(tmp_path, f"schedule={schedule}", "trainer.max_steps=10", result=True)
    with pytest.raises(UserError, match=f"max_steps: 10 -> 20 .*{schedule}") as failure:
        opened(tmp_path, f"schedule={schedule}", "trainer.max_steps=20")
    one_line(failure)


def test_a_finished_run_without_its_checkpoint_cannot_continue(tmp_path):
    path = leave(tmp_path, "trainer.max_steps=10", checkpoint=False, result=True)
    before = contents(path)
    with pytest.raises(UserError, match="has no checkpoint"):
        opened(tmp_path, "trainer.max_steps=20")
    assert contents(path) == before


@pytest.mark.parametrize(("steps", "result"), [(10, False), (20, True)])
def test_resume_never_refuses_to_go_on(tmp_path, steps, result):
    leave(tmp_path, "trainer.max_steps=10", result=result)
    with pytest.raises(UserError, match=r"resume=auto.*overwrite=true") as failure:
        opened(tmp_path, f"trainer.max_steps={steps}", "resume=never")
    one_line(failure)


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    path = leave(tmp_path, result=True)
    (path / "events.out.tfevents.1.indrnn").write_bytes(b"old")
    (path / "notes.txt").write_text("mine")
    (path / "figures").mkdir()
    before = contents_of_files(path)
    with opened(tmp_path, "overwrite=true", "optimizer.lr=1e-3") as run:
        assert run.state == "fresh"
        assert {**contents_of_files(path), ".lock": b""} == {**before, ".lock": b""}  # not before the run begins
        run.begin()
    assert set(os.listdir(path)) == {".lock", "config.yaml", "overrides.yaml", "notes.txt", "figures"}
    assert load_config_file(path / "config.yaml")["optimizer"]["lr"] == 1e-3


def contents_of_files(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


@pytest.mark.parametrize("text", ["model: [", "just words", "a: 1\nb: 2\n", "", "\0\xff"])
@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_a_config_file_that_is_not_a_runs_is_kept(tmp_path, text, overwrite):
    path = run_folder(config(tmp_path))
    path.mkdir(parents=True)
    (path / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.yaml") as failure:
        opened(tmp_path, f"overwrite={overwrite}")
    one_line(failure)
    assert (path / "config.yaml").read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize("name", ["result.json", "checkpoint.pt", "metrics.csv"])
def test_a_runs_files_without_its_configuration_are_kept(tmp_path, name):
    path = run_folder(config(tmp_path))
    path.mkdir(parents=True)
    (path / name).write_text("precious")
    with pytest.raises(UserError, match=name) as failure:
        opened(tmp_path, "overwrite=true")
    one_line(failure)
    assert (path / name).read_text() == "precious"


def test_a_second_process_is_turned_away_until_the_first_ends(tmp_path):
    cfg = load_config(["model=indrnn", "data=mnist5k", f"output_root={tmp_path}"])
    with open_run(cfg, [], "") as run:
        run.begin()
        script = (
            "import sys; from indrnn.config.compose import load_config\n"
            "from indrnn.record.folder import open_run\n"
            "open_run(load_config(sys.argv[1:]), [], '')"
        )
        second = subprocess.run(
            [sys.executable, "-c", script, "model=indrnn", "data=mnist5k", f"output_root={tmp_path}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"run folder {run.path} is in use by another process; wait for it to end" in second.stderr
        assert run.config_path.exists()
    open_run(cfg, [], "").close()


def test_a_link_in_the_locks_place_is_refused_and_what_it_points_to_kept(tmp_path):
    path = run_folder(config(tmp_path))
    path.mkdir(parents=True)
    (tmp_path / "diary.txt").write_text("precious")
    (path / ".lock").symlink_to(tmp_path / "diary.txt")
    with pytest.raises(UserError, match=r"\.lock: .*a symbolic link .*remove it") as failure:
        opened(tmp_path)
    one_line(failure)
    assert (tmp_path / "diary.txt").read_text() == "precious"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_and_said(tmp_path, monkeypatch, caplog, code):
    def flock(*_):
        raise OSError(code, "no locks here")

    monkeypatch.setattr("fcntl.flock", flock)
    with opened(tmp_path) as run:
        assert run.state == "fresh"
    assert [str(run.path) in message and "has no locks" in message for message in caplog.messages] == [True]


def test_a_run_folder_nobody_refers_to_is_free(tmp_path):
    run = opened(tmp_path)
    with pytest.raises(UserError, match="in use"):
        opened(tmp_path)
    del run
    opened(tmp_path).close()


def test_a_killed_run_leaves_its_folder_free_and_its_metrics_whole(tmp_path):
    script = (
        "import sys; from indrnn.config.compose import load_config\n"
        "from indrnn.files import replacing\n"
        "from indrnn.record.folder import open_run\n"
        "from indrnn.record.metrics import MetricsWriter\n"
        "run = open_run(load_config(sys.argv[1:]), [], '')\n"
        "run.begin(); metrics = MetricsWriter(run.metrics_path, None)\n"
        "for step in range(1, 10**9):\n"
        "    metrics.row(step, 0.1, 0.1, 'train', 1 / step)\n"
        "    if step % 10 == 0:\n"
        "        with replacing(run.checkpoint_path) as file: file.write(str(step).encode())\n"
        "        print('saved', flush=True)\n"
    )
    arguments = ["model=indrnn", "data=mnist5k", f"output_root={tmp_path}"]
    with subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert [process.stdout.readline() for _ in range(20)] == 20 * ["saved\n"]
        process.send_signal(signal.SIGKILL)
    with open_run(load_config(arguments), [], "") as run:
        assert run.state == "resume"
        step = int(run.checkpoint_path.read_bytes())
        MetricsWriter(run.metrics_path, step).close()
        assert read_metrics(run.metrics_path)["step"].tolist() == list(range(1, step + 1))


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(UserError, match=r"outputs.*output_root=") as failure:
        opened(tmp_path / "outputs")
    one_line(failure)
    (tmp_path / "other" / "mnist5k" / "indrnn").mkdir(parents=True)
    (tmp_path / "other" / "mnist5k" / "indrnn" / "seed0").write_text("a file")
    with pytest.raises(UserError, match=r"seed0.*output_root="):
        opened(tmp_path / "other")


def test_a_name_too_long_for_the_disk_is_named(tmp_path):
    with pytest.raises(UserError, match="shorter") as failure:
        opened(tmp_path, f"tag={'x' * 300}")
    one_line(failure)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_named_but_a_finished_run_in_it_is_still_skipped(tmp_path):
    path = leave(tmp_path, result=True)
    path.chmod(0o555)
    try:
        assert opened(tmp_path).state == "finished"
        with pytest.raises(UserError, match=r"Permission denied.*output_root="):
            opened(tmp_path, "overwrite=true")
    finally:
        path.chmod(0o755)


def test_a_disk_that_is_full_at_the_start_is_a_user_error(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    path = run_folder(config(tmp_path))
    path.mkdir(parents=True)
    (path / "config.yaml.tmp").symlink_to("/dev/full")
    with opened(tmp_path) as run, pytest.raises(UserError, match=r"No space left.*free some space") as failure:
        run.begin()
    assert not isinstance(failure.value, RunError)
    one_line(failure)
    with opened(tmp_path) as run:
        assert run.state == "fresh"
