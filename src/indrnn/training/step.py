"""One training step: forward and backward pass, gradient clipping, optimizers.

The forward and backward pass never wait for the device and read no number that changes, so they run eagerly or as a
CUDA graph. Clipping and the optimizers run outside the graph, so any optimizer works.
"""

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config.schema import TrainerConfig
from ..data import Split
from ..errors import RunError, UserError
from ..layers import project_recurrent_weights_
from ..recurrence.dispatch import KernelError
from .device import autocast_context
from .distributed import Share
from .evaluation import Objective

WARM_UP = 3  # on a side stream, where libraries create workspaces and autograd streams before the capture

# Graphs whose capture failed. The allocator still asks them whether a capture is under way, so they must stay alive.
_failed: list[torch.cuda.CUDAGraph] = []


class Meter:
    """Sums over the steps since the last `clear`, in one tensor on the device."""

    NAMES = ("loss", "correct", "grad_norm", "count", "finite")

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(self.NAMES), device=device, dtype=torch.float32)
        self._one = torch.ones((), device=device, dtype=torch.float32)
        self._zeros = torch.zeros_like(self.sums[:-1])

    def add(self, loss: Tensor, correct: Tensor, grad_norm: Tensor) -> None:
        """Count a step, and whether its loss and gradient are finite, as those of all steps before it."""
        row = [loss, correct, grad_norm, self._one]
        sums, finite = self.sums[:-1], self.sums[-1]
        sums.add_(torch.stack([value.to(sums.dtype) for value in row]))
        finite.add_(torch.dot(sums, self._zeros) == 0)  # 0 · ∞ is not a number

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
        # Read once: a step must not wait for OmegaConf.
        self._precision, self._clip_value, self._clip_norm = cfg.precision, cfg.clip_value, cfg.clip_norm
        self.device, self.share = device, share
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.meter = Meter(device)
        self.gradients: Callable[[Tensor], tuple[Tensor, Tensor]] = self.compute_gradients
        """Sets ``grad`` of all parameters; returns loss and correct predictions. Replaced by its CUDA graph."""

    def compute_gradients(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The forward and the backward pass, eagerly."""
        share = self.share
        x, y = self.split.batch(indices if share is None else indices[share.rows])
        self.model.zero_grad(set_to_none=True)
        with autocast_context(self._precision, self.device):
            output = self.model(x) if share is None else share.network(x)
        loss, correct = self.objective(output, y, training=True)
        if share is not None:
            loss = loss * share.weight
        loss.backward()
        return loss.detach(), correct

    def warm_up(self, indices: Tensor, graph: bool | str) -> dict[str, str]:
        """Run a forward and backward pass, so that compiling, allocating and capturing are over when the clock starts.

        Restores the running statistics, not the generators. Returns what cannot be used, with the reason.

        Args:
            graph: trainer.cuda_graph. NCCL cannot end while a graph is alive, so several processes use none.
        """
        if graph is True and self.share is not None:
            raise UserError("trainer.cuda_graph=true: several processes train without a CUDA graph; use auto or false")
        weights, fallbacks = copy.deepcopy(self.model.state_dict()), {}
        self.model.train()
        if graph and self.device.type == "cuda" and self.share is None:
            try:
                self.capture(indices)
            except RunError as failure:
                if graph is True or isinstance(failure, KernelError):  # eager steps would fail, too
                    raise
                fallbacks["cuda_graph"] = str(failure)
                warnings.warn(f"training runs without a CUDA graph, which is slow: {failure}", stacklevel=2)
        self.gradients(indices)
        self.model.load_state_dict(weights)
        return fallbacks

    def capture(self, indices: Tensor) -> None:
        """Replace `gradients` by a CUDA graph of it. Raises RunError if it cannot be captured."""
        fixed, device = indices.clone(), self.device
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        random_state = torch.cuda.get_rng_state(device)
        try:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self.compute_gradients(fixed)
            torch.cuda.current_stream(device).wait_stream(stream)
            torch.cuda.synchronize(device)
            # If the capture fails, torch.cuda.graph leaves its own stream current; the outer block restores ours.
            with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph):
                results = self.compute_gradients(fixed)
            torch.cuda.synchronize(device)
        except UserError:
            raise
        except Exception as failure:  # out of memory, a synchronization, a compiler's or the driver's own exception
            _failed.append(graph)
            # The generator would stay in the state of a capture, and the next dropout would fail.
            fresh = torch.Generator(device)
            fresh.set_state(random_state)
            torch.cuda.default_generators[fresh.device.index].graphsafe_set_state(fresh)
            reason = _root_cause(failure)
            raise RunError(f"no CUDA graph of a training step ({reason}); use trainer.cuda_graph=false") from failure

        def replay(indices: Tensor) -> tuple[Tensor, Tensor]:
            fixed.copy_(indices)
            graph.replay()
            return results

        self.gradients = replay

    def __call__(self, indices: Tensor) -> None:
        loss, correct = self.gradients(indices)
        if self.share is not None:
            loss, correct = self.share.total(loss, correct)
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        grads = [torch.view_as_real(grad) if grad.is_complex() else grad for grad in grads]
        norm = nn.utils.get_total_norm(grads)
        self.meter.add(loss, correct, norm)
        if self._clip_value is not None:
            torch._foreach_clamp_max_(grads, self._clip_value)
            torch._foreach_clamp_min_(grads, -self._clip_value)
            norm = nn.utils.get_total_norm(grads)
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self._clip_norm, norm)
        for optimizer in self.optimizers:
            optimizer.step()
        project_recurrent_weights_(self.model)


def _root_cause(failure: BaseException) -> str:
    """The first exception in one line, not the end of the capture, which fails because of it."""
    while failure.__context__ is not None:
        failure = failure.__context__
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
