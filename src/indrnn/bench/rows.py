"""The long table that a benchmark writes: a row a measurement, each with what it was measured on."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from indrnn.errors import UserError
from indrnn.record import environment, git


@dataclass(frozen=True)
class Row:
    """One contender at one size. Times in seconds; what does not apply, or was not measured, is None.

    launch: "eager", or "graph" for a replayed CUDA graph. status: "measured", or "skipped" or "failed" and then why.
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
    """The columns that say where and with what: the same in every row of a file."""
    found = environment(device)
    source = git()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": found["device_name"],
        "threads": found["num_threads"],
        **found["versions"],
        "commit": source["commit"],
        "dirty": source["dirty"],
    }


def slug(where: dict[str, Any]) -> str:
    """The name of a file about this device and day, without its ending."""
    name = re.sub(r"[^a-z0-9]+", "-", str(where["device"]).lower()).strip("-")
    return f"{name}-{where['date']}"


def write_rows(path: Path, rows: Sequence[Any], where: dict[str, Any]) -> None:
    """Write rows (dataclasses of one type) as CSV, each with the columns of ``where``.

    Raises:
        UserError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(rows[0])] + list(where), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = {key: _plain(value) for key, value in asdict(row).items()}
        writer.writerow({**values, **where})
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Write a file, making its folder. Raises UserError if that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another folder with --out") from error


def _plain(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
