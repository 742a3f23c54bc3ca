"""Whole training steps as `indrnn.training` makes them, against their matrix products alone.

The data are the bundled mnist5k images: batches gathered on the device, forward, backward, clipping, Adam.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from indrnn.config.compose import load_config
from indrnn.data import Split, make_task
from indrnn.errors import RunError, UserError
from indrnn.files import write_atomically
from indrnn.models import build_model
from indrnn.training.device import flush_denormals, precision_refusal, set_precision
from indrnn.training.distributed import SINGLE_PROCESS, Processes
from indrnn.training.evaluation import Objective
from indrnn.training.optimizer import build_optimizers
from indrnn.training.step import GraphedGradients, TrainingStep

from .clock import Clock, Work, peak_memory
from .grid import ratio_table

T = 784
# Steps per timed call on a GPU.
STEPS_A_CALL = 20
PROFILED_STEPS = 10


@dataclass(frozen=True)
class StepRow:
    """One kind of training step. Times in seconds.

    products_seconds: the products with the weights between layers (forward, gradient of the input, gradient of the
    weight; into memory allocated before) in float32, whatever the step's precision, in turns with the step;
    floor_seconds adds the least that the recurrences must move, five tensors per layer, at the speed of a copy. None
    for the LSTM.
    """

    model: str
    layers: int
    units: int
    B: int
    precision: str
    launch: str
    status: str = "skipped"
    reason: str | None = None
    parameters: int | None = None
    median_seconds: float | None = None
    q20_seconds: float | None = None
    q80_seconds: float | None = None
    repeats: int | None = None
    steps_per_second: float | None = None
    products_seconds: float | None = None
    over_products: float | None = None
    floor_seconds: float | None = None
    peak_memory_bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.model} {self.layers} x {self.units}, B={self.B}, {self.precision}, {self.launch}"


def cases(device: torch.device, quick: bool) -> list[StepRow]:
    """The steps to time: every precision that is faster on the device; on a GPU with and without a CUDA graph. The LSTM
    has equal units (68,362 parameters) and equal parameters (86,122 with 144 units; the IndRNN 86,410)."""
    networks = [("indrnn", 6, 128), ("lstm", 1, 128), ("lstm", 1, 144)]
    networks += [] if quick else [("indrnn", 12, 128)]
    batches = (32,) if quick else (32, 128)
    cuda = device.type == "cuda"
    precisions = [name for name in ("float32", "tf32", "bfloat16") if precision_refusal(name, device) is None]
    launches = ("graph", "eager") if cuda else ("eager",)
    return [
        StepRow(model, layers, units, B, precision, launch)
        for (model, layers, units), B, precision, launch in product(networks, batches, precisions, launches)
        if cuda or model == "indrnn" or precision == "float32"  # on a CPU nn.LSTM always computes in float32
    ]


def run_steps(cases: Sequence[StepRow], device: torch.device, seconds: float) -> Iterator[list[StepRow]]:
    """Measure each case; after each print how it went, and yield all rows so far."""
    flush_denormals(device)
    clock = Clock(device)
    rows: list[StepRow] = []
    for row in cases:
        try:
            row = _measure(row, clock, seconds)
            ratio = "" if row.over_products is None else f", {row.over_products:.2f} x its float32 matrix products"
            print(f"{row}: {row.steps_per_second:.1f} steps/s{ratio}", flush=True)
        except (RunError, torch.cuda.OutOfMemoryError) as error:
            row = replace(row, reason=str(error).splitlines()[0])
            print(f"{row}: skipped, {row.reason}", flush=True)
        rows.append(row)
        yield rows


def conclude(
    rows: Sequence[StepRow], device: torch.device, where: dict[str, Any], folder: Path, stem: str
) -> tuple[str, list[Path]]:
    """The ratios as a table, and the file of the profiles: where the time goes at B = 32 in float32."""
    path = folder / f"{stem}-profile.txt"
    profiled = [row for row in rows if row.status == "measured" and (row.B, row.precision) == (32, "float32")]
    write_atomically(path, "\n".join(profile(row, device) for row in profiled), UserError)
    return ratio_table(step_ratios(rows)), [path]


def profile(row: StepRow, device: torch.device) -> str:
    """Where the time of a case goes: the table of PyTorch's profiler over some steps, the costliest operators first."""
    set_precision(row.precision, device)
    _, step = training_step(row, device)
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60)
    return f"{row}; {PROFILED_STEPS} steps\n{table}\n"


def step_ratios(rows: Sequence[StepRow]) -> list[tuple[str, float | None]]:
    """Every IndRNN step over its matrix products, and every LSTM step over the IndRNN step of the same kind, also over
    the one in bfloat16 where the LSTM has none."""
    ratios: list[tuple[str, float | None]] = []
    ours = {(row.B, row.precision, row.launch): row for row in rows if (row.model, row.layers) == ("indrnn", 6)}
    others = [] if any((row.model, row.precision) == ("lstm", "bfloat16") for row in rows) else ["bfloat16"]
    for row in rows:
        if row.median_seconds is None:
            continue
        if row.over_products is not None:
            ratios.append((f"{row} / its float32 matrix products", row.over_products))
        for precision in [row.precision, *others]:
            same = ours.get((row.B, precision, row.launch))
            if row.model == "lstm" and same is not None and same.median_seconds is not None:
                ratios.append((f"{row} / {same}", row.median_seconds / same.median_seconds))
    return ratios


def _measure(row: StepRow, clock: Clock, seconds: float) -> StepRow:
    set_precision(row.precision, clock.device)
    with clock.scope():
        model, step = training_step(row, clock.device)
        call, steps = several(step, clock.device)
        works: dict[str, Work] = {"step": call}
        if row.model == "indrnn":
            works["products"] = _products(row, clock.device)
            source = torch.randn(row.B, T, row.units, device=clock.device)
            target = torch.empty_like(source)
            works["copy"] = lambda: target.copy_(source)
    for work in works.values():
        clock.warm_up(work)
    timings = clock.together(works, seconds)
    timing = timings["step"].of(steps)
    limits: dict[str, Any] = {}
    if row.model == "indrnn":
        products = timings["products"].median_seconds
        # A copy reads one tensor and writes one; a recurrence's forward and backward read three and write two.
        floor = products + row.layers * timings["copy"].median_seconds * 5 / 2
        limits = {
            "products_seconds": products, "over_products": timing.median_seconds / products, "floor_seconds": floor
        }  # fmt: skip
    parameters = sum(parameter.numel() for parameter in model.parameters())
    peak = None if row.launch == "graph" else peak_memory(step, clock.device)
    return replace(
        row, status="measured", parameters=parameters, **asdict(timing), steps_per_second=1 / timing.median_seconds,
        peak_memory_bytes=peak, **limits,
    )  # fmt: skip


class _Repeated:
    """The training sequences, repeated along time until they have T steps."""

    def __init__(self, split: Split, T: int) -> None:
        self.size, self._split, self._T = split.size, split, T

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self._split.batch(indices)
        return x[:, torch.arange(self._T, device=x.device) % x.shape[1]], y


def training_step(
    row: StepRow, device: torch.device, length: int = T, processes: Processes = SINGLE_PROCESS
) -> tuple[nn.Module, Work]:
    """A network and a call that makes one update, in all of the ``processes``, from sequences of ``length`` steps."""
    cfg = load_config(
        [
            f"model={row.model}", f"model.num_layers={row.layers}", f"model.hidden_size={row.units}", "data=mnist5k",
            f"trainer.batch_size={row.B}", f"trainer.precision={row.precision}",
        ]
    )  # fmt: skip
    task = replace(make_task(cfg.data), length=length)
    train = task.load(device).train
    train = train if length == T else _Repeated(train, length)
    torch.manual_seed(0)
    model = build_model(cfg.model, task).to(device).train()
    optimizers = build_optimizers(model, cfg.optimizer)
    share = processes.share(model, row.B, row.B)
    update = TrainingStep(model, optimizers, Objective(task), train, cfg.trainer, device, share)
    indices = torch.arange(row.B, device=device)
    if row.launch == "graph":
        update.gradients = GraphedGradients(update.compute_gradients, indices, device)
    return model, lambda: update(indices)


def several(step: Work, device: torch.device) -> tuple[Work, int]:
    """A call that makes several steps where the gap between two is part of their cost, on a GPU; and their number."""
    steps = STEPS_A_CALL if device.type == "cuda" else 1

    def call() -> None:
        for _ in range(steps):
            step()

    return call, steps


def _products(row: StepRow, device: torch.device) -> Work:
    """The layers - 1 products H -> H over B·T rows, forward and both gradients, each layer with its own data."""
    n, H = row.B * T, row.units
    layers = [
        (torch.randn(n, H, device=device), torch.randn(n, H, device=device), torch.randn(H, H, device=device))
        for _ in range(row.layers - 1)
    ]
    tall, square = torch.empty(n, H, device=device), torch.empty(H, H, device=device)

    def call() -> None:
        set_precision("float32", device)
        for x, _, weight in layers:
            torch.mm(x, weight.T, out=tall)
        for x, gradient, weight in layers:
            torch.mm(gradient, weight, out=tall)
            torch.mm(gradient.T, x, out=square)
        set_precision(row.precision, device)

    return call
