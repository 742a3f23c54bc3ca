"""One run in several processes, ``torchrun --nproc-per-node=2 -m indrnn ...``, which compute what one process computes,
apart from rounding.

Each process has the whole network and computes some rows of every batch; trainer.batch_size is that of all together.
Loss and gradients are summed in one transfer per step. Batch-norm statistics and their gradients are joined in every
layer. Every process draws the dropout masks of the whole batch, from the same stream. In an evaluation each process
computes whole batches. So all processes have the same numbers, to the last bit, and only the first one writes.

Data are transferred by gloo between CPUs and by nccl between GPUs. On GPUs this has not been tried yet.
"""

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..errors import RunError, UserError
from ..layers import recurrent_layers

T = TypeVar("T")

_groups = itertools.count()  # numbers the groups of this process: each job of a sweep has its own


class ProcessLost(RunError):  # noqa: N818
    """Another process of the run has ended, or cannot be reached."""


class Processes:
    """The processes of a run; one that is alone transfers nothing."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def part(self, indices: Tensor) -> Tensor:
        """This process's rows of a batch (B,)."""
        return indices[self._rows(len(indices))]

    def _rows(self, count: int) -> slice:
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def from_leader(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the leading process and return its value in every process."""
        value = [work() if self.leads else None]
        self._transfer(lambda: dist.broadcast_object_list(value, src=0))
        return value[0]  # type: ignore[return-value]

    def one_a_machine_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` in every process, but first in one on each machine: it may fill a folder that all read."""
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            self.agree(0)
            return work()
        value = work()
        self.agree(0)
        return value

    def agree(self, number: int) -> int:
        """The largest of all processes' numbers. All must call it equally often."""
        largest = torch.tensor(number)
        self._transfer(lambda: dist.all_reduce(largest, dist.ReduceOp.MAX))
        return int(largest)

    def sum_(self, values: Tensor) -> Tensor:
        """Sum ``values`` over all processes, in place."""
        self._transfer(lambda: dist.all_reduce(values))
        return values

    def share(self, model: nn.Module, batch_size: int, norm_batch: int) -> "Share | None":
        """Prepare ``model`` to see part of each batch. ``norm_batch``: sequences in the smallest batch that statistics
        are estimated from. None for a single process."""
        if self.size == 1:
            return None
        for key, count in (("trainer.batch_size", batch_size), ("trainer.bn_samples", norm_batch)):
            if count < self.size:
                raise UserError(
                    f"{key} leaves {count} sequences for {self.size} processes, and each needs one; raise it, or use "
                    "fewer processes"
                )
        share = Share(self, batch_size, self._rows(batch_size))
        folded = {id(layer.norm) for _, layer in recurrent_layers(model)}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in folded:
                raise UserError(f"the batch norm {name} cannot be joined between processes; train in one process")
            if isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1:
                raise UserError(
                    f"model.dropout={module.dropout}: {type(module).__name__} itself draws the masks between its "
                    "layers and cannot share them; set model.dropout=0, model.num_layers=1, or train in one process"
                )
            for child_name, child in list(module.named_children()):
                if type(child) is nn.Dropout:
                    setattr(module, child_name, _SharedDropout(child.p, share))
        for _, layer in recurrent_layers(model):
            layer.share = share
        # Initial values may differ in their last bits between unlike machines.
        for tensor in model.state_dict().values():
            self._transfer(partial(dist.broadcast, tensor, src=0))
        return share

    def _transfer(self, work: Callable[[], object]) -> None:
        if self.size > 1:
            _transfer(work)


ALONE = Processes()


class Share:
    """The rows of each training batch that this process computes, and how they are joined to the others."""

    def __init__(self, processes: Processes, batch_size: int, rows: slice) -> None:
        self.rows = rows
        self.weight = (rows.stop - rows.start) / batch_size
        """The weight of this process's mean loss in that of the whole batch."""
        self._processes, self._batch_size = processes, batch_size

    def join(self, mean: Tensor, variance: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """From the mean and biased variance (H,) of this process's n values per unit, those of all processes' values,
        and their number. Differentiable. In float64, where cancellation does not matter."""
        mean64 = mean.double()
        moments = torch.cat([mean64, variance.double() + mean64.square(), mean64.new_ones(1)]) * n
        sums = _Sum.apply(moments, self._processes)
        count = sums[-1].detach()
        first, second = (sums[:-1] / count).chunk(2)
        return first.to(mean.dtype), (second - first.square()).clamp(min=0.0).to(variance.dtype), count

    def mask(self, like: Tensor, keep: float) -> Tensor:
        """This process's rows (b, H) of the dropout mask of a batch (B, H)."""
        whole = like.new_empty(self._batch_size, *like.shape[1:])
        return whole.bernoulli_(keep).div_(keep)[self.rows]

    def sum_gradients(self, gradients: Sequence[Tensor], loss: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the gradients in place, and the loss and the number of right answers, over all processes."""
        parts = [*gradients, loss.detach(), correct.to(loss.dtype)]
        flat = self._processes.sum_(torch.cat([part.reshape(-1) for part in parts]))
        *summed, loss, correct = flat.split([part.numel() for part in parts])
        torch._foreach_copy_(list(gradients), [new.view_as(old) for new, old in zip(summed, gradients, strict=True)])
        return loss.squeeze(0), correct.squeeze(0)


class _Sum(torch.autograd.Function):
    """The sum over all processes. Every process's use of it adds to the gradient of every summand: a sum as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return processes.sum_(values.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.processes.sum_(gradients[0].clone()), None


class _SharedDropout(nn.Module):
    """nn.Dropout of (B, H) whose mask is drawn for the whole batch."""

    def __init__(self, p: float, share: Share) -> None:
        super().__init__()
        self.p = p
        self.share: Share | None = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return F.dropout(x, self.p) if self.share is None else x * self.share.mask(x, 1 - self.p)


@cache
def _meeting_place() -> tuple[Store, int, int]:
    """The store that the processes share, the rank of this one and their number. All runs of a command share one: a
    second store at the same address could connect to the first while that is closing."""
    return next(rendezvous("env://"))


@contextmanager
def joined_processes(device: str) -> Iterator[Processes]:
    """The processes that torchrun started together, joined within the block; a single one if it started none.

    The first process that fails reports why; the others, which fail because of it, end silently. ``device`` is
    cfg.device. Raises UserError if the device cannot be shared.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield ALONE
        return
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and torch.cuda.is_available():
        gpu, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if gpu >= gpus:
            raise UserError(f"process {gpu + 1} lacks a GPU: there are {gpus}; use --nproc-per-node={gpus}")
        torch.cuda.set_device(gpu)
    elif device == "mps":
        raise UserError("device=mps cannot be used by several processes; use device=cpu")
    # Optimizers import this. If the group exists by then (PyTorch 2.14), the import keeps the group's threads alive
    # after destroy_process_group, and a thread that frees a tensor while the interpreter ends aborts the process.
    import_module("torch._dynamo")
    store, rank, size = _meeting_place()
    store = PrefixStore(f"indrnn{next(_groups)}", store)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        _transfer(lambda: dist.init_process_group(backend, store=store, rank=rank, world_size=size))
        yield Processes(dist.get_rank(), dist.get_world_size())
    except (Exception, KeyboardInterrupt) as failure:
        if threading.current_thread() is threading.main_thread():
            # torchrun ends all processes once one has failed; this one is ending anyway.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        first = True
        with suppress(RuntimeError):  # the process with the store has ended
            first = store.add("failures", 1) == 1
        if first:
            raise
        sys.exit(getattr(failure, "exit_code", 1))
    finally:
        with suppress(RuntimeError, AssertionError):  # AssertionError: there is no group
            dist.destroy_process_group()


def _transfer(work: Callable[[], object]) -> None:
    try:
        work()
    except RuntimeError as failure:
        raise ProcessLost("another process of this run has ended or cannot be reached") from failure
