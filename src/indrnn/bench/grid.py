"""Every contender at every size, within a budget of time and memory.

A point is a size. Points are taken by the size of their tensor, the default one (B = 32, T = 784) first, and within a
point the contenders take turns on the clock. What would be too slow or too large is skipped by rule and recorded so:

- memory: the point needs more than half of what is free;
- call: a call is expected to take longer than ``call_seconds``, judged by the nearest smaller point of that contender
  and growth in proportion to T (and on a CPU to B);
- budget: ``minutes`` had passed before the point began (the default point is always measured).

A contender that fails at a point (out of memory, or a size its library does not know) is recorded as failed, with why.
"""

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .clock import Clock, Work, peak_memory
from .contenders import COPY, LOOPS, Contender, Size, prepare
from .output import Row

Say = Callable[[str], None]

HIDDEN = 128
DEFAULT = Size(32, 784, HIDDEN)
# x, h, the gradients of both, and as much again for a contender's own work.
TENSORS_NEEDED = 12


@dataclass(frozen=True)
class Plan:
    """What to measure and for how long."""

    steps: tuple[int, ...]
    batches: tuple[int, ...]
    seconds: float
    """Of clock for each contender and pass at each point."""
    call_seconds: float
    minutes: float

    def sizes(self) -> list[Size]:
        grid = [Size(B, T, HIDDEN) for B, T in product(self.batches, self.steps)]
        return sorted(grid, key=lambda size: (size != DEFAULT, size.tensor_bytes(), size.T))


FULL = Plan((28, 256, 512, 784, 1024, 4096, 16384), (1, 8, 32, 128, 512), seconds=0.3, call_seconds=1.0, minutes=30)
QUICK = Plan((28, 256, 784), (32,), seconds=0.3, call_seconds=3.0, minutes=2)


@dataclass
class _Past:
    """The seconds that calls took, by contender and pass, for what is to be expected of larger sizes."""

    device: torch.device
    seen: dict[tuple[Contender, str], list[tuple[Size, float]]] = field(default_factory=dict)

    def note(self, contender: Contender, which: str, size: Size, seconds: float) -> None:
        self.seen.setdefault((contender, which), []).append((size, seconds))

    def expected(self, contender: Contender, size: Size) -> float:
        """Seconds of the slowest pass at ``size``; 0 if no smaller size is known."""
        worst = 0.0
        for which in contender.passes:
            smaller = [
                (old, s) for old, s in self.seen.get((contender, which), []) if old.B <= size.B and old.T <= size.T
            ]
            if smaller:
                old, seconds = max(smaller, key=lambda each: each[0].tensor_bytes())
                growth = size.T / old.T * (size.B / old.B if self.device.type == "cpu" else 1.0)
                worst = max(worst, seconds * growth)
        return worst


def run_grid(plan: Plan, contenders: Sequence[Contender], device: torch.device, say: Say) -> Iterator[list[Row]]:
    """Measure every contender at every size of the plan: yields the rows of each point, and ``say`` gets a line."""
    end = time.monotonic() + 60 * plan.minutes
    clock, past = Clock(device), _Past(device)
    for size in plan.sizes():
        # Here, so that nothing of an earlier point is collected while the clock runs or memory is counted.
        gc.collect()
        start = time.monotonic()
        over = start > end and size != DEFAULT
        rows = _point(plan, contenders, size, clock, past, over)
        counts = ", ".join(f"{count} {status}" for status, count in sorted(Counter(row.status for row in rows).items()))
        say(f"B={size.B} T={size.T} H={size.H}: {counts}, {time.monotonic() - start:.0f} s")
        for row in rows:
            if row.status == "failed":
                say(f"  {row.op} {row.implementation} {row.which} failed: {row.reason}")
        yield rows


def _point(plan: Plan, contenders: Sequence[Contender], size: Size, clock: Clock, past: _Past, over: bool) -> list[Row]:
    rows: list[Row] = []
    for op in ("recurrence", "layer"):
        works: dict[tuple[Contender, str, str], Work] = {}
        for contender in (each for each in contenders if each.op == op):
            status, reason = "skipped", _reason_to_skip(plan, contender, size, clock.device, past, over)
            if reason is None:
                try:
                    works |= _warm(contender, size, clock, past)
                    continue
                except RuntimeError as error:  # out of memory, or a library that cannot do this size
                    status, reason = "failed", str(error).splitlines()[0]
            rows += [_row(contender, which, "eager", size, status, reason) for which in contender.passes]
        timings = clock.together(works, plan.seconds)
        copies = {
            (launch, contender.dtype): timing.median_seconds
            for (contender, _, launch), timing in timings.items()
            if contender.name == COPY
        }
        for (contender, which, launch), timing in timings.items():
            # A replayed graph owns its memory already.
            peak = None if launch == "graph" else peak_memory(works[contender, which, launch], clock.device)
            moved, copy = contender.bytes_moved(which, size), copies.get((launch, contender.dtype))
            limit = None
            if moved is not None and copy is not None:
                # The copy reads one tensor and writes one.
                limit = copy * moved / (2 * size.tensor_bytes(contender.dtype))
            rows.append(
                _row(
                    contender, which, launch, size, "measured", **asdict(timing), bytes_moved=moved,
                    limit_seconds=limit, share_of_limit=limit and limit / timing.median_seconds,
                    peak_memory_bytes=peak,
                )
            )  # fmt: skip
    return rows


def _reason_to_skip(
    plan: Plan, contender: Contender, size: Size, device: torch.device, past: _Past, over: bool
) -> str | None:
    free, needed = free_memory(device), TENSORS_NEEDED * size.tensor_bytes()
    if free is not None and needed > free / 2:
        return f"memory: needs about {needed / 1e9:.1f} GB, half of what is free is {free / 2e9:.1f} GB"
    expected = past.expected(contender, size)
    if expected > plan.call_seconds:
        return f"call: expected to take {expected:.1f} s, limit {plan.call_seconds:g} s"
    if over:
        return f"budget: {plan.minutes:g} minutes were used up"
    return None


def _warm(contender: Contender, size: Size, clock: Clock, past: _Past) -> dict[tuple[Contender, str, str], Work]:
    works: dict[tuple[Contender, str, str], Work] = {}
    with clock.scope():
        prepared = prepare(contender, size, clock.device)
    for which, work in prepared.items():
        past.note(contender, which, size, clock.warm_up(work))
        works[contender, which, "eager"] = work
        # Launching a kernel a time step is what a loop is; captured, it would be something else.
        if clock.cuda and contender.name not in LOOPS and contender.backend != "reference":
            works[contender, which, "graph"] = clock.capture(work)
    return works


def _row(
    contender: Contender, which: str, launch: str, size: Size, status: str, reason: str | None = None, **measured: Any
) -> Row:
    names = (contender.op, contender.name, which, launch, size.B, size.T, size.H, contender.dtype)
    return Row(*names, status, reason, **measured)


def free_memory(device: torch.device) -> int | None:
    """Bytes free on the device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return None if available is None else int(available.split()[1]) * 1024
