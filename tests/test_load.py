"""The weights that a finished run keeps: anyone can load them, evaluate them again and find out if they are others."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from indrnn import load_run
from indrnn.cli import evaluate as command
from indrnn.errors import UserError
from indrnn.record import open_run
from indrnn.train import loop
from small_runs import folder_of, run_small, small_config, small_task

COMMITTED = Path(__file__).resolve().parents[1] / "results" / "runs" / "mnist5k" / "demo_indrnn-verify" / "seed0"
KEPT = ("config.yaml", "metrics.csv", "result.json", "weights.safetensors")


@pytest.fixture
def published(tmp_path):
    """A copy of the committed run, with nothing but what results/runs holds."""
    if not COMMITTED.parents[3].is_dir():
        pytest.skip("an sdist has no results/")
    folder = tmp_path / "runs" / "mnist5k" / "demo_indrnn-verify" / "seed0"
    folder.mkdir(parents=True)
    for name in KEPT:
        shutil.copyfile(COMMITTED / name, folder / name)
    return folder


def evaluated(capsys, *words) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        command.main([*map(str, words), "--device", "cpu"])
    said = capsys.readouterr()
    return end.value.code, said.out + said.err


def test_a_finished_run_keeps_the_chosen_weights_and_their_statistics(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "load_task", lambda data, device: small_task())
    run_small(tmp_path)
    folder = folder_of(tmp_path)
    chosen = torch.load(folder / "best.pt", weights_only=True)["model"]
    kept = load_file(folder / "weights.safetensors")
    assert kept.keys() == chosen.keys()
    assert all(torch.equal(kept[name], chosen[name]) for name in kept)
    assert any("running_mean" in name for name in kept)
    (folder / "best.pt").unlink()
    (folder / "checkpoint.pt").unlink()
    model, _ = load_run(folder)
    assert all(torch.equal(value, chosen[name]) for name, value in model.state_dict().items())


def test_a_finished_run_that_goes_on_does_not_keep_its_old_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "load_task", lambda data, device: small_task())
    run_small(tmp_path, "trainer.max_steps=10")
    assert (folder_of(tmp_path) / "weights.safetensors").exists()
    with open_run(small_config(tmp_path), [], "") as longer:
        longer.begin()
    assert not (folder_of(tmp_path) / "weights.safetensors").exists()
    assert load_run(folder_of(tmp_path))[1].trainer.max_steps == 30


def test_the_committed_run_gives_its_result_again(published, capsys):
    code, said = evaluated(capsys, published.parents[2])
    assert code == 0
    assert "of 1,000 right; result.json" in said
    assert "1 of 1 agree" in said


def test_weights_that_are_not_those_of_the_result_are_noticed(published, capsys):
    weights = load_file(published / "weights.safetensors")
    (norm,) = [name for name in weights if name.endswith("running_mean")][-1:]
    weights[norm] += 10 * weights[norm].abs().max()
    save_file(weights, published / "weights.safetensors")
    code, said = evaluated(capsys, published)
    assert code == 1
    assert "DIFFERENT" in said
    assert "0 of 1 agree" in said


def test_what_cannot_be_evaluated_is_one_line(published, capsys, tmp_path):
    (published / "weights.safetensors").write_bytes(b"no weights")
    code, said = evaluated(capsys, published)
    assert code == 2
    assert "weights.safetensors is damaged" in said
    (published / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no weights\.safetensors or best\.pt"):
        load_run(published)
    code, said = evaluated(capsys, published.parent)
    assert code == 2
    assert "1 finished runs keep no weights.safetensors" in said
    assert evaluated(capsys, tmp_path / "nowhere")[0] == 2


def test_another_test_set_than_the_runs_is_refused(published, capsys):
    config = published / "config.yaml"
    config.write_text(config.read_text().replace("split_seed: 0", "split_seed: 1"))
    code, said = evaluated(capsys, published)
    assert code == 2
    assert "split of the data here is" in said
