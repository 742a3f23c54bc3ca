"""Write the report: summary.csv, table.md, figures, and report.html, which contains the tables and figures."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

import pandas as pd

from indrnn.errors import UserError
from indrnn.files import write_atomically

from .curves import draw
from .inspection import inspect_runs
from .runs import Group, by_task, collect, labels
from .table import general_notes, markdown_report, summary, task_notes, task_table, without_constants


def write_report(
    folders: Sequence[Path], out: Path, inspected: Sequence[Path] = (), data_root: str | None = None
) -> tuple[str, list[Path]]:
    """Write summary.csv, table.md, report.html and a folder of figures per task to ``out``.

    Args:
        folders: searched for runs, at any depth.
        inspected: runs of one task whose trained networks are shown in the report too.
        data_root: where the inspected runs find MNIST, if not where they had it.

    Returns:
        The tables as text and the files written.

    Raises:
        UserError: no run was found, or ``out`` cannot be written.
    """
    groups = collect(folders)
    tables, figures = markdown_report(groups), draw(groups, out)
    if inspected:
        memory, pictures = inspect_runs(inspected, out, data_root)
        tables, figures = f"{tables}\n{memory}\n", figures + pictures
    texts = {
        out / "summary.csv": summary(groups).to_csv(index=False, lineterminator="\n"),
        out / "table.md": tables,
        out / "report.html": html_page(groups, figures, out),
    }
    for path, text in texts.items():
        write_atomically(path, text, UserError)
    return tables, [*texts, *figures]


def html_page(groups: Sequence[Group], figures: Sequence[Path], out: Path) -> str:
    """One page that needs no other file and no network. Figures are those in ``out`` and in the folders of tasks."""
    parts = [f"<h1>Runs compared: {sum(len(group.runs) for group in groups)}</h1>"]
    for task, members in by_task(groups).items():
        table, equal = without_constants(task_table(members))
        parts += [f"<h2>{escape(members[0].task.title)}</h2>", f"<p>{escape(equal)}</p>", _table(table)]
        parts += [_list(task_notes(members)), _figures(figures, out / task)]
        if len(settings := _settings(members)):
            parts.append(f"<details><summary>Different settings</summary>{_table(settings)}</details>")
    parts += ["<h2>Sequence length</h2>", _figures(figures, out)] if _figures(figures, out) else []
    page = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return page.substitute(body="\n".join(parts), notes=_list(general_notes(groups)))


def _settings(groups: Sequence[Group]) -> pd.DataFrame:
    """One row per setting that differs between the first runs of the groups, one column per group."""
    label = labels(groups)
    columns = {label[group.name]: pd.Series(group.runs[0].settings).map(str, na_action=None) for group in groups}
    table = pd.DataFrame(columns).drop(index=["name", "tag", "seed", "output_root"], errors="ignore")
    table = table[table.nunique(axis=1) > 1].fillna("–")
    return table.rename_axis("setting").reset_index()


def _table(table: pd.DataFrame) -> str:
    with pd.option_context("display.max_colwidth", None):
        return f'<div class="wide">{table.to_html(index=False, border=0)}</div>'


def _list(notes: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>"


def _figures(figures: Sequence[Path], folder: Path) -> str:
    """The SVG files of one folder as separate images, because they use the same names for their elements."""
    files = [path for path in figures if path.parent == folder and path.suffix == ".svg"]
    data = [(path.stem, base64.b64encode(path.read_bytes()).decode()) for path in files]
    images = [f'<img src="data:image/svg+xml;base64,{content}" alt="{escape(stem)}">' for stem, content in data]
    return f'<div class="figures">{"".join(images)}</div>' if images else ""
