"""The whole report: tables and figures from run folders into one folder."""

from collections.abc import Sequence
from pathlib import Path

from indrnn.errors import UserError
from indrnn.record import replacing

from .collect import Group, collect
from .curves import draw_task
from .length_study import draw_length_study
from .results import beginnings
from .style import make_folder
from .table import markdown_report, summary_csv


def write_report(folders: Sequence[Path], out: Path) -> tuple[str, list[Path]]:
    """Write summary.csv, table.md, a folder of figures a task and, for several lengths of the adding problem, the
    length study. Returns the tables as text and the files written.

    Raises:
        UserError: no runs below ``folders``, or ``out`` cannot be written.
    """
    groups = collect(folders)
    tables = markdown_report(groups)
    paths = [_write(out / "summary.csv", summary_csv(groups)), _write(out / "table.md", tables)]
    return tables, paths + draw(groups, out)


def draw(groups: Sequence[Group], out: Path) -> list[Path]:
    """A folder of figures a task and, for several lengths of the adding problem, the length study, into ``out``."""
    paths = [path for task, of_task in by_task(groups).items() for path in draw_task(of_task, out / task)]
    return paths + draw_length_study(groups, out)


def draw_results(results: Path) -> list[Path]:
    """Draw ``results``/figures from ``results``/runs; runs that end at their first evaluation have no curves."""
    groups = collect([results / "runs"])
    left_out = beginnings(groups)
    return draw([group for group in groups if (group.task, group.name) not in left_out], results / "figures")


def by_task(groups: Sequence[Group]) -> dict[str, list[Group]]:
    tasks: dict[str, list[Group]] = {}
    for group in groups:
        tasks.setdefault(group.task, []).append(group)
    return tasks


def _write(path: Path, text: str) -> Path:
    make_folder(path.parent)
    with replacing(path, UserError) as file:
        file.write(text.encode())
    return path
