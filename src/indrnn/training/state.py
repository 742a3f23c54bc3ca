"""Everything that decides how training continues: network, optimizers, schedule, sampler and position.

`RunState` is built from the configuration, saved in checkpoints and restored from them. Every start of a run adds a
segment, a record of what computes it.
"""

import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config.checks import flatten
from ..config.schema import Config
from ..data import make_task
from ..errors import UserError
from ..layers import recurrent_layers
from ..models import build_model
from ..record.config_diff import Difference, fingerprint, fingerprint_differences
from ..record.result import environment, running_code
from ..recurrence import resolve_backend
from ..recurrence.dispatch import auto_backend
from .checkpoint import (
    FIX,
    copied_weights,
    damage_reported,
    load_weights,
    optimizer_states,
    random_state,
    read_checkpoint,
    restore_optimizers,
    restore_random_state,
)
from .device import peak_memory_bytes, prepare_process, set_precision, synchronize
from .distributed import Processes
from .evaluation import Objective, norm_batches
from .optimizer import build_optimizers, build_schedule, uses_muon
from .sampler import BatchSampler, Stream, torch_seed
from .step import CaptureError, GraphedGradients, TrainingStep, can_use_graph


@dataclass
class Position:
    """The progress of a run, in plain values."""

    step: int = 0
    """Updates so far."""
    observed: int = 0
    """Everything due up to and including this step has been recorded."""
    seconds: float = 0.0
    """Time of the training steps alone."""
    interval_seconds: float = 0.0
    """`seconds` at the last training row."""
    peak_memory: int = 0
    """In bytes, over all segments; 0 if unknown."""
    warned: bool = False


class RunState:
    """Built as at step 0; `start` restores the checkpoint, if there is one, and runs a warm-up step."""

    def __init__(self, cfg: Config, device: torch.device, processes: Processes) -> None:
        trainer = cfg.trainer
        self._code = running_code()  # before the data is read: the checkout may change meanwhile
        prepare_process(device)
        set_precision(trainer.precision, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.cfg, self.device, self.processes = cfg, device, processes
        self.task = make_task(cfg.data)
        self.data = processes.one_per_machine_first(lambda: self.task.load(device))
        torch.manual_seed(torch_seed(cfg.seed, Stream.INITIALIZATION))
        self.model = build_model(cfg.model, self.task).to(device)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.objective = Objective(self.task, trainer.label_smoothing)
        self.sampler = BatchSampler(self.data.train.size, trainer.batch_size, cfg.seed, device)
        self.optimizers = build_optimizers(self.model, cfg.optimizer)
        self.schedule = build_schedule(cfg.schedule, cfg.optimizer.lr, trainer.max_steps)
        samples = len(self.sampler.norm_samples(trainer.bn_samples, 0))
        norm_batch = samples // norm_batches(samples, trainer.eval_batch_size)
        share = processes.share(self.model, trainer.batch_size, norm_batch)
        self.update = TrainingStep(self.model, self.optimizers, self.objective, self.data.train, trainer, device, share)
        self.meter = self.update.meter
        self.position = Position()
        self.best: dict[str, Any] | None = None
        """Step, score, accuracy, loss and weights of the best evaluation so far."""
        self.segments: list[dict[str, Any]] = []

    def start(self, checkpoint: Path | None) -> None:
        """Run a warm-up step, then continue from ``checkpoint`` or from step 0. Begins a segment."""
        content = None
        if checkpoint is not None:
            content = self.processes.broadcast_from_rank_zero(lambda: read_checkpoint(checkpoint))
            self._require_same_run(content, checkpoint)
        precision = self.cfg.trainer.precision
        fallbacks = self._fallbacks()
        self._warm_up(fallbacks)
        if content is None or checkpoint is None:
            torch.manual_seed(torch_seed(self.cfg.seed, Stream.DROPOUT))
        else:
            self._restore(content, checkpoint)
        self.segments.append(
            {
                "step": self.position.step,
                "git": self._code,
                "device": self.device.type,
                **environment(self.device),
                "processes": self.processes.size,
                "precision": precision,
                "backend": backend_of(self.model, self.device, precision),
                "fallbacks": fallbacks,
            }
        )

    def _require_same_run(self, content: dict[str, Any], path: Path) -> None:
        with damage_reported(path):
            differ = fingerprint_differences(content["fingerprint"], self.cfg, self.data.provenance)
        if differ:
            raise UserError(f"checkpoint {path} is of another run: {', '.join(map(str, differ))}; {FIX}")

    def _restore(self, content: dict[str, Any], path: Path) -> None:
        """Continue from what `content` returned. Raises UserError if a part is missing or does not fit."""
        with damage_reported(path):
            best = content["best"]
            if best is not None:
                load_weights(self.model, best["model"], path)  # shows that they fit
                best |= {"step": int(best["step"]), "score": float(best["score"]), "loss": float(best["loss"])}
                best["accuracy"] = None if best["accuracy"] is None else float(best["accuracy"])
            load_weights(self.model, content["model"], path)
            restore_optimizers(self.optimizers, content["optimizer"])
            self.meter.sums.copy_(content["meter"])
            restore_random_state(content["random"], self.device)
            self.schedule.restore(content["schedule"])
            for field in fields(Position):
                setattr(self.position, field.name, field.type(content["progressed"][field.name]))  # type: ignore
            if not 0 <= self.position.observed <= self.position.step:
                raise ValueError("step is out of range")
            self.best, self.segments = best, [dict(segment) for segment in content["segments"]]

    def _fallbacks(self) -> dict[str, str]:
        """What would be preferred but cannot be used, with the reason. Warns of what was asked for."""
        cfg = self.cfg
        fallbacks = skipped_backends(self.model, self.device, cfg.trainer.precision)
        if cfg.trainer.precision == "bfloat16" and self.device.type == "cpu" and not recurrent_layers(self.model):
            fallbacks["bfloat16"] = "on a CPU only IndRNN layers compute in it"
            warnings.warn(
                f"trainer.precision=bfloat16 has no effect, the run uses float32: {fallbacks['bfloat16']}", stacklevel=3
            )
        if uses_muon(cfg.optimizer) and len(self.optimizers) == 1:
            fallbacks["muon"] = "the model has no hidden matrix"
            warnings.warn(f"optimizer=muon: {fallbacks['muon']}, so Adam updates all parameters", stacklevel=3)
        return fallbacks

    def _warm_up(self, fallbacks: dict[str, str]) -> None:
        """Run a forward and backward pass, so that compiling, allocating and capturing are over when the clock starts.

        Restores the running statistics. The caller sets the generators.
        """
        weights = copied_weights(self.model)
        self.model.train()
        indices, graph = self.sampler.indices(0), self.cfg.trainer.cuda_graph
        eager = self.update.compute_gradients
        if graph == "auto" and hasattr(self.cfg.model, "_target_"):
            graph = False  # a graph would freeze the control flow of a custom model, such as layer dropout
        if graph is True and self.processes.size > 1:
            raise UserError("trainer.cuda_graph=true: several processes train without a CUDA graph; use auto or false")
        if graph and can_use_graph(self.device, self.processes):
            try:
                self.update.gradients = GraphedGradients(eager, indices, self.device)
            except CaptureError as failure:
                if graph != "auto":
                    raise
                fallbacks["cuda_graph"] = failure.reason
                warnings.warn(
                    f"training runs without a CUDA graph, which is slow: {failure.reason}; please report it with the "
                    "output of indrnn-info",
                    stacklevel=3,
                )
        if self.update.gradients == eager:
            eager(indices)
        synchronize(self.device)
        self.model.load_state_dict(weights)

    def note_peak_memory(self) -> None:
        """Include this segment's peak memory so far."""
        self.position.peak_memory = max(peak_memory_bytes(self.device) or 0, self.position.peak_memory)

    def content(self) -> dict[str, Any]:
        """The content of a checkpoint."""
        self.note_peak_memory()
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": optimizer_states(self.optimizers),
            "meter": self.meter.sums.cpu(),
            "random": random_state(self.device),
            "schedule": self.schedule.state(),
            "progressed": asdict(self.position),
            "best": self.best,
            "fingerprint": fingerprint(self.cfg, self.data.provenance),
            "segments": self.segments,
        }

    def moved(self) -> str:
        """How the last segment differs from the one before; empty if it does not."""
        before, now = map(flatten, self.segments[-2:])
        keys = [key for key in before if key in now and key != "step" and before[key] != now[key]]
        return ", ".join(str(Difference(key, before[key], now[key])) for key in keys)


def backend_of(model: nn.Module, device: torch.device, precision: str) -> str:
    """What computes the recurrences: a backend of `indrnn.recurrence`, or cudnn or torch for other networks."""
    dtype = _sequence_dtype(precision)
    names = {resolve_backend(layer.backend, device, dtype, layer.nonlinearity) for _, layer in recurrent_layers(model)}
    if names:
        return "+".join(sorted(names))
    by_cudnn = device.type == "cuda" and torch.backends.cudnn.is_available()
    return "cudnn" if by_cudnn and any(isinstance(module, nn.RNNBase) for module in model.modules()) else "torch"


def skipped_backends(model: nn.Module, device: torch.device, precision: str) -> dict[str, str]:
    """The backends that backend=auto would prefer, with the reasons why they cannot be used."""
    reasons: dict[str, str] = {}
    for _, layer in recurrent_layers(model):
        if layer.backend == "auto":
            reasons |= auto_backend(device, _sequence_dtype(precision), layer.nonlinearity)[1]
    return reasons


def _sequence_dtype(precision: str) -> torch.dtype:
    """The dtype of the recurrences' input (see `device.autocast_context`)."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
