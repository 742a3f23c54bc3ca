"""Tasks from their configuration: names, shapes, splits, and the bundled mnist5k."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from indrnn.data import make_task, mnist
from indrnn.data.mnist import ImageSplit, stratified_split
from indrnn.errors import UserError
from parts import adding as adding_data
from parts import mnist as mnist_data
from parts import mnist5k as mnist5k_data

CPU = torch.device("cpu")


def permuted(permutation):
    return mnist_data(name="mnist_permuted", permutation=permutation)


# Names and shapes


@pytest.mark.parametrize(
    ("config", "folder", "name"),
    [
        (mnist_data(), "mnist", "mnist"),
        (permuted("seed92916"), "mnist_permuted", "mnist_permuted"),
        (permuted("bitrev"), "mnist_permuted-bitrev", "mnist_permuted"),
        (permuted("random:07"), "mnist_permuted-random-7", "mnist_permuted"),
        (permuted("file:../my orders/a b?.npy"), "mnist_permuted-file-a_b_", "mnist_permuted"),
        (mnist_data(permutation="numpy0"), "mnist_permuted-numpy0", "mnist_permuted"),
        (mnist5k_data(), "mnist5k", "mnist5k"),
        (mnist5k_data(permutation="bitrev"), "mnist5k_permuted-bitrev", "mnist5k_permuted"),
    ],
)
def test_image_tasks_have_their_folder_and_shape(config, folder, name):
    task = make_task(config)
    assert (task.folder, task.name) == (folder, name)
    assert (task.length, task.input_size, task.output_size, task.loss) == (784, 1, 10, "cross_entropy")


def test_the_adding_problems_folder_tells_its_length():
    config = adding_data(length=500)
    task = make_task(config)
    assert (task.folder, task.name, task.length) == ("adding-T500", "adding", 500)


def test_what_cannot_be_a_task_is_refused_in_one_line():
    for config, named in (
        (mnist_data(name="fashion"), "mnist5k"),
        (permuted("shuffle"), "bitrev"),
        (permuted(None), "seed92916"),
    ):
        with pytest.raises(UserError, match=named) as error:
            make_task(config)
        assert "\n" not in str(error.value)


def test_names_and_shapes_cost_no_import_of_torch():
    code = "import sys, indrnn.data; assert not {'torch', 'torchvision'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


# Splits

LABELS = np.random.default_rng(5).choice(10, p=np.arange(1, 11) / 55, size=5003).astype(np.uint8)


@pytest.mark.parametrize("sizes", [[500], [499, 1003], [10], [4000, 1000], [5002]])
def test_parts_are_exact_disjoint_and_complete(sizes):
    parts = stratified_split(LABELS, sizes, seed=0)
    assert [len(part) for part in parts] == [*sizes, len(LABELS) - sum(sizes)]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_class_has_its_share(seed):
    share = np.bincount(LABELS) / len(LABELS)
    for part in stratified_split(LABELS, [507, 1001], seed):
        assert (np.abs(np.bincount(LABELS[part]) - share * len(part)) < 2).all()


def test_the_seed_decides_the_split():
    first, again, other = (stratified_split(LABELS, [500], seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    # About a tenth of 500 are shared by chance.
    assert 20 < len(np.intersect1d(first, other)) < 90


def test_splits_do_not_change_from_release_to_release():
    labels = (np.arange(1000) % 10).astype(np.uint8)
    assert stratified_split(labels, [20], seed=0)[0].tolist() == [
        11,
        92,
        108,
        196,
        269,
        403,
        504,
        523,
        569,
        600,
        608,
        632,
        657,
        744,
        777,
        836,
        850,
        855,
        921,
        935,
    ]


def test_a_split_without_rest_is_refused():
    with pytest.raises(ValueError, match="leave none"):
        stratified_split(LABELS, [5000, 3], 0)


# Batches


def test_each_byte_is_scaled_to_minus_one_to_one():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(4)[:784].reshape(1, 784)
    x, _ = ImageSplit(pixels, torch.tensor([3])).batch(torch.tensor([0, 0]))
    exact = 2 * pixels[0].double() / 255 - 1
    assert x.shape == (2, 784, 1)
    assert (x[1, :, 0].double() - exact).abs().max() < 1e-7
    assert x.min() == -1
    assert x.max() == 1


def test_a_batch_may_be_changed_without_changing_the_data():
    task = make_task(mnist5k_data()).load(CPU)
    x, y = task.train.batch(torch.arange(4))
    copies = x.clone(), y.clone()
    x.zero_()
    y.zero_()
    for got, want in zip(task.train.batch(torch.arange(4)), copies, strict=True):
        assert torch.equal(got, want)


# mnist5k


def test_mnist5k_has_500_of_each_digit_and_its_hash():
    images, labels = mnist.read_mnist5k()
    assert images.shape == (5000, 784)
    assert images.dtype == labels.dtype == np.uint8
    assert np.bincount(labels).tolist() == [500] * 10
    assert mnist.content_sha256(images, labels) == mnist.MNIST5K_SHA256


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
    assert task.provenance["sha256"] == {"mnist5k.npz": mnist.MNIST5K_SHA256}
    split = task.provenance["split"]
    assert {key: split[key] for key in ("seed", "train", "validation", "test")} == {
        "seed": 0,
        "train": 3500,
        "validation": 500,
        "test": 1000,
    }


def test_mnist5k_sizes_and_seed_can_be_chosen():
    one = make_task(mnist5k_data(validation_size=123, test_size=77, split_seed=1)).load(CPU)
    two = make_task(mnist5k_data(validation_size=123, test_size=77, split_seed=2)).load(CPU)
    assert (one.train.size, one.validation.size, one.test.size) == (4800, 123, 77)
    hashes = [task.provenance["split"]["validation_sha256"] for task in (one, two)]
    assert hashes[0] != hashes[1]
    with pytest.raises(UserError, match=r"data\.validation_size=4000 and data\.test_size=1000"):
        make_task(mnist5k_data(validation_size=4000, test_size=1000)).load(CPU)


def test_mnist5k_can_be_permuted():
    rows = torch.arange(10)
    x, _ = make_task(mnist5k_data()).load(CPU).test.batch(rows)
    px, _ = make_task(mnist5k_data(permutation="bitrev")).load(CPU).test.batch(rows)
    assert torch.equal(px[:, 1], x[:, 512])
    assert torch.equal(px.sort(dim=1).values, x.sort(dim=1).values)


def test_an_altered_asset_is_refused(monkeypatch, tmp_path):
    images, labels = mnist.read_mnist5k()
    monkeypatch.setattr(mnist.resources, "files", lambda _: tmp_path)
    asset = tmp_path / "assets" / "mnist5k.npz"
    with pytest.raises(UserError, match="missing or damaged"):
        mnist.read_mnist5k()
    asset.parent.mkdir()
    np.savez(asset, images=images, labels=labels[::-1])
    with pytest.raises(UserError, match="not the one that was released"):
        mnist.read_mnist5k()
    for content in (b"", b"garbage", asset.read_bytes()[:5000]):
        asset.write_bytes(content)
        with pytest.raises(UserError, match="missing or damaged"):
            mnist.read_mnist5k()


@pytest.mark.gpu
def test_image_batches_are_the_same_on_the_gpu_and_inside_a_cuda_graph():
    rows = torch.tensor([5, 3, 3, 3499])
    expected = make_task(mnist5k_data()).load(CPU).train.batch(rows)
    split = make_task(mnist5k_data()).load(torch.device("cuda")).train
    static = rows.cuda()
    split.batch(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = split.batch(static)
    graph.replay()
    for got, want in zip(out, expected, strict=True):
        assert torch.equal(got.cpu(), want)
