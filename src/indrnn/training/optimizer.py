"""Adam with parameter groups chosen by module and a learning rate in a tensor that a captured step can read; and the
schedules of that rate.

All schedules except the plateau are pure functions of the step. `steps` counts the updates so far: the first update has
``rate(0)``.
"""

from collections.abc import Callable
from functools import partial
from math import cos, pi
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ..config.schema import OptimizerConfig, ScheduleConfig
from ..errors import UserError


def decayed_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters with weight decay: all but u and biases, as in the paper's code. These are the matrices of every
    module, also of a network from outside, and the scales of normalisations."""
    weights: list[Tensor] = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    norms = (module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.LayerNorm))
    # A weight that two modules share must be there once.
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
        # One kernel for all parameters, which changes nothing while `found_inf` is 1 (see TrainingStep).
        fused=True,
        capturable=device.type == "cuda",
    )


def rate_tensor(optimizer: torch.optim.Optimizer) -> Tensor:
    """The learning rate that every group reads."""
    return optimizer.param_groups[0]["lr"]


def constant(steps: int, total: int) -> float:
    return 1.0


def staircase(steps: int, total: int, every: int, factor: float) -> float:
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


class Schedule:
    """A schedule that depends on the step alone; ``share`` gives the share of the peak rate."""

    restores_best = False
    """Whether `observe` may ask to go back: the best checkpoint then holds the optimizer's state."""

    def __init__(self, peak: float, share: Callable[[int], float]) -> None:
        self._peak, self._share = peak, share

    def rate(self, steps: int) -> float:
        """The learning rate of the update that follows ``steps`` updates."""
        return self._peak * self._share(steps)

    def observe(self, score: float) -> bool:
        """Note an evaluation's score, higher is better; return whether to go back to the best checkpoint."""
        return False

    @property
    def finished(self) -> bool:
        """Whether the schedule says that training is over."""
        return False

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class PlateauSchedule(Schedule):
    """The rate drops when evaluations bring no gain; training ends when it falls below the minimum."""

    def __init__(self, peak: float, factor: float, patience: list[int], minimum_lr: float, restore_best: bool) -> None:
        super().__init__(peak, lambda steps: factor**self._drops)
        self._patience, self._minimum = patience, minimum_lr
        self.restores_best = restore_best
        self._drops = self._waited = 0  # rate drops so far, evaluations without gain since the last
        self._best: float | None = None

    def observe(self, score: float) -> bool:
        if self._best is None or score > self._best:  # an equal score is no gain
            self._best, self._waited = score, 0
            return False
        self._waited += 1
        if self._waited < self._patience[min(self._drops, len(self._patience) - 1)]:
            return False
        self._drops, self._waited = self._drops + 1, 0
        return self.restores_best

    @property
    def finished(self) -> bool:
        # A rate that should equal the minimum may differ by rounding: 2e-4 · 0.1³ is 2.0000000000000004e-07.
        return self.rate(0) < self._minimum * (1.0 - 1e-9)

    def state(self) -> dict[str, Any]:
        return {"drops": self._drops, "waited": self._waited, "best": self._best}

    def restore(self, state: dict[str, Any]) -> None:
        self._drops, self._waited, self._best = state["drops"], state["waited"], state["best"]


SHARES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "staircase": staircase,
    "cosine": cosine,
    "one_cycle": one_cycle,
}


def build_schedule(cfg: ScheduleConfig, peak: float, max_steps: int) -> Schedule:
    """The schedule ``cfg.name`` with the other keys of ``cfg``. Raises UserError if there is no such schedule."""
    parameters: dict[str, Any] = OmegaConf.to_container(cast(DictConfig, cfg))  # type: ignore[assignment]
    name = parameters.pop("name")
    if name == "plateau":
        return PlateauSchedule(peak, **parameters)
    if name not in SHARES:
        raise UserError(f"schedule.name={name} is unknown; choose from {', '.join([*SHARES, 'plateau'])}")
    return Schedule(peak, partial(SHARES[name], total=max_steps, **parameters))
