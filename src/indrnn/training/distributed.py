"""One run in several processes: ``torchrun --nproc-per-node=2 -m indrnn ...``.

Each process has the whole network and computes some rows of every batch; trainer.batch_size is the global batch size.
Gradients and loss are all-reduced once per step, batch-norm statistics and their gradients in every layer. Each process
draws the dropout masks of the global batch from the same stream. The result equals that of a single process up to
rounding, and all processes agree to the last bit. Only rank 0 writes. gloo connects CPUs, nccl GPUs (not tried yet).
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
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..errors import RunError, UserError
from ..layers import recurrent_layers

T = TypeVar("T")

_groups = itertools.count()  # numbers the process groups of this process: each job of a sweep has its own


class ProcessLost(RunError):  # noqa: N818
    """Another process of the run has ended or cannot be reached."""


class Processes:
    """The processes of a run. A single process communicates nothing."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """This process's rows of a batch of ``count`` sequences."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def broadcast_from_rank_zero(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 and return its value in every process."""
        value = [work() if self.is_rank_zero else None]
        self._communicate(lambda: dist.broadcast_object_list(value, src=0))
        return value[0]  # type: ignore[return-value]

    def one_per_machine_first(self, work: Callable[[], T]) -> T:
        """Run ``work``, which may fill a folder, in one process on each machine before the others."""
        first = self.size == 1 or int(os.environ.get("LOCAL_RANK") or 0) == 0
        if first:
            value = work()
        self.all_reduce_max(0)
        return value if first else work()

    def all_reduce_max(self, number: int) -> int:
        """The largest of all processes' numbers."""
        largest = torch.tensor(number, device="cpu")
        self._communicate(lambda: dist.all_reduce(largest, dist.ReduceOp.MAX))
        return int(largest)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum ``values`` over all processes, in place."""
        self._communicate(lambda: dist.all_reduce(values))
        return values

    def share(self, model: nn.Module, batch_size: int, norm_batch: int) -> "Share | None":
        """Prepare ``model`` to see part of each batch; None for a single process. ``norm_batch``: the sequences in the
        smallest batch that batch-norm statistics are estimated from. Raises UserError if a part would be empty, or a
        module cannot be synchronized."""
        if self.size == 1:
            return None
        for key, count in (("trainer.batch_size", batch_size), ("trainer.bn_samples", norm_batch)):
            if count < self.size:
                raise UserError(
                    f"{key} leaves {count} sequences for {self.size} processes, and each needs one; raise it, or use "
                    "fewer processes"
                )
        share = Share(self, batch_size)
        folded = {id(layer.norm) for _, layer in recurrent_layers(model)}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in folded:
                raise UserError(f"the batch norm {name} cannot be synchronized between processes; use one process")
            if isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1:
                raise UserError(
                    f"model.dropout={module.dropout}: {type(module).__name__} itself draws the masks between its "
                    "layers and cannot share them; set model.dropout=0 or model.num_layers=1, or use one process"
                )
            for child_name, child in list(module.named_children()):
                if type(child) is nn.Dropout:
                    setattr(module, child_name, _SharedDropout(child.p, share))
        for _, layer in recurrent_layers(model):
            layer.share = share
        # Initial values may differ in their last bits between different machines.
        for tensor in model.state_dict().values():
            self._communicate(partial(dist.broadcast, tensor, src=0))
        return share

    def _communicate(self, work: Callable[[], object]) -> None:
        if self.size > 1:
            _communicate(work)


SINGLE_PROCESS = Processes()


class Share:
    """The rows of each training batch that this process computes, and how they are combined with the others."""

    def __init__(self, processes: Processes, batch_size: int) -> None:
        self._processes, self._batch_size = processes, batch_size
        self.rows = processes.rows(batch_size)
        self.weight = (self.rows.stop - self.rows.start) / batch_size
        """The weight of this process's mean loss in that of the whole batch."""

    def join(self, mean: Tensor, variance: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """From mean and biased variance (H,) of this process's n values per unit, those of all processes' values, and
        their number. Differentiable; computed in float64, where cancellation does not matter."""
        mean64 = mean.double()
        moments = torch.cat([mean64, variance.double() + mean64.square(), mean64.new_ones(1)]) * n
        sums = _AllReduceSum.apply(moments, self._processes)
        count = sums[-1].detach()
        first, second = (sums[:-1] / count).chunk(2)
        return first.to(mean.dtype), (second - first.square()).clamp(min=0.0).to(variance.dtype), count

    def mask(self, like: Tensor, keep: float) -> Tensor:
        """This process's rows (b, H) of the dropout mask of a whole batch (B, H)."""
        whole = like.new_empty(self._batch_size, *like.shape[1:])
        return whole.bernoulli_(keep).div_(keep)[self.rows]

    def sum_gradients(self, parameters: Sequence[Tensor], loss: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
        """Sum ``grad`` of the parameters, in place, and loss and correct predictions over all processes.

        A parameter that has a gradient in any process has one in all of them afterwards.
        """
        missing = [parameter.grad is None for parameter in parameters]
        grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        reals = [torch.view_as_real(grad) if grad.is_complex() else grad for grad in grads]
        present = torch.tensor([not each for each in missing], device=loss.device)
        parts = [*reals, loss.detach(), correct, present]
        flat = self._processes.all_reduce_sum(torch.cat([part.reshape(-1).to(loss.dtype) for part in parts]))
        *summed, loss, correct, present = flat.split([part.numel() for part in parts])
        torch._foreach_copy_(reals, [new.view_as(old) for new, old in zip(summed, reals, strict=True)])
        if any(missing):
            for parameter, grad, holders in zip(parameters, grads, present.tolist(), strict=True):
                parameter.grad = grad if holders else None
        return loss.squeeze(0), correct.squeeze(0)


class _AllReduceSum(torch.autograd.Function):
    """torch.distributed.nn.functional.all_reduce that raises ProcessLost, also in the backward pass."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return processes.all_reduce_sum(values.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.processes.all_reduce_sum(gradients[0].clone()), None


class _SharedDropout(nn.Module):
    """nn.Dropout of (B, H) whose mask is drawn for the whole batch."""

    def __init__(self, p: float, share: Share) -> None:
        super().__init__()
        self.p = p
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return x * self.share.mask(x, 1 - self.p) if self.training and self.p > 0 else x


def launched_processes() -> tuple[int, int] | None:
    """Rank and number of the processes that a launcher such as torchrun started; None for a single process.

    Raises:
        UserError: the environment variables do not describe a group of processes.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank, size, *_ = values = [os.environ.get(name, "") for name in names]
    if not rank or size in ("", "1"):
        return None
    found = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    numbers = all(value.isdecimal() for value in (rank, size, values[3]))
    if not (numbers and values[2] and int(rank) < int(size)):
        raise UserError(
            f"{found}: these environment variables do not describe a group of processes; start with torchrun, or unset "
            "RANK to use a single process"
        )
    return int(rank), int(size)


@cache
def _rendezvous() -> tuple[Store, int, int]:
    """The store that the processes share, rank and size. All runs of a command share one: a second store at the same
    address could connect to the first while that is closing."""
    if os.environ["RANK"] == "0":
        names = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        print("waiting for {} processes at {}:{} ...".format(*map(os.environ.get, names)), file=sys.stderr, flush=True)
    return next(rendezvous("env://"))


@contextmanager
def joined_processes(device: str) -> Iterator[Processes]:
    """The processes that torchrun started together, joined within the block, or a single process.

    The first process that fails reports why; the others, which fail because of it, exit without a message. ``device``
    is cfg.device. Raises UserError if it cannot be shared, or if the environment variables are inconsistent.
    """
    if launched_processes() is None:
        yield SINGLE_PROCESS
        return
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and torch.cuda.is_available():
        gpu, gpus = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
        if gpu >= gpus:
            raise UserError(f"process {gpu + 1} has no GPU: there are {gpus}; use --nproc-per-node={gpus}")
        torch.cuda.set_device(gpu)
    elif device == "mps":
        raise UserError("device=mps cannot be used by several processes; use device=cpu")
    # Optimizers import this. With PyTorch 2.14, an import while the group exists keeps its threads alive after
    # destroy_process_group, and a thread that frees a tensor while the interpreter ends aborts the process.
    import_module("torch._dynamo")
    store, rank, size = _communicate(_rendezvous)
    store = PrefixStore(f"indrnn{next(_groups)}", store)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        _communicate(lambda: dist.init_process_group(backend, store=store, rank=rank, world_size=size))
        yield Processes(rank, size)
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


def _communicate(work: Callable[[], T]) -> T:
    try:
        return work()
    except RuntimeError as failure:
        raise ProcessLost("another process of this run has ended or cannot be reached") from failure
