"""What a run ran on: versions, device, source commit, command line."""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import indrnn

if TYPE_CHECKING:
    import torch


def environment(device: "torch.device | str") -> dict[str, Any]:
    """``{"versions": {python, torch, cuda, numba, triton, indrnn}, "device_name": ..., "num_threads": ...}``.

    A package that is not installed, and CUDA in a CPU build of torch, is None. num_threads are torch's CPU threads.
    """
    import torch

    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which no checkpoint may hold
        "cuda": torch.version.cuda,
        "numba": _version("numba"),
        "triton": _version("triton"),
        "indrnn": indrnn.__version__,
    }
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"versions": versions, "device_name": name, "num_threads": torch.get_num_threads()}


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model, as the system calls it."""
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        model = None
    return model[1].strip() if model else platform.processor() or platform.machine()


def git(package: Path | None = None) -> dict[str, Any]:
    """``{"commit": hex, "dirty": bool}`` of the checkout this package runs from; both None where there is none.

    dirty: src/ or configs/ differ from the commit. The repository that happens to surround an installed package (a
    project with its environment inside) is not reported.
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
    """`git` as it was when this process first asked, at its first run: a later commit is not the code that runs."""
    return git()


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command as typed, with the program's base name in place of its path."""
    program, *arguments = sys.argv if argv is None else argv
    return shlex.join([Path(program).name, *arguments])


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    # GIT_DIR and the like, set while a git hook runs, would point to another repository.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "--no-optional-locks", *arguments],
            capture_output=True, text=True, errors="replace", timeout=10, env=variables, check=False,
            start_new_session=True,  # Ctrl-C is for us, not for git
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout if answer.returncode == 0 else None
