"""Timing with `torch.utils.benchmark` on a CPU and `triton.testing.do_bench` on a GPU."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import numpy as np
import torch

Work = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)

ROUNDS = 5
_failed: list[torch.cuda.CUDAGraph] = []  # the allocator still asks a graph whose capture failed


def capture(work: Work) -> Work:
    """Capture ``work``, which must have run before, as a CUDA graph; return the call that replays it.

    Autograd runs a backward pass on the stream of its forward pass, so both must be on the current stream.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            work()
    except BaseException:
        _failed.append(graph)
        raise
    return graph.replay


def seconds_of(work: Work, device: torch.device) -> float:
    """The seconds of a call after a warm-up call, launches included."""
    for _ in range(2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - start


def time_interleaved(works: Mapping[Key, Work], device: torch.device, seconds: float) -> dict[Key, dict[str, float]]:
    """Time calls in turns, so that noise on the machine reaches all of them, each for about ``seconds``.

    On a GPU, the L2 cache is flushed before every timed call. Returns median_seconds, q20_seconds, q80_seconds and
    repeats of each.
    """
    samples: dict[Key, list[float]] = {key: [] for key in works}
    for round_ in range(ROUNDS):
        for key, work in works.items():
            if round_ == 0 or sum(samples[key]) < seconds:
                samples[key] += _samples(work, device, seconds / ROUNDS)
    rows = {}
    for key, times in samples.items():
        q20, median, q80 = np.quantile(times, [0.2, 0.5, 0.8]).tolist()
        rows[key] = {"median_seconds": median, "q20_seconds": q20, "q80_seconds": q80, "repeats": len(times)}
    return rows


def _samples(work: Work, device: torch.device, seconds: float) -> list[float]:
    if device.type == "cuda":
        from triton.testing import do_bench

        return [milliseconds / 1e3 for milliseconds in do_bench(work, warmup=1, rep=1e3 * seconds, return_mode="all")]
    from torch.utils.benchmark import Timer

    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).times
