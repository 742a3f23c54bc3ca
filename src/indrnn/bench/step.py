"""Whole training steps as `indrnn.train` makes them, against their matrix products alone.

The data are the bundled mnist5k images: batches gathered on the device, forward, backward, clipping, Adam.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import nn

from indrnn.config import load_config
from indrnn.data import load_task
from indrnn.errors import RunError
from indrnn.models import build_model
from indrnn.train.device import flush_denormals, set_precision
from indrnn.train.graph import GraphedStep
from indrnn.train.objective import Objective
from indrnn.train.optimizer import build_optimizer
from indrnn.train.step import TrainingStep

from .clock import Clock, Work, peak_memory
from .targets import Target

T, HIDDEN = 784, 128
# Steps a timed call on a GPU: what lies between two steps there is part of a step.
STEPS_A_CALL = 20
PROFILED_STEPS = 10


@dataclass(frozen=True)
class StepRow:
    """One kind of training step. Times in seconds.

    products_seconds: the products with the weights between layers (forward, gradient of the input, gradient of the
    weight; into memory allocated before) in turns with the step; floor_seconds adds what the recurrences cannot do
    without, five tensors a layer at the speed of a copy. None for the LSTM.
    """

    model: str
    layers: int
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


def cases(device: torch.device, quick: bool) -> list[StepRow]:
    """What to time: on a GPU every precision, with and without the CUDA graph."""
    networks = [("indrnn", 6), ("lstm", 1)] if quick else [("indrnn", 6), ("indrnn", 12), ("lstm", 1)]
    batches = (32,) if quick else (32, 128)
    cuda = device.type == "cuda"
    precisions = ("float32", "tf32", "bfloat16") if cuda else ("float32",)
    launches = ("graph", "eager") if cuda else ("eager",)
    return [
        StepRow(model, layers, B, precision, launch)
        for (model, layers), B, precision, launch in product(networks, batches, precisions, launches)
    ]


def run_steps(
    rows: Sequence[StepRow], device: torch.device, seconds: float, say: Callable[[str], None]
) -> list[StepRow]:
    """Measure each case; ``say`` gets a line a case."""
    flush_denormals(device)
    clock = Clock(device)
    measured = []
    for row in rows:
        try:
            found = _measure(row, clock, seconds)
        except (RunError, torch.cuda.OutOfMemoryError) as error:
            found = replace(row, reason=str(error).splitlines()[0])
        measured.append(found)
        say(_line(found))
    return measured


def profile(row: StepRow, device: torch.device) -> str:
    """Where the time of a case goes: PyTorch's profiler over some steps, by operator, the costliest first."""
    set_precision(row.precision, device)
    _, step = _training_step(row, device)
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
    head = f"{row.model}, {row.layers} layers, B={row.B}, {row.precision}, {row.launch}; {PROFILED_STEPS} steps"
    return f"{head}\n{table}\n"


def step_targets(rows: Sequence[StepRow], device_type: str) -> list[Target]:
    """The aims for the default training step, 6 x 128 at batch 32."""

    def default(precision: str, launch: str) -> StepRow | None:
        key = ("indrnn", 6, 32, precision, launch)
        return next((row for row in rows if (row.model, row.layers, row.B, row.precision, row.launch) == key), None)

    if device_type != "cuda":
        row = default("float32", "eager")
        text = "default training step over its matrix products, 6 x 128, B=32"
        return [Target(text, 1.7, row.over_products if row else None, False, 2.2)]
    found = []
    for precision, aim in (("float32", 1500), ("tf32", 2500)):
        row = default(precision, "graph")
        text = f"default training steps a second, 6 x 128, B=32, {precision}"
        found.append(Target(text, aim, row.steps_per_second if row else None, True))
    return found


def _measure(row: StepRow, clock: Clock, seconds: float) -> StepRow:
    set_precision(row.precision, clock.device)
    with clock.scope():
        model, step = _training_step(row, clock.device)
        works: dict[str, Work] = {"step": _repeated(step, clock.device)}
        if row.model == "indrnn":
            works["products"] = _products(row, clock.device)
            source = torch.randn(row.B, T, HIDDEN, device=clock.device)
            target = torch.empty_like(source)
            works["copy"] = lambda: target.copy_(source)
    for work in works.values():
        clock.warm_up(work)
    timings = clock.together(works, seconds)
    steps = _steps_a_call(clock.device)
    taken = timings["step"]
    found = replace(
        row,
        status="measured",
        parameters=sum(each.numel() for each in model.parameters()),
        median_seconds=taken.median / steps,
        q20_seconds=taken.q20 / steps,
        q80_seconds=taken.q80 / steps,
        repeats=taken.repeats * steps,
        steps_per_second=steps / taken.median,
        peak_memory_bytes=None if row.launch == "graph" else peak_memory(step, clock.device),
    )
    if "products" not in timings:
        return found
    products = timings["products"].median
    # A copy reads one tensor and writes one; a recurrence's forward and backward read three and write two.
    recurrences = row.layers * timings["copy"].median * 5 / 2
    return replace(
        found,
        products_seconds=products,
        over_products=taken.median / steps / products,
        floor_seconds=products + recurrences,
    )


def _training_step(row: StepRow, device: torch.device) -> tuple[nn.Module, Callable[[], object]]:
    overrides = [f"model={row.model}", f"model.num_layers={row.layers}", "data=mnist5k"]
    cfg = load_config([*overrides, f"trainer.batch_size={row.B}", f"trainer.precision={row.precision}"])
    task = load_task(cfg.data, device)
    torch.manual_seed(0)
    model = build_model(cfg).to(device).train()
    optimizer = build_optimizer(model, cfg.optimizer, device)
    update: Any = TrainingStep(model, optimizer, Objective(task.spec), task.train, cfg.trainer, device)
    indices = torch.arange(row.B, device=device)
    if row.launch == "graph":
        update = GraphedStep(update, indices, device)
    return model, lambda: update(indices)


def _steps_a_call(device: torch.device) -> int:
    return STEPS_A_CALL if device.type == "cuda" else 1


def _repeated(step: Callable[[], object], device: torch.device) -> Work:
    def call() -> None:
        for _ in range(_steps_a_call(device)):
            step()

    return call


def _products(row: StepRow, device: torch.device) -> Work:
    """The layers - 1 products 128 -> 128 over B·T rows, forward and both gradients, each layer with its own data."""
    dtype = torch.bfloat16 if row.precision == "bfloat16" else torch.float32
    n = row.B * T
    layers = [
        (
            torch.randn(n, HIDDEN, device=device, dtype=dtype),
            torch.randn(n, HIDDEN, device=device, dtype=dtype),
            torch.randn(HIDDEN, HIDDEN, device=device, dtype=dtype),
        )
        for _ in range(row.layers - 1)
    ]
    tall = torch.empty(n, HIDDEN, device=device, dtype=dtype)
    square = torch.empty(HIDDEN, HIDDEN, device=device, dtype=dtype)

    def call() -> None:
        for x, _, weight in layers:
            torch.mm(x, weight.T, out=tall)
        for x, gradient, weight in layers:
            torch.mm(gradient, weight, out=tall)
            torch.mm(gradient.T, x, out=square)

    return call


def _line(row: StepRow) -> str:
    what = f"{row.model}, {row.layers} layers, B={row.B}, {row.precision}, {row.launch}"
    if row.steps_per_second is None:
        return f"{what}: skipped, {row.reason}"
    ratio = "" if row.over_products is None else f", {row.over_products:.2f} x its matrix products"
    return f"{what}: {row.steps_per_second:.1f} steps/s{ratio}"
