"""Adam with parameter groups chosen by module, its learning rate a tensor so that a captured step can read it; and the
schedules of that rate.

Everything but the plateau is a pure function of the step; the plateau's state is explicit, so that a checkpoint can
hold it. `steps` counts the updates made so far: the first update runs with ``rate(0)``.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import cos, pi
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..config.schema import (
    CosineConfig,
    OneCycleConfig,
    OptimizerConfig,
    PlateauConfig,
    ScheduleConfig,
    StaircaseConfig,
)
from ..errors import UserError


def decayed_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters that weight decay applies to: all but u and biases, as in the paper's code. These are the matrices
    of every module, also of a network from outside, and the scales of normalisations."""
    weights: list[Tensor] = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    norms = (module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.LayerNorm))
    # A weight that two modules share counts once.
    return list(dict.fromkeys([*weights, *(norm.weight for norm in norms if norm.weight is not None)]))


def build_optimizer(model: nn.Module, cfg: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """Adam; weight decay is added to the gradient.

    All groups share one learning-rate tensor, to be changed in place (`rate_tensor`).
    """
    decayed = decayed_parameters(model)
    ids = {id(parameter) for parameter in decayed}
    others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    rate = torch.tensor(cfg.lr, dtype=torch.float32, device=device)
    groups = [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for parameters, decay in ((decayed, cfg.weight_decay), (others, 0.0))
        if parameters
    ]
    return torch.optim.Adam(
        groups,
        lr=cfg.lr,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
        # One kernel for all parameters; it also leaves everything as it is while `found_inf` is 1 (see TrainingStep).
        fused=True,
        capturable=device.type == "cuda",
    )


def rate_tensor(optimizer: torch.optim.Optimizer) -> Tensor:
    """The learning rate that every group reads."""
    return optimizer.param_groups[0]["lr"]


def staircase(steps: int, every: int, factor: float) -> float:
    """The share of the peak rate after a drop by ``factor`` every ``every`` steps."""
    return factor ** (steps // every)


def cosine(steps: int, total: int, warmup: float, final: float) -> float:
    """Linear rise over the first ``warmup`` share of ``total`` steps, then half a cosine that reaches ``final`` with
    the last update (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5, without restarts)."""
    rising = round(warmup * total)
    if steps < rising:
        return (steps + 1) / rising
    return final + (1.0 - final) * _half_cosine(steps - rising, total - rising)


def one_cycle(steps: int, total: int, warmup: float, initial: float, final: float) -> float:
    """Half a cosine from ``initial`` up to the peak over the first ``warmup`` share, another down to ``final``
    (Smith & Topin 2019, arXiv 1708.07120, with cosine flanks)."""
    rising = round(warmup * total)
    if steps < rising:
        return 1.0 + (initial - 1.0) * (1.0 + cos(pi * steps / rising)) / 2.0
    return final + (1.0 - final) * _half_cosine(steps - rising, total - rising)


def _half_cosine(steps: int, total: int) -> float:
    return (1.0 + cos(pi * min(1.0, steps / max(1, total - 1)))) / 2.0


@dataclass(frozen=True)
class Plateau:
    """Where a plateau schedule stands: rate drops so far, evaluations without gain since the last, best score."""

    drops: int = 0
    waited: int = 0
    best: float | None = None

    def after(self, score: float, patience: list[int]) -> "Plateau":
        """The state after an evaluation with ``score`` (higher is better; an equal one is no gain)."""
        if self.best is None or score > self.best:
            return replace(self, best=score, waited=0)
        waited = self.waited + 1
        if waited >= patience[min(self.drops, len(patience) - 1)]:
            return replace(self, drops=self.drops + 1, waited=0)
        return replace(self, waited=waited)


class Schedule(Protocol):
    def rate(self, steps: int) -> float:
        """The learning rate of the update that follows ``steps`` updates."""

    def observe(self, score: float) -> bool:
        """Take note of an evaluation; higher is better. Whether training is to go back to the best checkpoint."""

    restores_best: bool
    """Whether `observe` can send training back, so that the best checkpoint must hold the optimizer's state."""

    @property
    def finished(self) -> bool:
        """Whether the schedule says that training is over."""

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""

    def restore(self, state: dict[str, Any]) -> None: ...


class StepSchedule:
    """A schedule that depends on the step alone; ``share`` gives the share of the peak rate."""

    finished = False
    restores_best = False

    def __init__(self, peak: float, share: Callable[[int], float]) -> None:
        self._peak, self._share = peak, share

    def rate(self, steps: int) -> float:
        return self._peak * self._share(steps)

    def observe(self, score: float) -> bool:
        return False

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class PlateauSchedule:
    """The rate drops when evaluations bring no gain; training ends when it falls below the minimum."""

    def __init__(self, cfg: PlateauConfig, peak: float) -> None:
        self._factor, self._minimum, self._patience = cfg.factor, cfg.minimum_lr, list(cfg.patience)
        self.restores_best = cfg.restore_best
        self._peak = peak
        self._plateau = Plateau()

    def rate(self, steps: int) -> float:
        return self._peak * self._factor**self._plateau.drops

    def observe(self, score: float) -> bool:
        drops = self._plateau.drops
        self._plateau = self._plateau.after(score, self._patience)
        return self.restores_best and self._plateau.drops > drops

    @property
    def finished(self) -> bool:
        # A rate meant to equal the minimum may miss it by rounding: 2e-4 · 0.1³ is 2.0000000000000004e-07.
        return self.rate(0) < self._minimum * (1.0 - 1e-9)

    def state(self) -> dict[str, Any]:
        return asdict(self._plateau)

    def restore(self, state: dict[str, Any]) -> None:
        self._plateau = Plateau(**state)


def build_schedule(cfg: ScheduleConfig, peak: float, max_steps: int) -> Schedule:
    """The schedule of ``cfg.name``. Raises UserError for one that does not exist."""
    match cfg.name:
        case "constant":
            return StepSchedule(peak, lambda steps: 1.0)
        case "staircase":
            stairs = cast(StaircaseConfig, cfg)
            return StepSchedule(peak, partial(staircase, every=stairs.every, factor=stairs.factor))
        case "cosine":
            wave = cast(CosineConfig, cfg)
            return StepSchedule(peak, partial(cosine, total=max_steps, warmup=wave.warmup, final=wave.final))
        case "one_cycle":
            cycle = cast(OneCycleConfig, cfg)
            return StepSchedule(
                peak,
                partial(one_cycle, total=max_steps, warmup=cycle.warmup, initial=cycle.initial, final=cycle.final),
            )
        case "plateau":
            return PlateauSchedule(cast(PlateauConfig, cfg), peak)
    raise UserError(f"schedule.name={cfg.name} is unknown; choose from constant, staircase, plateau, cosine, one_cycle")
