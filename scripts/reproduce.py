#!/usr/bin/env python3
"""Run the next unfinished rows of the results table, within a time budget, and regenerate the table.

    python scripts/reproduce.py --list                     what is done, part-done, missing
    python scripts/reproduce.py --minutes 9                continue where the last call stopped; call it repeatedly
    python scripts/reproduce.py --minutes 600 --parallel 3 several seeds at once on one GPU
    python scripts/reproduce.py --table                    only regenerate results/README.md, speedrun.md and figures
    python scripts/reproduce.py --inspect data             only redraw figures/inspect from the committed weights

The rows, their order and their seeds are those of results_rows.py. indrnn-train runs them in a work folder (default
outputs/reproduce, not committed), which has the checkpoints that a later call continues from: keep it, or take it along
to another machine. When the budget ends, the runs under way are asked to stop (SIGTERM) and save a checkpoint. The
result.json, metrics.csv, config.yaml and weights.safetensors of a finished run are copied to results/runs; such a run
is never repeated.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from results_rows import ROWS, Row
from results_tables import draw_bench, draw_inspected, draw_results, publish, update_readme

from indrnn.cli import run
from indrnn.errors import UserError
from indrnn.record.metrics import read_metrics
from indrnn.record.result import read_result

ROOT = Path(__file__).resolve().parents[1]
# For the step under way, which is long at the longest length, and a checkpoint.
GRACE = 90.0
# With less time than this a run would only start and stop again.
LEAST = 45.0
POLL = 0.5
# The exit codes of a run after SIGTERM: with a checkpoint, or killed before it could save anything.
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)
REPORT_EVERY = 60.0


@dataclass(frozen=True)
class Job:
    """One seed of one row."""

    row: Row
    seed: int
    work: Path
    runs: Path

    @property
    def path(self) -> Path:
        return Path(self.row.task, self.row.name, f"seed{self.seed}")

    @property
    def folder(self) -> Path:
        return self.work / self.path

    @property
    def log(self) -> Path:
        return self.work / "logs" / ("-".join(self.path.parts) + ".log")

    @property
    def state(self) -> str:
        if (self.runs / self.path / "result.json").exists():
            return "done"
        if (self.folder / "result.json").exists():
            return "finished"
        return "part-done" if (self.folder / "checkpoint.pt").exists() else "missing"

    def command(self, overrides: list[str]) -> list[str]:
        place = [f"seed={self.seed}", f"output_root={os.path.relpath(self.work)}"]
        return [_program(), *self.row.overrides, *place, *overrides]

    def progress(self) -> str:
        """The state in words, and how far an unfinished run has come."""
        state = self.state
        if state == "done":
            result = json.loads((self.runs / self.path / "result.json").read_text())
            score = result["test_accuracy"]
            score = f"mse {result['test_loss']:.2g}" if score is None else f"{100 * score:.2f} %"
            return f"done       {result['steps']:>9,} updates  test {score}"
        metrics = self.folder / "metrics.csv"
        if state == "missing" or not metrics.exists():
            return state
        step = max(read_metrics(metrics)["step"], default=0)
        return f"{state:<10} {step:>9,} updates"


def _program() -> str:
    in_environment = Path(sys.executable).with_name("indrnn-train")
    program = str(in_environment) if in_environment.exists() else shutil.which("indrnn-train")
    if program is None:
        raise UserError("indrnn-train is not installed in this environment; run pip install -e . first")
    return program


class Budget:
    """Runs jobs, ``parallel`` at a time, until the deadline; then stops them with a checkpoint."""

    def __init__(self, deadline: float, parallel: int, overrides: list[str]) -> None:
        self.deadline = deadline
        self.parallel = parallel
        self.overrides = overrides
        self.running: dict[subprocess.Popen, Job] = {}
        self.failed: list[Job] = []

    def run(self, waiting: list[Job]) -> None:
        """Work through ``waiting`` in order. Ctrl-C and SIGTERM end it as the deadline does."""
        last_report = time.monotonic()
        try:
            while self.running or (waiting and self._time_left() > LEAST):
                while waiting and len(self.running) < self.parallel and self._time_left() > LEAST:
                    self._start(waiting.pop(0))
                if self._time_left() <= 0:
                    break
                time.sleep(POLL)
                self._collect()
                if time.monotonic() - last_report > REPORT_EVERY:
                    last_report = time.monotonic()
                    for job in self.running.values():
                        print(f"  {job.path}: {job.progress()}", flush=True)
        finally:
            self._stop()

    def _time_left(self) -> float:
        return self.deadline - time.monotonic()

    def _start(self, job: Job) -> None:
        if job.state == "finished":  # by an earlier call that was killed before it could copy the figures
            self._publish(job)
            return
        command = job.command(self.overrides)
        print(f"{job.path}: {job.progress()}; {' '.join(command[1:])}", flush=True)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        # In a new session, because Ctrl-C must reach this process alone, which then asks each run once to save.
        with job.log.open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.running[process] = job

    def _collect(self) -> None:
        for process in [process for process in self.running if process.poll() is not None]:
            job = self.running.pop(process)
            if job.state == "finished":
                self._publish(job)
            elif process.returncode not in STOPPED:
                output = job.log.read_text(errors="replace").strip().splitlines() or ["no output"]
                self._fail(job, f"code {process.returncode}: {output[-1]}")

    def _publish(self, job: Job) -> None:
        try:
            publish(job.folder, job.runs)
        except UserError as error:
            self._fail(job, str(error))
        else:
            print(f"{job.path}: {job.progress()}", flush=True)
            for segment in read_result(job.folder / "result.json").segments:
                for what, why in segment.get("fallbacks", {}).items():
                    print(f"  without {what}, so slower than it should be: {why}", flush=True)

    def _fail(self, job: Job, why: str) -> None:
        self.failed.append(job)
        print(f"{job.path}: failed, {why}", flush=True)

    def _stop(self) -> None:
        for process in self.running:
            process.send_signal(signal.SIGTERM)
        end = time.monotonic() + GRACE
        while self.running and time.monotonic() < end:
            self._collect()
            time.sleep(POLL / 5)
        for process, job in self.running.items():
            print(f"{job.path}: did not stop within {GRACE:.0f} s; killed, will continue from its last checkpoint")
            process.kill()
            process.wait()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "reproduce.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help="stop after this time, with everything saved")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--only", action="append", default=[], metavar="TASK/NAME", help="these rows alone")
    parser.add_argument("--list", action="store_true", help="only print what is done, part-done and missing")
    parser.add_argument("--table", action="store_true", help="only regenerate the table and figures")
    parser.add_argument("--inspect", metavar="FOLDER", help="only redraw figures/inspect, with MNIST from that folder")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "outputs/reproduce", help="where runs and checkpoints are kept"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where figures of finished runs go")
    parser.add_argument("overrides", nargs="*", help="for every run, such as data.root=../data or device=cuda")
    return parser.parse_args()


def _jobs(options: argparse.Namespace) -> list[Job]:
    names = {f"{row.task}/{row.name}" for row in ROWS}
    for name in options.only:
        if name not in names:
            raise UserError(f"--only {name}: there is no such row; --list shows them")
    rows = [row for row in ROWS if not options.only or f"{row.task}/{row.name}" in options.only]
    return [Job(row, seed, options.work, options.results / "runs") for row in rows for seed in row.seeds]


def _regenerate(results: Path) -> None:
    update_readme(results)
    print(f"wrote {results / 'README.md'} and speedrun.md")
    if any((results / "runs").rglob("result.json")):
        draw_results(results)
        print(f"wrote {results / 'figures'}")
    if draw_bench(results):
        print(f"wrote the figures in {results / 'bench'}")


def main() -> int:
    start = time.monotonic()
    options = _arguments()
    jobs = _jobs(options)
    if options.list:
        for job in jobs:
            print(f"{job.path!s:<42} {job.progress()}")
        return 0
    if options.inspect:
        draw_inspected(options.results, options.inspect)
        print(f"wrote {options.results / 'figures' / 'inspect'}")
        return 0
    failed: list[Job] = []
    if not options.table:
        if options.minutes is None:
            raise UserError("say how long with --minutes, or --list, or --table")
        if options.parallel < 1:
            raise UserError(f"--parallel {options.parallel}: at least 1")
        # SIGTERM (a job system's time limit) ends this like Ctrl-C: the runs save and the table is written.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        budget = Budget(start + 60 * options.minutes, options.parallel, options.overrides)
        try:
            budget.run([job for job in jobs if job.state != "done"])
        except KeyboardInterrupt:
            print("stopped; the same command continues")
        failed = budget.failed
    _regenerate(options.results)
    done = sum(job.state == "done" for job in jobs)
    print(f"{done} of {len(jobs)} runs done")
    return 1 if failed else 0


if __name__ == "__main__":
    run("reproduce.py", main)
