"""``indrnn-report``: tables and figures of run folders, and pictures of what trained networks do."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from indrnn.errors import UserError

from . import run, say

DESCRIPTION = """\
Collect run folders into report.html (one page with everything), summary.csv, table.md and figures (PNG and SVG):
validation accuracy against updates and time, training loss, and error against sequence length for the adding problem.
With --inspect: how long the units of trained networks remember, and how far gradients reach. Name an IndRNN's run
and an LSTM's to compare them.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 2 and one line on stderr for a folder that is missing, empty or unreadable."""
    parser = argparse.ArgumentParser("indrnn-report", description=DESCRIPTION)
    add = parser.add_argument
    add("folder", nargs="*", type=Path, help="folders that hold run folders, at any depth (default: outputs)")
    add("--out", type=Path, help="where to write (default: report in the first folder)")
    add("--inspect", nargs="+", type=Path, metavar="RUN", help="add what these networks do; alone into outputs/inspect")
    add("--playground", nargs="+", type=Path, metavar="RUN", help="a page that runs these networks in the browser")
    add("--data-root", metavar="FOLDER", help="with --inspect or --playground: the folder that has MNIST")
    add("--open", action="store_true", help="show report.html in the browser")
    options = parser.parse_args(arguments)
    only_inspect = options.inspect and not options.folder
    command = _playground if options.playground else _inspect if only_inspect else _report
    run("indrnn-report", lambda: command(options))


def _report(options: argparse.Namespace) -> None:
    if options.data_root and not options.inspect:
        raise UserError("--data-root has no use without --inspect or --playground")
    folders = options.folder or [Path("outputs")]
    say("indrnn-report", f"reading runs in {', '.join(map(str, folders))} and drawing ...")
    from indrnn.report.page import write_report

    out = options.out or folders[0] / "report"
    tables, paths = write_report(folders, out, options.inspect or (), options.data_root)
    print("\n".join([tables, *map("wrote {}".format, paths)]))
    for folder in folders:
        print(f"live curves: tensorboard --logdir {shlex.quote(str(folder))}")
    if options.open:
        import webbrowser

        page = next(path for path in paths if path.suffix == ".html").resolve()
        if not webbrowser.open(page.as_uri()):
            raise UserError(f"no browser found to open {page}; open it by hand")


def _inspect(options: argparse.Namespace) -> None:
    if options.open:
        raise UserError("--open shows report.html, which --inspect alone does not write; name a folder too")
    say("indrnn-report", "loading PyTorch, the data and the networks ...")
    from indrnn.report.inspection import inspect_runs

    text, paths = inspect_runs(options.inspect, options.out or Path("outputs/inspect"), options.data_root)
    print("\n".join([text, *map("wrote {}".format, paths)]))


def _playground(options: argparse.Namespace) -> None:
    if options.folder or options.inspect or options.open:
        raise UserError("--playground RUN [RUN ...] takes no other runs, no --inspect and no --open")
    from indrnn.report.playground import write_playground

    out = options.out or Path("outputs/playground.html")
    write_playground(options.playground, out, options.data_root)
    print(f"wrote {out}")
