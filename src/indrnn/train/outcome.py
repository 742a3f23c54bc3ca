"""From a finished training to its `Result`."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ..data import Task
from ..layers import recurrent_layers
from ..record import Result, environment, git, read_metrics, wilson_interval
from ..recurrence import resolve_backend
from .evaluate import Evaluation


def make_result(
    cfg: DictConfig,
    command: str,
    task: Task,
    provenance: dict[str, Any],
    model: nn.Module,
    device: torch.device,
    best: dict[str, Any],
    test: Evaluation,
    *,
    steps: int,
    epochs: float,
    seconds: float,
    peak_memory: int | None,
) -> Result:
    """``best``: step, accuracy and loss of the chosen checkpoint on validation; ``seconds``: of training alone."""
    surroundings = environment(device)
    return Result(
        model=cfg.model.name,
        task=task.name,
        name=cfg.name if cfg.tag is None else f"{cfg.name}-{cfg.tag}",
        seed=cfg.seed,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        best_step=best["step"],
        steps=steps,
        epochs=epochs,
        val_accuracy=best["accuracy"],
        val_loss=best["loss"],
        test_accuracy=test.accuracy,
        test_loss=test.loss,
        test_ci95=None if test.accuracy is None else wilson_interval(test.correct, test.size),
        seconds=seconds,
        steps_per_second=steps / seconds,
        peak_memory_bytes=peak_memory,
        backend=backend_of(model, device, cfg.trainer.precision),
        device_name=surroundings["device_name"],
        precision=cfg.trainer.precision,
        data=provenance,
        versions=surroundings["versions"],
        git=git(),
        command=command,
    )


def backend_of(model: nn.Module, device: torch.device, precision: str) -> str:
    """What computes the recurrences: a backend of `indrnn.recurrence`, or cudnn or torch for nn.LSTM and nn.RNN."""
    # Products give bfloat16 under autocast, so that is what the recurrence sees; on a CPU they give float32.
    dtype = torch.bfloat16 if precision == "bfloat16" and device.type != "cpu" else torch.float32
    names = {resolve_backend(layer.backend, device, dtype, layer.nonlinearity) for _, layer in recurrent_layers(model)}
    if names:
        return "+".join(sorted(names))
    return "cudnn" if device.type == "cuda" and torch.backends.cudnn.is_available() else "torch"


def recurrent_weights(model: nn.Module) -> list[Tensor]:
    """Layer by layer, u as it is used (H,), or the recurrent matrix of an LSTM or RNN."""
    weights = [layer.recurrent_weight() for _, layer in recurrent_layers(model)]
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            weights += [getattr(module, f"weight_hh_l{number}") for number in range(module.num_layers)]
    return weights


def test_row_written(metrics: Path, step: int) -> bool:
    """Whether a run that was killed just before its result had already recorded the test figures of this step."""
    columns = read_metrics(metrics)
    return bool(((columns["split"] == "test") & (columns["step"] == step)).any())
