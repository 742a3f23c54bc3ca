"""Each named permutation against an independent computation of what its users' code does."""

import numpy as np
import pytest
import torch

from indrnn.data.permutations import NAMED, load_permutation
from indrnn.errors import UserError


def drawn(name: str) -> list[int]:
    seed = int("".join(filter(str.isdigit, name)) or 0)
    if name == "bitrev":  # sorted by the ten binary digits read backwards
        return sorted(range(784), key=lambda number: f"{number:010b}"[::-1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (torch.randperm(784) if "torch" in name else np.random.RandomState(seed).permutation(784)).tolist()


@pytest.mark.parametrize("name", NAMED)
def test_named_permutations_follow_their_users_rule(name):
    permutation = load_permutation(name)
    assert permutation.dtype == np.int64
    assert permutation.tolist() == drawn(name)


def test_random_permutations_follow_their_seed():
    assert load_permutation("random:92916").tolist() == load_permutation("seed92916").tolist()
    assert load_permutation("random:1").tolist() != load_permutation("random:2").tolist()
    assert sorted(load_permutation("random:7").tolist()) == list(range(784))


def test_a_changed_library_is_noticed_and_random_streams_are_unchanged(monkeypatch):
    states = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    for name in [*NAMED, "random:5"]:
        load_permutation(name)
    assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == states
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
    with pytest.raises(UserError, match="torch12008"):
        load_permutation("torch12008")


@pytest.mark.parametrize(
    "name",
    ["seed1", "", "file:order.npy", "<seed>", "BITREV", *map("random:{}".format, (-1, "x", 1.5, "", 2**32, "²"))],
)
def test_unknown_names_are_refused_with_the_choices(name):
    with pytest.raises(UserError, match="from 0 to 4294967295") as error:
        load_permutation(name)
    assert all(choice in str(error.value) for choice in (*NAMED, "random:<seed"))
