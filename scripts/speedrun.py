#!/usr/bin/env python3
"""Time the fast protocol from the command's start to its end, for three seeds: a record for results/speedrun.md.

    python scripts/speedrun.py                      experiment=fast model=indrnn, seeds 0, 1 and 2, one after another
    python scripts/speedrun.py trainer.precision=bfloat16 tag=speedrun-bf16

Nothing else may run on the machine. Every run starts from its first step and gets a timing.json beside its result.json:
seconds, start, threads, and the load average before and after, which shows whether the machine was quiet. A run that
has one is not repeated. --publish copies the runs to results/runs; they become a record when RECORDS in
results_tables.py names them and scripts/reproduce.py --table writes the table.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from results_tables import publish

from indrnn.cli import run
from indrnn.config.compose import load_config
from indrnn.errors import UserError
from indrnn.files import write_atomically
from indrnn.record.folder import TIMING, run_folder

RUNS = Path(__file__).resolve().parents[1] / "results" / "runs"
PROGRAM = str(Path(sys.executable).with_name("indrnn-train"))
DEFAULTS = ["experiment=fast", "model=indrnn", "tag=speedrun", "output_root=outputs/speedrun"]


def timed(overrides: list[str]) -> Path:
    """The folder of the run, which is trained now, timed from outside, unless it has a timing already."""
    import torch

    folder = run_folder(load_config(overrides))
    if not (folder / TIMING).exists():
        begun = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        timing = {"begun": begun, "threads": torch.get_num_threads(), "load_before": os.getloadavg()[0]}
        start = time.perf_counter()
        if subprocess.run([PROGRAM, *overrides, "overwrite=true"], check=False).returncode:
            raise UserError(f"the run {folder} failed and is not timed; the same command starts it again")
        timing |= {"seconds": time.perf_counter() - start, "load_after": os.getloadavg()[0]}
        write_atomically(folder / TIMING, json.dumps(timing, indent=2) + "\n")
    print(f"{folder}: {(folder / TIMING).read_text()}")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish", action="store_true", help="copy the runs to results/runs")
    parser.add_argument("override", nargs="*", help="for every run, for example data.root=...")
    options = parser.parse_intermixed_args()
    keys = [word.partition("=")[0] for word in options.override]
    defaults = [word for word in DEFAULTS if word.partition("=")[0] not in keys]
    folders = [timed([*defaults, *options.override, f"seed={seed}"]) for seed in range(3)]
    if options.publish:
        print("\n".join(f"copied to {publish(folder, RUNS)}" for folder in folders))


if __name__ == "__main__":
    run("speedrun.py", main)
