"""What computed a run, a record for each segment of it, and the `Result` of a finished one."""

from typing import Any

import torch
from torch import nn

from ..config.checks import run_name
from ..config.schema import Config
from ..data import Task
from ..layers import recurrent_layers
from ..record import Result, environment, wilson_interval
from ..record.compare import Difference, flatten
from ..recurrence import resolve_backend
from ..recurrence.dispatch import auto_backend
from .evaluate import Evaluation


def make_result(
    cfg: Config,
    command: str,
    task: Task,
    provenance: dict[str, Any],
    model: nn.Module,
    segments: list[dict[str, Any]],
    best: dict[str, Any],
    test: Evaluation,
    *,
    steps: int,
    epochs: float,
    seconds: float,
    peak_memory: int | None,
) -> Result:
    """``best``: step, accuracy and loss of the chosen checkpoint on validation; ``seconds``: of training alone."""
    return Result(
        model=cfg.model.name,
        task=task.name,
        name=run_name(cfg),
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
        backend=_joined("backend", segments, "+"),
        device_name=_joined("device_name", segments, ", then "),
        precision=cfg.trainer.precision,
        data=provenance,
        versions=segments[-1]["versions"],
        git=segments[-1]["git"],
        command=command,
        segments=segments,
    )


def segment(
    step: int,
    model: nn.Module,
    device: torch.device,
    precision: str,
    code: dict[str, Any],
    fallbacks: dict[str, str],
    processes: int,
) -> dict[str, Any]:
    """What computes a run from ``step`` on, in plain values for checkpoints and result.json; a run that was interrupted
    has several. ``code`` is `indrnn.record.running_code`; ``fallbacks``: what was to be used and is not, and why;
    ``processes``: how many computed it together."""
    return {
        "step": step,
        "git": code,
        "device": device.type,
        **environment(device),
        "processes": processes,
        "precision": precision,
        "backend": backend_of(model, device, precision),
        "fallbacks": dict(fallbacks),
    }


def changes(segments: list[dict[str, Any]]) -> str:
    """In words, what the last segment does not share with the one before; empty if it shares all."""
    before, now = map(flatten, segments[-2:])
    keys = [key for key in before if key in now and key != "step" and before[key] != now[key]]
    return ", ".join(str(Difference(key, before[key], now[key])) for key in keys)


def _joined(key: str, segments: list[dict[str, Any]], separator: str) -> str:
    """All values that the key had, in order."""
    return separator.join(dict.fromkeys(segment[key] for segment in segments if key in segment))


def backend_of(model: nn.Module, device: torch.device, precision: str) -> str:
    """What computes the recurrences: a backend of `indrnn.recurrence`, or cudnn or torch for all others."""
    dtype = _sequence_dtype(precision)
    names = {resolve_backend(layer.backend, device, dtype, layer.nonlinearity) for _, layer in recurrent_layers(model)}
    if names:
        return "+".join(sorted(names))
    by_cudnn = device.type == "cuda" and torch.backends.cudnn.is_available()
    return "cudnn" if by_cudnn and any(isinstance(module, nn.RNNBase) for module in model.modules()) else "torch"


def passed_over(model: nn.Module, device: torch.device, precision: str) -> dict[str, str]:
    """Each backend that backend=auto would rather have taken, and why it cannot compute the recurrences."""
    dtype, reasons = _sequence_dtype(precision), dict[str, str]()
    for _, layer in recurrent_layers(model):
        if layer.backend == "auto":
            reasons |= auto_backend(device, dtype, layer.nonlinearity)[1]
    return reasons


def _sequence_dtype(precision: str) -> torch.dtype:
    """What the recurrences see (see `device.computing`)."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
