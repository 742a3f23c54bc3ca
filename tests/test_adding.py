"""The adding problem: its sequences, their independence of everything but the index, and their randomness."""

import numpy as np
import pytest
import torch

from indrnn.data import make_task
from indrnn.data.adding import _mix
from parts import adding as adding_data

CPU = torch.device("cpu")
SPLITS = ("train", "validation", "test")


def adding(length=50, **keys):
    return make_task(adding_data(length=length, **keys)).load(CPU)


@pytest.mark.parametrize(("length", "part"), [(2, "train"), (3, "test"), (17, "validation"), (100, "train")])
def test_one_marker_in_each_half_and_their_values_sum_to_the_target(length, part):
    x, y = getattr(adding(length), part).batch(torch.arange(64))
    assert x.shape == (64, length, 2)
    assert y.shape == (64,)
    assert x.dtype == y.dtype == torch.float32
    values, markers = x.unbind(2)
    assert ((markers == 0) | (markers == 1)).all()
    half = length // 2
    assert (markers[:, :half].sum(1) == 1).all()
    assert (markers[:, half:].sum(1) == 1).all()
    assert ((values >= 0) & (values < 1)).all()
    torch.testing.assert_close(y, (values * markers).sum(1), rtol=0, atol=0)


def test_sizes_and_shapes_are_declared():
    task = adding(500, validation_size=7, test_size=9)
    assert (task.train.size, task.validation.size, task.test.size) == (None, 7, 9)
    assert task.provenance["split"] == {"seed": 0, "train": None, "validation": 7, "test": 9}
    assert make_task(adding_data(length=500)).folder == "adding-T500"


def test_sequence_depends_on_its_index_alone():
    """So a resumed run sees the same data, whatever the batches."""
    x, y = adding().train.batch(torch.arange(1000, 1040))
    rows = torch.tensor([39, 0, 7, 7])
    for got, expected in zip(adding().train.batch(1000 + rows), (x[rows], y[rows]), strict=True):
        assert torch.equal(got, expected)


def test_numbers_are_those_of_splitmix64():
    """Compare with SplitMix64 in Python integers, for counters of either sign."""

    def splitmix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    counters = [0, 1, 2**31, 2**63 - 1, -1, -(2**63), 123456789123456789, -987654321987654321]
    mixed = _mix(torch.tensor(counters)).tolist()
    assert [m % 2**64 for m in mixed] == [splitmix(c % 2**64) for c in counters]
    # The first three outputs of the published generator from the seed 1234567.
    outputs = _mix(torch.tensor([1, 2, 3]) * (0x9E3779B97F4A7C15 - 2**64) + 1234567).tolist()
    assert [o % 2**64 for o in outputs] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_splits_and_seeds_share_no_sequence():
    tasks = [adding(20, data_seed=seed) for seed in (0, 1, 2**31)]
    rows = torch.cat([getattr(task, part).batch(torch.arange(2000))[0][..., 0] for task in tasks for part in SPLITS])
    # Nor is one sequence another one shifted by a few steps.
    starts = torch.cat([rows[:, k : k + 4] for k in range(17)])
    assert len(torch.unique(starts, dim=0)) == 17 * len(rows)


@pytest.mark.parametrize("length", [50, 51])
def test_markers_are_uniform_over_their_half(length):
    x, _ = adding(length).train.batch(torch.arange(20_000))
    half = length // 2
    first, second = x[:, :half, 1].argmax(1), x[:, half:, 1].argmax(1)
    pairs = np.bincount((first * (length - half) + second).numpy(), minlength=half * (length - half))
    chi_squared, degrees = ((pairs - pairs.mean()) ** 2).sum() / pairs.mean(), pairs.size - 1
    assert abs(chi_squared - degrees) < 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("part", SPLITS)
def test_mean_baseline_is_that_of_the_split_itself(part):
    task = make_task(adding_data(length=17, validation_size=300, test_size=500, data_seed=4))
    split = getattr(task.load(CPU), part)
    expected = 1 / 6 if part == "train" else split.batch(torch.arange(split.size))[1].double().var(correction=0).item()
    assert task.mean_answer_error(part) == expected
