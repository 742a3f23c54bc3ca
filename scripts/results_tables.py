"""What is generated in results/ from the run folders committed there: the tables of README.md, the records of
speedrun.md and the figures; and how run folders are checked and copied there. Used by reproduce.py and speedrun.py."""

import csv
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from results_rows import LENGTH, PROTOCOLS, ROWS, SOURCES, Row

from indrnn.errors import UserError
from indrnn.files import write_atomically
from indrnn.record.folder import BEST, CONFIG, TIMING, WEIGHTS
from indrnn.record.result import wilson_interval
from indrnn.report.runs import Group, Run, collect, read_run
from indrnn.report.table import (
    bullets,
    draw,
    duration,
    general_notes,
    group_row,
    markdown_table,
    percent,
    spread,
    task_rows,
)

FILES = ("config.yaml", "metrics.csv", "result.json")
# Copied if they exist: runs of earlier versions have no weights, and only scripts/speedrun.py writes timings.
KEPT_TOO = (WEIGHTS, TIMING)
BEGIN = "<!-- generated from runs/ by scripts/reproduce.py: begin -->"
END = "<!-- generated: end -->"
TARGET = 0.99
# The runs whose networks figures/inspect shows side by side.
INSPECTED = ("mnist/fast_indrnn/seed0", "mnist/fast_lstm_chrono/seed0")

# Names of runs in results/runs/mnist that scripts/speedrun.py timed while nothing else ran on the machine, the newest
# first. Add a line only for runs whose timing.json shows that: the load was near 0 before, near the threads after.
RECORDS: tuple[str, ...] = ()

COLUMNS = (
    *("n", "test %", "validation %", "parameters", "updates"),
    *("time", "to 99 % val.", "steps/s", "precision", "device"),
)
ADDING_COLUMNS = ("n", "test mse", "parameters", "updates")
# In per cent: the mean of at least this many runs is above it.
MARKS = {"99.0 validation": ("val_accuracy", 99.0), "98.9 test": ("test_accuracy", 98.9)}
LEAST_RUNS = 3


def publish(folder: Path, runs: Path) -> Path:
    """Copy a finished run's figures and weights (not its checkpoints) to ``runs``/<task>/<name>/seed<k>.

    The weights of runs of earlier versions come from their best.pt. Raises UserError if the run is unfinished, has
    neither, or its files contradict each other.
    """
    wrong = problems(folder)
    if not any((folder / name).is_file() for name in (WEIGHTS, BEST)):
        wrong.append(f"{WEIGHTS} is missing")
    if wrong:
        raise UserError(f"{folder} cannot be published: {'; '.join(wrong)}")
    target = runs.joinpath(*folder.resolve().parts[-3:])
    target.mkdir(parents=True, exist_ok=True)
    for name in (*FILES, *KEPT_TOO):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    config = target / CONFIG
    # Where the files were on the machine that trained the run means nothing elsewhere.
    config.write_text(re.sub(r"(?m)^(\s*root|output_root): .*$", _place, config.read_text()))
    if not (folder / WEIGHTS).is_file():
        from indrnn.training.checkpoint import read_checkpoint, save_weights

        save_weights(target / WEIGHTS, read_checkpoint(folder / BEST)["model"])
    return target


def _place(line: re.Match[str]) -> str:
    return f"{line[1]}: {'outputs' if line[1] == 'output_root' else 'data'}"


def problems(folder: Path) -> list[str]:
    """What is missing or contradictory in a finished run's folder, one phrase for each problem."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        return [f"{name} is missing" for name in missing]
    run = read_run(folder)
    result = run.result
    assert result is not None
    steps, accuracies = run.curve("val", "accuracy")
    if result.val_accuracy is None:
        steps, losses = run.curve("val", "loss")
        best, recorded, word = losses.min(initial=np.inf), result.val_loss, "val_loss"
    else:
        best, recorded, word = accuracies.max(initial=-np.inf), result.val_accuracy, "val_accuracy"
    expected = {
        "the folder": ("/".join(folder.resolve().parts[-3:]), f"{run.task}/{run.name}/seed{run.seed}"),
        "model": (result.model, run.config.model.name),
        "seed": (result.seed, run.seed),
        "precision": (result.precision, run.config.trainer.precision),
        "steps": (result.steps, int(run.metrics["step"].max(initial=0))),
        word: (recorded, float(best)),
    }
    faults = [f"{what} is {is_} but should be {should}" for what, (is_, should) in expected.items() if is_ != should]
    if result.best_step not in steps:
        faults.append(f"best_step {result.best_step} is no evaluation")
    for name, value in (("accuracy", result.test_accuracy), ("loss", result.test_loss)):
        row = run.curve("test", name)[1]
        if len(row) and value != row[-1]:
            faults.append(f"test_{name} is {value} but metrics.csv says {row[-1]}")
    if result.test_accuracy is not None:
        size = run.about.test_samples
        assert size is not None
        interval = wilson_interval(round(result.test_accuracy * size), size)
        if result.test_ci95 is None or not np.allclose(result.test_ci95, interval, atol=1e-6):
            faults.append(f"test_ci95 is {result.test_ci95} but should be {interval}")
    return faults


def results_markdown(runs: Path) -> str:
    """The text between the markers of results/README.md."""
    groups = collect([runs]) if runs.is_dir() and any(runs.rglob("result.json")) else []
    known = {(row.task, name) for row in ROWS for name in row.names} | beginnings(groups)
    parts = []
    for task, title in (("mnist", "Sequential MNIST"), ("mnist_permuted", "Permuted sequential MNIST (seed92916)")):
        lines = [_line(row, _find(groups, row.task, row.names)) for row in ROWS if row.task == task]
        parts += [f"### {title}", markdown_table(lines)]
    adding = [_adding_line(row, _find(groups, row.task, row.names)) for row in ROWS if row.protocol == LENGTH]
    parts += ["### Adding problem", markdown_table(adding), _legend(groups)]
    first = _first_evaluation(groups)
    if first:
        parts += ["### Validation accuracy after the first 1,700 updates, paper protocol", markdown_table(first)]
    others = [group for group in groups if (group.task, group.name) not in known]
    for task in dict.fromkeys(group.task for group in others):
        of_task = [group for group in others if group.task == task]
        parts += [f"### Other runs: {of_task[0].about.title}", markdown_table(task_rows(of_task))]
    if groups:
        parts += ["### Notes", bullets(general_notes(groups))]
    return "\n\n".join(parts)


def readme_with(text: str, generated: str, file: Path = Path("results/README.md")) -> str:
    """``text`` with the part between the markers replaced. Raises UserError if the markers are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{file} lacks the lines {BEGIN} and {END}; put them back where the tables belong")
    return f"{before}{begin}\n\n{generated}\n\n{end}{after}"


def update_readme(results: Path) -> None:
    """Regenerate the tables in ``results``/README.md and speedrun.md from ``results``/runs."""
    for name, generate in (("README.md", results_markdown), ("speedrun.md", records_markdown)):
        file = results / name
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
        write_atomically(file, readme_with(text, generate(results / "runs"), file), UserError)


def draw_results(results: Path) -> list[Path]:
    """Draw ``results``/figures from ``results``/runs, without the runs that end at their first evaluation."""
    groups = collect([results / "runs"])
    left_out = beginnings(groups)
    return draw([group for group in groups if (group.task, group.name) not in left_out], results / "figures")


def draw_bench(results: Path) -> list[Path]:
    """Draw the figures of ``results``/bench from its tables."""
    from indrnn.bench import grid, scaling

    written = []
    for what, row_type, draw_rows in (
        ("recurrence", grid.Row, grid.draw),
        ("scaling", scaling.Row, scaling.draw_scaling),
    ):
        names = [field.name for field in fields(row_type)]
        for path in sorted((results / "bench").glob(f"{what}-*.csv")):
            with path.open(newline="", encoding="utf-8") as file:
                lines = list(csv.DictReader(file))
            rows = [row_type(**{name: _parsed(line[name]) for name in names}) for line in lines]
            # Every line says where it was measured.
            written += draw_rows(rows, lines[0], path.parent, path.stem)
    return written


def _parsed(cell: str) -> Any:
    try:
        return json.loads(cell) if cell else None
    except ValueError:
        return cell


def draw_inspected(results: Path, data_root: str) -> list[Path]:
    """Draw ``results``/figures/inspect from the weights in ``results``/runs, with MNIST from ``data_root``."""
    from indrnn.report.inspection import inspect_runs

    return inspect_runs([results / "runs" / run for run in INSPECTED], results / "figures" / "inspect", data_root)[1]


def _find(groups: Sequence[Group], task: str, names: Sequence[str]) -> Group | None:
    """The group with the first of ``names`` that exists."""
    by_name = {group.name: group for group in groups if group.task == task}
    return next((by_name[name] for name in names if name in by_name), None)


def _line(row: Row, group: Group | None) -> dict[str, str]:
    line = {"network": row.network, "protocol": row.protocol, "run": row.name if group is None else group.name}
    cells = _cells(row, group, "test %")
    if group is not None and group.results:
        cells["to 99 % val."] = _time_to_target(group.finished)
    return line | {column: cells.get(column, "") for column in COLUMNS} | {"published": row.published}


def _adding_line(row: Row, group: Group | None) -> dict[str, str]:
    line, cells = {"T": row.task.removeprefix("adding-T"), "network": row.network}, _cells(row, group, "test mse")
    return line | {"run": row.name} | {column: cells.get(column, "") for column in ADDING_COLUMNS}


def _cells(row: Row, group: Group | None, figure: str) -> dict[str, str]:
    """The cells of a row by column; without a finished run, when it will be run in place of the ``figure``."""
    if group is None or not group.results:
        return {figure: "not run yet: " + ("for a GPU" if row.minutes is None else f"about {row.minutes} min a seed")}
    cells = group_row(group)
    return cells | {"updates": cells["steps"]}


def _time_to_target(runs: Sequence[Run]) -> str:
    """Mean wall-clock time until validation first exceeds 99 %, and how many runs reached it, if not all did."""
    reached = []
    for run in runs:
        seconds, accuracy = run.curve("val", "accuracy", "seconds")
        if (accuracy > TARGET).any():
            reached.append(float(seconds[accuracy > TARGET][0]))
    if not reached:
        return "never"
    return duration(fmean(reached)) + (f" ({len(reached)} of {len(runs)})" if len(reached) < len(runs) else "")


def beginnings(groups: Sequence[Group]) -> set[tuple[str, str]]:
    """Task and name of the runs that end at their first evaluation and are shown as such."""
    names = {(row.task, name) for row in ROWS if row.first_1700 is not None for name in row.first_names}
    return {(group.task, group.name) for group in groups if (group.task, group.name) in names and _after_1700(group)}


def _after_1700(group: Group | None) -> list[float]:
    """Validation accuracy after 1,700 updates of the finished runs that have one."""
    curves = [run.curve("val", "accuracy") for run in group.finished] if group else []
    return [float(values[steps == 1700][0]) for steps, values in curves if (steps == 1700).any()]


def _first_evaluation(groups: Sequence[Group]) -> list[dict[str, str]]:
    lines = []
    for row in ROWS:
        for names in (row.names, row.first_names):
            group = _find(groups, row.task, names)
            ours = _after_1700(group)
            if row.first_1700 is not None and group is not None and ours:
                cells = {"task": row.task, "network": row.network, "run": group.name, "n": str(len(ours))}
                lines.append(cells | {"ours %": percent(ours), "log %": f"{row.first_1700}"})
    return lines


def _legend(groups: Sequence[Group]) -> str:
    lines = [f"- Protocol “{name}”: {text}" for name, text in PROTOCOLS.items()]
    lines += [f"- Published, {source}" for source in SOURCES]
    versions = [result.versions for group in groups for result in group.results]
    said = sorted({", ".join(f"{name} {number}" for name, number in known.items() if number) for known in versions})
    if said:
        lines.append(f"- Versions: {'; '.join(said)}.")
    return "\n".join(lines)


def records_markdown(runs: Path, records: tuple[str, ...] = RECORDS) -> str:
    """The table of records, from the runs of these names. Raises UserError for a record that breaks a rule."""
    if not records:
        return "No record yet: no runs have been timed while nothing else ran on the machine."
    groups = {group.name: group for group in collect([runs / "mnist"])}
    missing = [name for name in records if name not in groups]
    if missing:
        raise UserError(f"the record {missing[0]} has no runs in {runs / 'mnist'}; take it out of RECORDS")
    return markdown_table([_record(groups[name], runs) for name in records])


def _record(group: Group, runs: Path) -> dict[str, str]:
    results, n, record = group.results, len(group.results), f"the record {group.name}"
    if n < LEAST_RUNS or group.unfinished:
        raise UserError(f"{record} has {n} finished runs; at least {LEAST_RUNS} are needed, and none unfinished")
    try:
        timings = [json.loads((run.path / TIMING).read_text(encoding="utf-8")) for run in group.finished]
    except (OSError, ValueError) as failure:
        raise UserError(f"{record} has no timing ({failure}); run it again with make speedrun") from None
    means = {mark: 100 * fmean(getattr(result, figure) for result in results) for mark, (figure, _) in MARKS.items()}
    reached = [mark for mark, (_, least) in MARKS.items() if means[mark] > least]
    if not reached:
        raise UserError(f"{record} has a mean above no mark; take it out of RECORDS")

    def distinct(values: list[str]) -> str:
        return "; ".join(dict.fromkeys(values))

    return {
        "mark %": ", ".join(reached),
        "minutes": spread([timing["seconds"] / 60 for timing in timings], ".1f"),
        "test %": percent([result.test_accuracy for result in results]),
        "validation %": percent([result.val_accuracy for result in results]),
        "n": str(n),
        "hardware": distinct([result.device_name for result in results]),
        "threads": distinct([str(timing["threads"]) for timing in timings]),
        "precision": distinct([result.precision for result in results]),
        "versions": distinct([f"torch {r.versions['torch']}, indrnn {(r.git['commit'] or '')[:7]}" for r in results]),
        "date": max(timing["begun"][:10] for timing in timings),
        "runs": f"[{group.name}]({runs.name}/{group.task}/{group.name})",
    }
