"""The order of the data, and independent random streams for each purpose."""

import pytest
import torch

from indrnn.errors import UserError
from indrnn.training.sampler import BatchSampler, Stream, generator, torch_seed

CPU = torch.device("cpu")


def test_an_epoch_sees_each_sequence_at_most_once_in_full_batches():
    sampler = BatchSampler(103, 10, seed=5, device=CPU)
    seen = torch.cat([sampler.indices(step) for step in range(10)])
    assert sampler.steps_per_epoch == 10
    assert len(seen) == len(seen.unique()) == 100
    assert seen.max() < 103
    assert sampler.epochs(25) == 2.5


def test_batches_are_a_function_of_seed_and_step():
    sampler = BatchSampler(50, 7, seed=1, device=CPU)
    forward = [sampler.indices(step).tolist() for step in range(30)]
    another = BatchSampler(50, 7, seed=1, device=CPU)
    assert [another.indices(step).tolist() for step in reversed(range(30))] == forward[::-1]
    assert forward[0] != forward[7]  # the second epoch has another order
    assert BatchSampler(50, 7, seed=2, device=CPU).indices(0).tolist() != forward[0]
    # What a seed means does not change between versions.
    assert BatchSampler(1000, 4, seed=0, device=CPU).indices(0).tolist() == [257, 285, 223, 457]


def test_endless_training_sets_are_read_in_order():
    sampler = BatchSampler(None, 4, seed=0, device=CPU)
    assert [sampler.indices(step).tolist() for step in (0, 5)] == [[0, 1, 2, 3], [20, 21, 22, 23]]
    assert sampler.epochs(5) == 0.0


def test_batch_norm_samples_are_distinct_training_indices_of_the_step():
    sampler = BatchSampler(100, 10, seed=0, device=CPU)
    samples = sampler.norm_samples(60, step=10)
    assert len(samples.unique()) == 60
    assert samples.max() < 100
    assert torch.equal(samples, sampler.norm_samples(60, step=10))
    assert not torch.equal(samples, sampler.norm_samples(60, step=20))
    assert len(sampler.norm_samples(1000, step=0)) == 100


def test_batch_norm_samples_of_an_endless_set_are_never_trained_on():
    samples = BatchSampler(None, 4, seed=0, device=CPU).norm_samples(60, step=10)
    assert samples.min() > 10**11
    assert samples.max() < 2**61  # where the validation sequences begin


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(UserError, match=r"trainer\.batch_size=11 .* 10 training sequences"):
        BatchSampler(10, 11, seed=0, device=CPU)


def test_streams_differ_from_each_other_and_between_seeds():
    draws = {(seed, stream): generator(seed, stream).integers(2**62) for seed in (0, 1) for stream in Stream}
    assert len(set(draws.values())) == len(draws)
    seeds = {torch_seed(seed, stream) for seed in (0, 1) for stream in Stream}
    assert len(seeds) == 2 * len(Stream)
    assert all(0 <= seed < 2**63 for seed in seeds)
