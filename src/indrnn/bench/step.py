"""Whole training steps as `indrnn.training` runs them, next to their matrix products alone.

The data are the bundled mnist5k images (T = 784): batches gathered on the device, forward, backward, clipping, Adam.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pandas as pd
import torch

from indrnn.config.compose import load_config
from indrnn.data import make_task
from indrnn.models import build_model
from indrnn.training.device import precision_refusal, set_precision
from indrnn.training.evaluation import Objective
from indrnn.training.optimizer import build_optimizers
from indrnn.training.step import TrainingStep

from .timing import Work, seconds_of, time_interleaved

T = 784
# The LSTM with equal units (68,362 parameters) and with equal parameters (86,122; the IndRNN 86,410). On a GPU,
# quote the 128 units first: the backward pass of cuDNN's persistent kernel ends at H = 128, so the 144 units are slower
# by a switch of algorithm.
NETWORKS = (("indrnn", 6, 128), ("indrnn", 12, 128), ("lstm", 1, 128), ("lstm", 1, 144))  # model, layers, units
STEPS_PER_CALL = 20  # on a GPU, where the gap between two steps is part of their cost
COLUMNS = ("model", "layers", "units", "B", "precision", "launch", "reason", "over_products")


def measure(batches: Sequence[int], device: torch.device, seconds: float) -> Iterator[list[dict[str, Any]]]:
    """Time the steps of all networks in turns, each for about ``seconds``; yield all rows after each combination.

    Combined are the batch sizes, every precision that is faster on the device, and on a GPU CUDA graph and eager.
    products_seconds: the products with the weights between layers in float32, whatever the step's precision.
    """
    precisions = [name for name in ("float32", "tf32", "bfloat16") if precision_refusal(name, device) is None]
    launches, steps = (("graph", "eager"), STEPS_PER_CALL) if device.type == "cuda" else (("eager",), 1)
    rows: list[dict[str, Any]] = []
    for B, precision, launch in product(batches, precisions, launches):
        works: dict[object, Work] = {"products": matrix_products(B, precision, device)}
        begun = {}
        for network in NETWORKS:
            if network[0] == "lstm" and precision == "bfloat16" and device.type == "cpu":
                continue  # nn.LSTM stays in float32 there
            row: dict[str, Any] = dict(zip(COLUMNS, (*network, B, precision, launch, None, None), strict=True))
            try:
                step = training_step(*network, B, precision, launch, device)
                seconds_of(step, device)
                works[network] = lambda step=step: [step() for _ in range(steps)]  # type: ignore[misc]
                begun[network] = {**row, "status": "measured"}
            except Exception as error:  # out of memory, a capture, a compiler: each raises its own type
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                rows.append({**row, "status": "failed", "reason": reason})
        timed = time_interleaved(works, device, seconds)
        products = timed["products"]["median_seconds"]
        for network, row in begun.items():
            times = {name: value if name == "repeats" else value / steps for name, value in timed[network].items()}
            row |= {**times, "steps_per_second": 1 / times["median_seconds"]}
            if network == NETWORKS[0]:
                row |= {"products_seconds": products, "over_products": times["median_seconds"] / products}
            rows.append(row)
        yield rows


def training_step(
    model: str, layers: int, units: int, B: int, precision: str, launch: str, device: torch.device
) -> Work:
    """A call that trains a network with one batch of B sequences."""
    cfg = load_config(
        [
            f"model={model}", f"model.num_layers={layers}", f"model.hidden_size={units}", "data=mnist5k",
            f"trainer.batch_size={B}", f"trainer.precision={precision}",
        ]
    )  # fmt: skip
    set_precision(precision, device)
    task = make_task(cfg.data)
    torch.manual_seed(0)
    network = build_model(cfg.model, task).to(device).train()
    optimizers = build_optimizers(network, cfg.optimizer)
    update = TrainingStep(network, optimizers, Objective(task), task.load(device).train, cfg.trainer, device)
    indices = torch.arange(B, device=device)
    if launch == "graph":
        update.capture(indices)
    return lambda: update(indices)


def matrix_products(B: int, precision: str, device: torch.device) -> Work:
    """The products between the layers of the IndRNN over B·T rows, forward and both gradients, each layer with its own
    data, in float32; ``precision`` is set again afterwards."""
    _, layers, H = NETWORKS[0]
    x, gradients = torch.randn(2, layers - 1, B * T, H, device=device)
    weights = torch.randn(layers - 1, H, H, device=device)
    tall, square = torch.empty_like(x[0]), torch.empty_like(weights[0])

    def call() -> None:
        set_precision("float32", device)
        for layer in range(layers - 1):
            torch.mm(x[layer], weights[layer].T, out=tall)
        for layer in range(layers - 1):
            torch.mm(gradients[layer], weights[layer], out=tall)
            torch.mm(gradients[layer].T, x[layer], out=square)
        set_precision(precision, device)

    return call


def ratios(frame: pd.DataFrame, _: torch.device) -> pd.DataFrame:
    """Steps per second, the 6-layer IndRNN's step / its matrix products, and every step / its step of the same kind."""
    kind = ["B", "precision", "launch"]
    first = (frame["model"] == "indrnn") & (frame["layers"] == NETWORKS[0][1])
    ours = frame.loc[first, [*kind, "median_seconds"]]
    frame = frame.merge(ours, on=kind, how="left", suffixes=("", "_indrnn"))
    frame["over_indrnn"] = frame["median_seconds"] / frame["median_seconds_indrnn"]
    return frame.set_index(["model", "layers", "units", *kind])[["steps_per_second", "over_products", "over_indrnn"]]


def profile(device: torch.device) -> str:
    """PyTorch's profile of two training steps of the IndRNN (B = 32, float32), replayed as a CUDA graph on a GPU."""
    launch = "graph" if device.type == "cuda" else "eager"
    step = training_step(*NETWORKS[0], 32, "float32", launch, device)
    seconds_of(step, device)
    with torch.profiler.profile(acc_events=True) as profiler:  # PyTorch 2.11 warns without it
        seconds_of(step, device)  # calls it twice
    order = f"self_{device.type}_time_total"
    return str(profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60))
