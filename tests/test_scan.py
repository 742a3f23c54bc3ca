"""Composing clamp-affine maps in any bracketing yields the states of the loop, and never NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
from indrnn.recurrence.scan import UNBOUNDED, ClampAffine, compose

# Relative to the largest state. A float32 tree loses about 2e-4 at |u| = 2^(1/784) over 784 steps.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-4}
MAX = 2 ** (1 / 784)
WEIGHTS = [0.0, 1e-30, -1e-30, 1e-3, -1e-3, 1.0, -1.0, MAX, -MAX, 1.5, -1.5]


def steps_of(x, u):
    """One map per step; x (T, H), u (H,)."""
    return [ClampAffine(a, u, torch.zeros_like(a), torch.full_like(a, UNBOUNDED)) for a in x]


def fold_left(maps):
    results = maps[:1]
    for each in maps[1:]:
        results.append(compose(results[-1], each))
    return results


def hillis_steele(maps):
    maps, distance = list(maps), 1
    while distance < len(maps):
        maps = [maps[t] if t < distance else compose(maps[t - distance], maps[t]) for t in range(len(maps))]
        distance *= 2
    return maps


def assert_states(maps, x, u, h0, tolerance):
    expected = naive.recurrence(x.double().unsqueeze(0), u.double(), h0.double().unsqueeze(0))[0][0]
    actual = torch.stack([each(h0) for each in maps])
    assert not actual.isnan().any()
    largest = expected.abs().amax(0).clamp(min=1e-6)
    assert ((actual.double() - expected).abs().amax(0) <= tolerance * largest).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scan", [fold_left, hillis_steele])
@pytest.mark.parametrize("T", [1, 2, 17, 100, 784])
def test_every_order_yields_the_states_of_the_loop(scan, T, dtype):
    u = torch.tensor(WEIGHTS, dtype=dtype)
    x, h0 = torch.randn(T, len(u), dtype=dtype), torch.rand(len(u), dtype=dtype)
    maps = scan(steps_of(x, u))
    assert not any(part.isnan().any() for each in maps for part in each)
    bounded = u.abs() <= (MAX if T == 784 else 1.5)  # 1.5^784 overflows
    maps = [ClampAffine(*(part[bounded] for part in each)) for each in maps]
    assert_states(maps, x[:, bounded], u[bounded], h0[bounded], TOLERANCE[dtype])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), T=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_random_brackets(data, T, seed):
    generator = torch.Generator().manual_seed(seed)
    u = torch.tensor(WEIGHTS, dtype=torch.float64)
    x = torch.randn(T, len(u), dtype=torch.float64, generator=generator)
    maps = steps_of(x, u)
    while len(maps) > 1:
        k = data.draw(st.integers(0, len(maps) - 2))
        maps[k : k + 2] = [compose(maps[k], maps[k + 1])]
    h0 = torch.rand(len(u), dtype=torch.float64, generator=generator)
    expected = naive.recurrence(x.unsqueeze(0), u, h0.unsqueeze(0))[1][0]
    actual = maps[0](h0)
    scale = expected.abs().clamp(min=1.0) * max(1.0, 1.5**T * 1e-3)
    assert not actual.isnan().any()
    assert ((actual - expected).abs() <= 1e-11 * scale).all()
