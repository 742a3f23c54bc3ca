"""results/speedrun.md: the shortest times to a mark on full sequential MNIST, one line a record."""

import json
from pathlib import Path
from statistics import fmean

from indrnn.errors import UserError
from indrnn.record.folder import TIMING

from .collect import Group, collect
from .table import markdown_table, percent, spread

# Names of runs in results/runs/mnist that scripts/speedrun.py timed while nothing else ran on the machine, the newest
# first. Add a line only for runs whose timing.json shows that: the load was near 0 before, near the threads after.
RECORDS: tuple[str, ...] = ()

# In per cent: the mean of at least this many runs lies above it.
MARKS = {"99.0 validation": ("val_accuracy", 99.0), "98.9 test": ("test_accuracy", 98.9)}
LEAST_RUNS = 3


def records_markdown(runs: Path, records: tuple[str, ...] = RECORDS) -> str:
    """The table of records, from the runs named. Raises UserError for a record that breaks a rule."""
    if not records:
        return "No record yet: no runs have been timed while nothing else ran on the machine."
    groups = {group.name: group for group in collect([runs / "mnist"])}
    missing = [name for name in records if name not in groups]
    if missing:
        raise UserError(f"the record {missing[0]} has no runs in {runs / 'mnist'}; take it out of RECORDS")
    return markdown_table([_line(groups[name], runs) for name in records])


def _line(group: Group, runs: Path) -> dict[str, str]:
    results, n, record = group.results, len(group.results), f"the record {group.name}"
    if n < LEAST_RUNS or group.unfinished:
        raise UserError(f"{record} has {n} finished runs; at least {LEAST_RUNS} are needed, and none unfinished")
    try:
        timings = [json.loads((entry.path / TIMING).read_text(encoding="utf-8")) for entry in group.finished]
    except (OSError, ValueError) as failure:
        raise UserError(f"{record} cannot be timed ({failure}); make its runs with make speedrun") from None
    means = {mark: 100 * fmean(getattr(result, figure) for result in results) for mark, (figure, _) in MARKS.items()}
    reached = [mark for mark, (_, least) in MARKS.items() if means[mark] > least]
    if not reached:
        raise UserError(f"{record} has a mean above no mark; take it out of RECORDS")

    def one(values: list[str]) -> str:
        return "; ".join(dict.fromkeys(values))

    return {
        "mark %": ", ".join(reached),
        "minutes": spread([timing["seconds"] / 60 for timing in timings], ".1f"),
        "test %": percent([result.test_accuracy for result in results]),
        "validation %": percent([result.val_accuracy for result in results]),
        "n": str(n),
        "hardware": one([result.device_name for result in results]),
        "threads": one([str(timing["threads"]) for timing in timings]),
        "precision": one([result.precision for result in results]),
        "versions": one([f"torch {r.versions['torch']}, indrnn {(r.git['commit'] or '')[:7]}" for r in results]),
        "date": max(timing["begun"][:10] for timing in timings),
        "runs": f"[{group.name}]({runs.name}/{group.task}/{group.name})",
    }
