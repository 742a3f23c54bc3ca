"""The order of the data, and that each purpose has random numbers of its own."""

import pytest
import torch

from indrnn.errors import UserError
from indrnn.training.order import DataOrder, Stream, generator, torch_seed

CPU = torch.device("cpu")


def test_an_epoch_sees_each_sequence_at_most_once_in_full_batches():
    order = DataOrder(103, 10, seed=5, device=CPU)
    assert order.steps_per_epoch == 10
    seen = torch.cat([order.indices(step) for step in range(10)])
    assert len(seen) == 100
    assert len(seen.unique()) == 100
    assert seen.max() < 103


def test_batches_are_a_function_of_seed_and_step_alone():
    order = DataOrder(50, 7, seed=1, device=CPU)
    forward = [order.indices(step).tolist() for step in range(30)]
    another = DataOrder(50, 7, seed=1, device=CPU)
    assert [another.indices(step).tolist() for step in reversed(range(30))] == forward[::-1]
    assert forward[0] != forward[7]  # the second epoch has another order
    assert DataOrder(50, 7, seed=2, device=CPU).indices(0).tolist() != forward[0]


def test_generated_tasks_are_read_in_their_own_order():
    order = DataOrder(None, 4, seed=0, device=CPU)
    assert order.indices(0).tolist() == [0, 1, 2, 3]
    assert order.indices(5).tolist() == [20, 21, 22, 23]
    assert order.epochs(5) == 0.0


def test_epochs_count_what_was_seen():
    assert DataOrder(103, 10, seed=0, device=CPU).epochs(25) == 2.5


def test_samples_for_batch_norm_are_distinct_training_indices_drawn_anew_each_time():
    order = DataOrder(100, 10, seed=0, device=CPU)
    samples = order.norm_samples(60, step=10)
    assert len(samples.unique()) == 60
    assert samples.max() < 100
    assert torch.equal(samples, order.norm_samples(60, step=10))
    assert not torch.equal(samples, order.norm_samples(60, step=20))
    assert len(order.norm_samples(1000, step=0)) == 100


def test_samples_of_a_generated_task_are_none_that_training_sees():
    samples = DataOrder(None, 4, seed=0, device=CPU).norm_samples(60, step=10)
    assert samples.min() > 10**11
    assert samples.max() < 2**61  # where the validation sequences begin


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(UserError, match=r"trainer\.batch_size=11 exceeds the 10 training sequences"):
        DataOrder(10, 11, seed=0, device=CPU)


def test_streams_differ_from_each_other_and_between_seeds():
    draws = {(seed, stream): generator(seed, stream).integers(2**62) for seed in (0, 1) for stream in Stream}
    assert len(set(draws.values())) == len(draws)
    seeds = {torch_seed(seed, stream) for seed in (0, 1) for stream in Stream}
    assert len(seeds) == 2 * len(Stream)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_what_a_seed_means_does_not_change():
    assert DataOrder(1000, 4, seed=0, device=CPU).indices(0).tolist() == [257, 285, 223, 457]
