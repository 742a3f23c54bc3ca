"""One training step: forward and backward pass, gradient clipping, optimizers.

The forward and backward pass never wait for the device and read no number that changes, so they run eagerly or as a
CUDA graph. Clipping and the optimizers run outside the graph, so any optimizer works.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config.schema import TrainerConfig
from ..data import Split
from ..errors import RunError, UserError
from ..layers import project_recurrent_weights_
from .device import autocast_context
from .distributed import Processes, Share
from .evaluation import Objective

WARM_UP = 3  # on a side stream, where libraries create workspaces and autograd streams before the capture

# Graphs whose capture failed. The allocator still asks them whether a capture is under way, so they must stay alive.
_failed: list[torch.cuda.CUDAGraph] = []

Gradients = Callable[[Tensor], tuple[Tensor, Tensor]]
Capture = Callable[[Callable[[], None], torch.device], Callable[[], None]]


class Meter:
    """Sums over the steps since the last `clear`, in one tensor on the device."""

    NAMES = ("loss", "correct", "grad_norm", "count", "finite")

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(self.NAMES), device=device, dtype=torch.float32)
        self._one = torch.ones((), device=device, dtype=torch.float32)

    def add(self, loss: Tensor, correct: Tensor, grad_norm: Tensor) -> None:
        """Count a step, and whether its loss and gradient are finite, as those of all steps before it."""
        finite = ((loss + grad_norm) * 0 == 0) & (self.sums[-1] == self.sums[-2])  # fewer kernels than isfinite()
        row = [loss, correct, grad_norm, self._one, finite]
        self.sums += torch.stack([value.to(self.sums.dtype) for value in row])

    def read(self) -> dict[str, float]:
        """The sums as Python numbers: one synchronization with the device."""
        return dict(zip(self.NAMES, self.sums.tolist(), strict=True))

    def clear(self) -> None:
        """Start a new interval."""
        self.sums.zero_()


class TrainingStep:
    """``step(indices)`` performs one update with the training sequences at ``indices`` (B,).

    Gradients are clipped by value (cfg.clip_value), then by their global norm (cfg.clip_norm). The meter gets the norm
    before clipping.

    Args:
        share: this process's part of the batch, if several processes train together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        objective: Objective,
        split: Split,
        cfg: TrainerConfig,
        device: torch.device,
        share: Share | None = None,
    ) -> None:
        self.model, self.optimizers, self.objective, self.split = model, optimizers, objective, split
        self.clip_norm: float | None = cfg.clip_norm
        self.clip_value: float | None = cfg.clip_value
        self.precision: str = cfg.precision
        self.device, self.share = device, share
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.meter = Meter(device)
        self.gradients: Gradients = self.compute_gradients
        """Sets ``grad`` of all parameters; returns loss and correct predictions. Replaced by its CUDA graph."""

    def compute_gradients(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The forward and the backward pass, eagerly."""
        share = self.share
        x, y = self.split.batch(indices if share is None else indices[share.rows])
        self.model.zero_grad(set_to_none=True)
        with autocast_context(self.precision, self.device):
            output = self.model(x)
        loss, correct = self.objective(output, y, training=True)
        if share is not None:
            loss = loss * share.weight
        loss.backward()
        return loss.detach(), correct

    def __call__(self, indices: Tensor) -> None:
        loss, correct = self.gradients(indices)
        if self.share is not None:
            loss, correct = self.share.sum_gradients(self.parameters, loss, correct)
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        grads = [torch.view_as_real(grad) if grad.is_complex() else grad for grad in grads]
        norm = nn.utils.get_total_norm(grads)
        self.meter.add(loss, correct, norm)
        if self.clip_value is not None:
            torch._foreach_clamp_max_(grads, self.clip_value)
            torch._foreach_clamp_min_(grads, -self.clip_value)
            norm = nn.utils.get_total_norm(grads)
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        for optimizer in self.optimizers:
            optimizer.step()
        project_recurrent_weights_(self.model)


def capture_cuda(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture ``step()`` as a CUDA graph and return the call that replays it."""
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


def can_use_graph(device: torch.device, processes: Processes) -> bool:
    """Whether the passes may be a CUDA graph. NCCL cannot end while one is alive, so several processes use none."""
    return device.type == "cuda" and processes.size == 1


class GraphedGradients:
    """`TrainingStep.compute_gradients` as one CUDA graph.

    Raises:
        CaptureError: it cannot be captured. The exception keeps neither the step's tensors nor its autograd graph.
    """

    def __init__(
        self, compute: Gradients, indices: Tensor, device: torch.device, capture: Capture = capture_cuda
    ) -> None:
        self._indices = indices.clone()
        reason = None
        try:
            self._replay = capture(lambda: self._keep(compute(self._indices)), device)
        except UserError:
            raise
        except Exception as failure:  # out of memory, a synchronization, a compiler's or the driver's own exception
            reason = _root_cause(failure)
        if reason is not None:
            raise CaptureError(reason)  # not within the handler: __context__ would keep the failed step

    def _keep(self, results: tuple[Tensor, Tensor]) -> None:
        self._results = results

    def __call__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self._indices.copy_(indices)
        self._replay()
        return self._results


def _root_cause(failure: BaseException) -> str:
    """The first exception in one line, not the end of the capture, which fails because of it."""
    while failure.__context__ is not None:
        failure = failure.__context__
    return " ".join(str(failure).split())[:200] or type(failure).__name__
