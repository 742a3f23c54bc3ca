"""Checkpoints: tensors and plain values, written atomically, loaded with ``weights_only=True``; and `load_run`.

checkpoint.pt holds everything a run needs to resume, including the best weights so far and, if the schedule returns to
them, the optimizer state at that step. best.pt holds only these. It is rewritten from checkpoint.pt when a run resumes,
so the two cannot disagree.
"""

import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from safetensors.torch import load, save
from torch import Tensor, nn

from ..config.schema import Config
from ..data import make_task
from ..errors import UserError
from ..files import replacing
from ..models import build_model
from ..record.folder import BEST, CONFIG, WEIGHTS, load_config_file
from .device import torch_defaults

FORMAT = 3


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Replace ``path`` atomically. Raises RunError if the disk is full or not writable."""
    # Through memory, because torch's own writer does not report a full disk as an OSError.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Replace ``path`` (safetensors) by a state dict, atomically. Raises RunError if it cannot be written."""
    with replacing(path) as file:
        file.write(save({name: value.contiguous() for name, value in weights.items()}))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. Raises UserError if it is damaged or no checkpoint of this version."""
    with damage_reported(path):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, not {FORMAT}")
    return content


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turn any exception while the checkpoint ``path`` is read or restored into a UserError with one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as failure:  # unzipping and unpickling damaged bytes raise anything
        reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
        fix = "move it away, or start again with overwrite=true"
        raise UserError(f"checkpoint {path} is damaged or of another run ({reason}); {fix}") from failure


def restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], states: Sequence[dict[str, Any]]) -> None:
    """Load a copy of the state dicts: an optimizer may keep their tensors and change them."""
    for optimizer, state in zip(optimizers, copy.deepcopy(states), strict=True):
        optimizer.load_state_dict(state)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore what `random_state` returned. Generators without a stored state, of another device, are unchanged."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])


def load_run(path: str | Path) -> tuple[nn.Module, Config]:
    """The model of a run, on the CPU and in evaluation mode, and the run's configuration.

    The weights are those chosen on validation, with their batch-norm statistics. Of a finished run only config.yaml and
    weights.safetensors are read.

    Raises:
        UserError: the folder is not a run folder, or its weights are missing, damaged or those of another model.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a run folder: it has no {CONFIG}")
    file = next((folder / name for name in (WEIGHTS, BEST) if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} has no {WEIGHTS} or {BEST}: the run has not written one yet")
    cfg = cast(Config, OmegaConf.create(load_config_file(folder / CONFIG)))
    with torch_defaults():
        model = build_model(cfg.model, make_task(cfg.data))
    with damage_reported(file):
        model.load_state_dict(load(file.read_bytes()) if file.name == WEIGHTS else read_checkpoint(file)["model"])
    return model.eval(), cfg
