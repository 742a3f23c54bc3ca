"""indrnn-report --playground: the page computes what PyTorch computes, without network access."""

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from indrnn.cli.report import main
from indrnn.config.compose import load_config
from indrnn.data.permutations import load_permutation
from indrnn.training import load_run, train

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PUBLISHED = Path(__file__).resolve().parents[1] / "results" / "playground.html"
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
QUICK = (
    "device=cpu", "trainer.max_steps=6", "trainer.eval_every=6", "trainer.batch_size=8", "trainer.bn_samples=64",
    "data.validation_size=20", "optimizer.lr=0.01",
)  # fmt: skip
MNIST5K = ("data=mnist5k", "data.test_size=40")
ADDING = ("data=adding", "data.length=9")
NETWORKS = {
    "indrnn": ("model=indrnn", "model.num_layers=3", "model.hidden_size=66"),
    "lstm": ("model=lstm_chrono", "model.num_layers=2", "model.hidden_size=10"),
    "without_norm": ("model=indrnn", "model.num_layers=1", "model.norm=none", "model.weight_init=kaiming"),
    "permuted_indrnn": ("model=indrnn", "model.num_layers=2", "model.hidden_size=6", "data.permutation=bitrev"),
    "permuted_lstm": ("model=lstm", "model.hidden_size=6", "data.permutation=bitrev"),
    "tanh": ("model=indrnn", "model.nonlinearity=tanh", "model.num_layers=1", "model.hidden_size=4"),
    "adding": ("model=lstm", "model.hidden_size=4"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function that trains a network of NETWORKS for a few steps, once, and returns its run folder."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(name):
        task = ADDING if name == "adding" else MNIST5K
        train(load_config([*task, *QUICK, *NETWORKS[name], f"name={name}", f"output_root={root}"]))
        (file,) = root.glob(f"*/{name}/seed0/weights.safetensors")
        weights = load_file(file)  # after a few steps at chance level, or sure of one class: make differences visible
        scale = 0.1 if name == "without_norm" else 10
        save_file(weights | {"head.weight": scale * weights["head.weight"]}, file)
        return file.parent

    return run


def opened(page: Path, profile: Path) -> str:
    """The page's elements after its scripts have run."""
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-webgl", "--disable-3d-apis")
    command = [BROWSER, *options, f"--user-data-dir={profile}", "--dump-dom", f"{page.as_uri()}#selftest"]
    return subprocess.run(command, check=True, capture_output=True, timeout=300).stdout.decode()


@needs_browser
@pytest.mark.parametrize("names", [("indrnn", "lstm", "without_norm"), ("permuted_indrnn", "permuted_lstm")])
def test_page_computes_what_pytorch_computes(names, runs, tmp_path):
    path = tmp_path / "playground.html"
    main(["--playground", *(str(runs(name)) for name in names), "--out", str(path)])
    # A digit drawn on the page, and the probabilities of every network after the last step.
    report = """<script>{
      const drawn = rasterize([[[0.7, 0.2], [0.3, 0.2], [0.25, 0.45], [0.6, 0.5], [0.65, 0.7], [0.2, 0.8]]]);
      const probabilities = networks.map(network => [...predict(network, drawn).probabilities.slice(-K)]);
      document.body.dataset.drawn = JSON.stringify([[...drawn], probabilities]);
    }</script>"""
    path.write_text(path.read_text(encoding="utf-8") + report, encoding="utf-8")
    text = opened(path, tmp_path / "profile")
    assert "selftest: ok" in text, re.findall("<pre.*</pre>", text, re.S)
    pixels, predicted = json.loads(re.search('data-drawn="(.*?)"', text)[1])
    image = torch.tensor(pixels, dtype=torch.float32)
    assert image.max() == 255
    assert 60 < (image > 127).sum() < 160
    for name, probabilities in zip(names, predicted, strict=True):
        model, cfg = load_run(runs(name))
        order = load_permutation(cfg.data.permutation) if cfg.data.permutation else range(784)
        with torch.no_grad():
            expected = model((2 * image / 255 - 1)[torch.tensor(order)].view(1, 784, 1)).softmax(1)[0]
        torch.testing.assert_close(torch.tensor(probabilities, dtype=torch.float32), expected, atol=1e-3, rtol=0)
        assert expected.max() > 0.15, "the comparison says little"
    wrong = re.sub(r'"probabilities": \[\[[^,]+', '"probabilities": [[2', path.read_text(encoding="utf-8"))
    path.write_text(wrong, encoding="utf-8")
    assert "selftest: failed" in opened(path, tmp_path / "profile")


@pytest.mark.skipif(not PUBLISHED.exists(), reason="needs results/")
def test_published_page_is_small_and_needs_no_network():
    text = PUBLISHED.read_text(encoding="utf-8")
    assert len(text.encode()) < 600_000
    assert not re.search(r"https?://|@import|<link[^>]+stylesheet|\bsrc=", text)
    assert not re.search("/(work|home|root|Users)/", text)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("lstm", "tanh"), "supports indrnn"),
        (("lstm", "adding"), "supports indrnn"),
        (("permuted_lstm", "lstm"), "one MNIST task"),
    ],
)
def test_unsupported_runs_and_runs_of_two_tasks_are_refused(names, said, runs, tmp_path, capsys):
    paths = [str(runs(name)) for name in names]
    capsys.readouterr()  # what training printed
    with pytest.raises(SystemExit) as exit:
        main(["--playground", *paths, "--out", str(tmp_path / "page.html")])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert paths[1] in line
    assert said in line
    assert not (tmp_path / "page.html").exists()
