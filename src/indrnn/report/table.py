"""The report: runs as rows of summary.csv, of Markdown tables and of one page with the figures in it."""

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from indrnn.errors import UserError
from indrnn.files import csv_text, write_atomically
from indrnn.record.result import no_better_than_chance
from indrnn.record.tensorboard import tensorboard_command

from .curves import draw_length_study, draw_task
from .runs import Group, Run, by_task, collect, differing_keys, extent, grouped, in_words, mean_answer_level

SUMMARY_COLUMNS = (
    *("task", "name", "seed", "state", "model", "parameters", "steps", "best_step", "epochs"),
    *("val_accuracy", "val_loss", "test_accuracy", "test_loss", "test_ci95_low", "test_ci95_high"),
    *("seconds", "steps_per_second", "peak_memory_bytes", "backend", "device_name", "precision"),
    *("torch", "commit", "dirty", "path"),
)

ACCURACY = ("test %", "95 %", "validation %")
ERROR = ("test mse", "validation mse")
COST = ("parameters", "steps", "time", "steps/s", "precision", "backend", "device")
LEFT_ALIGNED = {
    *("name", "device", "backend", "precision", "network", "protocol"),
    *("run", "time", "published", "task", "ratio", "settings"),
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
th { background: #f3f3f3; } img { max-width: 100%; display: block; margin: 1rem 0; } code { background: #f3f3f3; }
li, figcaption { font-size: 13px; color: #444; }
@page { margin: 12mm; }
@media print { body { margin: 0; max-width: none; font-size: 10pt; } table { font-size: 6.5pt; }
  th, td { white-space: normal; padding: .2rem .3rem; } td:nth-child(2) { min-width: 9em; } .wide { overflow: visible; }
  img { max-height: 11cm; } img, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""


def write_report(folders: Sequence[Path], out: Path) -> tuple[str, list[Path]]:
    """Write summary.csv, table.md, a folder of figures a task and, for several lengths of a series of tasks, the
    length study; and report.html, which has all of it in itself. Returns the tables as text and the files written.

    Raises:
        UserError: no runs below ``folders``, or ``out`` cannot be written.
    """
    groups = collect(folders)
    tables = markdown_report(groups)
    figures = draw(groups, out)
    texts = {
        out / "summary.csv": summary_csv(groups),
        out / "table.md": tables,
        out / "report.html": html_page(groups, figures, out, folders),
    }
    for path, text in texts.items():
        write_atomically(path, text, UserError)
    return tables, [*texts, *figures]


def draw(groups: Sequence[Group], out: Path) -> list[Path]:
    """A folder of figures a task and, for several lengths of a series of tasks, the length study, into ``out``."""
    paths = [path for task, members in by_task(groups).items() for path in draw_task(members, out / task)]
    series = grouped((group for group in groups if group.about.series), lambda group: group.about.series)
    for members in series.values():
        paths += draw_length_study(members, out if len(series) == 1 else out / members[0].about.name)
    return paths


def summary_csv(groups: Sequence[Group]) -> str:
    """One row a run, finished or not."""
    rows = [_summary_row(run) for group in groups for run in group.runs]
    return csv_text([SUMMARY_COLUMNS, *([row.get(column) for column in SUMMARY_COLUMNS] for row in rows)])


def _summary_row(run: Run) -> dict[str, Any]:
    result = asdict(run.result) if run.result else {"versions": {}, "git": {}, "test_ci95": None}
    low, high = result["test_ci95"] or (None, None)
    best = {f"val_{figure}": run.best_validation.get(figure) for figure in ("accuracy", "loss")}
    return {
        **best, **result, **result["git"], "torch": result["versions"].get("torch"), "task": run.task, "name": run.name,
        "seed": run.seed, "state": "finished" if run.result else "unfinished", "model": run.config.model.name,
        "steps": run.steps, "seconds": round(run.seconds, 3), "test_ci95_low": low, "test_ci95_high": high,
        "path": run.path.as_posix(),
    }  # fmt: skip


def markdown_report(groups: Sequence[Group]) -> str:
    """All tables, a heading a task, and the notes that they need."""
    parts = []
    for members in by_task(groups).values():
        parts += [f"## {members[0].about.title}", markdown_table(task_rows(members)), bullets(task_notes(members))]
    return "\n\n".join(filter(None, [*parts, bullets(general_notes(groups))])) + "\n"


def bullets(notes: Iterable[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)


def task_rows(groups: Sequence[Group]) -> list[dict[str, str]]:
    """The rows of one task's table: the finished groups, best first, then the unfinished runs."""
    finished = sorted((group for group in groups if group.finished), key=lambda group: (-group.score, group.name))
    words = in_words(groups)
    rows = [
        {"rank": rank, "network": words[group.name], **group_row(group)}
        for group, rank in zip(finished, _ranks(finished), strict=True)
    ]
    rows += [
        {
            "network": words[group.name],
            "name": f"{group.name} seed {run.seed}, unfinished",
            "validation %": percent([run.best_validation.get("accuracy")]),
            "validation mse": spread([run.best_validation.get("loss")], ".3g"),
            "steps": f"{run.steps:,}",
            "time": duration(run.seconds),
        }
        for group in groups
        for run in group.unfinished
    ]
    figures = ACCURACY if groups[0].about.measures_accuracy else ERROR
    titles = ("rank", "network", "name", "n", *figures, *COST)
    return [{title: row.get(title, "") for title in titles} for row in rows]


def task_notes(groups: Sequence[Group]) -> list[str]:
    notes = [groups[0].about.caveat or ""]
    for group in groups:
        keys = ", ".join(differing_keys(group.finished))
        notes.append(f"The runs of {group.name} are not alike: they differ in {keys}." if keys else "")
    return [note for note in notes if note]


def general_notes(groups: Sequence[Group]) -> list[str]:
    """What the marks and columns of the tables mean, as far as they occur."""
    finished = [group for group in groups if group.finished]
    seeds = {len(group.finished) for group in finished}
    level = mean_answer_level(groups, "test")[1]
    regressions = [group for group in groups if not group.about.measures_accuracy]
    sizes = sorted({group.about.test_samples or 0 for group in finished if group.about.measures_accuracy})
    ties = [
        f"{100 * _noise(0.99, size):.2f} points at 99 % and {100 * _noise(0.95, size):.2f} at 95 % ({size:,} sequences)"
        for size in filter(None, sizes)
    ]
    learnt_nothing = any(map(_learnt_nothing, finished))
    unfinished = any(group.unfinished for group in groups)
    notes = {
        "Mean ± standard deviation (n − 1) over seeds, each run's best on validation.": seeds - {1},
        "† n = 1: a single run; its spread is not known.": 1 in seeds,
        "‡ No better than chance, the share of the most frequent class: it has learnt nothing yet.": learnt_nothing,
        "Unfinished runs show how far they are and enter no mean; the same command continues them.": unfinished,
        "mse: mean squared error" + (f"; on the test set, {level}." if level else "."): regressions,
        "The 95 % interval is Wilson's, for the size of the test set; over seeds its ends are averaged.": sizes,
        "Accuracies closer than 1.96 standard errors of their difference are a tie, and share a rank (=) with its "
        f"first: {'; '.join(ties)}.": ties,
    }
    return [text for text, holds in notes.items() if holds]


def _noise(share: float, size: int) -> float:
    """1.96 standard errors of the difference of two accuracies near ``share`` on ``size`` sequences each."""
    return 1.96 * math.sqrt(2 * share * (1 - share) / size)


def group_row(group: Group) -> dict[str, str]:
    """The cells of a group's finished runs, by column."""
    results = group.results
    marks = (" †" if len(results) == 1 else "") + (" ‡" if _learnt_nothing(group) else "")
    ends = [fmean(ends) for ends in zip(*(r.test_ci95 for r in results if r.test_ci95), strict=True)]
    return {
        "name": group.name,
        "n": str(len(results)),
        "test %": percent([r.test_accuracy for r in results]) + marks,
        "95 %": "–".join(f"{100 * end:.2f}" for end in ends),
        "validation %": percent([r.val_accuracy for r in results]),
        "test mse": spread([r.test_loss for r in results], ".3g") + marks,
        "validation mse": spread([r.val_loss for r in results], ".3g"),
        "parameters": extent([r.parameters for r in results]),
        "steps": extent([r.steps for r in results]),
        "time": duration(fmean(r.seconds for r in results)),
        "steps/s": f"{fmean(r.steps_per_second for r in results):.3g}",
        "precision": _same(r.precision for r in results),
        "backend": _same(r.backend for r in results),
        "device": _same(r.device_name for r in results),
    }


def _ranks(groups: Sequence[Group]) -> list[str]:
    """1, 2=, 2=, 4 …: a row ties with the first of its rank when the difference is within the test sets' noise."""
    leaders: list[int] = []
    for index, group in enumerate(groups):
        leader = leaders[-1] if leaders else index
        leaders.append(leader if leader == index or _tie(groups[leader], group) else index)
    return [f"{leader + 1}{'=' if leaders.count(leader) > 1 else ''}" for leader in leaders]


def _tie(better: Group, worse: Group) -> bool:
    if not (better.about.measures_accuracy and better.about.test_samples):
        return False
    return better.score - worse.score < _noise((better.score + worse.score) / 2, better.about.test_samples)


def _learnt_nothing(group: Group) -> bool:
    # What the most frequent class has is not recorded: a point above its equal share, as in MNIST's test set.
    chance = 1 / group.about.output_size + 0.01
    return group.about.measures_accuracy and no_better_than_chance(group.score, chance)


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


def duration(seconds: float) -> str:
    """95 -> '95 s', 1500 -> '25.0 min', 40000 -> '11.1 h'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _same(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


def html_page(groups: Sequence[Group], figures: Sequence[Path], out: Path, folders: Sequence[Path]) -> str:
    """One page that needs no other file and no network: tables, figures (as SVG) and how configurations differ.

    ``figures``: files below ``out``, those of a task in the folder named as it is.
    """
    drawn = [path for path in figures if path.suffix == ".svg"]
    parts = []
    for task, members in by_task(groups).items():
        parts += [f"<h2>{escape(members[0].about.title)}</h2>", _table(task_rows(members)), _list(task_notes(members))]
        parts += [_figure(path) for path in drawn if path.parent == out / task]
        settings = setting_rows(members)
        if settings:
            parts += ["<h3>How their configurations differ</h3>", _table(settings)]
    lengths = [_figure(path) for path in drawn if path.stem == "length_study"]
    parts += ["<h2>Error against the length of the sequence</h2>"] * bool(lengths) + lengths
    runs = sum(len(group.runs) for group in groups)
    commands = [f"<code>{escape(tensorboard_command(folder))}</code> shows the curves live." for folder in folders]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>IndRNN report</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{runs} {'run' if runs == 1 else 'runs'} compared</h1>\n<p>{' '.join(commands)}</p>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<h2>Notes</h2>\n{_list(general_notes(groups))}\n</body></html>\n"
    )


def setting_rows(groups: Sequence[Group]) -> list[dict[str, str]]:
    """A row a setting that differs between the groups of a task (their first runs), a column a group."""
    first = [group.runs[0] for group in groups]
    words = in_words(groups)

    def shown(value: object) -> str:
        return "–" if value is None else str(value)

    return [
        {"setting": key} | {words[run.name]: shown(run.settings.get(key)) for run in first}
        for key in differing_keys(first)
        if key not in ("name", "tag")
    ]


def _table(rows: Sequence[dict[str, str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in rows[0])
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _list(notes: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>" if notes else ""


def _figure(path: Path) -> str:
    """As an image of its own, so that names within one SVG do not meet those of another."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(f"{path.parent.name}: {path.stem}")}">'
