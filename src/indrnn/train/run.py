"""train(cfg): the run folder around a training."""

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from ..config.checks import check
from ..data.permutations import load_permutation, permutation_sha256
from ..errors import UserError
from ..record import Result, open_run, read_result
from .device import check_memory, resolve_device
from .loop import Training


def train(cfg: DictConfig, *, overrides: Sequence[str] = (), command: str = "") -> Result:
    """Train, evaluate and record the run that ``cfg`` (schema `indrnn.config.schema.Config`) describes.

    A run folder that is finished is read, not run again; an unfinished one is gone on with. ``overrides`` and
    ``command`` are recorded. For the whole process it sets PyTorch's seed and float32 precision, flushes denormals and
    lets the allocator keep freed memory.

    Raises:
        UserError: the request cannot be met (device, data, folder, checkpoint).
        RunError: the run failed (a loss that is not finite, a full disk).
        Interrupted: SIGINT or SIGTERM came; a checkpoint is saved, or the run is finished.
    """
    check(cfg)
    device = resolve_device(cfg.device)
    check_memory(cfg, device)
    with open_run(cfg, list(overrides), command) as folder:
        if folder.state == "finished":
            result = read_result(folder.result_path)
            _require_same_permutation(cfg, result, folder.path)
            print(f"{folder.path} is finished: nothing to do", file=sys.stderr)
            return result
        print(f"{folder.path}: reading the data and trying a first step ...", file=sys.stderr, flush=True)
        return Training(cfg, folder, device).run()


def _require_same_permutation(cfg: DictConfig, result: Result, path: Path) -> None:
    """A file is the one part of the data that can change under its name; all others are checked as they are read."""
    name = cfg.data.get("permutation") or ""
    if name.startswith("file:") and permutation_sha256(load_permutation(name)) != result.data.get("permutation_sha256"):
        raise UserError(
            f"data.permutation={name} is not the order that the finished run in {path} had; keep both with "
            "tag=<word>, or replace it with overwrite=true"
        )
