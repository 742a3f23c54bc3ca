"""``indrnn-eval``: evaluate the weights of finished runs again and compare the outcome with their result.json."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from . import command_parser, run

if TYPE_CHECKING:
    from ..training.evaluation import Reevaluation

DESCRIPTION = """\
Read the test set again with the weights and batch-norm statistics of finished runs, and print accuracy and 95 %
interval beside those in result.json. Exits with 1 if a run's right answers differ by more than 2 of 10,000 (where there
are no classes, if its error differs by more than 1 %), with 2 if one cannot be evaluated.
"""
# Of 10,000: other processors and backends round differently, which may change a close answer.
ALLOWED = 2
ALLOWED_ERROR = 0.01


def parser() -> argparse.ArgumentParser:
    command = command_parser("indrnn-eval", DESCRIPTION)
    command.add_argument("run", nargs="+", type=Path, metavar="RUN", help="run folders, or folders that hold some")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    command.add_argument(
        "--data-root",
        default=os.environ.get("INDRNN_DATA"),
        metavar="FOLDER",
        help="where MNIST is (default: INDRNN_DATA from the environment, or where the run had it)",
    )
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    run("indrnn-eval", lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> int:
    from ..record.folder import CONFIG, WEIGHTS

    runs = [path for path in options.run if (path / CONFIG).is_file()]
    finished = [file.parent for path in options.run if path not in runs for file in sorted(path.rglob("result.json"))]
    kept = [path for path in finished if (path / WEIGHTS).is_file()]
    if len(finished) > len(kept):
        print(f"{len(finished) - len(kept)} finished runs have no {WEIGHTS} (made before it was written): left out")
    runs += kept
    if not runs:
        raise UserError(f"no run with {WEIGHTS} in {', '.join(map(str, options.run))}; train one with indrnn-train")
    print(f"evaluating {len(runs)} {'run' if len(runs) == 1 else 'runs'}, seconds each", file=sys.stderr, flush=True)
    # Imports PyTorch, so not before there is something to do.
    from ..training.evaluation import evaluate_run

    agree = 0
    for path in runs:
        agrees, line = _compare(evaluate_run(path, options.device, options.data_root))
        agree += agrees
        print(f"{path}: {line}", flush=True)
    print(f"{agree} of {len(runs)} agree with result.json")
    return 0 if agree == len(runs) else 1


def _compare(run: "Reevaluation") -> tuple[bool, str]:
    """Whether the run reproduces its result, and a line with both."""
    from ..record.result import wilson_interval

    recorded, evaluation, n = run.recorded, run.evaluation, run.evaluation.size
    note = "" if run.precision == recorded.precision else f" in float32, as there is no {recorded.precision} here"
    before = run.recorded_correct
    if before is None:
        agrees = abs(evaluation.loss - recorded.test_loss) <= ALLOWED_ERROR * recorded.test_loss
        line = f"test error {evaluation.loss:.4g}{note}; result.json {recorded.test_loss:.4g}"
    else:
        agrees = abs(evaluation.correct - before) <= ALLOWED * max(1.0, n / 10_000)
        (low, high), correct = wilson_interval(evaluation.correct, n), evaluation.correct
        line = f"{correct / n:.2%} ({low:.2%} to {high:.2%}), {correct:,} of {n:,} right{note}; result.json "
        low, high = recorded.test_ci95 or (low, high)
        line += f"{recorded.test_accuracy:.2%} ({low:.2%} to {high:.2%}), {before:,} right"
    return agrees, line + ("" if agrees else ": DIFFERENT")
