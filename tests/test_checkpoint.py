"""The weights of a finished run: they can be loaded, evaluated again, and compared with the result."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from indrnn.cli import evaluate as command
from indrnn.config.compose import load_config
from indrnn.training import load_run, train

COMMITTED = Path(__file__).resolve().parents[1] / "results" / "runs" / "mnist5k" / "demo_indrnn-verify" / "seed0"

TINY = [
    "data=mnist5k", "model.hidden_size=4", "model.num_layers=2", "trainer.eval_every=2", "trainer.batch_size=4",
    "data.validation_size=20", "data.test_size=20", "trainer.bn_samples=10", "device=cpu",
]  # fmt: skip


@pytest.fixture
def published(tmp_path):
    """A copy of the committed run, with nothing but what results/runs holds."""
    if not COMMITTED.parents[3].is_dir():
        pytest.skip("an sdist has no results/")
    folder = tmp_path / "runs" / "mnist5k" / "demo_indrnn-verify" / "seed0"
    shutil.copytree(COMMITTED, folder)
    return folder


def evaluated(capsys, *words) -> tuple[int, str]:
    code = 0
    try:
        command.main([*map(str, words), "--device", "cpu"])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out + said.err


def test_a_finished_run_keeps_the_best_weights_and_their_statistics(tmp_path):
    train(load_config([*TINY, "trainer.max_steps=2", f"output_root={tmp_path}"]))
    folder = tmp_path / "mnist5k" / "indrnn" / "seed0"
    chosen = torch.load(folder / "best.pt", weights_only=True)["model"]
    assert any("running_mean" in name for name in load_file(folder / "weights.safetensors"))
    (folder / "best.pt").unlink()
    weights = load_run(folder)[0].state_dict()
    assert weights.keys() == chosen.keys()
    assert all(torch.equal(weights[name], chosen[name]) for name in chosen)


def test_the_committed_run_reproduces_its_result(published, capsys):
    code, said = evaluated(capsys, published.parents[2])
    assert (code, "622 of 1,000 correct; result.json 62.20%" in said, "1 of 1 agree" in said) == (0, True, True)


def test_weights_that_do_not_match_the_result_are_reported(published, capsys):
    weights = load_file(published / "weights.safetensors")
    for name in [name for name in weights if name.endswith("running_mean")]:
        weights[name] += 10 * weights[name].abs().max()
    save_file(weights, published / "weights.safetensors")
    code, said = evaluated(capsys, published)
    assert (code, "DIFFERENT" in said, "0 of 1 agree" in said) == (1, True, True)


def test_what_cannot_be_evaluated_is_refused_in_one_line(published, capsys):
    config, weights = published / "config.yaml", published / "weights.safetensors"
    config.write_text(config.read_text().replace("split_seed: 0", "split_seed: 1"))
    code, said = evaluated(capsys, published)
    assert (code, "split of the data here is" in said) == (2, True)
    weights.write_bytes(b"no weights")
    code, said = evaluated(capsys, published)
    assert (code, "weights.safetensors is damaged" in said) == (2, True)
    weights.unlink()
    code, said = evaluated(capsys, published.parent)
    assert (code, "1 finished runs have no weights.safetensors" in said) == (2, True)
