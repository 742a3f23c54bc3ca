"""train(cfg): the run folder around a training."""

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from ..config.checks import check
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
        Interrupted: SIGINT or SIGTERM came; a checkpoint is saved.
    """
    check(cfg)
    device = resolve_device(cfg.device)
    check_memory(cfg, device)
    with open_run(cfg, list(overrides), command) as folder:
        if folder.state == "finished":
            print(f"{folder.path} is finished: nothing to do", file=sys.stderr)
            return read_result(folder.result_path)
        print(f"{folder.path}: reading the data and trying a first step ...", file=sys.stderr, flush=True)
        return Training(cfg, folder, device).run()
