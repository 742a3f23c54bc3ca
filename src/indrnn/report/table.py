"""Runs as rows: summary.csv with one row a run, and Markdown tables with one row a task and name."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

from indrnn.record.files import csv_text

from .runs import Group, Run, differing_keys, mean_answer_level

SUMMARY_COLUMNS = (
    *("task", "name", "seed", "state", "model", "parameters", "steps", "best_step", "epochs"),
    *("val_accuracy", "val_loss", "test_accuracy", "test_loss", "test_ci95_low", "test_ci95_high"),
    *("seconds", "steps_per_second", "peak_memory_bytes", "backend", "device_name", "precision"),
    *("torch", "commit", "dirty", "path"),
)

ACCURACY_NOTES = (
    "The 95 % interval is Wilson's, for the size of the test set; over several seeds its ends are averaged.",
    "A test set of 10,000 images has a standard error of 0.07 points at 99.5 %, 0.10 at 99.0 and 0.16 at 97.5 (one of "
    "1,000 three times that): single runs closer than about 0.2 points (0.4 with permuted pixels) are a tie. Rows "
    "share a rank (=) when they differ from its first by less than 1.96 standard errors of such a difference.",
)


def summary_csv(groups: Sequence[Group]) -> str:
    """One row a run, finished or not."""
    rows = [_summary_row(run) for group in groups for run in group.runs]
    return csv_text([SUMMARY_COLUMNS, *([row.get(column) for column in SUMMARY_COLUMNS] for row in rows)])


def _summary_row(run: Run) -> dict[str, Any]:
    row = {
        "task": run.task,
        "name": run.name,
        "seed": run.seed,
        "state": "finished" if run.result else "unfinished",
        "model": run.config.model.name,
        "steps": run.steps,
        "seconds": round(run.seconds, 3),
        "val_accuracy": run.best_validation_accuracy,
        "val_loss": run.best_validation_loss,
        "path": run.path.as_posix(),
    }
    result = run.result
    if result is None:
        return row
    row.update({key: value for key, value in asdict(result).items() if key in SUMMARY_COLUMNS and key not in row})
    row.update(val_accuracy=result.val_accuracy, val_loss=result.val_loss)
    row.update(zip(("test_ci95_low", "test_ci95_high"), result.test_ci95 or (None, None), strict=True))
    row.update({key: result.git.get(key) for key in ("commit", "dirty")}, torch=result.versions.get("torch"))
    return row


def markdown_report(groups: Sequence[Group]) -> str:
    """All tables, a heading a task, and the notes that they need."""
    parts = []
    for task in dict.fromkeys(group.task for group in groups):
        of_task = [group for group in groups if group.task == task]
        parts += [f"## {of_task[0].title}", markdown_table(task_rows(of_task)), *_bullets(task_notes(of_task))]
    return "\n\n".join([*parts, *_bullets(general_notes(groups))]) + "\n"


def _bullets(notes: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {note}" for note in notes)] if notes else []


def task_rows(groups: Sequence[Group]) -> list[dict[str, str]]:
    """The rows of one task's table: the finished groups, best first, then the unfinished runs."""
    finished = sorted((group for group in groups if group.finished), key=lambda group: group.order)
    rows = [_group_row(group, rank) for group, rank in zip(finished, _ranks(finished), strict=True)]
    return rows + [_unfinished_row(group, run) for group in groups for run in group.unfinished]


def task_notes(groups: Sequence[Group]) -> list[str]:
    notes = []
    if groups[0].about.caveat:
        notes.append(groups[0].about.caveat)
    for group in groups:
        keys = differing_keys(group.finished)
        if keys:
            notes.append(f"The runs of {group.name} are not alike: they differ in {', '.join(keys)}.")
    return notes


def general_notes(groups: Sequence[Group]) -> list[str]:
    """What the marks and columns of the tables mean, as far as they occur."""
    finished = [group for group in groups if group.finished]
    notes = []
    if any(len(group.finished) > 1 for group in finished):
        notes.append("Mean ± standard deviation (n − 1) over seeds; each run's network is the one best on validation.")
    if any(len(group.finished) == 1 for group in finished):
        notes.append("† n = 1: a single run; its spread is not known.")
    if any(_learnt_nothing(group) for group in finished):
        notes.append("‡ No better than chance, the share of the most frequent class: it has learnt nothing yet.")
    if any(group.unfinished for group in groups):
        notes.append("Unfinished runs show how far they are and enter no mean; the same command continues them.")
    regressions = [group for group in groups if not group.measures_accuracy]
    if regressions:
        level = mean_answer_level(regressions, "test")[1]
        notes.append("mse: mean squared error" + (f"; on the test set, {level}." if level else "."))
    if any(group.measures_accuracy for group in finished):
        notes += ACCURACY_NOTES
    return notes


def _group_row(group: Group, rank: str) -> dict[str, str]:
    results = group.results
    marks = (" †" if len(results) == 1 else "") + (" ‡" if _learnt_nothing(group) else "")
    row = {"rank": rank, "name": group.name, "n": str(len(results))}
    if group.measures_accuracy:
        row["test %"] = percent([r.test_accuracy for r in results]) + marks
        low, high = (fmean(ends) for ends in zip(*(r.test_ci95 for r in results if r.test_ci95), strict=True))
        row["95 %"] = f"{100 * low:.2f}–{100 * high:.2f}"
        row["validation %"] = percent([r.val_accuracy for r in results])
    else:
        row["test mse"] = spread([r.test_loss for r in results], ".3g") + marks
        row["validation mse"] = spread([r.val_loss for r in results], ".3g")
    row["parameters"] = extent([r.parameters for r in results])
    row["steps"] = extent([r.steps for r in results])
    row["time"] = duration(fmean(r.seconds for r in results))
    row["steps/s"] = f"{fmean(r.steps_per_second for r in results):.3g}"
    row["precision"] = _same(r.precision for r in results)
    row["backend"] = _same(r.backend for r in results)
    row["device"] = _same(r.device_name for r in results)
    return row


def _unfinished_row(group: Group, run: Run) -> dict[str, str]:
    row = {"rank": "", "name": f"{group.name} seed {run.seed}, unfinished", "n": ""}
    if group.measures_accuracy:
        best = run.best_validation_accuracy
        row |= {"test %": "", "95 %": "", "validation %": "" if best is None else f"{100 * best:.2f}"}
    else:
        best = run.best_validation_loss
        row |= {"test mse": "", "validation mse": "" if best is None else f"{best:.3g}"}
    row |= {"parameters": "", "steps": f"{run.steps:,}", "time": duration(run.seconds)}
    return row | dict.fromkeys(("steps/s", "precision", "backend", "device"), "")


def _ranks(groups: Sequence[Group]) -> list[str]:
    """1, 2=, 2=, 4 …: a row ties with the first of its rank when the difference is within the test sets' noise."""
    leaders: list[int] = []
    for index, group in enumerate(groups):
        leader = leaders[-1] if leaders else index
        leaders.append(leader if leader == index or _tie(groups[leader], group) else index)
    return [f"{leader + 1}{'=' if leaders.count(leader) > 1 else ''}" for leader in leaders]


def _tie(better: Group, worse: Group) -> bool:
    if not better.measures_accuracy:
        return False
    p = (better.mean_test_accuracy + worse.mean_test_accuracy) / 2
    return better.mean_test_accuracy - worse.mean_test_accuracy < 1.96 * math.sqrt(2 * p * (1 - p) / better.test_size)


def _learnt_nothing(group: Group) -> bool:
    return group.measures_accuracy and group.mean_test_accuracy < 1 / group.about.output_size + 0.02


LEFT_ALIGNED = frozenset(
    ["name", "device", "backend", "precision", "network", "protocol", "run", "time", "published", "task", "ratio"]
)


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table padded so that it is aligned in a terminal too; all rows have the same keys."""
    titles = list(rows[0])
    widths = [max(len(title), *(len(row[title]) for row in rows), 3) for title in titles]
    align = ["<" if title in LEFT_ALIGNED else ">" for title in titles]

    def line(cells: Sequence[str]) -> str:
        padded = (f"{cell:{side}{width}}" for cell, side, width in zip(cells, align, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if side == "<" else "-" * (width - 1) + ":" for side, width in zip(align, widths, strict=True)]
    return "\n".join([line(titles), line(rule), *(line([row[title] for title in titles]) for row in rows)])


def percent(shares: Sequence[float | None]) -> str:
    """[0.9921, 0.9935] -> '99.28 ± 0.10'."""
    return spread([100 * share for share in shares if share is not None], ".2f")


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean ± sample standard deviation; one value alone; nothing where none is known."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{fmean(known):{form}}"
    return mean if len(known) == 1 else f"{mean} ± {stdev(known):{form}}"


def extent(values: Sequence[int]) -> str:
    """[41000, 60000] -> '41,000–60,000'; equal values once."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def duration(seconds: float) -> str:
    """95 -> '95 s', 1500 -> '25.0 min', 40000 -> '11.1 h'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _same(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))
