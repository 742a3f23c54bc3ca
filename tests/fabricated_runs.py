"""Run folders as training leaves them, with made-up curves."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from indrnn.data import make_task
from indrnn.record.metrics import COLUMNS
from indrnn.record.result import Result, wilson_interval, write_result

MNIST = {"name": "mnist", "root": "data", "mirror": None, "validation_size": 5000, "split_seed": 0, "permutation": None}
ADDING = {"name": "adding", "validation_size": 1000, "test_size": 10_000, "data_seed": 0}


def fabricate(
    root: Path,
    name: str = "indrnn",
    seed: int = 0,
    *,
    best: float = 0.99,
    steps: int = 600,
    data: dict | None = None,
    model: dict | None = None,
    finished: bool = True,
    tag: str | None = None,
) -> Path:
    """Write one run that evaluates every 50 updates, with validation accuracies (errors, for adding) from chance to
    ``best``. An unfinished run has made a third of its updates."""
    data = data or MNIST
    model = {"name": name, "hidden_size": 128, "num_layers": 1, **(model or {})}
    config = {
        "model": model, "data": data, "optimizer": {"name": "adam", "lr": 2e-4}, "schedule": {"name": "constant"},
        "trainer": {"batch_size": 32, "max_steps": steps, "precision": "float32"}, "name": name, "tag": tag,
        "seed": seed, "device": "auto", "output_root": str(root),
    }  # fmt: skip
    run_name = name if tag is None else f"{name}-{tag}"
    folder = root / make_task(OmegaConf.create(data)).folder / run_name / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))

    adding = data["name"] == "adding"
    chance = 1 / 6 if adding else 0.1
    done = steps if finished else steps // 3
    at = [*range(50, done + 1, 50)]
    values = np.linspace(chance, best - 0.001 * seed, max(2, len(at)))[: len(at)].round(5).tolist()
    losses = values if adding else [2.5 * (1 - value) for value in values]
    accuracies = [None] * len(at) if adding else values
    rows = []
    for step, loss, accuracy in zip(at, losses, accuracies, strict=True):
        rows.append((step - 1, step / 1718, step / 50, "train", loss, accuracy, 2e-4, 1.0))
        rows.append((step, step / 1718, step / 50, "val", loss, accuracy, None, None))
    if finished:
        rows.append((at[-1], 1.0, done / 50, "test", losses[-1], accuracies[-1], None, None))
    pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(folder / "metrics.csv", index=False)
    if finished:
        ci95 = None if adding else wilson_interval(round(10_000 * accuracies[-1]), 10_000)
        result = Result(
            model=model["name"], task=data["name"], name=run_name, seed=seed, parameters=86_410, best_step=at[-1],
            steps=done, epochs=done / 1718, val_accuracy=accuracies[-1], val_loss=losses[-1],
            test_accuracy=accuracies[-1], test_loss=losses[-1], test_ci95=ci95, seconds=done / 50,
            steps_per_second=50.0, peak_memory_bytes=2**28, backend="numba", device_name="NVIDIA H200",
            precision="float32", data={"sha256": {}}, versions={"torch": "2.15.0"}, git={"commit": "0" * 40},
            command=f"indrnn-train model={name} seed={seed}",
        )  # fmt: skip
        write_result(folder / "result.json", result)
        save_file({"weight": torch.zeros(1)}, folder / "weights.safetensors")
    return folder
