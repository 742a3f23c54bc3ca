"""Everything that decides how training continues: the network, its optimizer, the schedule, the order of the data, the
position. It is built from the configuration, tried with one step, saved in checkpoints and restored from them. Every
start of a run adds a segment, a record of what computes it.
"""

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config.checks import flatten, run_name
from ..config.schema import Config
from ..data import make_task
from ..layers import recurrent_layers
from ..models import build_model
from ..record.config_diff import Difference, fingerprint
from ..record.folder import RunFolder
from ..record.result import Result, environment, running_code, wilson_interval
from ..recurrence import resolve_backend
from ..recurrence.dispatch import auto_backend
from .checkpoint import (
    copied_weights,
    load_weights,
    optimizer_states,
    random_state,
    read_checkpoint,
    require_same_run,
    require_whole,
    restore_optimizers,
    restore_random_state,
)
from .device import peak_memory_bytes, prepare_process, set_precision, synchronise
from .distributed import ALONE, Processes
from .evaluation import Evaluation, Objective, norm_batches
from .optimizer import build_optimizers, build_schedule
from .order import DataOrder, Stream, torch_seed
from .step import CaptureError, GraphedGradients, TrainingStep


@dataclass
class Position:
    """How far a run has come, in plain values."""

    step: int = 0
    """Updates made."""
    observed: int = 0
    """All that was due up to and including this step has been recorded."""
    seconds: float = 0.0
    """Time of the training steps alone."""
    interval_seconds: float = 0.0
    """`seconds` at the last row of training figures."""
    peak_memory: int = 0
    warned: bool = False


class TrainingState:
    """Built as at step 0; `prepare` readies it for the next step."""

    def __init__(self, cfg: Config, device: torch.device, processes: Processes = ALONE) -> None:
        # Before the data is read, because the checkout may change meanwhile.
        self._code = running_code()
        prepare_process(device)
        set_precision(cfg.trainer.precision, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.cfg, self.device, self.processes = cfg, device, processes
        self.task = make_task(cfg.data)
        self.data = processes.one_a_machine_first(lambda: self.task.load(device))
        torch.manual_seed(torch_seed(cfg.seed, Stream.INITIALISATION))
        self.model = build_model(cfg.model, self.task).to(device)
        self.objective = Objective(self.task, cfg.trainer.label_smoothing)
        self.order = DataOrder(self.data.train.size, cfg.trainer.batch_size, cfg.seed, device)
        self.optimizers = build_optimizers(self.model, cfg.optimizer)
        self.schedule = build_schedule(cfg.schedule, cfg.optimizer.lr, cfg.trainer.max_steps)
        trainer = cfg.trainer
        samples = len(self.order.norm_samples(trainer.bn_samples, 0))
        norm_batch = samples // norm_batches(samples, trainer.eval_batch_size)
        share = processes.share(self.model, trainer.batch_size, norm_batch)
        self.update = TrainingStep(self.model, self.optimizers, self.objective, self.data.train, trainer, device, share)
        self.meter = self.update.meter
        self.position = Position()
        self.best: dict[str, Any] | None = None
        """Step, score, accuracy, loss and weights of the best evaluation so far."""
        self.segments: list[dict[str, Any]] = []

    def prepare(self, folder: RunFolder) -> None:
        """Try a step, then restore the folder's checkpoint if the run resumes from one."""
        path, content = folder.checkpoint_path, None
        if folder.state == "resume":
            content = self.processes.from_leader(lambda: read_checkpoint(path))
            require_same_run(content, self.cfg, self.data.provenance, path)
            load_weights(self.model, content["model"], path)
        precision = self.cfg.trainer.precision
        # What would be preferred but cannot be used, with the reason.
        fallbacks = passed_over(self.model, self.device, precision)
        if precision == "bfloat16" and self.device.type == "cpu" and not recurrent_layers(self.model):
            fallbacks["bfloat16"] = "on a CPU only IndRNN layers compute in it"
            warnings.warn(
                f"trainer.precision=bfloat16 changes nothing, the run is in float32: {fallbacks['bfloat16']}",
                stacklevel=2,
            )
        if hasattr(self.cfg.optimizer, "muon_lr") and len(self.optimizers) == 1:
            fallbacks["muon"] = "the model has no hidden matrix"
            warnings.warn(f"optimizer=muon: {fallbacks['muon']}, so Adam updates all parameters", stacklevel=2)
        self._warm_up(fallbacks)
        if content is None:
            torch.manual_seed(torch_seed(self.cfg.seed, Stream.DROPOUT))
        else:
            require_whole(content, self.content(), self.schedule.restores_best, path)
            self._restore(content, path)
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

    def _restore(self, content: dict[str, Any], path: Path) -> None:
        restore_optimizers(self.optimizers, content["optimizer"], path)
        self.meter.sums.copy_(content["meter"])
        restore_random_state(content["random"], self.device, path)
        self.schedule.restore(content["schedule"])
        for name in asdict(self.position):
            setattr(self.position, name, content["progressed"][name])
        self.best = content["best"]
        # Checkpoints of earlier versions have no segments but the number of threads.
        self.segments = content.get("segments") or [{"num_threads": content.get("threads")}]

    def _warm_up(self, fallbacks: dict[str, str]) -> None:
        """Run a forward and backward pass before the run: compiling, allocating and capturing must be over when the
        clock starts. Restores the running statistics, and leaves the generators to the caller."""
        weights = copied_weights(self.model)
        self.model.train()
        indices = self.order.indices(0)
        eager = self.update.compute_gradients
        # NCCL cannot end while a captured graph is alive, so several processes run without one.
        if self.device.type == "cuda" and self.processes.size == 1 and self.cfg.trainer.cuda_graph:
            try:
                self.update.gradients = GraphedGradients(eager, indices, self.device)
            except CaptureError as failure:
                if self.cfg.trainer.cuda_graph != "auto":
                    raise
                fallbacks["cuda_graph"] = failure.reason
                warnings.warn(
                    "training runs without a CUDA graph, which is slow: the step cannot be captured "
                    f"({failure.reason}); please report it, with indrnn-info's output",
                    stacklevel=2,
                )
        if self.update.gradients == eager:
            eager(indices)
        synchronise(self.device)
        self.model.load_state_dict(weights)

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds, as it would be now."""
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

    def peak_memory(self) -> int | None:
        """Over all segments; None where it is not known."""
        here = peak_memory_bytes(self.device)
        return None if here is None else max(here, self.position.peak_memory)

    def result(self, command: str, test: Evaluation) -> Result:
        """The result of the finished run; ``test`` is the evaluation of the best weights."""
        cfg, position, best = self.cfg, self.position, self.best
        assert best is not None, "an evaluation precedes every end"
        return Result(
            model=cfg.model.name,
            task=self.task.name,
            name=run_name(cfg),
            seed=cfg.seed,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            best_step=best["step"],
            steps=position.step,
            epochs=self.order.epochs(position.step),
            val_accuracy=best["accuracy"],
            val_loss=best["loss"],
            test_accuracy=test.accuracy,
            test_loss=test.loss,
            test_ci95=None if test.accuracy is None else wilson_interval(test.correct, test.size),
            seconds=position.seconds,
            steps_per_second=position.step / position.seconds,
            peak_memory_bytes=self.peak_memory(),
            backend=_joined("backend", self.segments, "+"),
            device_name=_joined("device_name", self.segments, ", then "),
            precision=cfg.trainer.precision,
            data=self.data.provenance,
            versions=self.segments[-1]["versions"],
            git=self.segments[-1]["git"],
            command=command,
            segments=self.segments,
        )


def changes(segments: list[dict[str, Any]]) -> str:
    """How the last segment differs from the one before, in words; empty if it does not."""
    before, now = map(flatten, segments[-2:])
    keys = [key for key in before if key in now and key != "step" and before[key] != now[key]]
    return ", ".join(str(Difference(key, before[key], now[key])) for key in keys)


def _joined(key: str, segments: list[dict[str, Any]], separator: str) -> str:
    """The distinct values of a key in all segments, in their order."""
    return separator.join(dict.fromkeys(segment[key] for segment in segments if key in segment))


def backend_of(model: nn.Module, device: torch.device, precision: str) -> str:
    """What computes the recurrences: a backend of `indrnn.recurrence`, or cudnn or torch for other networks."""
    dtype = _sequence_dtype(precision)
    names = {resolve_backend(layer.backend, device, dtype, layer.nonlinearity) for _, layer in recurrent_layers(model)}
    if names:
        return "+".join(sorted(names))
    by_cudnn = device.type == "cuda" and torch.backends.cudnn.is_available()
    return "cudnn" if by_cudnn and any(isinstance(module, nn.RNNBase) for module in model.modules()) else "torch"


def passed_over(model: nn.Module, device: torch.device, precision: str) -> dict[str, str]:
    """The backends that backend=auto would prefer to its choice, with the reasons why they cannot be used."""
    dtype, reasons = _sequence_dtype(precision), dict[str, str]()
    for _, layer in recurrent_layers(model):
        if layer.backend == "auto":
            reasons |= auto_backend(device, dtype, layer.nonlinearity)[1]
    return reasons


def _sequence_dtype(precision: str) -> torch.dtype:
    """The dtype of the recurrences' input (see `device.computing`)."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
