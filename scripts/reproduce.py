#!/usr/bin/env python3
"""Run the unfinished rows of the results tables, within a time limit, and regenerate the tables and figures.

    python scripts/reproduce.py --list           finished, unfinished and missing runs
    python scripts/reproduce.py --minutes 600    resume where the last call stopped
    python scripts/reproduce.py --table          only regenerate results/README.md and figures

results_rows.py declares the rows. indrnn-train runs them in a work folder (default: outputs/reproduce), which keeps
the checkpoints. At the time limit, the running one is stopped with SIGTERM and saves a checkpoint. Finished runs are
skipped. Their folders are copied into results/runs. To redraw figures/inspect: R=results/runs/mnist;
indrnn-report --inspect $R/fast_indrnn/seed0 $R/fast_lstm_chrono/seed0 $R/lstm/seed0 --out results/figures/inspect
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from results_rows import ROWS, Row

from indrnn.cli import run
from indrnn.errors import UserError
from indrnn.files import write_atomically
from indrnn.record.folder import CONFIG, METRICS, RESULT, WEIGHTS
from indrnn.report.curves import draw
from indrnn.report.runs import Group, Run, by_task, collect, read_run
from indrnn.report.table import bullets, duration, general_notes, group_row, markdown_table, task_table

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [sys.executable, "-m", "indrnn"]
FILES = (CONFIG, METRICS, RESULT)
# The networks drawn against time, and the speed of their updates on one core.
AGAINST_TIME = [("mnist", name) for name in ("fast_indrnn", "fast_indrnn_12layer", "fast_lstm_chrono")]
SPEEDS = "bench/step-one-core.csv"
BEGIN = "<!-- generated from runs/ by scripts/reproduce.py: begin -->"
END = "<!-- generated: end -->"
COLUMNS = ["network", "protocol", "run", "n", "test %", "validation %", "parameters", "updates", "time"]
COLUMNS += ["to 99 % val.", "steps/s", "precision", "device", "published"]
ADDING_COLUMNS = ["T", "network", "run", "n", "test mse", "parameters", "updates", "time", "steps/s", "device"]
SECTIONS = (
    ("mnist", "Sequential MNIST", COLUMNS), ("mnist_permuted", "Permuted sequential MNIST (seed92916)", COLUMNS),
    ("adding", "Adding problem", ADDING_COLUMNS),
)  # fmt: skip


def publish(folder: Path, runs: Path) -> Path:
    """Copy the results and weights of a finished run, without checkpoints, to ``runs``/<task>/<name>/seed<k>.

    Raises:
        UserError: the run is unfinished, has no weights, or its files contradict each other.
    """
    faults = problems(folder) + [f"{WEIGHTS} is missing"] * (not (folder / WEIGHTS).is_file())
    if faults:
        raise UserError(f"{folder} cannot be published: {'; '.join(faults)}")
    target = runs.joinpath(*folder.resolve().parts[-3:])
    target.mkdir(parents=True, exist_ok=True)
    for name in (*FILES, WEIGHTS):
        shutil.copyfile(folder / name, target / name)
    # Paths of the machine that trained the run mean nothing elsewhere.
    text = re.sub(r"(?m)^(\s*root): .*$", r"\1: data", (target / CONFIG).read_text(encoding="utf-8"))
    (target / CONFIG).write_text(re.sub(r"(?m)^output_root: .*$", "output_root: outputs", text), encoding="utf-8")
    return target


def problems(folder: Path) -> list[str]:
    """The faults in the folder of a finished run: missing files, or where result.json contradicts the others."""
    missing = [f"{name} is missing" for name in FILES if not (folder / name).is_file()]
    if missing:
        return missing
    run = read_run(folder)
    val, tests = run.curve("val", "loss"), run.curve("test", "loss")
    if val.empty or tests.empty:
        return [f"{METRICS} has no evaluation on the validation or test split"]
    test = tests.iloc[-1]
    best = val.loc[val["loss"].idxmin() if run.result.val_accuracy is None else val["accuracy"].idxmax()]
    expected = {
        "name": run.name, "seed": run.seed, "model": run.config.model.name, "precision": run.config.trainer.precision,
        "steps": run.metrics["step"].max(), "best_step": best["step"], "val_accuracy": best["accuracy"],
        "val_loss": best["loss"], "test_accuracy": test["accuracy"], "test_loss": test["loss"],
    }  # fmt: skip
    found = {key: getattr(run.result, key) for key in expected}
    found["folder"], expected["folder"] = folder.resolve().parts[-3:], (run.task.folder, run.name, f"seed{run.seed}")
    return [
        f"{key} is {found[key]} but should be {right}"
        for key, right in expected.items()
        if found[key] != right and not (found[key] is None and pd.isna(right))
    ]


def results_markdown(runs: Path) -> str:
    """The text between the markers of results/README.md."""
    groups = collect([runs]) if any(runs.rglob(RESULT)) else []
    known = {(group.task.folder, group.name): group for group in groups}
    parts = []
    for task, title, columns in SECTIONS:
        rows = [row for row in ROWS if row.task == task or row.task.startswith(f"{task}-")]
        lines = [_line(row, known.pop((row.task, row.name), None), columns) for row in rows]
        parts += [f"### {title}", markdown_table(pd.DataFrame(lines, columns=columns, dtype=object).fillna(""))]
    for members in by_task(known.values()).values():
        parts += [f"### Other runs: {members[0].task.title}", markdown_table(task_table(members))]
    versions = {", ".join(f"{k} {v}" for k, v in r.versions.items() if v) for group in groups for r in group.results}
    notes = [*general_notes(groups), f"Versions: {'; '.join(sorted(versions - {''}))}."]
    return "\n\n".join([*parts, "### Notes", bullets(notes)])


def _line(row: Row, group: Group | None, columns: Sequence[str]) -> dict[str, str]:
    line = {"network": row.network, "protocol": row.protocol, "run": row.name, "published": row.published}
    line["T"] = row.task.removeprefix("adding-T")
    if group is None or not group.results:
        need = "needs a GPU" if row.minutes is None else f"about {row.minutes} min per seed"
        return line | {columns[4]: f"not run yet: {need}"}
    return line | group_row(group) | {"to 99 % val.": _time_to_target(group.finished)}


def _time_to_target(runs: Sequence[Run], target: float = 0.99) -> str:
    """Mean wall-clock time until validation accuracy first exceeds ``target``, and how many runs reached it."""
    curves = [run.curve("val", "accuracy") for run in runs]
    seconds = pd.Series([curve["seconds"][curve["accuracy"] > target].min() for curve in curves], dtype=float).dropna()
    if seconds.empty:
        return "never"
    return duration(seconds.mean()) + f" ({len(seconds)} of {len(runs)})" * (len(seconds) < len(runs))


def update_readme(results: Path) -> None:
    """Regenerate the tables in ``results``/README.md from ``results``/runs.

    Raises:
        UserError: the markers are missing.
    """
    file = results / "README.md"
    before, begin, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{file} lacks the lines {BEGIN} and {END}; put them back where the tables belong")
    generated = results_markdown(results / "runs")
    write_atomically(file, f"{before}{begin}\n\n{generated}\n\n{end}{after}", UserError)


def draw_results(results: Path) -> list[Path]:
    """Draw ``results``/figures from the rows in ``results``/runs that are not ablations."""
    shown = {(row.task, row.name) for row in ROWS if not row.note}
    groups = [group for group in collect([results / "runs"]) if (group.task.folder, group.name) in shown]
    paths = draw(groups, results / "figures")
    groups = [group for group in groups if (group.task.folder, group.name) in AGAINST_TIME]
    return paths + draw(at_measured_speed(groups, results), results / "figures" / "time") if groups else paths


def at_measured_speed(groups: Sequence[Group], results: Path) -> Sequence[Group]:
    """Replace each run's time by its updates at the speed of an idle core, which `indrnn-bench step` measured: the
    published runs shared their machine."""
    keys = ["model", "layers", "units", "precision"]
    speeds = pd.read_csv(results / SPEEDS).set_index(keys)["steps_per_second"]
    for each in (each for group in groups for each in group.runs):
        model, precision = each.config.model, each.config.trainer.precision
        speed = speeds[model.name, model.num_layers, model.hidden_size, precision]
        each.metrics["seconds"] = each.metrics["step"] / speed
    return groups


def train(row: Row, seed: int, options: argparse.Namespace) -> bool:
    """Train or resume one run, and publish it. Returns False if it failed.

    Raises:
        TimeoutExpired, KeyboardInterrupt: the run was stopped and has saved a checkpoint.
    """
    path = Path(row.task, row.name, f"seed{seed}")
    command = [*TRAIN, *row.overrides, f"seed={seed}", f"output_root={os.path.relpath(options.work)}"]
    print(f"{path}: {' '.join(command)}", flush=True)
    process = subprocess.Popen([*command, *options.overrides], start_new_session=True)
    try:
        process.wait(max(0, options.deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.terminate()
        process.wait()
        raise
    if process.returncode:
        return False
    try:
        print(f"{path}: copied to {publish(options.work / path, options.results / 'runs')}", flush=True)
    except UserError as failure:
        print(f"{path}: {failure}", flush=True)
        return False
    return True


def state(row: Row, seed: int, options: argparse.Namespace) -> str:
    path = Path(row.task, row.name, f"seed{seed}")
    if (options.results / "runs" / path / RESULT).exists():
        return "finished"
    return "unfinished" if (options.work / path / "checkpoint.pt").exists() else "missing"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--minutes", type=float, help="stop after this time, with everything saved")
    what.add_argument("--list", action="store_true", help="only list the state of every run")
    what.add_argument("--table", action="store_true", help="only regenerate tables and figures")
    parser.add_argument("--only", action="append", metavar="TASK/NAME", help="only these rows")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/reproduce", help="folder of runs and checkpoints")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of published results")
    parser.add_argument("overrides", nargs="*", help="for every run, such as data.root=../data or device=cuda")
    options = parser.parse_args()
    rows = {f"{row.task}/{row.name}": row for row in ROWS}
    if unknown := set(options.only or ()) - set(rows):
        raise UserError(f"--only {unknown.pop()}: no row of this name; --list shows them")
    jobs = [(rows[name], seed) for name in options.only or rows for seed in range(rows[name].num_seeds)]
    if options.list:
        print("\n".join(f"{row.task}/{row.name}/seed{seed}  {state(row, seed, options)}" for row, seed in jobs))
        return 0
    succeeded = True
    if options.minutes is not None:
        options.deadline = time.monotonic() + 60 * options.minutes
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job system's SIGTERM acts like Ctrl-C
        try:
            for job in jobs:
                succeeded &= state(*job, options) == "finished" or train(*job, options)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            print("stopped; rerun to resume", flush=True)
    update_readme(options.results)
    draw_results(options.results)
    print(f"{sum(state(*job, options) == 'finished' for job in jobs)} of {len(jobs)} runs finished")
    return 0 if succeeded else 1


if __name__ == "__main__":
    run("reproduce.py", main)
