"""One run in several processes: ``torchrun --nproc-per-node=2 -m indrnn ...``.

Each process has the whole network and computes some rows of every batch; trainer.batch_size is the global batch size.
DistributedDataParallel averages the gradients; batch-norm statistics and their gradients are summed in every layer.
Each process draws the dropout masks of the global batch from the same stream. The result equals that of a single
process up to rounding, and all processes agree to the last bit. Only rank 0 writes. gloo connects CPUs, nccl GPUs (not
tried yet).
"""

import atexit
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from ..errors import RunError, UserError
from ..layers import recurrent_layers

T = TypeVar("T")


class Processes:
    """The processes of a run. A single process communicates nothing."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.is_rank_zero = rank == 0
        """Whether this process writes and prints."""

    def rows(self, count: int) -> slice:
        """This process's rows of a batch of ``count`` sequences."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def broadcast_from_rank_zero(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 and return its value in every process."""
        value = [work() if self.is_rank_zero else None]
        if self.size > 1:
            dist.broadcast_object_list(value, src=0)
        return value[0]  # type: ignore[return-value]

    def all_reduce_max(self, number: int) -> int:
        """The largest of all processes' numbers."""
        largest = torch.tensor(number, device="cpu")
        if self.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def share(self, model: nn.Module, batch_size: int) -> "Share | None":
        """Prepare ``model`` to see part of each batch in training; None for a single process.

        Raises:
            UserError: a part would be empty, or a module cannot be synchronized.
        """
        if self.size == 1:
            return None
        if batch_size < self.size:
            raise UserError(f"trainer.batch_size={batch_size}: {self.size} processes need a sequence each; raise it")
        share = Share(self, batch_size)
        folded = {id(layer.norm) for _, layer in recurrent_layers(model)}
        for name, module in model.named_modules():
            foreign_norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in folded
            if foreign_norm or (isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1):
                kind = type(module).__name__
                fix = "use one process, or model.dropout=0 for the dropout between the layers of an LSTM"
                raise UserError(f"{name} ({kind}) cannot be synchronized between processes; {fix}")
            if type(module) is nn.Dropout:
                module.__class__ = _SharedDropout
                vars(module)["share"] = share
        for _, layer in recurrent_layers(model):
            layer.share = share
        # Broadcasts the initial values, which may differ in their last bits between different machines.
        warnings.filterwarnings("ignore", "find_unused_parameters=True")
        share.network = DistributedDataParallel(model, find_unused_parameters=True)
        return share


SINGLE_PROCESS = Processes()


class Share:
    """The rows of each training batch that this process computes, and how they are combined with the others."""

    network: DistributedDataParallel

    def __init__(self, processes: Processes, batch_size: int) -> None:
        self._processes, self._batch_size = processes, batch_size
        self.rows = processes.rows(batch_size)
        self.weight = (self.rows.stop - self.rows.start) * processes.size / batch_size
        """The weight of this process's mean loss, so that the processes' mean is that of the whole batch."""

    def join(self, mean: Tensor, variance: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor | int]:
        """From mean and biased variance (H,) of this process's n values per unit, those of all processes' values, and
        their number. Differentiable; computed in float64, where cancellation does not matter.

        Without gradients nothing is joined: every process re-estimates the statistics from all samples."""
        if not torch.is_grad_enabled():
            return mean, variance, n
        mean64 = mean.double()
        sums = _Sum.apply(torch.cat([mean64, variance.double() + mean64.square(), mean64.new_ones(1)]) * n)
        count = sums[-1].detach()
        first, second = (sums[:-1] / count).chunk(2)
        return first.to(mean.dtype), (second - first.square()).clamp(min=0.0).to(variance.dtype), count

    def total(self, loss: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the whole batch, and the correct predictions in it."""
        sums = torch.stack([loss / self._processes.size, correct.to(loss.dtype)])
        dist.all_reduce(sums)
        return sums[0], sums[1]

    def mask(self, like: Tensor, keep: float) -> Tensor:
        """This process's rows (b, H) of the dropout mask of a whole batch (B, H)."""
        whole = like.new_empty(self._batch_size, *like.shape[1:])
        return whole.bernoulli_(keep).div_(keep)[self.rows]


class _Sum(torch.autograd.Function):
    """The sum over all processes (torch.distributed.nn.functional.all_reduce is deprecated since PyTorch 2.14)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _Sum.apply(gradients[0])


class _SharedDropout(nn.Dropout):
    """nn.Dropout of (B, H) whose mask is drawn for the whole batch."""

    share: Share

    def forward(self, input: Tensor) -> Tensor:
        return input * self.share.mask(input, 1 - self.p) if self.training and self.p > 0 else input


@cache
def _join() -> Store:
    """Join the other processes, once for all runs of a command: a second store at the same address could connect to
    the first while that is closing."""
    # Optimizers import this. With PyTorch 2.14, an import while the group exists keeps its threads alive after
    # destroy_process_group, and a thread that frees a tensor while the interpreter ends aborts the process.
    import_module("torch._dynamo")
    try:
        store, rank, size = next(rendezvous("env://"))
    except ValueError as failure:
        raise UserError(f"RANK and WORLD_SIZE are set: {failure}; start with torchrun, or unset them") from failure
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    atexit.register(dist.destroy_process_group)
    return store


@contextmanager
def joined_processes(device: str) -> Iterator[Processes]:
    """The processes that torchrun started together, joined within the block, or a single process.

    The first process that fails reports why; the others, which fail because of it, exit without a message. ``device``
    is cfg.device. Raises UserError if it cannot be shared, or if the environment variables are inconsistent.
    """
    # A scheduler may leave one of the two behind.
    if not os.environ.get("RANK") or os.environ.get("WORLD_SIZE", "") in ("", "1"):
        yield SINGLE_PROCESS
        return
    if device in ("auto", "cuda") and torch.cuda.is_available():
        gpu, gpus = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
        if gpu >= gpus:
            raise UserError(f"process {gpu + 1} has no GPU: there are {gpus}; use --nproc-per-node={gpus}")
        torch.cuda.set_device(gpu)
    elif device == "mps":
        raise UserError("device=mps cannot be used by several processes; use device=cpu")
    store = None
    try:
        store = _join()
        yield Processes(dist.get_rank(), dist.get_world_size())
    except (Exception, KeyboardInterrupt) as failure:
        if threading.current_thread() is threading.main_thread():
            # torchrun ends all processes once one has failed; this one is ending anyway.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with suppress(RuntimeError):  # the process with the store has ended
            if store is not None and store.add("failures", 1) > 1:
                sys.exit(getattr(failure, "exit_code", 1))
        if isinstance(failure, dist.DistError) or "gloo" in str(failure):
            lost = "another process of this run has ended or cannot be reached"
            raise RunError(f"{lost}; rerun the same command to resume from the last checkpoint") from failure
        raise
