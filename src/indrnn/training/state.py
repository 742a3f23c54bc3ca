"""All that decides how training goes on: the network, its optimizer, the schedule, the order of the data, how far it
is; made from the configuration, rehearsed, put into a checkpoint and taken out of one.
"""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..config.schema import Config
from ..data import make_task
from ..layers import recurrent_layers
from ..models import build_model
from ..record import RunFolder, running_code
from ..record.compare import fingerprint
from .checkpoint import (
    copied_weights,
    load_weights,
    optimizer_state,
    random_state,
    read_checkpoint,
    require_same_run,
    require_whole,
    restore_optimizer,
    restore_random_state,
)
from .device import (
    flush_denormals,
    keep_freed_memory,
    peak_memory_bytes,
    reset_peak_memory,
    set_precision,
    synchronise,
)
from .distributed import ALONE, Processes
from .evaluate import Objective, norm_batches
from .optimizer import build_optimizer, build_schedule
from .order import DataOrder, Stream, torch_seed
from .segments import passed_over, segment
from .step import CaptureError, GraphedStep, TrainingStep


@dataclass
class Position:
    """How far a run is, in plain values."""

    step: int = 0
    """Updates made."""
    observed: int = 0
    """All that was due up to and including this step has been done and recorded."""
    seconds: float = 0.0
    """Spent on training steps alone."""
    interval_seconds: float = 0.0
    """`seconds` at the last row of training figures."""
    peak_memory: int = 0
    warned: bool = False


class TrainingState:
    """Built as at step 0; `prepare` makes it ready for the step that comes next."""

    def __init__(self, cfg: Config, device: torch.device, processes: Processes = ALONE) -> None:
        # The code as it is loaded, not as it may lie there once the data is.
        self._code = running_code()
        # Before the first tensor is allocated, and before any operator wakes worker threads.
        keep_freed_memory()
        flush_denormals(device)
        set_precision(cfg.trainer.precision, device)
        reset_peak_memory(device)
        self.cfg, self.device, self.processes = cfg, device, processes
        self.task = make_task(cfg.data)
        self.data = processes.one_a_machine_first(lambda: self.task.load(device))
        torch.manual_seed(torch_seed(cfg.seed, Stream.INITIALISATION))
        self.model = build_model(cfg.model, self.task).to(device)
        self.objective = Objective(self.task)
        self.order = DataOrder(self.data.train.size, cfg.trainer.batch_size, cfg.seed, device)
        self.optimizer = build_optimizer(self.model, cfg.optimizer, device)
        self.schedule = build_schedule(cfg.schedule, cfg.optimizer.lr, cfg.trainer.max_steps)
        trainer = cfg.trainer
        samples = len(self.order.norm_samples(trainer.bn_samples, 0))
        norm_batch = samples // norm_batches(samples, trainer.eval_batch_size)
        share = processes.share(self.model, trainer.batch_size, norm_batch)
        self.update = TrainingStep(self.model, self.optimizer, self.objective, self.data.train, trainer, device, share)
        self.meter = self.update.meter
        self.position = Position()
        self.best: dict[str, Any] | None = None
        """Step, score, accuracy, loss and weights of the best evaluation so far."""
        self.segments: list[dict[str, Any]] = []
        self.step: Callable[[Tensor], None] = self.update
        """Makes one update from the training sequences at the indices (B,)."""

    def prepare(self, folder: RunFolder) -> None:
        """Rehearse a step, then take over what the folder's checkpoint holds, if the run goes on from one."""
        path, content = folder.checkpoint_path, None
        if folder.state == "resume":
            content = self.processes.from_leader(lambda: read_checkpoint(path))
            require_same_run(content, self.cfg, self.data.provenance, path)
            load_weights(self.model, content["model"], path)
        precision = self.cfg.trainer.precision
        # What was to be used and is not -> why.
        fallbacks = passed_over(self.model, self.device, precision)
        if precision == "bfloat16" and self.device.type == "cpu" and not recurrent_layers(self.model):
            fallbacks["bfloat16"] = "on a CPU only IndRNN layers compute in it"
            warnings.warn(
                f"trainer.precision=bfloat16 changes nothing, the run is in float32: {fallbacks['bfloat16']}",
                stacklevel=2,
            )
        self._rehearse(fallbacks)
        if content is None:
            restore_optimizer(self.model, self.optimizer, {})
            self.meter.reset()
            torch.manual_seed(torch_seed(self.cfg.seed, Stream.DROPOUT))
        else:
            require_whole(content, self.content(), self.schedule.restores_best, path)
            restore_optimizer(self.model, self.optimizer, content["optimizer"])
            self.meter.restore(content["meter"])
            restore_random_state(content["random"], self.device, path)
            self.schedule.restore(content["schedule"])
            for name in asdict(self.position):
                setattr(self.position, name, content["progressed"][name])
            self.best = content["best"]
            # Before there were segments, a checkpoint held the number of threads alone.
            self.segments = content.get("segments") or [{"num_threads": content.get("threads")}]
        self.segments.append(
            segment(self.position.step, self.model, self.device, precision, self._code, fallbacks, self.processes.size)
        )

    def _rehearse(self, fallbacks: dict[str, str]) -> None:
        """Make a step ahead of the run, so that compiling, allocating or capturing is done before the clock starts and
        the optimizer has its state; what else it changed, the caller restores in place. Sets `step`."""
        weights = copied_weights(self.model)
        self.model.train()
        indices = self.order.indices(0)
        if self.device.type == "cuda" and self.cfg.trainer.cuda_graph:
            try:
                self.step = GraphedStep(self.update, indices, self.device)
            except CaptureError as failure:
                if self.cfg.trainer.cuda_graph != "auto":
                    raise
                fallbacks["cuda_graph"] = failure.reason
                warnings.warn(
                    f"the training step runs without a CUDA graph, which is slow: it cannot be captured "
                    f"({failure.reason}); please report it, with indrnn-info's output",
                    stacklevel=2,
                )
        if self.step is self.update:
            self.update(indices)
        synchronise(self.device)
        self.model.load_state_dict(weights)

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds, as it would be now."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": optimizer_state(self.model, self.optimizer),
            "meter": self.meter.state(),
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
