"""What a task is, known from its configuration alone: shapes, loss, and the name of its folder. Imports no torch."""

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from ..errors import UserError

TASKS = ("mnist", "mnist_permuted", "mnist5k", "adding")
PERMUTATIONS = ("seed92916", "bitrev", "torch12008", "torch5544", "numpy0", "random:<seed>", "file:<path>")
DEFAULT_PERMUTATION = "seed92916"
PIXELS = 784
CLASSES = 10
# The largest seed that numpy's RandomState takes.
MAX_RANDOM_SEED = 2**32 - 1


@dataclass(frozen=True)
class TaskSpec:
    """The shape of a task: sequences of `length` steps with `input_size` features, `output_size` outputs, a loss."""

    name: str
    length: int
    input_size: int
    output_size: int
    loss: Literal["cross_entropy", "mse"]


def task_spec(data: Any) -> TaskSpec:
    """The shape of the task that ``cfg.data`` asks for. Reads no file.

    ``data=mnist`` with a permutation is the task mnist_permuted, mnist5k with one is mnist5k_permuted.
    Raises UserError for an unknown task or permutation.
    """
    name = _checked_name(data)
    if name == "adding":
        return TaskSpec("adding", int(data.length), 2, 1, "mse")
    return TaskSpec(_image_task(data), PIXELS, 1, CLASSES, "cross_entropy")


def task_folder(data: Any) -> str:
    """The part of the run folder's path that names the task, safe on any file system.

    For example mnist, mnist5k, mnist_permuted (the default permutation), mnist_permuted-bitrev, adding-T500.
    Raises UserError as `task_spec` does.
    """
    name = _checked_name(data)
    if name == "adding":
        return f"adding-T{int(data.length)}"
    folder = _image_task(data)
    if data.permutation is None or data.permutation == DEFAULT_PERMUTATION:
        return folder
    kind, _, value = str(data.permutation).partition(":")
    if kind == "random":
        value = str(int(value))
    elif kind == "file":
        value = re.sub(r"[^A-Za-z0-9_.]+", "_", PurePath(value).stem)
    return f"{folder}-{kind}{'-' if value else ''}{value}"


def check_permutation_name(name: str) -> None:
    """Raise UserError unless `name` is one of PERMUTATIONS (whether a file: exists is not looked at)."""
    kind, colon, value = name.partition(":")
    if kind == "random" and colon:
        if value.isascii() and value.isdigit() and int(value) <= MAX_RANDOM_SEED:
            return
        raise UserError(f"data.permutation={name}: the seed must be a whole number from 0 to {MAX_RANDOM_SEED}")
    if kind == "file" and colon:
        if value:
            return
        raise UserError(f"data.permutation={name}: a path must follow file:, for example file:order.npy")
    if name not in PERMUTATIONS or "<" in name:
        raise UserError(f"data.permutation={name} is unknown; choose from {', '.join(PERMUTATIONS)}, or null for none")


def _checked_name(data: Any) -> str:
    if data.name not in TASKS:
        raise UserError(f"data.name={data.name} is unknown; choose from {', '.join(TASKS)}")
    if data.name != "adding" and data.permutation is not None:
        check_permutation_name(str(data.permutation))
    elif data.name == "mnist_permuted":
        raise UserError(
            f"data.permutation=null, but data=mnist_permuted needs one of {', '.join(PERMUTATIONS)}; "
            "without a permutation the task is data=mnist"
        )
    return str(data.name)


def _image_task(data: Any) -> str:
    base = "mnist5k" if data.name == "mnist5k" else "mnist"
    return base if data.permutation is None else f"{base}_permuted"
