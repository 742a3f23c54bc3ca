"""One optimisation step made of tensor operations alone: it never waits for the device and reads no Python number that
changes, so the same function runs eagerly and inside a CUDA graph (captured once, then started with a single call).

What changes from step to step is in buffers that the graph reads: the indices in `GraphedStep`, the learning rate in
the optimizer, the random state in CUDA's generator.

B batch, T time steps, D input features, K outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema import TrainerConfig
from ..data import Split
from ..errors import RunError, UserError
from ..layers import AffineSequence, project_recurrent_weights_
from .device import computing
from .distributed import Share
from .evaluation import Objective

WARM_UP = 3  # on a side stream, where libraries create workspaces and autograd streams before the capture

# Graphs whose capture failed. The allocator still asks them whether a capture is under way, so they must stay alive.
_failed: list[torch.cuda.CUDAGraph] = []

Capture = Callable[[Callable[[], None], torch.device], Callable[[], None]]


class Meter:
    """Sums over the steps since the last reading, and the first step that was not finite, all on the device."""

    SUMS = ("loss", "correct", "grad_norm", "count")

    def __init__(self, device: torch.device) -> None:
        self.values = {name: torch.zeros((), device=device) for name in self.SUMS}
        for name in ("steps", "first_bad"):
            self.values[name] = torch.zeros((), dtype=torch.int64, device=device)
        self.reset()

    def add(self, loss: Tensor, correct: Tensor, grad_norm: Tensor) -> Tensor:
        """Count a step. Returns a scalar that is true from the first non-finite step on."""
        steps, first_bad = self.values["steps"], self.values["first_bad"]
        steps.add_(1)
        bad = ~(loss.isfinite() & grad_norm.isfinite())
        first_bad.copy_(torch.where(bad & (first_bad < 0), steps, first_bad))
        for name, value in (("loss", loss), ("correct", correct), ("grad_norm", grad_norm)):
            self.values[name].add_(value)
        self.values["count"].add_(1)
        return first_bad >= 0

    def read(self) -> dict[str, float]:
        """Everything as Python numbers: one wait for the device."""
        sums = torch.stack([self.values[name].float() for name in self.SUMS]).tolist()
        counts = [int(self.values[name]) for name in ("steps", "first_bad")]
        return dict(zip(self.values, [*sums, *counts], strict=True))

    def clear(self) -> None:
        """Begin a new interval."""
        for name in self.SUMS:
            self.values[name].zero_()

    def reset(self) -> None:
        """As new."""
        self.clear()
        self.values["steps"].zero_()
        self.values["first_bad"].fill_(-1)  # none so far

    def state(self) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self.values.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """In place, because a captured graph has the addresses."""
        for name, value in self.values.items():
            value.copy_(state[name])


class TrainingStep:
    """``step(indices)`` performs one update with the training sequences at ``indices`` (B,).

    Gradients are limited value by value (cfg.clip_value), then by their global norm (cfg.clip_norm); the meter gets the
    norm before either. If the loss or a gradient is not finite, neither this update nor any later one is applied: when
    the meter is read, the weights are still the last good ones.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        split: Split,
        cfg: TrainerConfig,
        device: torch.device,
        share: Share | None = None,
    ) -> None:
        """``share``: this process's part of the batch, if several processes train together."""
        self.model = model
        self.optimizer = optimizer
        self.objective = objective
        self.split = split
        self.clip_norm: float | None = cfg.clip_norm
        self.clip_value: float | None = cfg.clip_value
        self.precision: str = cfg.precision
        self.device = device
        self.share = share
        self.parameters = list(model.parameters())
        self.meter = Meter(device)
        # The fused optimizers skip their update while this is 1, without asking the host (it exists for GradScaler).
        self._skip = torch.zeros((), device=device)
        optimizer.found_inf = self._skip  # type: ignore[attr-defined]

    def __call__(self, indices: Tensor) -> None:
        share = self.share
        if share is not None:
            indices = indices[share.rows]
        x, y = self.split.batch(indices)
        self.optimizer.zero_grad(set_to_none=True)
        with computing(self.precision, self.device):
            output = self.model(x)
        loss, correct = self.objective(output, y)
        if share is not None:
            loss = loss * share.weight
        loss.backward()
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if share is not None:
            loss, correct = share.sum_gradients(grads, loss, correct)
        norm = nn.utils.get_total_norm(grads)
        self._skip.copy_(self.meter.add(loss.detach(), correct, norm))
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(self.parameters, self.clip_value)
        if self.clip_norm is not None:
            # clip_value has changed the norm.
            total = norm if self.clip_value is None else nn.utils.get_total_norm(grads)
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, total)
        self.optimizer.step()
        project_recurrent_weights_(self.model)

    def first_non_finite(self, split: Split, indices: Tensor, training: bool = True) -> str:
        """Repeat a step without its update, from the weights it started from, and name the first parameter, output or
        gradient that is not finite, in the order in which they are computed. Without ``training``, repeat a step of an
        evaluation, up to the loss and with the model's running statistics.

        This reads values, so it cannot be captured, and in this process alone: it ends the exchange with the others.
        """
        model = self.model
        for module in model.modules():
            if getattr(module, "share", None) is not None:
                module.share = None  # type: ignore[assignment]
        for name, parameter in model.named_parameters():
            if not _finite(parameter):
                return f"parameter {name}"
        not_finite: list[str] = []

        def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda module, inputs, output: None if _finite(output) else not_finite.append(name)

        hooks = [
            module.register_forward_hook(watch(name)) for name, module in model.named_modules() if _is_leaf(module)
        ]
        try:
            model.train(training)
            model.zero_grad(set_to_none=True)
            x, y = split.batch(indices)
            with computing(self.precision, self.device):
                output = model(x)
            loss, _ = self.objective(output, y)
        finally:
            for hook in hooks:
                hook.remove()
        if not_finite:
            return f"output of {not_finite[0]}"
        if not _finite(loss) or not training:
            return "loss"
        loss.backward()
        # Backward visits the last layer first.
        for name, parameter in reversed(list(model.named_parameters())):
            if parameter.grad is not None and not _finite(parameter.grad):
                return f"gradient of {name}"
        # Every gradient is finite, but the sum of their squares overflows; or another dropout mask hides the cause.
        return "norm of all gradients"


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module has parameters of its own, as an IndRNN layer does even with a batch norm in it, or no parts."""
    return any(True for _ in module.parameters(recurse=False)) or not any(True for _ in module.children())


def _finite(value: Any) -> bool:
    """Whether all tensors in a module's output are finite."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, AffineSequence):
        value = tuple(vars(value).values())
    return not isinstance(value, tuple | list) or all(map(_finite, value))


def capture_cuda(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record ``step()`` as a CUDA graph and return the call that replays it."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    random_state = torch.cuda.get_rng_state(device)
    try:
        # If the capture fails, torch.cuda.graph leaves its own stream current; the outer block restores ours.
        with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph):
            step()
    except BaseException:
        _failed.append(graph)
        # The generator would stay in the state of a capture, and the next dropout would fail.
        fresh = torch.Generator(device)
        fresh.set_state(random_state)
        torch.cuda.default_generators[fresh.device.index].graphsafe_set_state(fresh)
        raise
    torch.cuda.synchronize(device)
    return graph.replay


class CaptureError(RunError):
    """``reason``: why a training step cannot be a CUDA graph."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"the training step cannot be captured as a CUDA graph ({reason}); use trainer.cuda_graph=auto or false"
        )


class GraphedStep:
    """``step(indices)`` as one graph. Its construction runs a few real steps: the caller restores what they changed, in
    place.

    Raises CaptureError with the reason if the step cannot be captured.
    """

    def __init__(
        self, step: Callable[[Tensor], None], indices: Tensor, device: torch.device, capture: Capture = capture_cuda
    ) -> None:
        self._indices = indices.clone()
        try:
            self._replay = capture(lambda: step(self._indices), device)
        except UserError:
            raise
        except RuntimeError as failure:  # out of memory, an operation that waits for the host, a CUDA error
            first: BaseException = failure  # the cause, not the end of the capture, which fails because of it
            while first.__context__ is not None:
                first = first.__context__
            raise CaptureError(" ".join(str(first).split())[:200]) from failure

    def __call__(self, indices: Tensor) -> None:
        self._indices.copy_(indices)
        self._replay()
