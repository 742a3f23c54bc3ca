"""A trained model kept in its run folder, given back, and evaluated again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..data import make_task
from ..errors import UserError
from ..layers import recurrent_layers
from ..models import build_model
from ..record import Result, read_result, replacing
from ..record.folder import BEST, CHECKPOINT, CONFIG, RESULT, WEIGHTS, load_config_file
from .checkpoint import load_weights, read_checkpoint
from .device import bfloat16_refusal, computing, flush_denormals, resolve_device, set_precision
from .evaluate import Evaluation, evaluate
from .objective import Objective

# The first of these that the folder has.
CHECKPOINTS = {"best": (WEIGHTS, BEST), "latest": (CHECKPOINT,)}


def load_run(path: str | Path, checkpoint: str = "best") -> tuple[nn.Module, DictConfig]:
    """The model of a run with its weights, on the CPU and in evaluation mode, and the run's configuration.

    ``best`` are the weights chosen on validation, with the batch-norm statistics they were judged with (a finished run
    needs nothing but config.yaml and weights.safetensors for that); ``latest`` the last checkpoint written. Raises
    UserError for a folder that is no run, weights that are missing, damaged or of another model.
    """
    folder = Path(path)
    if checkpoint not in CHECKPOINTS:
        raise UserError(f"checkpoint={checkpoint!r} is unknown; choose from {', '.join(CHECKPOINTS)}")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a run folder: it has no {CONFIG}")
    names = CHECKPOINTS[checkpoint]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} has no {' or '.join(names)}: the run has not come far enough to write one")
    cfg = OmegaConf.create(load_config_file(folder / CONFIG))
    model = build_model(cfg)
    load_weights(model, read_weights(file) if file.name == WEIGHTS else read_checkpoint(file)["model"], file)
    return model.eval(), cfg


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Replace ``path`` (safetensors) by a state dict, all or nothing. Raises RunError with one line if it cannot."""
    with replacing(path) as file:
        file.write(save({name: value.contiguous() for name, value in weights.items()}))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of `save_weights`, on the CPU. Raises UserError if it cannot be read or is damaged."""
    try:
        return load(path.read_bytes())
    except OSError as failure:
        raise UserError(f"cannot read {path}: {failure.strerror}") from failure
    except SafetensorError as failure:
        raise UserError(f"{path} is damaged ({failure}); fetch it again, or train the run again") from failure


@dataclass(frozen=True)
class Again:
    """A finished run and its weights evaluated again. ``precision`` is float32 where this device lacks the run's."""

    recorded: Result
    found: Evaluation
    precision: str

    @property
    def recorded_correct(self) -> int | None:
        """None for a task without classes."""
        accuracy = self.recorded.test_accuracy
        return None if accuracy is None else round(accuracy * self.found.size)


def evaluate_run(path: Path, device_name: str = "auto", data_root: str | None = None) -> Again:
    """Read the test set again, with the weights and batch-norm statistics that a finished run keeps.

    Any backend of this device may compute it, whatever the run used. ``data_root`` stands for the run's data.root.
    Sets PyTorch's float32 precision and flushes denormals for the whole process.

    Raises:
        UserError: the folder is no finished run, or its weights or data are missing, damaged or another run's.
    """
    device = resolve_device(device_name)
    flush_denormals(device)
    recorded = read_result(path / RESULT)
    model, cfg = load_run(path)
    if data_root is not None and "root" in cfg.data:
        cfg.data.root = data_root
    task = make_task(cfg.data)
    data = task.load(device)
    for key, value in data.provenance.items():
        if recorded.data.get(key, value) != value:
            raise UserError(f"{path}: {key} of the data here is {value}, of the run {recorded.data[key]}")
    for _, layer in recurrent_layers(model):
        layer.backend = "auto"
    on_cpu, precision = device.type == "cpu", cfg.trainer.precision
    if (precision == "bfloat16" and on_cpu and bfloat16_refusal()) or (precision == "tf32" and device.type != "cuda"):
        precision = "float32"
    set_precision(precision, device)
    with computing(precision, device):
        found = evaluate(model.to(device), data.test, Objective(task), cfg.trainer.eval_batch_size, device)
    return Again(recorded, found, precision)
