"""``indrnn-bench``: how fast the IndRNN is, and how near to the limits of the machine."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from indrnn.errors import UserError

from . import announce, command_parser, run

DESCRIPTION = """\
Time the recurrence and a layer against a plain copy, a PyTorch loop and nn.LSTM (recurrence), whole training steps
against their matrix products (step), and how steps slow down and memory grows with processes, batch, length and depth
(scaling). Every backend is compared with float64 first; if one is wrong, nothing is timed or written. Writes CSV, a
figure and the ratios that matter.
"""


def parser() -> argparse.ArgumentParser:
    command = command_parser("indrnn-bench", DESCRIPTION)
    command.add_argument(
        "what",
        nargs="?",
        choices=("all", "recurrence", "step", "scaling", "exact"),
        default="all",
        help="what to measure (default: all, which is recurrence and step); exact: only the comparison with float64",
    )
    command.add_argument(
        "--quick", action="store_true", help="a few sizes at B = 32: under two minutes on two CPU cores"
    )
    command.add_argument(
        "--minutes", type=_minutes,
        help="recurrence, scaling: skip the sizes left after this time (default: 30, with --quick 2 and 1)",
    )  # fmt: skip
    command.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    command.add_argument(
        "--out", type=Path, default=Path("results/bench"), help="folder to write to (default: results/bench)"
    )
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 2 and one line on stderr for a bad request, with 1 if a backend is not exact."""
    options = parser().parse_args(arguments)
    run("indrnn-bench", lambda: _bench(options))


def _bench(options: argparse.Namespace) -> None:
    announce("indrnn-bench", "loading PyTorch and comparing every backend with float64")
    from indrnn.bench.commands import bench, write_exactness
    from indrnn.bench.exactness import check_device

    if options.minutes is not None and options.what in ("step", "exact"):
        raise UserError(f"--minutes has no use with {options.what}; recurrence and scaling take it")
    on = check_device(options.device)
    if options.what == "exact":
        write_exactness(on, options.out)
        return
    for what in ("recurrence", "step") if options.what == "all" else (options.what,):
        bench(what, on, options.quick, options.minutes, options.out)


def _minutes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


if __name__ == "__main__":
    main()
