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
    with torch.cuda.graph(graph):
        step()
    torch.cuda.synchronize(device)
    return graph.replay


class GraphedStep:
    """``step(indices)`` as one graph. Making it runs a few real steps: the caller restores what they changed, in place.

    Raises RunError with the reason if the step cannot be captured.
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
            reason = " ".join(str(failure).split())[:200]
            raise RunError(
                f"the training step cannot be captured as a CUDA graph ({reason}); use trainer.cuda_graph=false"
            ) from failure

    def __call__(self, indices: Tensor) -> None:
        self._indices.copy_(indices)
        self._replay()
