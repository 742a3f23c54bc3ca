"""result.json: the results of a finished run and what computed them; the last file that a run writes."""

import dataclasses
import json
import math
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import indrnn

from ..errors import UserError
from ..files import write_atomically

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1
Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


@dataclass(frozen=True, kw_only=True)
class Result:
    """The results of one run. Accuracies are in [0, 1], and None for regressions."""

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
    """Training time without evaluation and start-up, summed over all interruptions."""
    steps_per_second: float
    peak_memory_bytes: int | None
    """Largest amount allocated on a GPU; in runs recorded earlier, also the memory of a process on a CPU."""
    backend: str
    device_name: str
    """All devices that the run was on, in order; the same for backend."""
    precision: str
    data: dict[str, Any]
    versions: dict[str, Any]
    git: dict[str, Any]
    """At the start of the last segment; the same for versions."""
    command: str
    segments: list[dict[str, Any]] = field(default_factory=list)
    """What computed the run, one entry per start."""
    schema_version: int = SCHEMA_VERSION


def write_result(path: Path, result: Result) -> None:
    """Write ``result`` as JSON atomically; every number must be finite, because JSON has no NaN.

    Raises RunError with one line if it cannot be written.
    """
    values = {"schema_version": result.schema_version, **dataclasses.asdict(result)}
    write_atomically(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def read_result(path: Path) -> Result:
    """Raises UserError with one line for a file that is missing, damaged or of another version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        interval = values["test_ci95"]
        result = Result(**{**values, "test_ci95": interval and tuple(interval)})
    except OSError as failure:
        raise UserError(f"cannot read {path}: {failure.strerror}") from failure
    except (ValueError, TypeError, KeyError) as failure:
        raise UserError(f"{path} is damaged ({failure}); move it away to run again") from failure
    if result.schema_version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version={result.schema_version}; this version reads {SCHEMA_VERSION}")
    return result


def no_better_than_chance(accuracy: float, chance: float) -> bool:
    """Whether accuracy is at most one point above ``chance``, the share of the most frequent class."""
    return accuracy <= chance + 0.01


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % interval of ``correct / n`` (Wilson 1927, JASA 22, 209-212).

    Unlike p ± 1.96 s it stays within [0, 1] and has a width even at 0 % and 100 %.
    """
    share = correct / n
    spread = Z_95**2 / n
    center = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    # At the ends the formula gives exactly 0 and 1, up to rounding.
    return (0.0 if correct == 0 else center - half), (1.0 if correct == n else center + half)


def environment(device: "torch.device | str") -> dict[str, Any]:
    """``{"versions": {python, torch, cuda, numba, triton, indrnn}, "device_name", "instruction_set", "num_threads"}``.

    A package that is not installed is None, as is CUDA in a CPU build of torch. num_threads: torch's CPU threads.
    """
    import torch

    device = torch.device(device)
    cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if cuda else ()
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # a subclass of str, which a checkpoint cannot hold
            "cuda": torch.version.cuda,
            "numba": _version("numba"),
            "triton": _version("triton"),
            "indrnn": indrnn.__version__,
        },
        "device_name": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "instruction_set": f"compute capability {'.'.join(map(str, capability))}" if cuda else cpu_instructions(),
        "num_threads": torch.get_num_threads(),
    }


def cpu_instructions() -> str:
    """The widest instructions for matrix products: AMX-BF16, AVX512-BF16, or what PyTorch uses, such as AVX2."""
    import torch

    flags = torch.cpu.get_capabilities()
    names = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16"}
    return next((name for flag, name in names.items() if flags.get(flag)), torch.backends.cpu.get_cpu_capability())


def cpu_name() -> str:
    """The processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def git(package: Path | None = None) -> dict[str, Any]:
    """``{"commit": hex, "dirty": bool}`` of the checkout that this package runs from.

    dirty: src/ or configs/ differ from the commit. If there is no checkout or git fails, both are None and ``"reason"``
    says why. A repository around an installed package (a project with its environment inside) is not reported.
    """
    root = (package or Path(indrnn.__file__).parent).parents[1]
    try:
        commit, status = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--", "src", "configs")
    except (OSError, subprocess.SubprocessError) as failure:
        reason = getattr(failure, "stderr", None) or str(failure)
        return {"commit": None, "dirty": None, "reason": " ".join(reason.split())}
    return {"commit": commit.strip(), "dirty": bool(status.strip())}


# `git` at the first run of this process: a later commit is not the code that is running.
running_code = cache(git)


def _git(root: Path, *arguments: str) -> str:
    # While a git hook runs, GIT_DIR and others point to another repository.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(
        # A checkout may belong to another user, who installed it for all.
        ["git", "-c", "safe.directory=*", "-C", str(root), "--no-optional-locks", *arguments],
        capture_output=True, text=True, errors="replace", timeout=10, check=True,
        env=variables | {"GIT_CEILING_DIRECTORIES": str(root.parent)},
    ).stdout  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
