"""Checkpoints: tensors and plain values only, written whole or not at all, checked against the model when read.

checkpoint.pt holds all that a run needs to go on exactly as if it had not stopped, the best weights so far included,
and beside them, where the schedule goes back to them, the optimizer's state then. best.pt holds those alone and is
written again from checkpoint.pt when a run resumes, so the two cannot disagree.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..record import replacing

FORMAT = 1


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Replace ``path``, all or nothing. Raises RunError with one line if the disk is full or not writable."""
    # Through memory, because torch's own writer reports a full disk as anything but an OSError.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. Raises UserError if the file is missing, damaged or no checkpoint."""
    remedy = "move the file away, or start the run anew with overwrite=true"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as failure:
        raise UserError(f"there is no checkpoint {path}") from failure
    # torch.load raises whatever unzipping and unpickling damaged bytes raise: RuntimeError, UnpicklingError, EOFError,
    # KeyError, UnicodeDecodeError, ...
    except Exception as failure:
        raise UserError(f"checkpoint {path} is damaged, or is no checkpoint; {remedy}") from failure
    if not isinstance(content, dict) or "model" not in content:
        raise UserError(f"{path} is not a checkpoint of indrnn; {remedy}")
    if content.get("format") != FORMAT:
        raise UserError(f"checkpoint {path} has format {content.get('format')}, this version reads {FORMAT}; {remedy}")
    return content


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy ``weights`` into ``model`` in place. Raises UserError if they are those of another model."""
    own = model.state_dict()
    for name in (*own, *weights):
        if name not in weights or name not in own or weights[name].shape != own[name].shape:
            there, here = (tuple(each[name].shape) if name in each else "none" for each in (weights, own))
            raise UserError(
                f"checkpoint {path} belongs to another model: {name} has shape {there} there and {here} here; "
                "use the config it was trained with"
            )
    model.load_state_dict(weights)


def copied_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as copies on the CPU, which later steps do not change."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Per parameter name, what the optimizer remembers of it, as copies on the CPU."""
    return {
        name: {key: value.to("cpu", copy=True) for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


@torch.no_grad()
def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Set what the optimizer remembers, to zero where ``state`` has nothing; in place, for a CUDA graph may hold it."""
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if name in state:
                value.copy_(state[name][key])
            else:
                value.zero_()


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """What `random_state` gave; the generator of a device that the run was not on before stays as it is."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])
