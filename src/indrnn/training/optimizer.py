"""Optimizers, with parameter groups chosen by module, and learning-rate schedules.

A schedule gives the share of the peak learning rates for each update and scales all optimizers alike. All but the
plateau are functions of the step: ``share(0)`` applies to the first update.
"""

from collections.abc import Callable, Iterable
from functools import partial
from math import cos, inf, pi
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..config.schema import MuonConfig, OptimizerConfig, ScheduleConfig
from ..errors import UserError
from ..external import call_target, explained, import_target


def decayed_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters with weight decay: matrices, also of custom models, and norm scales, but not u and biases."""
    weights: list[Tensor] = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    norms = (module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.LayerNorm))
    # Two modules may share a weight.
    return list(dict.fromkeys([*weights, *(norm.weight for norm in norms if norm.weight is not None)]))


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """What Muon updates: every matrix except the model's first and last, in the order of ``model.parameters()``, and
    except other input weights (as many columns as the first, if that has fewer columns than rows)."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    rows, columns = matrices[0].shape if matrices else (0, 0)
    inputs = columns if columns < rows else 1
    return [m for m in matrices[1:-1] if m.shape[1] not in (1, inputs) and m.requires_grad and not m.is_complex()]


def build_optimizers(model: nn.Module, cfg: OptimizerConfig) -> list[Optimizer]:
    """The optimizers that update ``model`` together: ``cfg._target_``, then Muon if ``cfg`` asks for it.

    Each parameter group has its peak learning rate as ``initial_lr``.

    Raises:
        UserError: the target is no optimizer, does not take these arguments, or needs more than ``step()``; or there is
            no hidden matrix for Muon.
    """
    muon = cast(MuonConfig, cfg) if hasattr(cfg, "muon_lr") else None
    hidden = hidden_matrices(model) if muon else []
    if muon and not hidden:
        raise UserError("optimizer=muon: the model has no hidden matrix; use optimizer=adam")
    excluded = set(map(id, hidden))
    decayed = [parameter for parameter in decayed_parameters(model) if id(parameter) not in excluded]
    excluded.update(map(id, decayed))
    others = [parameter for parameter in model.parameters() if id(parameter) not in excluded]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizers = [_build(cfg, [group for group in groups if group["params"]])]
    if muon:
        optimizers.append(
            torch.optim.Muon(hidden, lr=muon.muon_lr, momentum=muon.momentum, weight_decay=muon.weight_decay)
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _build(cfg: OptimizerConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """``cfg._target_`` for the parameter groups, after a step with another parameter has shown that it works."""
    what = f"optimizer._target_={cfg._target_}"
    target = import_target(what, cfg._target_)
    if not (isinstance(target, type) and issubclass(target, Optimizer)):
        raise UserError(f"{what}: it is not a torch.optim.Optimizer")
    for key in ("lr", "weight_decay"):
        if key in cfg.args:
            raise UserError(f"optimizer.args.{key}: set optimizer.{key} instead")
    given: dict[str, Any] = {"lr": cfg.lr}
    if cfg.weight_decay > 0:
        given["weight_decay"] = cfg.weight_decay  # the groups' values apply; this checks that the target takes it
    floating = all(parameter.is_floating_point() for group in groups for parameter in group["params"])
    if target in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD) and floating:
        given["fused"] = True  # one kernel for all parameters; there is none for complex ones
    parameter = nn.Parameter(torch.ones(2, 2, device="cpu", dtype=torch.float32))
    parameter.grad = torch.ones_like(parameter)
    trial = cast(Optimizer, call_target("optimizer", cfg, [parameter], **given))
    explained(f"{what}: a step without a closure", target, trial.step)
    return cast(Optimizer, call_target("optimizer", cfg, groups, **given))


def set_rates(optimizers: Iterable[Optimizer], share: float) -> None:
    """Set every learning rate to ``share`` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["initial_lr"]


def learning_rates(optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """The current learning rates: lr, and muon_lr if Muon has parameters."""
    pairs = zip(("lr", "muon_lr"), optimizers, strict=False)
    return {name: optimizer.param_groups[0]["lr"] for name, optimizer in pairs}


def constant(steps: int, total: int) -> float:
    return 1.0


def staircase(steps: int, total: int, every: int, factor: float) -> float:
    """A drop by ``factor`` every ``every`` steps."""
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
    """A schedule that depends on the step alone: ``share(step)``."""

    restores_best = False
    """Whether `observe` may ask to return to the best checkpoint, which then holds the optimizer state."""
    finished = False
    """Whether the schedule ends training."""

    def __init__(self, share: Callable[[int], float]) -> None:
        self.share = share
        self.state: dict[str, Any] = {}
        """Plain values for a checkpoint."""

    def observe(self, score: float) -> bool:
        """Note an evaluation's score, higher is better; return whether to return to the best checkpoint."""
        return False


class PlateauSchedule(Schedule):
    """The rate drops when evaluations bring no gain; training ends when it falls below the minimum."""

    def __init__(self, peak: float, factor: float, patience: list[int], minimum_lr: float, restore_best: bool) -> None:
        super().__init__(lambda steps: factor ** self.state["drops"])
        self._patience, self._peak, self._minimum = patience, peak, minimum_lr
        self.restores_best = restore_best
        # Rate drops so far, and evaluations without gain since the last.
        self.state = {"drops": 0, "waited": 0, "best": None}

    def observe(self, score: float) -> bool:
        state = self.state
        if state["best"] is None or score > state["best"]:  # an equal score is no gain
            state.update(best=score, waited=0)
            return False
        state["waited"] += 1
        if state["waited"] < self._patience[min(state["drops"], len(self._patience) - 1)]:
            return False
        state.update(drops=state["drops"] + 1, waited=0)
        return self.restores_best

    @property
    def finished(self) -> bool:  # type: ignore[override]
        # A rate that should equal the minimum may differ by rounding: 2e-4 · 0.1³ is 2.0000000000000004e-07.
        return self._peak * self.share(0) < self._minimum * (1.0 - 1e-9)


def _scheduler_share(cfg: Any, peak: float) -> Callable[[int], float]:
    """A class of `torch.optim.lr_scheduler` as a function of the step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros((), device="cpu"))], lr=peak, momentum=0.9)
    scheduler = call_target("schedule", cfg, optimizer)
    optimizer.step()  # before the scheduler, or PyTorch warns
    rates = [optimizer.param_groups[0]["lr"]]

    def share(steps: int) -> float:
        while len(rates) <= steps:
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates[steps] / peak

    return share


def _custom(cfg: Any, peak: float, max_steps: int) -> Callable[[int], float]:
    """``cfg._target_``: an LRScheduler class, or a function of ``cfg.args`` that returns a function of the step."""
    what = f"schedule._target_={cfg._target_}"
    target: Any = import_target(what, cfg._target_)
    scheduler = isinstance(target, type) and issubclass(target, LRScheduler)
    share = _scheduler_share(cfg, peak) if scheduler else call_target("schedule", cfg)
    steps = (0, max_steps - 1)
    values = explained(f"{what}, at step 0 or {steps[1]}", target, lambda: [float(share(step)) for step in steps])
    for step, value in zip(steps, values, strict=True):
        if not 0.0 <= value < inf:
            raise UserError(f"{what}: at step {step} it must return a share of optimizer.lr, at least 0, not {value}")
    return share


SHARES: dict[str, Callable[..., float]] = {each.__name__: each for each in (constant, staircase, cosine, one_cycle)}


def build_schedule(cfg: ScheduleConfig, peak: float, max_steps: int) -> Schedule:
    """The schedule ``cfg.name`` with the other keys of ``cfg``, or the custom one ``cfg._target_``.

    Raises:
        UserError: the schedule does not exist, or its target cannot be called as needed.
    """
    parameters: dict[str, Any] = OmegaConf.to_container(cast(DictConfig, cfg), resolve=True)  # type: ignore[assignment]
    name = parameters.pop("name")
    if "_target_" in parameters:
        return Schedule(_custom(cfg, peak, max_steps))
    if name == "plateau":
        return PlateauSchedule(peak, **parameters)
    if name not in SHARES:
        raise UserError(f"schedule.name={name} is unknown; choose from {', '.join([*SHARES, 'plateau'])}")
    return Schedule(partial(SHARES[name], total=max_steps, **parameters))
