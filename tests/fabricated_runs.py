"""Run folders as training leaves them, with fabricated curves that resemble the published ones."""

from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from indrnn.data import make_task
from indrnn.record.metrics import MetricsWriter
from indrnn.record.result import Result, wilson_interval, write_result

MNIST = {"name": "mnist", "root": "data", "mirror": None, "validation_size": 5000, "split_seed": 0, "permutation": None}


def fabricate(
    root: Path,
    name: str = "indrnn",
    seed: int = 0,
    *,
    best: float = 0.99,
    half: float = 1000.0,
    steps: int = 60_000,
    eval_every: int = 1000,
    log_every: int = 100,
    speed: float = 50.0,
    data: dict | None = None,
    model: dict | None = None,
    finished: bool = True,
    device: str = "NVIDIA H200",
    tag: str | None = None,
) -> Path:
    """Write one run whose validation accuracy (error, for adding) improves from chance towards ``best``."""
    data = data or MNIST
    model = {"name": name, "hidden_size": 128, "num_layers": 1, **(model or {})}
    adding = data["name"] == "adding"
    trainer = {"batch_size": 32, "max_steps": steps, "eval_every": eval_every, "precision": "float32"}
    config = {
        "model": model, "data": data, "optimizer": {"name": "adam", "lr": 2e-4}, "schedule": {"name": "constant"},
        "trainer": trainer, "name": name, "tag": tag, "seed": seed, "device": "auto", "output_root": str(root),
    }  # fmt: skip
    folder = (
        root / make_task(OmegaConf.create(data)).folder / (name if tag is None else f"{name}-{tag}") / f"seed{seed}"
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))

    rng = np.random.default_rng(seed)

    def error(step: int) -> float:
        start, floor = (1 / 6, best) if adding else (0.9, 1 - best)
        return float(floor + (start - floor) / (1 + step / half) ** 1.5) * float(np.exp(rng.normal(0, 0.06)))

    done = steps if finished else steps // 3
    accuracies: dict[int, tuple[float, float]] = {}
    with MetricsWriter(folder / "metrics.csv", None) as metrics:
        for step in range(1, done + 1):
            seconds = 5 + step / speed
            if step % log_every == 0:
                loss = 2.5 * error(step) * float(np.exp(rng.normal(0, 0.4)))
                metrics.row(step, step / 1718, seconds, "train", loss, None if adding else 1 - error(step), 2e-4, 1.0)
            if step % eval_every == 0:
                wrong = min(error(step), 0.95)
                accuracies[step] = (0.0, wrong) if adding else (round(5000 * (1 - wrong)) / 5000, 2.5 * wrong)
                metrics.row(
                    step, step / 1718, seconds, "val", accuracies[step][1], None if adding else accuracies[step][0]
                )
        chosen = max(accuracies, key=lambda step: (accuracies[step][0], -accuracies[step][1]))
        correct = round(10_000 * accuracies[chosen][0]) - int(rng.integers(0, 20))
        if finished:
            metrics.row(
                chosen, 1.0, 6 + done / speed, "test", accuracies[chosen][1], None if adding else correct / 10_000
            )
    if finished:
        result = Result(
            model=model["name"], task=data["name"], name=folder.parent.name, seed=seed, parameters=86_410,
            best_step=chosen, steps=done, epochs=done / 1718, val_accuracy=None if adding else accuracies[chosen][0],
            val_loss=accuracies[chosen][1],
            test_accuracy=None if adding else correct / 10_000, test_loss=accuracies[chosen][1],
            test_ci95=None if adding else wilson_interval(correct, 10_000), seconds=6 + done / speed,
            steps_per_second=speed, peak_memory_bytes=2**28, backend="numba", device_name=device, precision="float32",
            data={"sha256": {}}, versions={"python": "3.12.1", "torch": "2.15.0"},
            git={"commit": "0" * 40, "dirty": False}, command=f"indrnn-train model={name} seed={seed}",
        )  # fmt: skip
        write_result(folder / "result.json", result)
        save_file({"weight": torch.zeros(1)}, folder / "weights.safetensors")
    return folder
