"""Tasks from their configuration: names, shapes, splits, the bundled mnist5k, and a custom task with augmentation."""

import sys

import numpy as np
import pytest
import torch

from indrnn.config.compose import load_config
from indrnn.data import make_task
from indrnn.data.mnist import ImageSplit, stratified_split
from indrnn.errors import UserError
from indrnn.training import train
from parts import adding as adding_data
from parts import mnist as mnist_data
from parts import mnist5k as mnist5k_data

CPU = torch.device("cpu")
# Of the 5000 x 784 pixels and then the 5000 labels, as bytes.
MNIST5K_SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"
LABELS = np.random.default_rng(5).choice(10, p=np.arange(1, 11) / 55, size=5003).astype(np.uint8)


def permuted(permutation):
    return mnist_data(name="mnist_permuted", permutation=permutation)


@pytest.mark.parametrize(
    ("config", "folder", "name"),
    [
        (mnist_data(), "mnist", "mnist"),
        (permuted("seed92916"), "mnist_permuted", "mnist_permuted"),
        (permuted("bitrev"), "mnist_permuted-bitrev", "mnist_permuted"),
        (permuted("random:07"), "mnist_permuted-random-7", "mnist_permuted"),
        (mnist_data(permutation="numpy0"), "mnist_permuted-numpy0", "mnist_permuted"),
        (mnist5k_data(permutation="bitrev"), "mnist5k_permuted-bitrev", "mnist5k_permuted"),
    ],
)
def test_image_tasks_have_their_folder_and_shape(config, folder, name):
    task = make_task(config)
    assert (task.folder, task.name) == (folder, name)
    assert (task.length, task.input_size, task.output_size, task.loss) == (784, 1, 10, "cross_entropy")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (mnist_data(name="fashion"), "mnist5k"),
        (permuted("shuffle"), "bitrev"),
        (permuted("file:order.npy"), "random:<seed"),
        (permuted(None), "seed92916"),
        (mnist5k_data(validation_size=4000, test_size=1000), "data.validation_size=4000 and data.test_size=1000"),
    ],
)
def test_impossible_task_is_refused_in_one_line(config, named):
    with pytest.raises(UserError) as error:
        make_task(config)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sizes", [[500], [499, 1003], [10], [5002]])
def test_splits_are_exact_disjoint_complete_and_stratified(sizes):
    parts = stratified_split(LABELS, sizes, seed=1)
    assert [len(part) for part in parts] == [*sizes, len(LABELS) - sum(sizes)]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))
    share = np.bincount(LABELS) / len(LABELS)
    for part in parts:
        assert (np.abs(np.bincount(LABELS[part], minlength=10) - share * len(part)) < 2).all()


def test_splits_depend_on_the_seed_and_not_on_the_release():
    first, other = (stratified_split(LABELS, [500], seed)[0] for seed in (0, 1))
    assert 20 < len(np.intersect1d(first, other)) < 90  # a tenth of 500 by chance
    part = stratified_split((np.arange(1000) % 10).astype(np.uint8), [20], seed=0)[0].tolist()
    assert part == [
        11, 92, 108, 196, 269, 403, 504, 523, 569, 600, 608, 632, 657, 744, 777, 836, 850, 855, 921, 935
    ]  # fmt: skip


def test_pixels_are_scaled_to_minus_one_to_one():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(4)[:784].reshape(1, 784)
    x, _ = ImageSplit(pixels, torch.tensor([3])).batch(torch.tensor([0, 0]))
    assert (x[1, :, 0].double() - (2 * pixels[0].double() / 255 - 1)).abs().max() < 1e-7
    assert (x.min(), x.max()) == (-1, 1)


def test_mnist5k_is_split_in_three_stratified_parts():
    task = make_task(mnist5k_data()).load(CPU)
    seen = []
    for split, size in ((task.train, 3500), (task.validation, 500), (task.test, 1000)):
        assert split.size == size
        x, y = split.batch(torch.arange(size))
        assert torch.bincount(y).tolist() == [size // 10] * 10
        seen.append(x[..., 0])
    # No two of the 5,000 images are equal.
    assert len(torch.unique(torch.cat(seen), dim=0)) == 5000
    assert task.test is task.test
    assert task.provenance["sha256"] == {"mnist5k.npz": MNIST5K_SHA256}
    assert {"seed": 0, "train": 3500, "validation": 500, "test": 1000}.items() <= task.provenance["split"].items()


@pytest.mark.parametrize("config", [mnist5k_data(permutation="torch5544"), adding_data(length=10)])
def test_default_device_and_dtype_do_not_matter(config):
    def batches():
        splits = make_task(config).load(CPU)
        parts = (splits.train, splits.validation, splits.test)
        return [tensor for part in parts for tensor in part.batch(torch.arange(4, device="cpu"))]

    expected = batches()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        found = batches()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(got, want) and got.dtype == want.dtype for got, want in zip(found, expected, strict=True))


# The documented recipe for data augmentation.
SHIFTED = '''\
"""mnist5k with every training image shifted up or down by up to two pixels."""
import dataclasses

import torch
from indrnn.config.compose import load_config
from indrnn.data import make_task


def draw(indices, multiplier, count):
    """A number below count for each index. It depends on the index alone, so a resumed run sees the same data."""
    return (indices * multiplier >> 33) % count


class Shifted:
    size = None  # endless: every index occurs once

    def __init__(self, split):
        self.split = split

    def batch(self, indices):
        x, y = self.split.batch(draw(indices, -7046029254386353131, self.split.size))
        shift = 28 * (draw(indices, -4658895280553007687, 5) - 2)
        pixels = (torch.arange(784, device=x.device) + shift.unsqueeze(1)) % 784
        return x.gather(1, pixels.unsqueeze(2)), y


def shifted():
    task = make_task(load_config(["data=mnist5k"]).data)

    def load(device):
        splits = task.load(device)
        return dataclasses.replace(splits, train=Shifted(splits.train))

    return dataclasses.replace(task, folder="mnist5k_shifted", load=load)
'''
SHIFTED_YAML = "defaults: [/schema/data/external@_here_, _self_]\nname: shifted\n_target_: augmented.shifted\n"


def test_recipe_for_augmentation_trains_and_depends_on_the_index_alone(tmp_path, monkeypatch):
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "shifted.yaml").write_text(SHIFTED_YAML)
    (tmp_path / "augmented.py").write_text(SHIFTED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "augmented", raising=False)

    settings = ("model=rnn", "model.hidden_size=4", "model.num_layers=1", "device=cpu", "trainer.batch_size=8")
    lengths = ("trainer.max_steps=2", "trainer.eval_every=2", "trainer.bn_samples=8")
    cfg = load_config(["data=shifted", *settings, *lengths, f"output_root={tmp_path}"], config_dir=f"{tmp_path}/conf")
    train(cfg)
    assert (tmp_path / "mnist5k_shifted" / "rnn" / "seed0" / "result.json").exists()
    plain, shifted = make_task(mnist5k_data()).load(CPU), make_task(cfg.data).load(CPU)
    x, y = shifted.train.batch(torch.arange(500))
    assert torch.equal(x[7:9], shifted.train.batch(torch.arange(7, 9))[0])
    assert torch.bincount(y, minlength=10).min() > 25
    originals = plain.train.batch(torch.arange(3500))[0][..., 0].sort().values.numpy()
    assert {row.tobytes() for row in x[..., 0].sort().values.numpy()} <= {row.tobytes() for row in originals}


@pytest.mark.gpu
@pytest.mark.parametrize("config", [mnist5k_data(), adding_data(length=1000, data_seed=3)])
def test_batches_are_the_same_on_the_gpu_and_inside_a_cuda_graph(config):
    rows = torch.tensor([5, 3, 3, 3491])
    expected, split = (make_task(config).load(torch.device(device)).train for device in ("cpu", "cuda"))
    static = rows.cuda()
    split.batch(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = split.batch(static)
    for offset in (0, 7):
        static.copy_(rows + offset)
        graph.replay()
        for got, want in zip(out, expected.batch(rows + offset), strict=True):
            assert torch.equal(got.cpu(), want)
