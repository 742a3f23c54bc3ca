"""``indrnn-eval``: evaluate the weights of finished runs again and compare with their result.json."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from . import run, say

DESCRIPTION = """\
Evaluate the weights and batch-norm statistics of finished runs on the test set, and print accuracy and 95 % interval
next to the accuracy in result.json. Exits with 1 if the number of correct predictions differs by more than 2 of 10,000
(for a regression, if the error differs by more than 1 %), with 2 if a run cannot be evaluated.
"""
ALLOWED = 2  # of 10,000: other processors and backends round differently, which may change a close prediction


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("indrnn-eval", description=DESCRIPTION)
    parser.add_argument("run", nargs="+", type=Path, metavar="RUN", help="run folders, or folders that hold some")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument(
        "--data-root",
        default=os.environ.get("INDRNN_DATA"),
        metavar="FOLDER",
        help="where MNIST is (default: INDRNN_DATA from the environment, or where the run had it)",
    )
    options = parser.parse_args(arguments)
    run("indrnn-eval", lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> int:
    from ..record.folder import RESULT, WEIGHTS, find_run_folders

    found = [folder for path in options.run for folder in find_run_folders(path) if (folder / RESULT).is_file()]
    runs = [folder for folder in found if (folder / WEIGHTS).is_file()]
    if len(found) > len(runs):
        print(f"{len(found) - len(runs)} finished runs have no {WEIGHTS} (made before it was written): left out")
    if not runs:
        raise UserError(f"no run with {WEIGHTS} in {', '.join(map(str, options.run))}; train one with indrnn-train")
    say("indrnn-eval", f"evaluating {len(runs)} runs, seconds each ...")
    agrees = []
    for path in runs:
        same, line = _evaluate_again(path, options.device, options.data_root)
        agrees.append(same)
        print(f"{path}: {line}", flush=True)
    print(f"{sum(agrees)} of {len(runs)} agree with result.json")
    return 0 if all(agrees) else 1


def _evaluate_again(path: Path, device_name: str, data_root: str | None) -> tuple[bool, str]:
    """Whether a finished run's weights reproduce its result, and a line with both figures.

    The backend is the one for this device; the precision is float32 if this device lacks the run's.

    Raises:
        UserError: the weights or the data are missing, damaged or another run's.
    """
    # These import PyTorch.
    from ..data import make_task
    from ..layers import recurrent_layers
    from ..record.folder import RESULT
    from ..record.result import read_result, wilson_interval
    from ..training.checkpoint import load_run
    from ..training.device import autocast_context, precision_refusal, prepare_process, resolve_device, set_precision
    from ..training.evaluation import Objective, evaluate

    device = resolve_device(device_name)
    prepare_process(device)
    recorded = read_result(path / RESULT)
    model, cfg = load_run(path)
    if data_root is not None and hasattr(cfg.data, "root"):
        cfg.data.root = data_root
    task = make_task(cfg.data)
    data = task.load(device)
    for key, value in data.provenance.items():
        if recorded.data.get(key, value) != value:
            raise UserError(f"{path}: {key} of the data here is {value}, of the run {recorded.data[key]}")
    for _, layer in recurrent_layers(model):
        layer.backend = "auto"
    precision = "float32" if precision_refusal(recorded.precision, device) else recorded.precision
    set_precision(precision, device)
    with autocast_context(precision, device):
        evaluation = evaluate(model.to(device), data.test, Objective(task), cfg.trainer.eval_batch_size, device)
    if recorded.test_accuracy is None:
        agrees = abs(evaluation.loss - recorded.test_loss) <= 0.01 * recorded.test_loss
        line = f"test error {evaluation.loss:.4g}; result.json {recorded.test_loss:.4g}"
    else:
        n, correct = evaluation.size, evaluation.correct
        agrees = abs(correct - round(recorded.test_accuracy * n)) <= ALLOWED * max(1.0, n / 10_000)
        low, high = wilson_interval(correct, n)
        line = f"{correct / n:.2%} ({low:.2%} to {high:.2%}), {correct:,} of {n:,} correct; result.json "
        line += f"{recorded.test_accuracy:.2%}"
    note = "" if precision == recorded.precision else f" (in float32, because {recorded.precision} is unavailable)"
    return agrees, line + note + ("" if agrees else ": DIFFERENT")
