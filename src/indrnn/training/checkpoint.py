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
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..config.schema import Config
from ..data import make_task
from ..errors import UserError
from ..files import replacing
from ..models import build_model
from ..record.folder import BEST, CHECKPOINT, CONFIG, WEIGHTS, load_config_file
from .device import torch_defaults

FORMAT = 3
FIX = "move the file away, or start again with overwrite=true"
# The first of these files that a run folder has is loaded.
CHECKPOINTS = {"best": (WEIGHTS, BEST), "latest": (CHECKPOINT,)}


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Replace ``path`` atomically. Raises RunError if the disk is full or not writable."""
    # Through memory, because torch's own writer does not report a full disk as an OSError.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. Raises UserError if the file is missing, damaged or no checkpoint."""
    # torch.load raises whatever unzipping and unpickling damaged bytes raise.
    with damage_reported(path):
        content = torch.load(path, map_location="cpu", weights_only=True)
        found, _ = content["format"], content["model"]
    if found != FORMAT:
        raise UserError(f"checkpoint {path} has format {found}, this version reads {FORMAT}; {FIX}")
    return content


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turn any exception while the checkpoint ``path`` is read or restored into a UserError with one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as failure:
        raise UserError(f"there is no checkpoint {path}") from failure
    except Exception as failure:
        reason = " ".join(str(failure).split())[:120]
        raise UserError(
            f"checkpoint {path} is damaged or not a checkpoint of this version ({type(failure).__name__}: {reason}); "
            f"{FIX}"
        ) from failure


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy ``weights`` into ``model`` in place. Raises UserError if they belong to another model."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as failure:
        reason = " ".join(str(failure).split()).partition("state_dict for ")[2][:300]
        raise UserError(
            f"checkpoint {path} is damaged or belongs to another model ({reason}); use the config it was trained with"
        ) from failure


def copied_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as copies on the CPU, which later steps do not change."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def optimizer_states(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """The state of every optimizer, as copies."""
    return [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]


def restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], states: Sequence[dict[str, Any]]) -> None:
    """Restore what `optimizer_states` returned, whatever state the optimizers have now."""
    for optimizer, state in zip(optimizers, states, strict=True):
        # A copy, because the optimizer may keep the tensors of ``state`` and change them.
        optimizer.load_state_dict(copy.deepcopy(state))


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


def load_run(path: str | Path, checkpoint: str = "best") -> tuple[nn.Module, Config]:
    """The model of a run with its weights, on the CPU and in evaluation mode, and the run's configuration.

    Args:
        checkpoint: ``best``, the weights chosen on validation, with their batch-norm statistics; of a finished run
            only config.yaml and weights.safetensors are read. ``latest``, the last checkpoint written.

    Raises:
        UserError: the folder is not a run folder, or its weights are missing, damaged or those of another model.
    """
    folder = Path(path)
    if checkpoint not in CHECKPOINTS:
        raise UserError(f"checkpoint={checkpoint!r} is unknown; choose from {', '.join(CHECKPOINTS)}")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a run folder: it has no {CONFIG}")
    names = CHECKPOINTS[checkpoint]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} has no {' or '.join(names)}: the run has not written one yet")
    cfg = cast(Config, OmegaConf.create(load_config_file(folder / CONFIG)))
    with torch_defaults():
        model = build_model(cfg.model, make_task(cfg.data))
    load_weights(model, read_weights(file) if file.name == WEIGHTS else read_checkpoint(file)["model"], file)
    return model.eval(), cfg


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Replace ``path`` (safetensors) by a state dict, atomically. Raises RunError if it cannot be written."""
    with replacing(path) as file:
        file.write(save({name: value.contiguous() for name, value in weights.items()}))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict that `save_weights` wrote, on the CPU. Raises UserError if it cannot be read or is damaged."""
    try:
        return load(path.read_bytes())
    except OSError as failure:
        raise UserError(f"cannot read {path}: {failure.strerror}") from failure
    except SafetensorError as failure:
        raise UserError(f"{path} is damaged ({failure}); restore the file, or train the run again") from failure
