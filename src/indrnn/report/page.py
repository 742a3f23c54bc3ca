"""The whole report: tables, figures and one page with all of it, from run folders into one folder."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from indrnn.errors import UserError
from indrnn.files import write_atomically
from indrnn.record.tensorboard import tensorboard_command

from .curves import draw_length_study, draw_task
from .runs import Group, by_task, collect, differing_keys, grouped, in_words
from .table import general_notes, markdown_report, summary_csv, task_notes, task_rows

PAGE = "report.html"
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
        out / PAGE: html_page(groups, figures, out, folders),
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
