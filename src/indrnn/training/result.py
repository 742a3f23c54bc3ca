"""What computes a run, and the result of a finished one, for result.json."""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config.compose import run_name
from ..layers import recurrent_layers
from ..record.result import Result, environment, running_code, wilson_interval
from ..recurrence import resolve_backend
from ..recurrence.dispatch import auto_backend
from .evaluation import Evaluation

if TYPE_CHECKING:
    from .loop import Run


def segment(run: "Run", fallbacks: dict[str, str]) -> dict[str, Any]:
    """What computes the run from here on, and in ``fallbacks`` what would be preferred but cannot be used."""
    precision, device = run.cfg.trainer.precision, run.device
    layers = [layer for _, layer in recurrent_layers(run.model)]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32  # of the sequences
    backends = {resolve_backend(layer.backend, device, dtype, layer.nonlinearity) for layer in layers}
    for layer in layers:
        if layer.backend == "auto":
            fallbacks |= auto_backend(device, dtype, layer.nonlinearity)[1]
    if not backends:
        recurrent = any(isinstance(module, nn.RNNBase) for module in run.model.modules())
        cudnn = recurrent and device.type == "cuda" and torch.backends.cudnn.is_available()
        backends = {"cudnn" if cudnn else "torch"}
        if precision == "bfloat16" and device.type == "cpu":
            fallbacks["bfloat16"] = "on a CPU only IndRNN layers compute in it"
            warnings.warn(f"the run uses float32 instead of bfloat16: {fallbacks['bfloat16']}", stacklevel=3)
    return {
        "step": run.step,
        "git": running_code(),
        "device": device.type,
        **environment(device),
        "processes": run.processes.size,
        "precision": precision,
        "backend": "+".join(sorted(backends)),
        "fallbacks": fallbacks,
    }


def build_result(run: "Run", test: Evaluation) -> Result:
    """The result of a finished run; ``test`` is the evaluation of the best checkpoint."""
    assert run.best is not None, "an evaluation precedes every end"
    return Result(
        model=run.cfg.model.name,
        task=run.task.name,
        name=run_name(run.cfg),
        seed=run.cfg.seed,
        parameters=run.parameters,
        best_step=run.best["step"],
        steps=run.step,
        epochs=run.sampler.epochs(run.step),
        val_accuracy=run.best["accuracy"],
        val_loss=run.best["loss"],
        test_accuracy=test.accuracy,
        test_loss=test.loss,
        test_ci95=None if test.accuracy is None else wilson_interval(test.correct, test.size),
        seconds=run.seconds,
        steps_per_second=run.step / run.seconds,
        peak_memory_bytes=run.peak_memory or None,
        backend="+".join(dict.fromkeys(each["backend"] for each in run.segments)),
        device_name=", then ".join(dict.fromkeys(each["device_name"] for each in run.segments)),
        precision=run.cfg.trainer.precision,
        data=run.data.provenance,
        versions=run.segments[-1]["versions"],
        git=run.segments[-1]["git"],
        command=run.folder.command,
        segments=run.segments,
    )
