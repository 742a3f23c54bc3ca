"""One measurement from its first point to its files: CSV that says where it was made, a figure or profiles, and the
ratios that matter as a table."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from indrnn.errors import UserError
from indrnn.files import csv_text, write_atomically, written_lines
from indrnn.record.result import environment, git

from . import grid, scaling, training_steps
from .exactness import Checked


def bench(what: str, on: Checked, quick: bool, minutes: float | None, out: Path) -> None:
    """Measure ``what`` (recurrence, step or scaling), and write and print what was found. Rows are written after every
    point, so an interrupted benchmark keeps them.

    Raises:
        UserError: ``out`` cannot be written.
    """
    where = provenance(on.device)
    stem = f"{what}-{'quick-' if quick else ''}{slug(where)}"
    points, conclude = _measurement(what, on, quick, minutes)
    rows: Sequence[Any] = ()
    for rows in points:
        write_rows(out / f"{stem}.csv", rows, where)
    table, paths = conclude(rows, on.device, where, out, stem)
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "numba", "triton") if where[name])
    text = f"{where['device']}, {where['threads']} threads, {versions}, {where['date']}\n\n{table}\n"
    write_atomically(out / f"{stem}.md", text, UserError)
    print("\n" + text, *written_lines([out / f"{stem}.csv", *paths, out / f"{stem}.md"]), sep="\n", flush=True)


def _measurement(
    what: str, on: Checked, quick: bool, minutes: float | None
) -> tuple[Iterator[Sequence[Any]], Callable[..., tuple[str, list[Path]]]]:
    """All rows so far, after each point; and what turns them into a table and the files drawn."""
    device = on.device
    if what == "recurrence":
        plan = grid.QUICK if quick else grid.FULL
        plan = replace(plan, minutes=minutes or plan.minutes)
        return grid.run_grid(plan, on.implementations, device), grid.conclude
    if what == "step":
        cases, seconds = training_steps.cases(device, quick), 3.0 if device.type == "cpu" else 1.0
        return training_steps.run_steps(cases, device, seconds), training_steps.conclude
    scales = scaling.QUICK if quick else scaling.FULL
    return scaling.run_scaling(replace(scales, minutes=minutes or scales.minutes), device), scaling.conclude


def write_exactness(on: Checked, out: Path) -> None:
    """Write the errors of the exactness check as CSV."""
    where = provenance(on.device)
    path = out / f"exactness-{slug(where)}.csv"
    write_rows(path, on.checks, where)
    print(f"wrote {path}")


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
