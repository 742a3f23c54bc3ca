"""The Triton kernels compiled without a GPU: no spilled registers, and all loads of a tile in flight."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
import triton

from indrnn.recurrence.triton_gpu.chooser import MAX_CHUNKS, MAX_STEPS, Tile, choose
from triton_resources import Variant, compile_for, faults, shipped

pytestmark = pytest.mark.skipif(
    bool(triton.knobs.runtime.interpret), reason="TRITON_INTERPRET=1 leaves nothing to compile"
)

# The tiles of the default network without options. Shipped variants are compiled with all options.
PLAIN = [
    Variant("forward", Tile(8, 25, 32, ahead=True), masked=True, everything=False),
    Variant("forward", Tile(1, 28, 32, ahead=True), everything=False),
    Variant("backward", Tile(8, 14, 32, ahead=True), everything=False),
    Variant("backward", Tile(1, 16, 32, ahead=True), everything=False),
]
CASES = [
    pytest.param(variant, capability, marks=() if variant in PLAIN and capability == 90 else pytest.mark.slow)
    for variant in dict.fromkeys([*shipped(), *PLAIN])
    for capability in (80, 90)
]


def found_faults(variant, capability):
    return faults(variant, compile_for(variant, capability))


@pytest.fixture(scope="module")
def compilations(request):
    """The compilations of all selected cases, in parallel, since each takes seconds."""
    cases = [item.callspec.params for item in request.session.items if "compilations" in item.fixturenames]
    cores = min(8, len(os.sched_getaffinity(0)), len(cases))
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        yield {
            (case["variant"], case["capability"]): pool.submit(found_faults, case["variant"], case["capability"])
            for case in cases
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("variant", "capability"), CASES, ids=str)
def test_shipped_kernels_spill_nothing_and_load_ahead(variant, capability, compilations):
    assert compilations[variant, capability].result() == []


@pytest.mark.parametrize("strategy", ["auto", "sequential", "scan"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_chosen_tiles_are_within_limits(direction, strategy):
    for B in (1, 3, 32, 512, 100_000):
        for T in (1, 2, 3, 17, 28, 783, 784, 1024, 100_000):
            for H in (1, 5, 16, 128, 1000):
                tile = choose(direction, "relu", B, T, H, False, True, strategy)
                assert 1 <= tile.chunks <= MAX_CHUNKS
                assert 1 <= tile.steps <= MAX_STEPS[direction]
                assert tile.ahead == (tile.chunks * tile.steps < T)
                assert strategy in ("auto", tile.strategy)


def test_tanh_forward_is_sequential():
    assert choose("forward", "tanh", 1, 1000, 8, False, True, "scan").strategy == "sequential"
    assert choose("backward", "tanh", 1, 1000, 8, False, True, "scan").strategy == "scan"


def test_tiles_of_the_default_network_are_compiled():
    chosen = {
        (direction, choose(direction, "relu", B, 784, 128, False, True))
        for direction in ("forward", "backward")
        for B in (32, 512)
    }
    assert chosen <= {(variant.direction, variant.tile) for variant in PLAIN}
    assert chosen <= {(variant.direction, variant.tile) for variant in shipped()}
    assert {variant.dtype for variant in shipped()} == {torch.float32, torch.float64, torch.bfloat16}
