"""The parts of the command: check, measure, write, print the ratios."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from indrnn.errors import UserError
from indrnn.files import write_atomically, written_lines
from indrnn.training.device import prepare_process, resolve_device, set_precision

from . import grid, scaling
from .clock import Say
from .exactness import Check, require_exact
from .implementations import Implementation, implementations
from .output import Row, draw, provenance, ratio_table, recurrence_ratios, slug, write_rows
from .training_steps import cases, profile, run_steps, step_ratios


@dataclass(frozen=True)
class Checked:
    """A device whose backends have passed the exactness check."""

    device: torch.device
    implementations: list[Implementation]
    checks: list[Check]


def check_device(device_name: str, say: Say) -> Checked:
    """Compare every backend of a device with float64 before anything is timed.

    Raises:
        RunError: a backend is not exact.
        UserError: there is no such device.
    """
    device = resolve_device(device_name)
    prepare_process(device)
    set_precision("float32", device)
    able, unable = implementations(device)
    for name, reason in unable.items():
        say(f"{name} is left out: {reason}")
    checks = require_exact(able, device)
    worst: dict[tuple[str, str], float] = {}
    for check in checks:
        key = (check.implementation, str(check.dtype).removeprefix("torch."))
        worst[key] = max(worst.get(key, 0.0), check.error)
    for (name, dtype), error in worst.items():
        say(f"exact: {name}, {dtype}: largest error {error:.1e} of the largest value, gradients included")
    return Checked(device, able, checks)


# The functions below raise UserError if the folder cannot be written. Rows are written after every point, so an
# interrupted benchmark keeps them.


def bench_recurrence(on: Checked, quick: bool, minutes: float | None, out: Path, say: Say) -> None:
    """The recurrence and a layer over the grid of sizes."""
    plan = grid.QUICK if quick else grid.FULL
    plan = plan if minutes is None else replace(plan, minutes=minutes)
    where, stem = _begin("recurrence", on, quick)
    rows: list[Row] = []
    for point in grid.run_grid(plan, on.implementations, on.device, say):
        rows += point
        write_rows(out / f"{stem}.csv", rows, where)
    paths = [out / f"{stem}.csv", *draw(rows, where, grid.DEFAULT.B, out, stem)]
    ratios = recurrence_ratios(rows, on.device.type, grid.DEFAULT.B, grid.DEFAULT.T)
    _close(ratio_table(ratios), out / f"{stem}.md", paths, where, say)


def bench_steps(on: Checked, quick: bool, out: Path, say: Say) -> None:
    """Whole training steps."""
    device = on.device
    rows = run_steps(cases(device, quick), device, seconds=3.0 if device.type == "cpu" else 1.0, say=say)
    where, stem = _begin("step", on, quick)
    write_rows(out / f"{stem}.csv", rows, where)
    profiled = [row for row in rows if row.status == "measured" and (row.B, row.precision) == (32, "float32")]
    write_atomically(out / f"{stem}-profile.txt", "\n".join(profile(row, device) for row in profiled), UserError)
    paths = [out / f"{stem}.csv", out / f"{stem}-profile.txt"]
    _close(ratio_table(step_ratios(rows)), out / f"{stem}.md", paths, where, say)


def bench_scaling(on: Checked, quick: bool, minutes: float | None, out: Path, say: Say) -> None:
    """Training steps with more processes and at larger sizes."""
    plan = scaling.QUICK if quick else scaling.FULL
    plan = plan if minutes is None else replace(plan, minutes=minutes)
    where, stem = _begin("scaling", on, quick)
    rows: Sequence[scaling.Row] = ()
    for rows in scaling.run_scaling(plan, on.device, say):
        write_rows(out / f"{stem}.csv", rows, where)
    paths = [out / f"{stem}.csv", *scaling.draw_scaling(rows, where, out, stem)]
    _close(scaling.scaling_table(rows), out / f"{stem}.md", paths, where, say)


def write_exactness(on: Checked, out: Path, say: Say) -> None:
    """Write the errors of the exactness check as CSV."""
    where, stem = _begin("exactness", on, quick=False)
    write_rows(out / f"{stem}.csv", on.checks, where)
    say(f"wrote {out / stem}.csv")


def _begin(what: str, on: Checked, quick: bool) -> tuple[dict[str, Any], str]:
    """The provenance of the measurement, and the name of its files without an ending."""
    where = provenance(on.device)
    return where, f"{what}-{'quick-' if quick else ''}{slug(where)}"


def _close(table: str, path: Path, written: list[Path], where: dict[str, Any], say: Say) -> None:
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "numba", "triton") if where[name])
    text = f"{where['device']}, {where['threads']} threads, {versions}, {where['date']}\n\n{table}\n"
    write_atomically(path, text, UserError)
    say("\n" + text)
    for line in written_lines([*written, path]):
        say(line)
