"""result.json: the figures of a finished run and what it ran on (versions, device, source commit, command line). It is
the last file that a run writes."""

import dataclasses
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import indrnn

from ..errors import UserError
from ..files import write_atomically
from .same_run import EARLIER_NAMES

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1
Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


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
    """All devices that the run was on, in order; likewise for backend."""
    precision: str
    data: dict[str, Any]
    versions: dict[str, Any]
    git: dict[str, Any]
    """At the start of the last segment; likewise for versions."""
    command: str
    segments: list[dict[str, Any]] = field(default_factory=list)
    """What computed the run, an entry for each start; earlier versions wrote none."""
    schema_version: int = SCHEMA_VERSION


def write_result(path: Path, result: Result) -> None:
    """Write ``result`` as JSON, whole or not at all; every figure must be finite, because JSON has no NaN.

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
    schema_version = values.get("schema_version") if isinstance(values, dict) else None
    if schema_version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {schema_version}, this version of indrnn reads {SCHEMA_VERSION}")
    values = {"segments": [], **values}
    names = [field.name for field in dataclasses.fields(Result)]
    missing = [name for name in names if name not in values]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; move it away to run again")
    values["model"] = EARLIER_NAMES.get(str(values["model"]), values["model"])
    types = get_type_hints(Result)
    for name in names:
        if not _fits(values[name], types[name]):
            raise UserError(f"{path} is damaged: {name} is {json.dumps(values[name])[:40]}; move it away to run again")
    values["test_ci95"] = values["test_ci95"] and tuple(values["test_ci95"])
    return Result(**{name: values[name] for name in names})


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a field's type."""
    inner = get_args(kind)
    if get_origin(kind) is UnionType:
        return any(_fits(value, member) for member in inner)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and len(value) == len(inner) and all(map(_fits, value, inner))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(element, inner[0]) for element in value)
    if kind is float or kind is int:
        # This comparison refuses NaN and infinity, and allows whole numbers that are too large for a float.
        return type(value) in (int, kind) and abs(value) < math.inf
    return isinstance(value, get_origin(kind) or kind)


def no_better_than_chance(accuracy: float, chance: float) -> bool:
    """Whether a network has learnt nothing: its accuracy is at most a point above ``chance``, the share of the most
    frequent class."""
    return accuracy <= chance + 0.01


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % interval for a share of ``correct`` in ``n`` (Wilson 1927, JASA 22, 209-212).

    Unlike the textbook p ± 1.96 s it stays within [0, 1] and has a width even at 0 % and 100 %.
    Raises ValueError unless 0 <= correct <= n and n > 0.
    """
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"wilson_interval needs 0 <= correct <= n and n > 0, got correct={correct}, n={n}")
    share = correct / n
    spread = Z_95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    # At the ends the formula gives exactly 0 and 1, apart from rounding.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)


def environment(device: "torch.device | str") -> dict[str, Any]:
    """``{"versions": {python, torch, cuda, numba, triton, indrnn}, "device_name", "instruction_set", "num_threads"}``.

    A package that is not installed is None, and so is CUDA in a CPU build of torch. num_threads: torch's CPU threads.
    """
    import torch

    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a subclass of str, which a checkpoint cannot hold
        "cuda": torch.version.cuda,
        "numba": _version("numba"),
        "triton": _version("triton"),
        "indrnn": indrnn.__version__,
    }
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        instructions = "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
    else:
        name, instructions = cpu_name(), cpu_instructions()
    return {
        "versions": versions,
        "device_name": name,
        "instruction_set": instructions,
        "num_threads": torch.get_num_threads(),
    }


def cpu_instructions() -> str:
    """The widest instructions that this CPU has for matrix products: AMX-BF16, AVX512-BF16, or what PyTorch was
    compiled to use of it, such as AVX512, AVX2 or DEFAULT."""
    import torch

    flags = torch.cpu.get_capabilities()
    for flag in ("amx_bf16", "avx512_bf16"):
        if flags.get(flag):
            return flag.upper().replace("_", "-")
    return torch.backends.cpu.get_cpu_capability()


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model name."""
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        model = None
    return model[1].strip() if model else platform.processor() or platform.machine()


def git(package: Path | None = None) -> dict[str, Any]:
    """``{"commit": hex, "dirty": bool}`` of the checkout that this package runs from; both None if there is none.

    dirty: src/ or configs/ differ from the commit. A repository around an installed package (a project with its
    environment inside) is not reported.
    """
    unknown = {"commit": None, "dirty": None}
    root = (package or Path(indrnn.__file__).parent).parents[1]
    if not ((root / ".git").exists() and (root / "src" / "indrnn").is_dir()):
        return unknown
    commit = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain", "--", "src", "configs")
    if commit is None or status is None:
        return unknown
    return {"commit": commit.strip(), "dirty": bool(status.strip())}


@cache
def running_code() -> dict[str, Any]:
    """`git` as it was at the first run of this process: a later commit is not the code that is running."""
    return git()


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command as typed, with the program's base name in place of its path. ``python -m indrnn`` and ``torchrun -m
    indrnn``, of which Python passes on no more than the path of __main__.py, are put together again, the latter without
    options other than the number of processes."""
    program, *arguments = sys.argv if argv is None else argv
    path = Path(program)
    start = [path.name]
    if path.name == "__main__.py":
        start = [*_launcher(), "-m", path.parent.name]
    return shlex.join([*start, *arguments])


def _launcher() -> list[str]:
    processes, here = (int(os.environ.get(name, "0")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if not here:
        return ["python"]
    machines = [] if processes == here else [f"--nnodes={processes // here}"]
    return ["torchrun", *machines, f"--nproc-per-node={here}"]


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    # While a git hook runs, GIT_DIR and others point to another repository.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "--no-optional-locks", *arguments],
            capture_output=True, text=True, errors="replace", timeout=10, env=variables, check=False,
            start_new_session=True,  # Ctrl-C must not reach git
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout if answer.returncode == 0 else None
