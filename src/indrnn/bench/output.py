"""What a benchmark writes: CSV with one row per measurement and where it was made, a table of the ratios that matter,
and a figure of time against T with the limit that a copy sets."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from indrnn.errors import UserError
from indrnn.files import csv_text, write_atomically
from indrnn.record.result import environment, git
from indrnn.report.style import BASELINE, figure, legend_below, looks, save
from indrnn.report.table import markdown_table

from .implementations import COPY, LOOP, LOOP_UNBIND, LSTM, LSTM_EQUAL_PARAMETERS

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


def provenance(device: torch.device) -> dict[str, Any]:
    """The columns that tell where and with what a file was measured, the same in every row."""
    machine = environment(device)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": machine["device_name"],
        "threads": machine["num_threads"],
        **machine["versions"],
        **git(),
    }


def slug(where: dict[str, Any]) -> str:
    """A file name for this device and day, without an ending."""
    name = re.sub(r"[^a-z0-9]+", "-", str(where["device"]).lower()).strip("-")
    return f"{name}-{where['date']}"


def write_rows(path: Path, rows: Sequence[Any], where: dict[str, Any]) -> None:
    """Write rows (dataclasses of one type) as CSV, each with the columns of ``where``.

    Raises:
        UserError: the file cannot be written.
    """
    titles = [*(field.name for field in fields(rows[0])), *where]
    lines = [[*map(_plain, asdict(row).values()), *where.values()] for row in rows]
    write_atomically(path, csv_text([titles, *lines]), UserError)


def _plain(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def recurrence_ratios(rows: Sequence[Row], device_type: str, B: int, T: int) -> list[tuple[str, float | None]]:
    """Ratios of times at one size, the fairest comparisons first; None if one of the two was not measured. On CUDA,
    kernels are timed as graphs and loops as they are launched."""
    launch = "graph" if device_type == "cuda" else "eager"
    ours = FASTEST[device_type]
    seconds = {
        (row.op, row.implementation, row.which, row.launch, row.dtype): row.median_seconds
        for row in rows
        if (row.B, row.T) == (B, T) and row.median_seconds is not None
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


def draw(rows: Sequence[Row], where: dict[str, Any], B: int, folder: Path, stem: str) -> list[Path]:
    """Write ``stem``.png and .svg: a panel for each pass, a line for each implementation at batch ``B``, from CUDA
    graphs where those were timed. Returns the paths; none if nothing was measured at that batch."""
    shown = _preferred([row for row in rows if row.status == "measured" and row.B == B and row.dtype == "float32"])
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
                axis.fill_between(steps, low, high, color=look[name].color, alpha=0.2, linewidth=0)
                handles[WORDS.get(name, f"IndRNN, {name}")] = axis.plot(steps, median, **look[name].line)[0]
            axis.set(title=title, xlabel="Time steps T", xscale="log", yscale="log")
            tick_at(axis, sorted({row.T for row in panel}))
        axes[0].set_ylabel("Seconds")
        note = f"{where['device']}, B = {B}, H = {shown[0].H}, float32, {where['date']}; median, 20 to 80 % shaded"
        legend_below(drawing, list(handles.values()), list(handles), note)
        return save(drawing, folder, stem)


def tick_at(axis: Axes, sizes: Sequence[int]) -> None:
    """Ticks at the sizes that were measured, not at powers of ten; no numbers where they would touch."""
    numbered: list[int] = []
    apart = 0.15 * math.log(sizes[-1] / sizes[0]) if sizes else 0.0
    for size in sizes:
        if not numbered or math.log(size / numbered[-1]) > apart:
            numbered.append(size)
    axis.set_xticks(numbered, [f"{size:,}" for size in numbered])
    axis.set_xticks(sizes, minor=True)
    axis.xaxis.set_minor_formatter(NullFormatter())


def _preferred(rows: list[Row]) -> list[Row]:
    """One row for each implementation, pass and T: that of the CUDA graph where there is one."""
    best: dict[tuple[str, str, str, int], Row] = {}
    for row in rows:
        key = (row.op, row.implementation, row.which, row.T)
        if key not in best or row.launch == "graph":
            best[key] = row
    return list(best.values())
