"""result.json: what a finished run found, written once, last."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import UserError
from .files import write_atomically

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """The figures of one run. Accuracies are shares in [0, 1], and None for tasks without classes."""

    model: str
    task: str
    name: str
    seed: int
    parameters: int
    best_step: int
    steps: int
    epochs: float
    val_accuracy: float | None
    val_loss: float
    test_accuracy: float | None
    test_loss: float
    test_ci95: tuple[float, float] | None
    """Wilson interval of test_accuracy, from the size of the test set."""
    seconds: float
    """Training alone, without evaluation and start-up, summed over all interruptions."""
    steps_per_second: float
    peak_memory_bytes: int | None
    backend: str
    device_name: str
    """Every one that the run was on, in order; so for backend."""
    precision: str
    data: dict[str, Any]
    versions: dict[str, Any]
    git: dict[str, Any]
    """Of the last segment, as it began; so for versions."""
    command: str
    segments: list[dict[str, Any]] = field(default_factory=list)
    """What computed from which step on, an entry for each start (`indrnn.train.outcome.segment`); files written before
    there were segments have none."""
    schema_version: int = SCHEMA_VERSION


def write_result(path: Path, result: Result) -> None:
    """Write ``result`` as JSON, all or nothing; every figure must be finite, for JSON has no NaN.

    Raises RunError with one line if it cannot be written.
    """
    values = {"schema_version": result.schema_version, **dataclasses.asdict(result)}
    write_atomically(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def read_result(path: Path) -> Result:
    """Raises UserError with one line for a file that is missing, damaged or of another version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise UserError(f"cannot read {path}: {failure.strerror}") from failure
    except (ValueError, RecursionError) as failure:
        raise UserError(f"{path} is damaged ({failure}); move it away to run again") from failure
    found = values.get("schema_version") if isinstance(values, dict) else None
    if found != SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {found}, this version of indrnn reads {SCHEMA_VERSION}")
    types = get_type_hints(Result)
    missing = [each.name for each in dataclasses.fields(Result) if each.name not in values and _required(each)]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; move it away to run again")
    given = {name: values[name] for name in types if name in values}
    for name, value in given.items():
        if not _fits(value, types[name]):
            raise UserError(f"{path} is damaged: {name} is {json.dumps(value)[:40]}; move it away to run again")
    if given["test_ci95"] is not None:
        given["test_ci95"] = tuple(given["test_ci95"])
    return Result(**given)


def _required(each: dataclasses.Field) -> bool:
    return each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a field's type."""
    inner = get_args(kind)
    if get_origin(kind) is UnionType:
        return any(_fits(value, each) for each in inner)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and len(value) == len(inner) and all(map(_fits, value, inner))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if kind is float or kind is int:
        # Comparing finds NaN and infinity out, and takes whole numbers too large for a float.
        return type(value) in (int, kind) and abs(value) < math.inf
    return isinstance(value, get_origin(kind) or kind)
