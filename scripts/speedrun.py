#!/usr/bin/env python3
"""Time the fast protocol, start-up included, for three seeds on a quiet machine: a record for results/speedrun.md.

    python scripts/speedrun.py [--publish] [override ...]     for example trainer.precision=bfloat16 tag=speedrun-bf16

A seed is not rerun once it has a timing.json. --publish copies the runs to results/runs; they become a record when
RECORDS in results_tables.py names them.
"""

import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from statistics import fmean

from results_tables import MARKS, publish

from indrnn.cli import run
from indrnn.config.compose import load_config
from indrnn.errors import UserError
from indrnn.record.folder import TIMING, run_folder
from indrnn.record.result import read_result

DEFAULTS = ["experiment=fast", "model=indrnn", "tag=speedrun", "output_root=outputs/speedrun"]


def main() -> None:
    given = [argument for argument in sys.argv[1:] if argument != "--publish"]
    settings = {override.partition("=")[0]: override for override in [*DEFAULTS, *given]}
    results = []
    for seed in range(3):
        overrides = [*settings.values(), f"seed={seed}"]
        folder = run_folder(load_config(overrides))
        if not (folder / TIMING).exists():
            timing = {"begun": datetime.now().isoformat(timespec="seconds"), "load_before": os.getloadavg()[0]}
            start = time.perf_counter()
            if subprocess.run([sys.executable, "-m", "indrnn", *overrides, "overwrite=true"], check=False).returncode:
                raise UserError(f"the run {folder} failed and is not timed; rerun the command")
            timing |= {"seconds": time.perf_counter() - start, "load_after": os.getloadavg()[0]}
            timing["threads"] = read_result(folder / "result.json").segments[-1]["num_threads"]
            (folder / TIMING).write_text(json.dumps(timing, indent=2) + "\n")
        results.append(read_result(folder / "result.json"))
        print(f"{folder}: {(folder / TIMING).read_text()}")
        if "--publish" in sys.argv:
            publish(folder, Path(__file__).parents[1] / "results" / "runs")
    for mark, (figure, least) in MARKS.items():
        mean = 100 * fmean(getattr(result, figure) for result in results)
        print(f"mark {mark}: mean {mean:.2f} %, {'reached' if mean > least else 'not reached'}")


if __name__ == "__main__":
    run("speedrun.py", main)
