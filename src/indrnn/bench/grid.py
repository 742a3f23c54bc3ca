"""The recurrence and a layer, by every implementation at every size, within a budget of time and memory.

A point is a size. The default one (B = 32, T = 784) comes first, the others follow by the size of their tensor; within
a point the implementations take turns. What would be too slow or too large is skipped and recorded with the reason:

- memory: the point needs more than half of the free memory;
- call: a call would take longer than ``call_seconds``, judging by the nearest smaller point of the same implementation
  and growth in proportion to T (on a CPU also to B);
- budget: ``minutes`` had passed before the point began (the default point is always measured).

An implementation that fails at a point (out of memory, or a size that its library cannot do) is recorded as failed,
with the reason. What comes of it are ratios at the default size, and a figure of time against T with the limit that a
copy sets.
"""

import gc
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from indrnn.report.style import BASELINE, figure, legend_below, looks, save, tick_at
from indrnn.report.table import markdown_table

from .clock import Clock, Work, memory_shortage, peak_memory
from .implementations import (
    COPY,
    LOOP,
    LOOP_UNBIND,
    LOOPS,
    LSTM,
    LSTM_EQUAL_PARAMETERS,
    Implementation,
    Size,
    prepare,
)

HIDDEN = 128
DEFAULT = Size(32, 784, HIDDEN)
# x, h, the gradients of both, and as much again for an implementation's own work.
TENSORS_NEEDED = 12


PANELS = (
    ("recurrence", "forward", "Recurrence, forward"),
    ("recurrence", "backward", "Recurrence, backward"),
    ("layer", "step", "Layer, whole training step"),
)
# All other implementations are backends of the IndRNN.
WORDS = {
    LOOP: "PyTorch loop over x[:, t]", LOOP_UNBIND: "PyTorch loop over x.unbind(1)", LSTM: "nn.LSTM of equal units",
    LSTM_EQUAL_PARAMETERS: "nn.LSTM of equal parameters",
}  # fmt: skip
# Implementations drawn in the colour that their model has in other figures; strategies of one kernel share it.
MODELS = {"numba": "indrnn", "triton": "indrnn", LSTM: "lstm", LSTM_EQUAL_PARAMETERS: "lstm_matched"}
# The backend that auto takes.
FASTEST = {"cpu": "numba", "cuda": "triton"}


@dataclass(frozen=True)
class Row:
    """One implementation at one size. Times in seconds; what does not apply, or was not measured, is None.

    launch: "eager", or "graph" for a replayed CUDA graph. status: "measured", or "skipped" or "failed" with a reason.
    limit_seconds: a copy's time for as many bytes as the operation has to move; share_of_limit: that over the median.
    """

    op: str
    implementation: str
    which: str
    launch: str
    B: int
    T: int
    H: int
    dtype: str
    status: str
    reason: str | None = None
    median_seconds: float | None = None
    q20_seconds: float | None = None
    q80_seconds: float | None = None
    repeats: int | None = None
    bytes_moved: int | None = None
    limit_seconds: float | None = None
    share_of_limit: float | None = None
    peak_memory_bytes: int | None = None


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


def run_grid(plan: Plan, implementations: Sequence[Implementation], device: torch.device) -> Iterator[list[Row]]:
    """Measure every implementation at every size of the plan; after each size print how it went, and yield all rows so
    far."""
    end = time.monotonic() + 60 * plan.minutes
    clock = Clock(device)
    rows: list[Row] = []
    for size in plan.sizes():
        # Garbage of the last point must not be collected while the clock runs or memory is counted.
        gc.collect()
        start = time.monotonic()
        point = list(_point(plan, implementations, size, clock, rows, start > end and size != DEFAULT))
        rows += point
        counts = ", ".join(f"{count} {status}" for status, count in sorted(Counter(r.status for r in point).items()))
        print(f"B={size.B} T={size.T} H={size.H}: {counts}, {time.monotonic() - start:.0f} s", flush=True)
        for row in point:
            if row.status == "failed":
                print(f"  {row.op} {row.implementation} {row.which} failed: {row.reason}", flush=True)
        yield rows


def _point(
    plan: Plan, implementations: Sequence[Implementation], size: Size, clock: Clock, past: Sequence[Row], over: bool
) -> Iterator[Row]:
    for op in ("recurrence", "layer"):
        works: dict[tuple[Implementation, str, str], Work] = {}
        for implementation in implementations:
            if implementation.op != op:
                continue
            status, reason = "skipped", _reason_to_skip(plan, implementation, size, clock.device, past, over)
            if reason is None:
                try:
                    works |= _warm(implementation, size, clock)
                    continue
                except RuntimeError as error:  # out of memory, or a library that cannot do this size
                    status, reason = "failed", str(error).splitlines()[0]
            for which in implementation.passes:
                yield Row(*_names(implementation, which, "eager", size), status, reason)
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
            yield Row(
                *_names(implementation, which, launch, size), "measured", **asdict(timing), bytes_moved=moved,
                limit_seconds=limit, share_of_limit=limit and limit / timing.median_seconds, peak_memory_bytes=peak,
            )  # fmt: skip


def _names(
    implementation: Implementation, which: str, launch: str, size: Size
) -> tuple[str, str, str, str, int, int, int, str]:
    """The first columns of a row."""
    return implementation.op, implementation.name, which, launch, size.B, size.T, size.H, implementation.dtype


def _reason_to_skip(
    plan: Plan, implementation: Implementation, size: Size, device: torch.device, past: Sequence[Row], over: bool
) -> str | None:
    shortage = memory_shortage(TENSORS_NEEDED * size.tensor_bytes(), device)
    if shortage is not None:
        return shortage
    same = (implementation.op, implementation.name, implementation.dtype, "eager")
    smaller = [
        (row.B * row.T, row.median_seconds * size.T / row.T * (size.B / row.B if device.type == "cpu" else 1.0))
        for row in past
        if (row.op, row.implementation, row.dtype, row.launch) == same and row.B <= size.B and row.T <= size.T
        if row.median_seconds is not None
    ]
    # The slowest pass at the largest of those sizes.
    expected = max(smaller, default=(0, 0.0))[1]
    if expected > plan.call_seconds:
        return f"call: expected to take {expected:.1f} s, limit {plan.call_seconds:g} s"
    return f"budget: {plan.minutes:g} minutes were used up" if over else None


def _warm(implementation: Implementation, size: Size, clock: Clock) -> dict[tuple[Implementation, str, str], Work]:
    works: dict[tuple[Implementation, str, str], Work] = {}
    with clock.scope():
        prepared = prepare(implementation, size, clock.device)
    for which, work in prepared.items():
        clock.warm_up(work)
        works[implementation, which, "eager"] = work
        # One launch per time step is what a loop costs; captured, it would no longer pay for them.
        if clock.cuda and implementation.name not in LOOPS and implementation.backend != "reference":
            works[implementation, which, "graph"] = clock.capture(work)
    return works


def conclude(
    rows: Sequence[Row], device: torch.device, where: dict[str, Any], folder: Path, stem: str
) -> tuple[str, list[Path]]:
    """The ratios as a table, and the files of the figure."""
    return ratio_table(recurrence_ratios(rows, device.type)), draw(rows, where, folder, stem)


def recurrence_ratios(rows: Sequence[Row], device_type: str) -> list[tuple[str, float | None]]:
    """Ratios of times at the default size, the fairest comparisons first; None if one of the two was not measured. On
    CUDA, kernels are timed as graphs and loops as they are launched."""
    launch = "graph" if device_type == "cuda" else "eager"
    ours = FASTEST[device_type]
    seconds = {
        (row.op, row.implementation, row.which, row.launch, row.dtype): row.median_seconds
        for row in rows
        if (row.B, row.T) == (DEFAULT.B, DEFAULT.T) and row.median_seconds is not None
    }

    def took(op: str, name: str, *passes: str, launch: str = "eager", dtype: str = "float32") -> float:
        return math.fsum(seconds.get((op, name, which, launch, dtype), math.nan) for which in passes)

    def layer(name: str, dtype: str = "float32") -> float:
        return took("layer", name, "step", launch=launch, dtype=dtype)

    step, both_ways = "layer, training step", "recurrence, forward + backward"
    both = {name: took("recurrence", name, "forward", "backward") for name in (LOOP, LOOP_UNBIND, ours)}
    lstm = layer(LSTM_EQUAL_PARAMETERS)
    ratios = [
        (f"PyTorch loop over x.unbind(1) / {ours}: {both_ways}", both[LOOP_UNBIND] / both[ours]),
        (f"nn.LSTM of equal parameters / {ours}: {step}", lstm / layer(ours)),
    ]
    if any((row.op, row.dtype) == ("layer", "bfloat16") for row in rows):
        ours_bfloat16, lstm_bfloat16 = (layer(name, "bfloat16") for name in (ours, LSTM_EQUAL_PARAMETERS))
        ratios += [
            (f"nn.LSTM of equal parameters / {ours} in bfloat16: {step}", lstm / ours_bfloat16),
            (f"nn.LSTM of equal parameters in bfloat16 / {ours} in bfloat16: {step}", lstm_bfloat16 / ours_bfloat16),
        ]
    ratios += [
        (f"nn.LSTM of equal units / {ours}: {step}", layer(LSTM) / layer(ours)),
        (f"PyTorch loop over x[:, t] / {ours}: {both_ways}", both[LOOP] / both[ours]),
    ]
    for dtype in dict.fromkeys(row.dtype for row in rows if (row.op, row.implementation) == ("recurrence", ours)):
        copy = took("recurrence", COPY, "forward", launch=launch, dtype=dtype)
        ratios += [
            (
                f"{ours} / copy of its input: {which}, {dtype}",
                took("recurrence", ours, which, launch=launch, dtype=dtype) / copy,
            )
            for which in ("forward", "backward")
        ]
    return [(text, None if math.isnan(ratio) else ratio) for text, ratio in ratios]


def ratio_table(ratios: Sequence[tuple[str, float | None]]) -> str:
    """Markdown."""
    return markdown_table(
        [{"ratio": text, "": "not measured" if ratio is None else f"{ratio:.3g}"} for text, ratio in ratios]
    )


def draw(rows: Sequence[Row], where: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write ``stem``.png and .svg: a panel for each pass, a line for each implementation at the default batch, from
    CUDA graphs where those were timed. Returns the paths; none if nothing was measured at that batch."""
    at_batch = [row for row in rows if row.status == "measured" and (row.B, row.dtype) == (DEFAULT.B, "float32")]
    at_batch.sort(key=lambda row: row.launch)  # a graph replaces what was launched eagerly
    by_place = {(row.op, row.implementation, row.which, row.T): row for row in at_batch}
    shown = list(by_place.values())
    if not shown:
        return []
    names = {row.implementation for row in shown} - {COPY}
    look = looks({name: MODELS.get(name.partition("/")[0], name) for name in names})
    with figure(1, len(PANELS), width=10.5, height=4.2, sharey=True) as (drawing, axes):
        handles: dict[str, Any] = {}
        for axis, (op, which, title) in zip(axes, PANELS, strict=True):
            panel = [row for row in shown if (row.op, row.which) == (op, which)]
            limits = sorted({(row.T, row.limit_seconds) for row in panel if row.limit_seconds is not None})
            if limits:
                handles["copy of as many bytes"] = axis.plot(*zip(*limits, strict=True), **BASELINE)[0]
            for name in sorted(names, key=lambda name: (name in WORDS, name)):
                line = sorted(
                    (row.T, row.median_seconds, row.q20_seconds, row.q80_seconds)
                    for row in panel
                    if row.implementation == name
                )
                if not line:
                    continue
                steps, median, low, high = zip(*line, strict=True)
                axis.fill_between(steps, low, high, color=look[name]["color"], alpha=0.2, linewidth=0)
                handles[WORDS.get(name, f"IndRNN, {name}")] = axis.plot(steps, median, **look[name])[0]
            axis.set(title=title, xlabel="Time steps T", xscale="log", yscale="log")
            tick_at(axis, sorted({row.T for row in panel}))
        axes[0].set_ylabel("Seconds")
        note = (
            f"{where['device']}, B = {DEFAULT.B}, H = {shown[0].H}, float32, {where['date']}; median, 20 to 80 % shaded"
        )
        legend_below(drawing, handles, note)
        return save(drawing, folder, stem)
