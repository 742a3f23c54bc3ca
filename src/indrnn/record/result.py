"""result.json: what a finished run found, written once, last."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    precision: str
    data: dict[str, Any]
    versions: dict[str, Any]
    git: dict[str, Any]
    command: str
    fallbacks: dict[str, str] = field(default_factory=dict)
    """What was to be used and was not (triton, cuda_graph), and why. Runs made before it was recorded have none."""
    schema_version: int = SCHEMA_VERSION


def write_result(path: Path, result: Result) -> None:
    """Write ``result`` as JSON, all or nothing. JSON has no NaN: a figure that is not finite becomes null.

    Raises RunError with one line if it cannot be written.
    """
    values = {"schema_version": result.schema_version, **dataclasses.asdict(result)}
    write_atomically(path, json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")


def read_result(path: Path) -> Result:
    """Raises UserError with one line for a file that is missing, damaged or of another version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise UserError(f"cannot read {path}: {failure.strerror}") from failure
    except ValueError as failure:
        raise UserError(f"{path} is damaged ({failure}); move it away to run again") from failure
    found = values.get("schema_version") if isinstance(values, dict) else None
    if found != SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {found}, this version of indrnn reads {SCHEMA_VERSION}")
    values.setdefault("fallbacks", {})
    fields = [field.name for field in dataclasses.fields(Result)]
    missing = [name for name in fields if name not in values]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; move it away to run again")
    if values["test_ci95"] is not None:
        values["test_ci95"] = tuple(values["test_ci95"])
    return Result(**{name: values[name] for name in fields})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
