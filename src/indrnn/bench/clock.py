"""Seconds and bytes. Timing: warm-up outside the clock, implementations in turns, CUDA synchronised; medians with
20/80 % quantiles."""

import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

Work = Callable[[], object]
Key = TypeVar("Key")

# A turn of a fast implementation: one call that only brings its data back into the caches, then this many timed calls.
CALLS_A_TURN = 4
# A call slower than this counts itself, and makes the turn.
SLOW_SECONDS = 0.2
MOST_CALLS = 400
# Larger than the L2 cache of any GPU (H200: 50 MB), so that every timed call reads its input from memory.
FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Timing:
    """The duration of one call, over all timed calls."""

    median_seconds: float
    q20_seconds: float
    q80_seconds: float
    repeats: int

    def of(self, parts: int) -> "Timing":
        """The timing of one of ``parts`` equal parts of the call."""
        median, q20, q80 = (seconds / parts for seconds in (self.median_seconds, self.q20_seconds, self.q80_seconds))
        return Timing(median, q20, q80, self.repeats * parts)


class Clock:
    """Times calls on one device. On CUDA every call is timed between two events behind a write that flushes the L2
    cache and keeps the device busy while the host enqueues."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.cuda else None

    def scope(self) -> AbstractContextManager[Any]:
        """The context in which an implementation must be prepared: on CUDA the stream that may later be captured, since
        autograd runs a backward pass on the stream of its forward pass."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def once(self, work: Work) -> float:
        """Seconds of one call."""
        if self._flush is None:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        with self.scope():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            begin.record()
            work()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def capture(self, work: Work) -> Work:
        """Return a call that replays ``work`` as a CUDA graph; ``work`` must have run before."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph, stream=self.stream):
            work()
        return graph.replay

    def warm_up(self, work: Work) -> float:
        """Run ``work`` twice (compilation, caches, memory pools); return the seconds of the second call."""
        self.once(work)
        return self.once(work)

    def together(self, works: Mapping[Key, Work], seconds: float, least: int = 3) -> dict[Key, Timing]:
        """Time warmed-up calls in turns, so that a machine that slows down slows all of them.

        Each is timed for about ``seconds`` and at least ``least`` times.
        """
        samples: dict[Key, list[float]] = {name: [] for name in works}

        def unfinished(name: Key) -> bool:
            times = samples[name]
            return len(times) < least or (sum(times) < seconds and len(times) < MOST_CALLS)

        gc.disable()
        try:
            while waiting := [name for name in works if unfinished(name)]:
                for name in waiting:
                    turn = [self.once(works[name])]
                    if turn[0] <= SLOW_SECONDS:
                        turn = [self.once(works[name]) for _ in range(CALLS_A_TURN)]
                    samples[name] += turn
        finally:
            gc.enable()
        return {name: timing(values) for name, values in samples.items()}


def timing(samples: Sequence[float]) -> Timing:
    q20, median, q80 = np.quantile(samples, [0.2, 0.5, 0.8])
    return Timing(float(median), float(q20), float(q80), len(samples))


def peak_memory(work: Work, device: torch.device) -> int | None:
    """Bytes that one call needs on top of what was held before; None if the system does not report it.

    CUDA: the allocator's peak. Linux: the peak of the resident set, reset through /proc/self/clear_refs after the C
    library has returned what it kept from earlier calls; a lower bound where it cannot.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _bytes_in("self/status", "VmRSS")
        work()
        return max(0, _bytes_in("self/status", "VmHWM") - before)
    except OSError:
        return None


def memory_shortage(needed: int, device: torch.device) -> str | None:
    """The reason to skip a point that needs more bytes than half of those that are free; None if it fits."""
    free = free_memory(device)
    if free is None or needed <= free / 2:
        return None
    return f"memory: needs about {needed / 1e9:.1f} GB, half of what is free is {free / 2e9:.1f} GB"


def free_memory(device: torch.device) -> int | None:
    """Bytes free on the device; None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return _bytes_in("meminfo", "MemAvailable")
    except OSError:
        return None


def _bytes_in(file: str, field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc", file).read_text())
    if match is None:
        raise OSError(f"/proc/{file} has no {field}")
    return int(match[1]) * 1024
