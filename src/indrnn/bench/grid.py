"""Every implementation at every size, within a budget of time and memory.

A point is a size. The default one (B = 32, T = 784) comes first, the others follow by the size of their tensor; within
a point the implementations take turns. What would be too slow or too large is skipped and recorded with the reason:

- memory: the point needs more than half of the free memory;
- call: a call would take longer than ``call_seconds``, judging by the nearest smaller point of the same implementation
  and growth in proportion to T (on a CPU also to B);
- budget: ``minutes`` had passed before the point began (the default point is always measured).

An implementation that fails at a point (out of memory, or a size that its library cannot do) is recorded as failed,
with the reason.
"""

import gc
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .clock import Clock, Say, Work, peak_memory
from .implementations import COPY, LOOPS, Implementation, Size, prepare
from .output import Row

HIDDEN = 128
DEFAULT = Size(32, 784, HIDDEN)
# x, h, the gradients of both, and as much again for an implementation's own work.
TENSORS_NEEDED = 12


@dataclass(frozen=True)
class Plan:
    """What to measure and for how long."""

    steps: tuple[int, ...]
    batches: tuple[int, ...]
    seconds: float
    """Timed, for each implementation and pass at each point."""
    call_seconds: float
    minutes: float

    def sizes(self) -> list[Size]:
        grid = [Size(B, T, HIDDEN) for B, T in product(self.batches, self.steps)]
        return sorted(grid, key=lambda size: (size != DEFAULT, size.tensor_bytes(), size.T))


FULL = Plan((28, 256, 512, 784, 1024, 4096, 16384), (1, 8, 32, 128, 512), seconds=0.3, call_seconds=1.0, minutes=30)
QUICK = Plan((28, 256, 784), (32,), seconds=0.3, call_seconds=3.0, minutes=2)


@dataclass
class _Past:
    """The seconds that calls have taken, by implementation and pass, to predict those of larger sizes."""

    device: torch.device
    seen: dict[tuple[Implementation, str], list[tuple[Size, float]]] = field(default_factory=dict)

    def note(self, implementation: Implementation, which: str, size: Size, seconds: float) -> None:
        self.seen.setdefault((implementation, which), []).append((size, seconds))

    def expected(self, implementation: Implementation, size: Size) -> float:
        """Seconds of the slowest pass at ``size``; 0 if no smaller size is known."""
        worst = 0.0
        for which in implementation.passes:
            smaller = [
                (old, s) for old, s in self.seen.get((implementation, which), []) if old.B <= size.B and old.T <= size.T
            ]
            if smaller:
                old, seconds = max(smaller, key=lambda past: past[0].tensor_bytes())
                growth = size.T / old.T * (size.B / old.B if self.device.type == "cpu" else 1.0)
                worst = max(worst, seconds * growth)
        return worst


def run_grid(
    plan: Plan, implementations: Sequence[Implementation], device: torch.device, say: Say
) -> Iterator[list[Row]]:
    """Measure every implementation at every size of the plan; yield the rows of one point at a time, and ``say`` how it
    went."""
    end = time.monotonic() + 60 * plan.minutes
    clock, past = Clock(device), _Past(device)
    for size in plan.sizes():
        # Garbage of the last point must not be collected while the clock runs or memory is counted.
        gc.collect()
        start = time.monotonic()
        over = start > end and size != DEFAULT
        rows = _point(plan, implementations, size, clock, past, over)
        counts = ", ".join(f"{count} {status}" for status, count in sorted(Counter(row.status for row in rows).items()))
        say(f"B={size.B} T={size.T} H={size.H}: {counts}, {time.monotonic() - start:.0f} s")
        for row in rows:
            if row.status == "failed":
                say(f"  {row.op} {row.implementation} {row.which} failed: {row.reason}")
        yield rows


def _point(
    plan: Plan, implementations: Sequence[Implementation], size: Size, clock: Clock, past: _Past, over: bool
) -> list[Row]:
    rows: list[Row] = []
    for op in ("recurrence", "layer"):
        works: dict[tuple[Implementation, str, str], Work] = {}
        for implementation in implementations:
            if implementation.op != op:
                continue
            status, reason = "skipped", _reason_to_skip(plan, implementation, size, clock.device, past, over)
            if reason is None:
                try:
                    works |= _warm(implementation, size, clock, past)
                    continue
                except RuntimeError as error:  # out of memory, or a library that cannot do this size
                    status, reason = "failed", str(error).splitlines()[0]
            rows += [_row(implementation, which, "eager", size, status, reason) for which in implementation.passes]
        timings = clock.together(works, plan.seconds)
        copies = {
            (launch, implementation.dtype): timing.median_seconds
            for (implementation, _, launch), timing in timings.items()
            if implementation.name == COPY
        }
        for (implementation, which, launch), timing in timings.items():
            # A captured graph already owns its memory.
            peak = None if launch == "graph" else peak_memory(works[implementation, which, launch], clock.device)
            moved, copy = implementation.bytes_moved(which, size), copies.get((launch, implementation.dtype))
            limit = None
            if moved is not None and copy is not None:
                # The copy reads one tensor and writes one.
                limit = copy * moved / (2 * size.tensor_bytes(implementation.dtype))
            rows.append(
                _row(
                    implementation, which, launch, size, "measured", **asdict(timing), bytes_moved=moved,
                    limit_seconds=limit, share_of_limit=limit and limit / timing.median_seconds,
                    peak_memory_bytes=peak,
                )
            )  # fmt: skip
    return rows


def _reason_to_skip(
    plan: Plan, implementation: Implementation, size: Size, device: torch.device, past: _Past, over: bool
) -> str | None:
    shortage = memory_shortage(TENSORS_NEEDED * size.tensor_bytes(), device)
    if shortage is not None:
        return shortage
    expected = past.expected(implementation, size)
    if expected > plan.call_seconds:
        return f"call: expected to take {expected:.1f} s, limit {plan.call_seconds:g} s"
    return used_up(plan.minutes) if over else None


def used_up(minutes: float) -> str:
    """The reason to skip a point once the time is over."""
    return f"budget: {minutes:g} minutes were used up"


def _warm(
    implementation: Implementation, size: Size, clock: Clock, past: _Past
) -> dict[tuple[Implementation, str, str], Work]:
    works: dict[tuple[Implementation, str, str], Work] = {}
    with clock.scope():
        prepared = prepare(implementation, size, clock.device)
    for which, work in prepared.items():
        past.note(implementation, which, size, clock.warm_up(work))
        works[implementation, which, "eager"] = work
        # One launch per time step is what a loop costs; captured, it would no longer pay for them.
        if clock.cuda and implementation.name not in LOOPS and implementation.backend != "reference":
            works[implementation, which, "graph"] = clock.capture(work)
    return works


def _row(
    implementation: Implementation,
    which: str,
    launch: str,
    size: Size,
    status: str,
    reason: str | None = None,
    **measured: Any,
) -> Row:
    names = (implementation.op, implementation.name, which, launch, size.B, size.T, size.H, implementation.dtype)
    return Row(*names, status, reason, **measured)


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
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return None if available is None else int(available.split()[1]) * 1024
