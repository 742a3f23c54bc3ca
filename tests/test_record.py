"""The run folder: when a run starts, resumes, is skipped or refused, and that no user data is lost."""

import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from indrnn.config.compose import load_config
from indrnn.errors import UserError
from indrnn.record.folder import FolderInUseError, find_run_folders, load_config_file, open_run, run_folder
from indrnn.record.metrics import COLUMNS, read_metrics


def config(root, *overrides):
    data = [] if any(override.startswith("data=") for override in overrides) else ["data=mnist5k"]
    cfg = load_config([*data, *overrides])
    cfg.output_root = str(root)
    return cfg


def opened(root, *overrides):
    return open_run(config(root, *overrides))


def leave(root, *overrides, checkpoint=True, result=False):
    """A run folder as a process leaves it that was stopped at step 10, or ended there."""
    with opened(root, *overrides) as run:
        run.begin()
        (run.path / "metrics.csv").write_text(f"{','.join(COLUMNS)}\n10,0.1,1.0,train,2.3,,,\n")
        if checkpoint:
            run.checkpoint_path.write_bytes(b"state")
            run.best_path.write_bytes(b"weights")
        if result:
            run.result_path.write_text('{"schema_version": 1}')
    return run.path


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file() and file.name != ".lock"}


def refused(root, *overrides):
    """The message, after a check that nothing changed."""
    path = run_folder(config(root, *overrides))
    before = contents(path)
    with pytest.raises(UserError) as error:
        opened(root, *overrides)
    assert "\n" not in str(error.value)
    assert contents(path) == before
    return str(error.value)


def test_path_names_task_name_tag_and_seed(tmp_path, monkeypatch):
    assert run_folder(config(tmp_path)) == tmp_path / "mnist5k" / "indrnn" / "seed0"
    named = config(tmp_path, "name=paper", "tag=lr-1e-3", "seed=7", "data=adding", "data.length=500")
    assert run_folder(named) == tmp_path / "adding-T500" / "paper-lr-1e-3" / "seed7"
    assert not any(tmp_path.iterdir())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_folder(config("~/runs")).parts[: len(tmp_path.parts)] == tmp_path.parts


@pytest.mark.parametrize("key", ["name", "tag"])
@pytest.mark.parametrize("value", ["../elsewhere", "..", ".hidden", "a b", "", "a\nb"])
def test_name_cannot_leave_the_folder(tmp_path, key, value):
    cfg = config(tmp_path)
    cfg[key] = value
    with pytest.raises(UserError, match=f"^{key}=[^\n]*$"):
        run_folder(cfg)


@pytest.mark.parametrize("tag", ["5e41726", "1e3", "0x1f", "0123", "1_000", "nan", "null", "on", "2026-11-30", "="])
def test_fresh_run_writes_its_configuration_and_text_stays_text(tmp_path, tag):
    cfg = config(tmp_path, "seed=3", "optimizer.lr=1e-3")
    cfg.tag = tag
    with open_run(cfg) as run:
        assert run.state == "fresh"
        run.begin()
        run.checkpoint_path.write_bytes(b"state")
        stored = load_config_file(run.config_path)
        assert (stored["optimizer"]["lr"], stored["name"], stored["seed"], stored["tag"]) == (1e-3, "indrnn", 3, tag)
    assert open_run(cfg).state == "resume"


def test_finished_run_is_skipped_untouched_even_with_other_neutral_keys(tmp_path):
    path = leave(tmp_path, result=True)
    before = contents(path)
    with opened(tmp_path, "trainer.checkpoint_every=7", "trainer.log_every=3") as run:
        assert run.state == "finished"
    assert contents(path) == before


def test_unfinished_run_resumes_from_its_checkpoint(tmp_path):
    path = leave(tmp_path)
    with opened(tmp_path, "trainer.checkpoint_every=7") as run:
        run.begin()
        assert run.state == "resume"
        assert run.checkpoint_path.read_bytes() == b"state"
        assert read_metrics(run.path / "metrics.csv")["step"].tolist() == [10]
        assert load_config_file(path / "config.yaml")["trainer"]["checkpoint_every"] == 7


def test_unfinished_run_without_checkpoint_starts_again(tmp_path):
    path = leave(tmp_path, checkpoint=False)
    (path / "events.out.tfevents.1.indrnn").write_bytes(b"old")
    (path / "checkpoint.pt.tmp").write_bytes(b"half")
    with opened(tmp_path) as run:
        assert run.state == "fresh"
        assert (run.path / "metrics.csv").exists()  # nothing is removed before the run begins
        run.begin()
        assert set(contents(path)) == {"config.yaml"}
    with opened(tmp_path, "optimizer.lr=1e-3") as run:
        assert run.state == "fresh"  # the run before never trained


@pytest.mark.parametrize("result", [False, True])
def test_different_config_is_refused_and_named(tmp_path, result):
    path = leave(tmp_path, result=result)
    message = refused(tmp_path, "optimizer.lr=1e-3", "model.num_layers=12", "trainer.max_steps=70000")
    changes = ("optimizer.lr: 0.0002 -> 0.001", "model.num_layers: 6 -> 12", "trainer.max_steps: 60000 -> 70000")
    for part in (*changes, "tag=", "overwrite=true"):
        assert part in message
    assert len(refused(tmp_path, "model=lstm", "name=indrnn")) < 600
    stored = load_config_file(path / "config.yaml")
    stored["model"]["zoneout"] = stored["model"].pop("gamma")
    OmegaConf.save(stored, path / "config.yaml")
    message = refused(tmp_path)
    assert "model.zoneout: 2.0 -> (absent)" in message
    assert "model.gamma: (absent) -> 2.0" in message


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    path = leave(tmp_path, result=True)
    (path / "events.out.tfevents.1.host").write_bytes(b"old")
    (path / "notes.txt").write_text("mine")
    (path / "figures").mkdir()
    before = contents(path)
    with opened(tmp_path, "overwrite=true", "optimizer.lr=1e-3") as run:
        assert run.state == "fresh"
        assert contents(path) == before  # not before the run begins
        run.begin()
    assert set(os.listdir(path)) == {".lock", "config.yaml", "notes.txt", "figures"}
    assert load_config_file(path / "config.yaml")["optimizer"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("config.yaml", text) for text in ("model: [", "just words", "a: 1\nb: 2\n", "", "\0\xff")),
        *((name, "precious") for name in ("result.json", "checkpoint.pt", "metrics.csv")),
    ],
)
@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_files_of_something_else_are_kept(tmp_path, name, text, overwrite):
    path = run_folder(config(tmp_path))
    path.mkdir(parents=True)
    (path / name).write_bytes(text.encode("latin-1"))
    assert name in refused(tmp_path, f"overwrite={overwrite}")


def test_second_process_is_refused_until_the_first_ends(tmp_path):
    arguments = ["model=indrnn", "data=mnist5k", f"output_root={tmp_path}"]
    script = (
        "import sys; from indrnn.config.compose import load_config\n"
        "from indrnn.record.folder import open_run\n"
        "open_run(load_config(sys.argv[1:]))"
    )
    run = opened(tmp_path)
    second = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert f"run folder {run.path} is in use by another process" in second.stderr
    with pytest.raises(FolderInUseError):
        opened(tmp_path)
    del run
    assert opened(tmp_path).state == "fresh"


def test_link_in_place_of_the_lock_is_refused_and_its_target_kept(tmp_path):
    path = run_folder(config(tmp_path))
    path.mkdir(parents=True)
    (tmp_path / "diary.txt").write_text("precious")
    (path / ".lock").symlink_to(tmp_path / "diary.txt")
    with pytest.raises(UserError, match="cannot open run folder"):
        opened(tmp_path)
    assert (tmp_path / "diary.txt").read_text() == "precious"


@pytest.mark.parametrize("place", ["", "mnist5k/indrnn/seed0"])
def test_impossible_folder_is_named(tmp_path, place):
    file = tmp_path / "outputs" / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("a file")
    with pytest.raises(UserError, match=r"outputs.*output_root=") as error:
        opened(tmp_path / "outputs")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="name too long"):
        opened(tmp_path, f"tag={'x' * 300}")


def test_run_folders_are_found_through_links_and_cycles_end(tmp_path):
    paths = [leave(tmp_path / "store", f"seed={seed}") for seed in range(3)]
    gathered = tmp_path / "gathered"
    (gathered / "deep").mkdir(parents=True)
    (gathered / "a").symlink_to(paths[0])
    (gathered / "b").symlink_to(paths[0])  # the same run
    (gathered / "deep" / "c").symlink_to(paths[1].parent)
    (gathered / "deep" / "up").symlink_to(gathered)
    (gathered / "self").symlink_to("self")
    (gathered / "gone").symlink_to(tmp_path / "nowhere")
    (gathered / ".hidden").symlink_to(paths[2])
    found = list(find_run_folders(gathered))
    assert sorted(path.resolve() for path in found) == paths
    assert gathered / "a" in found
    assert list(find_run_folders(gathered / "a")) == [gathered / "a"]
    with pytest.raises(UserError, match="nowhere is not a folder"):
        list(find_run_folders(tmp_path / "nowhere"))
