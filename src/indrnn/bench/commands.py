"""A benchmark from its first row to its files: CSV that says where it was measured, ratios, a figure or a profile."""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from indrnn.errors import RunError, UserError
from indrnn.files import write_atomically
from indrnn.record.result import environment, git
from indrnn.recurrence import available_backends
from indrnn.training.device import prepare_process, resolve_device, set_precision

from . import exact, recurrence, step

MODULES = {"recurrence": recurrence, "step": step}


def bench(what: str, device_name: str, out: Path, sizes: Sequence[Any], seconds: float, profile: bool) -> None:
    """Compare every backend with float64, then time the recurrence or the training step; write and print the results.

    Args:
        what: exact (only the comparison), recurrence or step.
        sizes: (B, T, H) of recurrence, B of step.
        seconds: Time to spend on each implementation and pass.
        profile: Whether step also writes a profile.

    Raises:
        RunError: A backend is not exact. Nothing is timed.
        UserError: The device is not available, or ``out`` cannot be written.
    """
    device = resolve_device(device_name)
    prepare_process(device)
    set_precision("float32", device)
    machine = environment(device)
    date = datetime.now(UTC).date().isoformat()
    # The columns that say where and with what a row was measured.
    where = {"date": date, "device": machine["device_name"], "threads": machine["num_threads"]}
    where |= {**machine["versions"], **git()}
    machine_line = ", ".join(f"{name} {value}" for name, value in where.items() if value is not None)
    print(machine_line, flush=True)
    stem = f"{what}-{re.sub('[^a-z0-9]+', '-', where['device'].lower()).strip('-')}-{date}"
    csv = out / f"{stem}.csv"
    for name, reason in available_backends(device).items():
        if reason is not None:
            print(f"{name} skipped: {reason}")
    frame = exact.largest_errors(device)
    errors = frame.pivot(index=["implementation", "dtype"], columns="quantity", values="error")[[*exact.QUANTITIES]]
    print("Largest errors as shares of the largest value:", errors.to_string(float_format="{:.1e}".format), sep="\n")
    for row in frame[~(frame["error"] <= frame["tolerance"])].itertuples():  # a NaN is wrong too
        raise RunError(
            f"{row.implementation} is wrong in {row.dtype}: {row.quantity} has an error of {row.error:.1e} of its "
            f"largest value, the tolerance is {row.tolerance:.0e}; nothing is timed or written"
        )
    if what == "exact":
        write_atomically(csv, frame.assign(**where).to_csv(index=False), UserError)
        print(f"wrote {csv}")
        return
    module, paths = MODULES[what], [csv, out / f"{stem}.md"]
    # The default stream cannot be captured as a CUDA graph.
    with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext():
        for rows in module.measure(sizes, device, seconds):
            frame = pd.DataFrame(rows).assign(**where)
            write_atomically(csv, frame.to_csv(index=False, float_format="%.6g"), UserError)
            print(f"{len(frame)} rows in {csv}", flush=True)
        if profile:
            paths.append(out / f"{stem}-profile.txt")
            write_atomically(paths[-1], step.profile(device), UserError)
    table = module.ratios(frame, device).to_string(float_format="{:.3g}".format, na_rep="")
    write_atomically(paths[1], f"{machine_line}\n\n```\n{table}\n```\n", UserError)
    if what == "recurrence":
        paths += recurrence.draw(frame, out, stem)
    print(f"\n{table}\n", *map("wrote {}".format, paths), sep="\n")
