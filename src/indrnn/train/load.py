"""A trained model back from its run folder."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..errors import UserError
from ..models import build_model
from ..record.folder import BEST, CHECKPOINT, CONFIG, load_config_file
from .checkpoint import load_weights, read_checkpoint

CHECKPOINTS = {"best": BEST, "latest": CHECKPOINT}


def load_run(path: str | Path, checkpoint: str = "best") -> tuple[nn.Module, DictConfig]:
    """The model of a run with its weights, on the CPU and in evaluation mode, and the run's configuration.

    ``best`` is the checkpoint chosen on validation, with the batch-norm statistics it was judged with; ``latest`` the
    last one written. Raises UserError for a folder that is no run, a checkpoint that is missing, damaged or of another
    model.
    """
    folder = Path(path)
    if checkpoint not in CHECKPOINTS:
        raise UserError(f"checkpoint={checkpoint!r} is unknown; choose from {', '.join(CHECKPOINTS)}")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a run folder: it has no {CONFIG}")
    file = folder / CHECKPOINTS[checkpoint]
    if not file.is_file():
        raise UserError(f"{folder} has no {file.name}: the run has not come far enough to write one")
    cfg = OmegaConf.create(load_config_file(folder / CONFIG))
    model = build_model(cfg)
    load_weights(model, read_checkpoint(file)["model"], file)
    return model.eval(), cfg
