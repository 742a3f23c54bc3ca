"""MNIST's files: found, downloaded, checked, and the messages if that fails. No test needs a network."""

import gzip
import hashlib
import os
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from indrnn.data import download, make_task
from indrnn.data.permutations import load_permutation
from indrnn.errors import UserError
from parts import mnist as mnist_data

CPU = torch.device("cpu")
TRAIN_IMAGES = "train-images-idx3-ubyte"
REAL_ROOT = os.environ.get("INDRNN_DATA", "")
N_TRAIN, N_TEST = 200, 40


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def compressed(files):
    return {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in files.items()}


def place(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def files(monkeypatch):
    """A small MNIST, whose hashes replace the true ones; torchvision's only mirror does not exist."""
    rng = np.random.default_rng(0)
    contents = {}
    for part, n in (("train", N_TRAIN), ("t10k", N_TEST)):
        contents[f"{part}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        contents[f"{part}-labels-idx1-ubyte"] = idx(np.arange(n, dtype=np.uint8) % 10)
    for name, content in contents.items():
        monkeypatch.setitem(download.SHA256, name, hashlib.sha256(content).hexdigest())
    md5 = [(name, hashlib.md5(content).hexdigest()) for name, content in compressed(contents).items()]
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", md5)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["file:///nowhere/"])
    return contents


def load(root, **keys):
    return make_task(mnist_data(root=str(root), **{"validation_size": 50, **keys})).load(CPU)


def refused(root, **keys):
    with pytest.raises(UserError) as error:
        load(root, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_in_place_are_read_unchanged(tmp_path, files):
    raw = place(tmp_path / "MNIST" / "raw", files)
    before = sorted(raw.iterdir())
    raw.chmod(0o555)
    task = load(tmp_path)
    raw.chmod(0o755)
    assert (task.train.size, task.validation.size, task.test.size) == (N_TRAIN - 50, 50, N_TEST)
    assert task.provenance["sha256"] == download.SHA256
    split = {"seed": 0, "train": N_TRAIN - 50, "validation": 50, "test": N_TEST}
    assert split.items() <= task.provenance["split"].items()
    assert sorted(raw.iterdir()) == before


def test_every_image_is_in_one_split_with_its_label(tmp_path, files):
    place(tmp_path / "MNIST" / "raw", files)
    task = load(tmp_path)
    pixels = {part: np.frombuffer(files[f"{part}-images-idx3-ubyte"][16:], np.uint8) for part in ("train", "t10k")}
    parts = [split.batch(torch.arange(split.size)) for split in (task.train, task.validation, task.test)]
    x = torch.cat([part[0] for part in parts])[..., 0].mul(127.5).add(127.5).round().to(torch.uint8).numpy()
    y = torch.cat([part[1] for part in parts]).tolist()
    rows = [(row.tobytes(), i % 10) for part in pixels.values() for i, row in enumerate(part.reshape(-1, 784))]
    assert sorted((row.tobytes(), label) for row, label in zip(x, y, strict=True)) == sorted(rows)


def test_step_t_shows_pixel_p_t_and_a_picture_undoes_it(tmp_path, files):
    place(tmp_path / "MNIST" / "raw", files)
    plain = load(tmp_path)
    permuted = load(tmp_path, name="mnist_permuted", permutation="bitrev")
    p = load_permutation("bitrev")
    for part in ("train", "validation", "test"):
        (x, y), (px, py) = (getattr(splits, part).batch(torch.arange(20)) for splits in (plain, permuted))
        assert torch.equal(px, x[:, p])
        assert torch.equal(py, y)
    task = make_task(mnist_data(name="mnist_permuted", permutation="bitrev"))
    assert torch.equal(task.picture(px[0]), (x[0].reshape(28, 28) + 1) / 2)


@pytest.mark.parametrize("damage", [lambda c: c[:-1] + bytes([c[-1] ^ 1]), lambda c: c[:-7], lambda c: b""])
def test_damaged_file_is_named_and_kept(tmp_path, files, damage):
    raw = place(tmp_path / "MNIST" / "raw", files)
    for path in sorted(raw.iterdir()):
        content = path.read_bytes()
        path.write_bytes(damage(content))
        assert f"{path} is damaged" in refused(tmp_path)
        assert path.read_bytes() == damage(content)
        path.write_bytes(content)
    load(tmp_path)


@pytest.mark.parametrize("pack", [dict, compressed])
def test_mirror_may_be_a_folder(tmp_path, files, pack):
    folder = place(tmp_path / "a mirror", pack(files))
    load(tmp_path / "root", mirror=str(folder))
    folder.rename(tmp_path / "gone")
    load(tmp_path / "root")


@pytest.mark.parametrize("mirror", [None, "damaged", "no/such/folder", "s3://x"])
def test_failed_download_names_the_ways_out(tmp_path, monkeypatch, files, mirror):
    place(tmp_path / "damaged", {name: content[:-1] for name, content in compressed(files).items()})
    monkeypatch.chdir(tmp_path)
    message = refused("root", mirror=mirror)
    for way_out in (str(Path("root") / "MNIST" / "raw"), TRAIN_IMAGES, "data.root=", "data.mirror=", "data=mnist5k"):
        assert way_out in message


def test_mirror_may_be_a_url_and_torchvisions_are_next(tmp_path, monkeypatch, files):
    asked = []

    def fetch(url, download_root, filename, md5):
        asked.append(url)
        if url.startswith("https://other"):
            raise urllib.error.URLError("no route")
        place(Path(download_root), {filename.removesuffix(".gz"): files[filename.removesuffix(".gz")]})

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fetch)
    load(tmp_path, mirror="https://other.invalid")
    assert asked[:2] == [f"{mirror}/{TRAIN_IMAGES}.gz" for mirror in ("https://other.invalid", "file:///nowhere")]


def test_broken_torchvision_matters_only_for_downloads(tmp_path, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    assert "torchvision" in refused(tmp_path)
    place(tmp_path / "MNIST" / "raw", files)
    load(tmp_path)


@pytest.mark.skipif(not (Path(REAL_ROOT) / "MNIST" / "raw").is_dir(), reason="INDRNN_DATA names no folder with MNIST")
def test_real_mnist_agrees_with_torchvision():
    theirs = torchvision.datasets.MNIST(REAL_ROOT, train=False)
    task = load(REAL_ROOT, validation_size=3000)
    assert (task.train.size, task.validation.size) == (57_000, 3000)
    x, y = task.test.batch(torch.arange(10_000))
    assert torch.equal(y, theirs.targets)
    torch.testing.assert_close(x, 2 * theirs.data.reshape(10_000, 784, 1).float() / 255 - 1, atol=1e-7, rtol=0)
