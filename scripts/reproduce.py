#!/usr/bin/env python3
"""Run the unfinished rows of the results tables, within a time limit, and regenerate the tables and figures.

    python scripts/reproduce.py --list                      finished, unfinished and missing runs
    python scripts/reproduce.py --minutes 600 --parallel 2  resume where the last call stopped
    python scripts/reproduce.py --table                     only regenerate results/README.md and figures
    python scripts/reproduce.py --inspect data              only redraw figures/inspect from the committed weights

results_rows.py declares the rows. indrnn-train runs them in a work folder (default: outputs/reproduce), which keeps
the checkpoints. At the time limit, unfinished runs are stopped with SIGTERM and save a checkpoint. Finished runs are
skipped. Their folders are copied into results/runs.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from results_rows import ROWS, Row
from results_tables import draw_results, publish, update_readme

from indrnn.cli import run
from indrnn.errors import UserError
from indrnn.report.inspection import inspect_runs

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [sys.executable, "-m", "indrnn"]
# The runs whose networks figures/inspect compares.
INSPECTED = ("mnist/fast_indrnn/seed0", "mnist/fast_lstm_chrono/seed0", "mnist/lstm/seed0")


def train(row: Row, seed: int, options: argparse.Namespace) -> bool:
    """Train or resume one run until ``options.stop``, and publish it if it is finished. Returns False if it failed."""
    if options.stop.is_set() or state(row, seed, options) == "finished":
        return True
    path = Path(row.task, row.name, f"seed{seed}")
    log = options.work / "logs" / ("-".join(path.parts) + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [*TRAIN, *row.overrides, f"seed={seed}", f"output_root={os.path.relpath(options.work)}"]
    print(f"{path}: {' '.join(command)}", flush=True)
    with log.open("a") as file:
        process = subprocess.Popen([*command, *options.overrides], stdout=file, stderr=file, start_new_session=True)
    while process.poll() is None:
        if options.stop.wait(0.2):
            process.terminate()
            process.wait()
            print(f"{path}: stopped; the same command resumes it", flush=True)
            return True
    if process.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        print(f"{path}: failed with code {process.returncode}: {lines[-1]}", flush=True)
        return False
    try:
        print(f"{path}: copied to {publish(options.work / path, options.results / 'runs')}", flush=True)
    except UserError as error:  # the other runs continue
        print(f"{path}: {error}", flush=True)
        return False
    return True


def state(row: Row, seed: int, options: argparse.Namespace) -> str:
    path = Path(row.task, row.name, f"seed{seed}")
    if (options.results / "runs" / path / "result.json").exists():
        return "finished"
    return "unfinished" if (options.work / path / "checkpoint.pt").exists() else "missing"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="stop after this time, with everything saved")
    parser.add_argument("--parallel", type=int, default=1, help="number of runs at a time (default: 1)")
    parser.add_argument("--only", action="append", default=[], metavar="TASK/NAME", help="only these rows")
    parser.add_argument("--list", action="store_true", help="only list the state of every run")
    parser.add_argument("--table", action="store_true", help="only regenerate tables and figures")
    parser.add_argument("--inspect", metavar="FOLDER", help="only redraw figures/inspect, with MNIST from FOLDER")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/reproduce", help="folder of runs and checkpoints")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of published results")
    parser.add_argument("overrides", nargs="*", help="for every run, such as data.root=../data or device=cuda")
    options = parser.parse_args()
    options.stop = threading.Event()
    if unknown := set(options.only) - {f"{row.task}/{row.name}" for row in ROWS}:
        raise UserError(f"--only {unknown.pop()}: no row of this name; --list shows them")
    rows = [row for row in ROWS if not options.only or f"{row.task}/{row.name}" in options.only]
    jobs = [(row, seed) for row in rows for seed in range(row.num_seeds)]
    if options.list:
        print("\n".join(f"{row.task}/{row.name}/seed{seed}  {state(row, seed, options)}" for row, seed in jobs))
        return 0
    if options.inspect:
        runs = [options.results / "runs" / path for path in INSPECTED]
        inspect_runs(runs, options.results / "figures" / "inspect", options.inspect)
        return 0
    succeeded = [True]
    if not options.table:
        if options.minutes is None or options.parallel < 1:
            raise UserError("give --minutes and at least --parallel 1, or --list, or --table")
        timer = threading.Timer(60 * options.minutes, options.stop.set)
        timer.daemon = True
        timer.start()
        # Ctrl-C and a job system's SIGTERM act like the time limit.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: options.stop.set())
        with ThreadPoolExecutor(options.parallel) as pool:
            succeeded = list(pool.map(lambda job: train(*job, options), jobs))
    update_readme(options.results)
    draw_results(options.results)
    print(f"{sum(state(*job, options) == 'finished' for job in jobs)} of {len(jobs)} runs finished")
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    run("reproduce.py", main)
