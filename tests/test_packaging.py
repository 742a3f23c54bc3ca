"""The built packages work without the checkout: they include the configuration files and the bundled data."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = list((ROOT / "configs").rglob("*.yaml"))

pytestmark = pytest.mark.skipif(not CONFIGS, reason="needs the source tree")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT], check=True, capture_output=True
    )
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The wheel, unpacked."""
    target = tmp_path_factory.mktemp("site")
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def train(package: Path, cwd: Path, *arguments: str) -> str:
    """stdout of the console script of the package in the folder ``package``, started in ``cwd``."""
    # First on the path, so before the checkout that this environment installs.
    environment = {**os.environ, "PYTHONPATH": str(package)}
    code = (
        "import sys, indrnn; from indrnn.cli.train import main; "
        f"assert indrnn.__file__.startswith({str(package)!r}), indrnn.__file__; sys.argv[0] = 'indrnn-train'; main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_wheel_works_in_any_folder(built, installed, tmp_path):
    assert "indrnn_12layer" in train(installed, tmp_path, "--help")
    shown = yaml.safe_load(train(installed, tmp_path, "experiment=demo", "model=lstm", "--cfg", "job", "--resolve"))
    assert (shown["name"], shown["data"]["name"]) == ("demo_lstm", "mnist5k")
    assert not list(tmp_path.iterdir())
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"indrnn/configs/{path.relative_to(ROOT / 'configs').as_posix()}" for path in CONFIGS} <= names
    assert "indrnn/data/assets/mnist5k.npz" in names
    assert wheel.stat().st_size < 2_000_000


def test_sdist_is_a_working_checkout(built, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert {"README.md", "LICENSE", "pyproject.toml", "tests"} <= {path.name for path in source.iterdir()}
    assert "indrnn_12layer" in train(source / "src", tmp_path, "--help")
