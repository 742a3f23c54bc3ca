"""Time against T, log-log, with the copy limit drawn in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from indrnn.report.style import BASELINE, figure, legend_below, looks, save

from .contenders import COPY
from .rows import Row

PANELS = (
    ("recurrence", "forward", "Recurrence, forward"),
    ("recurrence", "backward", "Recurrence, backward"),
    ("layer", "step", "Layer, whole training step"),
)


def draw(rows: Sequence[Row], where: dict[str, Any], B: int, folder: Path, stem: str) -> list[Path]:
    """Write ``stem``.png and .svg: a panel a pass, a line a contender at batch ``B``. Where a CUDA graph was timed, the
    line is the graph's. Returns the paths; none if nothing was measured at that batch."""
    shown = _preferred([row for row in rows if row.status == "measured" and row.B == B])
    if not shown:
        return []
    look = looks({row.implementation for row in shown if row.implementation != COPY})
    with figure(1, len(PANELS), width=10.5, height=4.2, sharey=True) as (drawing, axes):
        handles: dict[str, Any] = {}
        for axis, (op, which, title) in zip(axes, PANELS, strict=True):
            panel = [row for row in shown if (row.op, row.which) == (op, which)]
            limits = sorted({(row.T, row.limit_seconds) for row in panel if row.limit_seconds is not None})
            if limits:
                handles["copy limit"] = axis.plot(*zip(*limits, strict=True), **BASELINE)[0]
            for name in sorted(look):
                line = sorted(
                    (row.T, row.median_seconds, row.q20_seconds, row.q80_seconds)
                    for row in panel
                    if row.implementation == name
                )
                if not line:
                    continue
                steps, median, low, high = zip(*line, strict=True)
                style = look[name]
                axis.fill_between(steps, low, high, color=style.color, alpha=0.2, linewidth=0)
                handles[name] = axis.plot(
                    steps, median, color=style.color, linestyle=style.linestyle, marker=style.marker
                )[0]
            axis.set(title=title, xlabel="time steps T", xscale="log", yscale="log")
            lengths = sorted({row.T for row in panel})
            # The lengths that were measured, not powers of ten with labels in between.
            slanted = {"rotation": 55, "ha": "right", "rotation_mode": "anchor"} if len(lengths) > 4 else {}
            axis.set_xticks(lengths, [str(T) for T in lengths], **slanted)
            axis.set_xticks([], minor=True)
        axes[0].set_ylabel("seconds")
        note = f"{where['device']}, B = {B}, H = {shown[0].H}, float32, {where['date']}; median, 20 to 80 % shaded"
        legend_below(drawing, list(handles.values()), list(handles), note)
        return save(drawing, folder, stem)


def _preferred(rows: list[Row]) -> list[Row]:
    """One row a contender, pass and T: the graph's where there is one."""
    best: dict[tuple[str, str, str, int], Row] = {}
    for row in rows:
        key = (row.op, row.implementation, row.which, row.T)
        if key not in best or row.launch == "graph":
            best[key] = row
    return list(best.values())
