#!/usr/bin/env python3
"""Time the fast protocol, start-up included, for three seeds on a quiet machine: a record for results/speedrun.md.

    python scripts/speedrun.py [--publish] [override ...]     for example trainer.precision=bfloat16 tag=speedrun-bf16

A seed is not rerun once it has a timing.json. Prints the line for the table in results/speedrun.md; --publish copies
the runs to results/runs.
"""

import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from results_tables import publish

from indrnn.cli import run
from indrnn.config.compose import load_config
from indrnn.errors import UserError
from indrnn.record.folder import TIMING, run_folder
from indrnn.report.runs import Group, read_run
from indrnn.report.table import group_row, markdown_table, spread

DEFAULTS = ["experiment=fast", "model=indrnn", "tag=speedrun", "output_root=outputs/speedrun"]
COLUMNS = ("test %", "validation %", "n", "device", "precision")


def main() -> None:
    given = [argument for argument in sys.argv[1:] if argument != "--publish"]
    settings = {override.partition("=")[0]: override for override in [*DEFAULTS, *given]}
    runs, timings = [], []
    for seed in range(3):
        overrides = [*settings.values(), f"seed={seed}"]
        folder = run_folder(load_config(overrides))
        if not (folder / TIMING).exists():
            timing = {"begun": datetime.now().isoformat(timespec="seconds"), "load_before": os.getloadavg()[0]}
            start = time.perf_counter()
            if subprocess.run([sys.executable, "-m", "indrnn", *overrides, "overwrite=true"], check=False).returncode:
                raise UserError(f"the run {folder} failed and is not timed; rerun the command")
            timing |= {"seconds": time.perf_counter() - start, "load_after": os.getloadavg()[0]}
            (folder / TIMING).write_text(json.dumps(timing, indent=2) + "\n")
        runs.append(read_run(folder))
        timings.append(json.loads((folder / TIMING).read_text()))
        print(f"{folder}: {timings[-1]}")
        if "--publish" in sys.argv:
            publish(folder, Path(__file__).parents[1] / "results" / "runs")
    group = Group(runs)
    versions = {
        f"torch {result.versions['torch']}, indrnn {(result.git['commit'] or '')[:7]}" for result in group.results
    }
    record = {"minutes": spread([timing["seconds"] / 60 for timing in timings], ".1f")}
    record |= {column: cell for column, cell in group_row(group).items() if column in COLUMNS}
    threads = {str(segment["num_threads"]) for result in group.results for segment in result.segments}
    record |= {"threads": ", ".join(sorted(threads)), "versions": "; ".join(sorted(versions))}
    record |= {"date": timings[-1]["begun"][:10], "runs": f"[{group.name}](runs/{group.task.folder}/{group.name})"}
    print(markdown_table([record]))


if __name__ == "__main__":
    run("speedrun.py", main)
