"""The optimizers of a run, with parameter groups chosen by module, and the schedules of their learning rates.

All schedules except the plateau are pure functions of the step. `steps` counts the updates so far: the first update has
``share(0)``. A schedule scales the rates of all optimizers alike.
"""

from collections.abc import Callable, Iterable
from functools import partial
from math import cos, pi
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config.schema import MuonConfig, OptimizerConfig, ScheduleConfig
from ..errors import UserError
from ..external import call_target, explained, import_target


def decayed_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters with weight decay: all but u and biases, as in the paper's code. These are the matrices of every
    module, custom models included, and the scales of normalizations."""
    weights: list[Tensor] = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    norms = (module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.LayerNorm))
    # A weight that two modules share must be there once.
    return list(dict.fromkeys([*weights, *(norm.weight for norm in norms if norm.weight is not None)]))


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """What Muon updates: every weight matrix with at least two columns, except the model's first and last (the input
    weights and the classifier), in the order of ``model.parameters()``."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2 and parameter.requires_grad]
    return [matrix for matrix in matrices[1:-1] if matrix.shape[1] > 1 and not matrix.is_complex()]


def build_optimizers(model: nn.Module, cfg: OptimizerConfig) -> list[Optimizer]:
    """The optimizers that update ``model`` together: ``cfg._target_``, and for optimizer=muon `torch.optim.Muon` for
    the hidden matrices.

    Each parameter group has its peak learning rate as ``initial_lr``.

    Raises:
        UserError: the target is no optimizer, does not take these arguments, or needs more than ``step()``.
    """
    muon_lr: float = getattr(cfg, "muon_lr", 0.0)
    hidden = hidden_matrices(model) if muon_lr else []
    optimizers = [_build(cfg, _groups(model, cfg.weight_decay, without=hidden))]
    if hidden:
        momentum = cast(MuonConfig, cfg).momentum
        optimizers.append(torch.optim.Muon(hidden, lr=muon_lr, momentum=momentum, weight_decay=cfg.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _groups(model: nn.Module, weight_decay: float, without: list[Tensor]) -> list[dict[str, Any]]:
    elsewhere = set(map(id, without))
    decayed = [parameter for parameter in decayed_parameters(model) if id(parameter) not in elsewhere]
    elsewhere.update(map(id, decayed))
    others = [parameter for parameter in model.parameters() if id(parameter) not in elsewhere]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _build(cfg: OptimizerConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """``cfg._target_`` over the parameter groups, once a trial with a parameter of its own has shown that it works."""
    what = f"optimizer._target_={cfg._target_}"
    given: dict[str, Any] = {"lr": cfg.lr}
    if cfg.weight_decay > 0:
        given["weight_decay"] = cfg.weight_decay  # the groups' own values apply; this checks that the target has it
    parameters = [parameter for group in groups for parameter in group["params"]]
    fusable = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
    target = import_target(what, cfg._target_)
    if target in fusable and all(parameter.is_floating_point() for parameter in parameters):
        given["fused"] = True  # one kernel for all parameters

    def trial() -> None:
        parameter = nn.Parameter(torch.ones(2, 2, device="cpu", dtype=torch.float32))
        parameter.grad = torch.ones_like(parameter)
        call_target("optimizer", cfg, [parameter], **given).step()

    if not (isinstance(target, type) and issubclass(target, Optimizer)):
        raise UserError(f"{what}: it is not a torch.optim.Optimizer")
    explained(f"{what}: a step without a closure", target, trial)
    return cast(Optimizer, call_target("optimizer", cfg, groups, **given))


def set_rates(optimizers: Iterable[Optimizer], share: float) -> None:
    """Set every learning rate to ``share`` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["initial_lr"]


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
    """A schedule that depends on the step alone; ``share`` gives the share of the peak rates."""

    restores_best = False
    """Whether `observe` may ask to go back: the best checkpoint then holds the optimizer's state."""

    def __init__(self, share: Callable[[int], float]) -> None:
        self.share = share
        """The share of the peak learning rates for the update that follows a number of updates."""

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
        super().__init__(lambda steps: factor**self._drops)
        self._patience, self._peak, self._minimum = patience, peak, minimum_lr
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
        return self._peak * self.share(0) < self._minimum * (1.0 - 1e-9)

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
    return Schedule(partial(SHARES[name], total=max_steps, **parameters))
