"""``indrnn-bench``: how fast the IndRNN is next to PyTorch and to the limits of the machine, and how exact."""

import argparse
from collections.abc import Sequence
from itertools import product
from math import inf
from pathlib import Path

from ..errors import UserError
from . import run, say

DESCRIPTION = """\
Every command first compares every backend with float64. If one is wrong, nothing is timed. Writes CSV, ratios and a
figure.
"""
COMMANDS = {
    "recurrence": "time the recurrence and a layer next to a copy of the input, a PyTorch loop and nn.LSTM",
    "step": "time training steps of the IndRNN and the LSTM next to the IndRNN's matrix products",
    "exact": "compare every backend, forward and backward, with float64",
}
HIDDEN_SIZE = 128


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser("indrnn-bench", description=DESCRIPTION)
    subparsers = command.add_subparsers(dest="what", required=True)
    commands = {what: subparsers.add_parser(what, help=text) for what, text in COMMANDS.items()}
    for options in commands.values():
        options.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
        options.add_argument("--out", type=Path, default=Path("results/bench"), help="default: results/bench")
        options.set_defaults(length=[0], batch=[], seconds=1.0, profile=False)
    for what, seconds in (("recurrence", 0.3), ("step", 3.0)):
        options = commands[what]
        options.add_argument("--batch", type=positive, nargs="+", default=[32], help="batch sizes (default: 32)")
        help_ = f"for each call (default: {seconds})"
        options.add_argument("--seconds", type=float, default=seconds, help=help_)
    commands["recurrence"].add_argument(
        "--length", type=positive, nargs="+", default=[28, 256, 784], help="time steps (default: 28 256 784)"
    )
    commands["step"].add_argument("--profile", action="store_true", help="also write where the time of a step goes")
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 2 and one line on stderr for a bad request, with 1 if a backend is not exact."""
    options = parser().parse_args(arguments)
    run("indrnn-bench", lambda: _bench(options))


def _bench(options: argparse.Namespace) -> None:
    if not 0 < options.seconds < inf:
        raise UserError(f"--seconds {options.seconds}: it must be above 0")
    say("indrnn-bench", "loading PyTorch and comparing every backend with float64 ...")
    from indrnn.bench.commands import bench

    sizes = options.batch
    if options.what == "recurrence":
        sizes = list(product(options.batch, options.length, [HIDDEN_SIZE]))
    bench(options.what, options.device, options.out, sizes, options.seconds, options.profile)


def positive(text: str) -> int:
    """A positive int; argparse names this function in its error."""
    if int(text) < 1:
        raise ValueError
    return int(text)


if __name__ == "__main__":
    main()
