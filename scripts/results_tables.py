"""Generate the tables and figures in results/ from the committed run folders, and copy finished runs there.

Used by reproduce.py and speedrun.py.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from results_rows import PROTOCOLS, ROWS, SOURCES, Row

from indrnn.errors import UserError
from indrnn.files import write_atomically
from indrnn.record.folder import CONFIG, METRICS, RESULT, TIMING, WEIGHTS
from indrnn.report.curves import draw
from indrnn.report.inspection import inspect_runs
from indrnn.report.runs import Group, Run, by_task, collect, read_run
from indrnn.report.table import bullets, duration, general_notes, group_row, markdown_table, percent, spread, task_table

FILES = (CONFIG, METRICS, RESULT)
OPTIONAL = (WEIGHTS, TIMING)
BEGIN = "<!-- generated from runs/ by scripts/reproduce.py: begin -->"
END = "<!-- generated: end -->"
# The runs whose networks figures/inspect compares.
INSPECTED = ("mnist/fast_indrnn-adam/seed0", "mnist/fast_lstm_chrono-adam/seed0", "mnist/lstm/seed0")
# Names of runs in results/runs/mnist that scripts/speedrun.py timed on an otherwise idle machine, the newest first.
RECORDS: tuple[str, ...] = ()
MARKS = {"99.0 validation": ("val_accuracy", 99.0), "98.9 test": ("test_accuracy", 98.9)}
COLUMNS = ["network", "protocol", "run", "n", "test %", "validation %", "parameters", "updates", "time"]
COLUMNS += ["to 99 % val.", "steps/s", "precision", "device", "published"]
ADDING_COLUMNS = ["T", "network", "run", "n", "test mse", "parameters", "updates"]


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
    for name in (*FILES, *OPTIONAL):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    # Paths of the machine that trained the run mean nothing elsewhere.
    text = re.sub(r"(?m)^(\s*root): .*$", r"\1: data", (target / CONFIG).read_text(encoding="utf-8"))
    (target / CONFIG).write_text(re.sub(r"(?m)^output_root: .*$", "output_root: outputs", text), encoding="utf-8")
    return target


def problems(folder: Path) -> list[str]:
    """What is missing or contradictory in the folder of a finished run, one phrase per problem."""
    missing = [f"{name} is missing" for name in FILES if not (folder / name).is_file()]
    if missing:
        return missing
    run = read_run(folder)
    result = run.result
    assert result is not None
    regression = result.val_accuracy is None
    expected = {
        "folder": ("/".join(folder.resolve().parts[-3:]), f"{run.task.folder}/{run.name}/seed{run.seed}"),
        "name": (result.name, run.name),
        "model": (result.model, run.config.model.name),
        "seed": (result.seed, run.seed),
        "precision": (result.precision, run.config.trainer.precision),
        "steps": (result.steps, int(run.metrics["step"].max())),
        "validation": (result.val_loss, run.val_loss) if regression else (result.val_accuracy, run.val_accuracy),
        **{
            f"test_{name}": (getattr(result, f"test_{name}"), run.curve("test", name)[name].iloc[-1])
            for name in ("loss", "accuracy")
            if len(run.curve("test", name))
        },
    }
    faults = [f"{key} is {value} but should be {right}" for key, (value, right) in expected.items() if value != right]
    if result.best_step not in set(run.curve("val", "loss")["step"]):
        faults.append(f"best_step {result.best_step} has no evaluation")
    return faults


def results_markdown(runs: Path) -> str:
    """The text between the markers of results/README.md."""
    groups = collect([runs]) if any(runs.rglob(RESULT)) else []
    known = {(group.task.folder, group.name): group for group in groups}
    parts = []
    for task, title in (("mnist", "Sequential MNIST"), ("mnist_permuted", "Permuted sequential MNIST (seed92916)")):
        lines = [_line(row, known.get((task, row.name)), "test %") for row in ROWS if row.task == task]
        parts += [f"### {title}", markdown_table(pd.DataFrame(lines, columns=COLUMNS, dtype=object).fillna(""))]
    adding = [_line(row, known.get((row.task, row.name)), "test mse") for row in ROWS if row.task.startswith("adding")]
    parts += [
        "### Adding problem",
        markdown_table(pd.DataFrame(adding, columns=ADDING_COLUMNS, dtype=object).fillna("")),
    ]
    parts.append(bullets([f"Protocol “{name}”: {text}" for name, text in PROTOCOLS.items()]))
    parts.append(bullets(f"Published, {source}" for source in SOURCES))
    rows = {(row.task, row.name) for row in ROWS}
    for members in by_task(group for key, group in known.items() if key not in rows).values():
        parts += [f"### Other runs: {members[0].task.title}", markdown_table(task_table(members))]
    versions = {_versions(result.versions) for group in groups for result in group.results} - {""}
    notes = [*general_notes(groups), *[f"Versions: {'; '.join(sorted(versions))}."] * bool(versions)]
    return "\n\n".join([*parts, "### Notes", bullets(notes)])


def _line(row: Row, group: Group | None, metric: str) -> dict[str, str]:
    line = {"network": row.network, "protocol": row.protocol, "run": row.name, "published": row.published}
    line["T"] = row.task.removeprefix("adding-T")
    if group is None or not group.results:
        need = "needs a GPU" if row.minutes is None else f"about {row.minutes} min per seed"
        return line | {metric: f"not run yet: {need}"}
    return line | group_row(group) | {"to 99 % val.": _time_to_target(group.finished)}


def _versions(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items() if number)


def _time_to_target(runs: Sequence[Run], target: float = 0.99) -> str:
    """Mean wall-clock time until validation accuracy first exceeds ``target``, and how many runs reached it."""
    curves = [run.curve("val", "accuracy") for run in runs]
    seconds = pd.Series([curve["seconds"][curve["accuracy"] > target].min() for curve in curves], dtype=float).dropna()
    if seconds.empty:
        return "never"
    return duration(seconds.mean()) + f" ({len(seconds)} of {len(runs)})" * (len(seconds) < len(runs))


def readme_with(text: str, generated: str, file: Path = Path("results/README.md")) -> str:
    """``text`` with the part between the markers replaced.

    Raises:
        UserError: the markers are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{file} lacks the lines {BEGIN} and {END}; put them back where the tables belong")
    return f"{before}{begin}\n\n{generated}\n\n{end}{after}"


def update_readme(results: Path) -> None:
    """Regenerate the tables in ``results``/README.md and speedrun.md from ``results``/runs."""
    for name, generate in (("README.md", results_markdown), ("speedrun.md", records_markdown)):
        text = (results / name).read_text(encoding="utf-8")
        write_atomically(results / name, readme_with(text, generate(results / "runs"), results / name), UserError)


def draw_results(results: Path) -> list[Path]:
    """Draw ``results``/figures from ``results``/runs, without ablations (other than Adam) and first evaluations."""
    hidden = {(row.task, row.name) for row in ROWS if row.ablation and not row.name.endswith("-adam")}
    groups = [group for group in collect([results / "runs"]) if (group.task.folder, group.name) not in hidden]
    return draw([group for group in groups if not group.name.endswith("first1700")], results / "figures")


def draw_inspected(results: Path, data_root: str) -> list[Path]:
    """Draw ``results``/figures/inspect from the weights in ``results``/runs, with MNIST from ``data_root``."""
    runs = [results / "runs" / run for run in INSPECTED]
    return inspect_runs(runs, results / "figures" / "inspect", data_root)[1]


def records_markdown(runs: Path, records: Sequence[str] = RECORDS) -> str:
    """The table of records, from the runs of these names.

    Raises:
        UserError: a record breaks a rule.
    """
    if not records:
        return "No record yet: no runs have been timed on an otherwise idle machine."
    groups = {group.name: group for group in collect([runs / "mnist"])}
    return markdown_table([_record(name, groups.get(name), runs) for name in records])


def _record(name: str, group: Group | None, runs: Path) -> dict[str, str]:
    results = group.results if group else []
    if group is None or len(results) < 3 or len(results) < len(group.runs):
        raise UserError(f"record {name} has {len(results)} finished runs; it needs at least 3, and none unfinished")
    try:
        timings = [json.loads((run.path / TIMING).read_text(encoding="utf-8")) for run in group.finished]
    except (OSError, ValueError) as failure:
        raise UserError(f"record {name} has no timing ({failure}); run it again with make speedrun") from None
    means = {mark: 100 * np.mean([getattr(result, field) for result in results]) for mark, (field, _) in MARKS.items()}
    reached = [mark for mark, (_, least) in MARKS.items() if means[mark] > least]
    if not reached:
        raise UserError(f"record {name} has a mean above no mark; remove it from RECORDS")
    row = group_row(group)
    commits = {f"torch {result.versions['torch']}, indrnn {(result.git['commit'] or '')[:7]}" for result in results}
    return {
        "mark %": ", ".join(reached),
        "minutes": spread([timing["seconds"] / 60 for timing in timings], ".1f"),
        "test %": percent([result.test_accuracy for result in results]),
        **{column: row[column] for column in ("validation %", "n", "device", "precision")},
        "threads": ", ".join(sorted({str(timing["threads"]) for timing in timings})),
        "versions": "; ".join(sorted(commits)),
        "date": max(timing["begun"][:10] for timing in timings),
        "runs": f"[{name}]({runs.name}/{group.task.folder}/{name})",
    }
