"""How cost grows: updates a second and peak memory with more processes, larger batches, longer sequences, more layers.

Each point is measured in new processes, started by torchrun, so that their peak memory is that point's alone; this
module is also the program that they run. Where processes are compared on CPUs, each has the same share of the threads
however few run; along the other axes a single process has all threads. What would be too large or too slow is skipped
and recorded with the reason:

- memory: about (2 layers + 4) tensors (B, T, H) need more than half of the free memory;
- update: an update would take longer than ``update_seconds``, judging by the point before and growth in proportion;
- budget: ``minutes`` had passed before the point began.

A point whose processes fail is recorded as failed, with the reason.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch

from indrnn.config.schema import THREAD_VARIABLES
from indrnn.errors import UserError
from indrnn.report.style import BASELINE, COLOURS, figure, legend_below, log_values, save, tick_at
from indrnn.report.table import markdown_table
from indrnn.training.device import peak_memory_bytes, prepare_process, resolve_device, set_precision
from indrnn.training.distributed import SINGLE_PROCESS, Processes, joined_processes

from .clock import MOST_CALLS, Clock, memory_shortage, timing
from .training_steps import StepRow, several, training_step

UNITS = 128
# What grows along each axis, and its title.
AXES = {
    "strong": ("processes", "Same batch for all processes"),
    "weak": ("processes", "Same batch a process"),
    "batch": ("B", "Batch"),
    "length": ("T", "Time steps"),
    "depth": ("layers", "Layers"),
}


@dataclass(frozen=True)
class Row:
    """The IndRNN of 128 units a layer at one point of one axis; B is the batch of all processes together.

    of_ideal: updates a second as a share of what they would be if, from the first point of the axis on, processes
    shared the work without loss and work grew in proportion. peak_memory_bytes: of the largest process, all of it on a
    CPU, its tensors on a GPU.
    """

    axis: str
    processes: int
    threads: int
    B: int = 32
    T: int = 784
    layers: int = 6
    status: str = "skipped"
    reason: str | None = None
    median_seconds: float | None = None
    q20_seconds: float | None = None
    q80_seconds: float | None = None
    repeats: int | None = None
    updates_per_second: float | None = None
    of_ideal: float | None = None
    peak_memory_bytes: int | None = None

    @property
    def size(self) -> int:
        return int(getattr(self, AXES[self.axis][0]))

    @property
    def speed(self) -> float:
        """What updates a second are ideally in proportion to along the axis."""
        return {"strong": self.size, "weak": 1.0}.get(self.axis, 1 / self.size)


@dataclass(frozen=True)
class Plan:
    """What to measure and for how long; each point is timed for ``seconds``."""

    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    depths: tuple[int, ...]
    most_processes: int
    seconds: float
    update_seconds: float
    minutes: float

    def points(self, device: torch.device) -> list[Row]:
        """All points, with up to one process per GPU, or per thread of the CPU."""
        threads = torch.get_num_threads()
        workers = torch.cuda.device_count() if device.type == "cuda" else threads
        counts = sorted({workers, *(2**k for k in range(workers.bit_length()))})
        counts = [count for count in counts if count <= self.most_processes]
        share = max(1, threads // counts[-1])
        return [
            *(Row("strong", count, share) for count in counts),
            *(Row("weak", count, share, B=32 * count) for count in counts),
            *(Row("batch", 1, threads, B=B) for B in self.batches),
            *(Row("length", 1, threads, T=T) for T in self.lengths),
            *(Row("depth", 1, threads, layers=layers) for layers in self.depths),
        ]


FULL = Plan(
    (32, 64, 128, 256, 512, 1024), (128, 256, 784, 2048, 4096, 16384), (1, 2, 6, 12, 24), most_processes=1024,
    seconds=3.0, update_seconds=30.0, minutes=30.0,
)  # fmt: skip
QUICK = Plan((32, 64), (256, 784), (1, 6), most_processes=2, seconds=1.0, update_seconds=5.0, minutes=1.0)


def run_scaling(plan: Plan, device: torch.device) -> Iterator[list[Row]]:
    """Measure the points of the plan; after each print how it went, and yield all rows so far."""
    end = time.monotonic() + 60 * plan.minutes
    rows: list[Row] = []
    for point in plan.points(device):
        measured = [row for row in rows if row.status == "measured"]
        along = [row for row in measured if row.axis == point.axis]
        same = [row for row in measured if _work(row) == _work(point)]
        reason = None if same else _reason_to_skip(plan, point, along, device, time.monotonic() > end)
        if same:
            row = replace(same[0], axis=point.axis)
        elif reason is not None:
            row = replace(point, reason=reason)
        else:
            row = replace(point, **_started(point, device, plan.seconds))
        if row.updates_per_second is not None:
            first = along[0] if along else row
            assert first.updates_per_second is not None
            ideal = first.updates_per_second * row.speed / first.speed
            row = replace(row, of_ideal=row.updates_per_second / ideal)
        rows.append(row)
        speed = row.reason if row.updates_per_second is None else f"{row.updates_per_second:.3g} updates/s"
        size = f"{row.processes} processes, B={row.B} T={row.T} layers={row.layers}"
        print(f"{row.axis}: {size}: {row.status}, {speed}", flush=True)
        yield rows


def _work(row: Row) -> tuple[int, ...]:
    return row.processes, row.threads, row.B, row.T, row.layers


def _reason_to_skip(plan: Plan, point: Row, along: Sequence[Row], device: torch.device, over: bool) -> str | None:
    # On a CPU the processes share the memory, as they share the batch.
    part = point.processes if device.type == "cuda" else 1
    shortage = memory_shortage((2 * point.layers + 4) * 4 * point.B * point.T * UNITS // part, device)
    if shortage is not None:
        return shortage
    if along and along[-1].median_seconds is not None:
        expected = along[-1].median_seconds * along[-1].speed / point.speed
        if expected > plan.update_seconds:
            return f"update: expected to take {expected:.0f} s, limit {plan.update_seconds:g} s"
    return f"budget: {plan.minutes:g} minutes were used up" if over else None


def _started(point: Row, device: torch.device, seconds: float) -> dict[str, Any]:
    """The columns of a point from `measure`, run in new processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={point.processes}"]
    work = ["-m", __name__, json.dumps(asdict(point)), device.type, str(seconds)]
    threads = dict.fromkeys(THREAD_VARIABLES, str(point.threads))
    done = subprocess.run(
        [sys.executable, *(launch if point.processes > 1 else []), *work],
        env={**os.environ, **threads}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    if lines and lines[-1].startswith("{"):
        return dict(json.loads(lines[-1]))
    messages = done.stderr.strip().splitlines() or ["no message"]
    return {"status": "failed", "reason": f"exit code {done.returncode}: {messages[-1]}"}


def measure(point: Row, device: torch.device, seconds: float, processes: Processes = SINGLE_PROCESS) -> dict[str, Any]:
    """The columns of a point, measured in this process, which is one of ``processes``."""
    prepare_process(device)
    set_precision("float32", device)
    clock = Clock(device)
    launch = "graph" if device.type == "cuda" else "eager"
    with clock.scope():
        step = training_step(
            StepRow("indrnn", point.layers, UNITS, point.B, "float32", launch), device, point.T, processes
        )[1]
    call, steps = several(step, device)
    # All processes must make the same number of calls: as many as the slowest has time for.
    microseconds = processes.all_reduce_max(1 + int(1e6 * clock.warm_up(call)))
    calls = min(MOST_CALLS, max(3, ceil(1e6 * seconds / microseconds)))
    update = timing([clock.once(call) for _ in range(calls)]).of(steps)
    peak = processes.all_reduce_max(peak_memory_bytes(device) or 0)
    return {
        "status": "measured", **asdict(update), "updates_per_second": 1 / update.median_seconds,
        "peak_memory_bytes": peak or None,
    }  # fmt: skip


def conclude(
    rows: Sequence[Row], _: torch.device, where: dict[str, Any], folder: Path, stem: str
) -> tuple[str, list[Path]]:
    """The table, and the files of the figure."""
    return scaling_table(rows), draw_scaling(rows, where, folder, stem)


def scaling_table(rows: Sequence[Row]) -> str:
    """Markdown."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    return markdown_table(
        [
            {
                "run": f"{AXES[row.axis][1]}: {row.size}",
                "threads": str(row.threads),
                "updates/s": cell(row.updates_per_second, ".3g"),
                "of ideal": cell(row.of_ideal, ".0%"),
                "peak MiB": cell(row.peak_memory_bytes and row.peak_memory_bytes / 2**20, ".0f"),
                "": row.reason or "",
            }
            for row in rows
        ]
    )


def draw_scaling(rows: Sequence[Row], where: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write ``stem``.png and .svg: a column for each axis, speed with the ideal line above, memory below."""
    with figure(2, len(AXES), width=12.5, height=5.0, sharex="col") as (drawing, panels):
        handles: dict[str, Any] = {}
        for (above, below), (axis, (quantity, title)) in zip(panels.T, AXES.items(), strict=True):
            line = [row for row in rows if row.axis == axis and row.updates_per_second]
            sizes = [row.size for row in line]
            speeds = [row.updates_per_second or 0.0 for row in line]
            ideals = [speed / (row.of_ideal or 1.0) for speed, row in zip(speeds, line, strict=True)]
            peaks = [(row.peak_memory_bytes or 0) / 2**20 for row in line]
            handles["in proportion to the first"] = above.plot(sizes, ideals, **BASELINE)[0]
            handles["updates a second"] = above.plot(sizes, speeds, color=COLOURS[0], marker="o")[0]
            handles["peak memory, MiB"] = below.plot(sizes, peaks, color=COLOURS[1], marker="s")[0]
            above.set(title=title)
            if line:  # an axis without points has no logarithm
                above.set_xscale("log")
                log_values(above)
                # A factor of 5 at least: small differences look small, and there are numbers at the axis.
                low, high = above.get_ylim()
                wider = max(1.0, (5 * low / high) ** 0.5)
                above.set_ylim(low / wider, high * wider)
            below.set(xlabel=quantity, ylim=(0, 1.1 * max(peaks, default=1.0)))
            tick_at(below, sizes)
        note = f"{where['device']}, {UNITS} units, else B = 32, T = 784, 6 layers, float32, {where['date']}; medians"
        legend_below(drawing, handles, note)
        return save(drawing, folder, stem)


def main() -> None:
    """One of the processes of a point; the first prints its columns as JSON."""
    text, device_name, seconds = sys.argv[1:]
    with joined_processes(device_name) as processes:
        try:
            columns = measure(Row(**json.loads(text)), resolve_device(device_name), float(seconds), processes)
        except (UserError, RuntimeError) as failure:  # out of memory, or a step that cannot be captured
            columns = {"status": "failed", "reason": str(failure).splitlines()[0]}
        if processes.is_rank_zero:
            print(json.dumps(columns), flush=True)


if __name__ == "__main__":
    main()
