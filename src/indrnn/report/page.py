"""The whole report: tables and figures from run folders into one folder."""

from collections.abc import Sequence
from pathlib import Path

from indrnn.errors import UserError
from indrnn.record.files import write_atomically

from .curves import draw_length_study, draw_task
from .runs import Group, collect
from .table import markdown_report, summary_csv


def write_report(folders: Sequence[Path], out: Path) -> tuple[str, list[Path]]:
    """Write summary.csv, table.md, a folder of figures a task and, for several lengths of a series of tasks, the
    length study. Returns the tables as text and the files written.

    Raises:
        UserError: no runs below ``folders``, or ``out`` cannot be written.
    """
    groups = collect(folders)
    tables = markdown_report(groups)
    texts = {out / "summary.csv": summary_csv(groups), out / "table.md": tables}
    for path, text in texts.items():
        write_atomically(path, text, UserError)
    return tables, [*texts, *draw(groups, out)]


def draw(groups: Sequence[Group], out: Path) -> list[Path]:
    """A folder of figures a task and, for several lengths of a series of tasks, the length study, into ``out``."""
    paths = [path for task, of_task in by_task(groups).items() for path in draw_task(of_task, out / task)]
    series: dict[str, list[Group]] = {}
    for group in groups:
        if group.about.series:
            series.setdefault(group.about.series, []).append(group)
    for members in series.values():
        paths += draw_length_study(members, out if len(series) == 1 else out / members[0].about.name)
    return paths


def by_task(groups: Sequence[Group]) -> dict[str, list[Group]]:
    tasks: dict[str, list[Group]] = {}
    for group in groups:
        tasks.setdefault(group.task, []).append(group)
    return tasks
