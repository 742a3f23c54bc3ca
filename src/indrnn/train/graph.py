"""A training step as one CUDA graph: captured once, then started with a single call.

Works for whatever the step is made of as long as it keeps to `TrainingStep`'s rule: tensors only, no wait for the host.
What changes from step to step lives in buffers that the graph reads: the indices here, the learning rate in the
optimizer, the random state in CUDA's generator.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import RunError, UserError

WARM_UP = 3  # on a side stream, so that libraries make their workspaces and autograd its streams before the capture

# Graphs whose capture failed: the allocator goes on asking them whether it is under way, so they must stay alive.
_failed: list[torch.cuda.CUDAGraph] = []

Capture = Callable[[Callable[[], None], torch.device], Callable[[], None]]


def capture_cuda(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record ``step()`` as a CUDA graph and return its replay."""
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
        # torch.cuda.graph leaves its own stream current if the capture fails; the outer block puts ours back.
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
    """``reason``: why a training step is no CUDA graph."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"the training step cannot be captured as a CUDA graph ({reason}); use trainer.cuda_graph=auto or false"
        )


class GraphedStep:
    """``step(indices)`` as one graph. Making it runs a few real steps: the caller restores what they changed, in place.

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
            first: BaseException = failure  # and not the end of the capture, which fails in consequence
            while first.__context__ is not None:
                first = first.__context__
            raise CaptureError(" ".join(str(first).split())[:200]) from failure

    def __call__(self, indices: Tensor) -> None:
        self._indices.copy_(indices)
        self._replay()
