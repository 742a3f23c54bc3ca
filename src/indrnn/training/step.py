"""One optimisation step made of tensor operations alone: it never waits for the device and reads no Python number that
changes, so the same function runs eagerly and inside a CUDA graph (captured once, then started with a single call).

What changes from step to step is in buffers that the graph reads: the indices in `GraphedStep`, the learning rate in
the optimizer, the random state in CUDA's generator.

B batch, T time steps, D input features, K outputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config.schema import TrainerConfig
from ..data import Split
from ..errors import RunError, UserError
from ..layers import project_recurrent_weights_
from .device import computing
from .distributed import Share
from .evaluation import Objective

WARM_UP = 3  # on a side stream, where libraries create workspaces and autograd streams before the capture

# Graphs whose capture failed. The allocator still asks them whether a capture is under way, so they must stay alive.
_failed: list[torch.cuda.CUDAGraph] = []

Capture = Callable[[Callable[[], None], torch.device], Callable[[], None]]


class Meter:
    """Sums over the steps since the last reading, and the first step that was not finite, all on the device."""

    NAMES = ("loss", "correct", "grad_norm", "count", "steps", "first_bad")

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.correct = torch.zeros((), device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.count = torch.zeros((), device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        # -1: none so far.
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, loss: Tensor, correct: Tensor, grad_norm: Tensor) -> Tensor:
        """Count a step. Returns a scalar that is true from the first non-finite step on."""
        self.steps.add_(1)
        bad = ~(loss.isfinite() & grad_norm.isfinite())
        self.first_bad.copy_(torch.where(bad & (self.first_bad < 0), self.steps, self.first_bad))
        self.loss.add_(loss)
        self.correct.add_(correct)
        self.grad_norm.add_(grad_norm)
        self.count.add_(1)
        return self.first_bad >= 0

    def read(self) -> dict[str, float]:
        """Everything as Python numbers: one wait for the device."""
        values = torch.stack([getattr(self, name).float() for name in self.NAMES[:4]]).tolist()
        return dict(zip(self.NAMES, [*values, int(self.steps), int(self.first_bad)], strict=True))

    def clear(self) -> None:
        """Begin a new interval."""
        for name in self.NAMES[:4]:
            getattr(self, name).zero_()

    def reset(self) -> None:
        """As new."""
        self.clear()
        self.steps.zero_()
        self.first_bad.fill_(-1)

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).cpu() for name in self.NAMES}

    def restore(self, state: dict[str, Tensor]) -> None:
        """In place, because a captured graph has the addresses."""
        for name in self.NAMES:
            getattr(self, name).copy_(state[name])


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
