"""Checkpoints: tensors and plain values only, written whole or not at all, checked against the model when read; and
`load_run`, which loads the model of a run folder.

checkpoint.pt holds everything that a run needs to continue as if it had not stopped, including the best weights so far
and, if the schedule returns to them, the optimizer's state at that step. best.pt holds only these and is rewritten from
checkpoint.pt when a run resumes, so the two cannot disagree.
"""

import copy
import io
from collections.abc import Mapping, Sequence
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
from ..record.config_diff import fingerprint_differences
from ..record.folder import BEST, CHECKPOINT, CONFIG, WEIGHTS, load_config_file

FORMAT = 2
REMEDY = "move the file away, or start the run again with overwrite=true"


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Replace ``path``, whole or not at all. Raises RunError with one line if the disk is full or not writable."""
    # Through memory, because torch's own writer does not report a full disk as an OSError.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. Raises UserError if the file is missing, damaged or no checkpoint."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as failure:
        raise UserError(f"there is no checkpoint {path}") from failure
    # torch.load raises whatever unzipping and unpickling damaged bytes raise: RuntimeError, UnpicklingError, EOFError,
    # KeyError, UnicodeDecodeError, ...
    except Exception as failure:
        raise UserError(f"checkpoint {path} is damaged, or is no checkpoint; {REMEDY}") from failure
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path} is not a checkpoint of indrnn; {REMEDY}")
    if content.get("format") != FORMAT:
        raise UserError(f"checkpoint {path} has format {content.get('format')}, this version reads {FORMAT}; {REMEDY}")
    return content


def require_same_run(content: Mapping[str, Any], cfg: Config, provenance: dict[str, Any], path: Path) -> None:
    """Raises UserError for the checkpoint of another run; one without a fingerprint, of an earlier version, passes."""
    if "fingerprint" not in content:
        return
    _require_shape(content, {"fingerprint": {"config": {}, "data": {}}}, path)
    differ = fingerprint_differences(content["fingerprint"], cfg, provenance)
    if differ:
        raise UserError(f"checkpoint {path} is of another run: {', '.join(map(str, differ))}; {REMEDY}")


def require_whole(content: Mapping[str, Any], own: dict[str, Any], restores_best: bool, path: Path) -> None:
    """Raises UserError for a checkpoint with a part that is missing or not of the shape in ``own``, the content of this
    run at its first step."""
    parts = ("model", "meter", "schedule", "progressed")
    # On another device the run had other generators; checkpoints of earlier versions have no segments.
    pattern = {**{part: own[part] for part in parts}, "random": {"cpu": own["random"]["cpu"]}, "best": None}
    if content.get("best") is not None:
        pattern["best"] = {"step": 0, "score": 0.0, "accuracy": None, "loss": 0.0, "model": own["model"]}
    if "segments" in content:
        pattern["segments"] = [{}]
    _require_shape(content, pattern, path)
    if not 0 <= content["progressed"]["observed"] <= content["progressed"]["step"]:
        raise _damaged("progressed", path)


def _require_shape(content: Any, pattern: Any, path: Path, part: str = "") -> None:
    """Raises UserError with the dotted name of the first part of ``content`` that does not match ``pattern``. These
    match: dicts with (at least) the pattern's keys, lists whose elements match the pattern's only one, tensors of the
    same shape and dtype, values of the same type; and for None in the pattern, None or a number.
    """
    if isinstance(pattern, dict | list):
        fits = isinstance(content, dict if isinstance(pattern, dict) else list)
    elif isinstance(pattern, Tensor):
        fits = isinstance(content, Tensor) and content.shape == pattern.shape and content.dtype == pattern.dtype
    elif pattern is None or isinstance(pattern, float):
        fits = type(content) in (int, float) or (content is None and pattern is None)
    else:
        fits = type(content) is type(pattern)
    if not fits:
        raise _damaged(part, path)
    if isinstance(pattern, dict):
        for key, value in pattern.items():
            _require_shape(content.get(key, _NOTHING), value, path, f"{part}.{key}".lstrip("."))
    elif isinstance(pattern, list):
        for number, element in enumerate(content):
            _require_shape(element, pattern[0], path, f"{part}[{number}]")


_NOTHING = object()


def _damaged(part: str, path: Path) -> UserError:
    return UserError(f"checkpoint {path} is damaged in its part {part}; {REMEDY}")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy ``weights`` into ``model`` in place. Raises UserError if they are those of another model."""
    own = model.state_dict()
    for name in (*own, *weights):
        stored, expected = (
            tuple(state[name].shape) if isinstance(state.get(name), Tensor) else "none" for state in (weights, own)
        )
        if stored != expected:
            raise UserError(
                f"checkpoint {path} belongs to another model: {name} has shape {stored} there and {expected} here; "
                "use the config it was trained with"
            )
    model.load_state_dict(weights)


def copied_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as copies on the CPU, which later steps do not change."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def optimizer_states(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """The state of every optimizer, as copies."""
    return [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]


def restore_optimizers(optimizers: Sequence[torch.optim.Optimizer], states: Any, path: Path) -> None:
    """Restore what `optimizer_states` returned, from the checkpoint ``path``. Raises UserError if it does not fit."""
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            # A copy, because the optimizer would go on to change the tensors of ``states``.
            optimizer.load_state_dict(copy.deepcopy(state))
    except (AttributeError, KeyError, TypeError, ValueError) as failure:
        raise _damaged("optimizer", path) from failure


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Tensor], device: torch.device, path: Path) -> None:
    """Restore what `random_state` returned; generators that are not in it stay as they are. Raises UserError for a
    state that no generator can have."""
    try:
        torch.set_rng_state(state["cpu"])
        if device.type != "cpu" and device.type in state:
            torch.get_device_module(device).set_rng_state(state[device.type])
    except (RuntimeError, TypeError, AttributeError) as failure:
        raise _damaged("random", path) from failure


# The first of these files that the folder has is loaded.
CHECKPOINTS = {"best": (WEIGHTS, BEST), "latest": (CHECKPOINT,)}


def load_run(path: str | Path, checkpoint: str = "best") -> tuple[nn.Module, Config]:
    """The model of a run with its weights, on the CPU and in evaluation mode, and the run's configuration.

    ``best``: the weights chosen on validation, with their batch-norm statistics (if the run is finished, only
    config.yaml and weights.safetensors are read); ``latest``: the last checkpoint written. Raises UserError if the
    folder is not a run's, and if the weights are missing, damaged or another model's.
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
    model = build_model(cfg.model, make_task(cfg.data))
    load_weights(model, read_weights(file) if file.name == WEIGHTS else read_checkpoint(file)["model"], file)
    return model.eval(), cfg


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Replace ``path`` (safetensors) by a state dict, whole or not at all. Raises RunError with one line if it cannot
    be written."""
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
