"""Tables of runs: summary.csv with one row per run, and Markdown and HTML tables with one row per group of seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd

from indrnn.record.result import no_better_than_chance

from .runs import Group, baseline, by_task, differing_keys, labels

ACCURACY = ("test %", "95 % CI", "validation %")
ERROR = ("test mse", "validation mse")
COST = ("parameters", "updates", "time", "steps/s", "precision", "backend", "device")
NOTES = (
    "± is the standard deviation over seeds (n − 1). Each run is tested once, at its best validation result.",
    "† n = 1: a single run. 95 % CI: the Wilson interval of a single run, from the size of the test set.",
    "‡ At chance level: the network has not learned the task yet.",
    "Accuracies on 10,000 test images that differ by less than 0.28 points at 99 %, or 0.60 at 95 %, are a tie; on the "
    "1,000 of mnist5k, 0.87 and 1.91 (1.96 standard errors of the difference).",
)


def summary(groups: Iterable[Group]) -> pd.DataFrame:
    """One row per run, finished or not: the values of its result, without lists and dictionaries."""
    rows = []
    for run in [run for group in groups for run in group.runs]:
        row = {"task": run.task.folder, "name": run.name, "seed": run.seed, "state": "unfinished", "steps": run.steps}
        row |= {"seconds": round(run.seconds, 3), "val_accuracy": run.val_accuracy, "val_loss": run.val_loss}
        if run.result:
            values = {key: value for key, value in asdict(run.result).items() if not isinstance(value, dict | list)}
            low, high = values.pop("test_ci95") or (None, None)
            commit, version = run.result.git.get("commit"), run.result.versions.get("torch")
            row |= values | {"task": run.task.folder, "name": run.name, "state": "finished"}
            row |= {"test_ci95_low": low, "test_ci95_high": high, "commit": commit, "torch": version}
        rows.append(row | {"path": run.path.as_posix()})
    return pd.DataFrame(rows)


def task_table(groups: Sequence[Group]) -> pd.DataFrame:
    """One row per group of finished runs of one task, best first, then one row per unfinished run. Cells are text."""
    label = labels(groups)
    ranked = sorted(
        (group for group in groups if group.finished),
        key=lambda group: np.mean(
            [r.test_loss if r.test_accuracy is None else -r.test_accuracy for r in group.results]
        ),
    )
    rows = [{"network": label[group.name], **group_row(group)} for group in ranked]
    rows += [
        {
            "network": label[run.name], "name": f"{run.name} seed {run.seed}, unfinished",
            "validation %": percent([run.val_accuracy]), "validation mse": spread([run.val_loss], ".3g"),
            "updates": f"{run.steps:,}", "time": duration(run.seconds),
        }
        for group in groups for run in group.runs if not run.result
    ]  # fmt: skip
    metrics = ACCURACY if groups[0].task.measures_accuracy else ERROR
    return pd.DataFrame(rows, columns=["network", "name", "n", *metrics, *COST], dtype=object).fillna("")


def group_row(group: Group) -> dict[str, str]:
    """The cells of a group's finished runs, by column."""
    results = group.results
    single, interval = len(results) == 1, results[0].test_ci95
    marks = " †" * single + " ‡" * at_chance(group)
    return {
        "name": group.name,
        "n": str(len(results)),
        "test %": percent([r.test_accuracy for r in results]) + marks,
        "95 % CI": f"{100 * interval[0]:.2f}–{100 * interval[1]:.2f}" if interval and single else "",
        "validation %": percent([r.val_accuracy for r in results]),
        "test mse": spread([r.test_loss for r in results], ".3g") + marks,
        "validation mse": spread([r.val_loss for r in results], ".3g"),
        "parameters": extent([r.parameters for r in results]),
        "updates": extent([r.steps for r in results]),
        "time": duration(float(np.mean([r.seconds for r in results]))),
        "steps/s": f"{np.mean([r.steps_per_second for r in results]):.3g}",
        **{c: ", ".join(sorted({getattr(r, c) for r in results})) for c in ("precision", "backend")},
        "device": ", ".join(sorted({r.device_name for r in results})),
    }


def at_chance(group: Group) -> bool:
    """Whether the mean test accuracy is not above the share of the most frequent class, taken as 1/K plus a point."""
    accuracies = [r.test_accuracy for r in group.results if r.test_accuracy is not None]
    return bool(accuracies) and no_better_than_chance(float(np.mean(accuracies)), 1 / group.task.output_size + 0.01)


def without_constants(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The table without the columns that are equal in all of its rows, and those columns as a sentence."""
    if len(table) < 2:
        return table, ""
    equal = [name for name in table if table[name].nunique() == 1]
    said = [f"{name} {table[name].iloc[0]}" for name in equal if table[name].iloc[0]]
    return table.drop(columns=equal), f"All rows: {', '.join(said)}." if said else ""


def task_notes(groups: Sequence[Group]) -> list[str]:
    differ = {group.name: ", ".join(differing_keys(group.finished)) for group in groups}
    notes = [f"The runs of {name} have different settings: {keys}." for name, keys in differ.items() if keys]
    return [*filter(None, [groups[0].task.caveat]), *notes]


def general_notes(groups: Sequence[Group]) -> list[str]:
    """What the marks and columns of the tables mean."""
    level = baseline(groups, "test")[1]
    mse = "mse: mean squared error." + (f" On the test set, {level}." if level else "")
    return [*NOTES, *[mse] * any(not group.task.measures_accuracy for group in groups)]


def markdown_report(groups: Sequence[Group]) -> str:
    """All tables, with one heading per task, and their notes."""
    parts = []
    for members in by_task(groups).values():
        table, equal = without_constants(task_table(members))
        parts += [f"## {members[0].task.title}", equal, markdown_table(table), bullets(task_notes(members))]
    return "\n\n".join(filter(None, [*parts, bullets(general_notes(groups))])) + "\n"


def bullets(notes: Iterable[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)


def markdown_table(rows: pd.DataFrame | Sequence[dict[str, str]]) -> str:
    """A Markdown table of text cells, aligned in a terminal too; numbers to the right."""
    table = pd.DataFrame(rows)
    columns = []
    for name in table:
        cells = [str(name), *table[name]]
        width, right = max(3, *map(len, cells)), any(cell[:1].isdigit() for cell in table[name])
        rule = "-" * (width - 1) + ":" if right else "-" * width
        padded = [cell.rjust(width) if right else cell.ljust(width) for cell in cells]
        columns.append([padded[0], rule, *padded[1:]])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def percent(shares: Sequence[float | None]) -> str:
    """[0.9921, 0.9935] -> '99.28 ± 0.10'."""
    return spread([None if share is None else 100 * share for share in shares], ".2f")


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean ± sample standard deviation of the known values; the value if there is one; empty if there is none."""
    known = pd.Series(values, dtype=float).dropna()
    parts = [known.mean(), known.std()][: min(len(known), 2)]
    return " ± ".join(f"{part:{form}}" for part in parts)


def extent(values: Sequence[int]) -> str:
    """[41000, 60000] -> '41,000–60,000'; equal values once."""
    return "–".join(f"{value:,}" for value in sorted({min(values), max(values)}))


def duration(seconds: float) -> str:
    """95 -> '95 s', 1500 -> '25.0 min', 40000 -> '11.1 h'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
