"""The adding problem as a task; its sequences are made in `adding_stream`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .task import Splits, Task

if TYPE_CHECKING:
    import torch

    from ..config.schema import AddingConfig
    from .adding_stream import AddingSplit


def adding_task(data: AddingConfig) -> Task:
    """The adding problem over ``data.length`` steps; training sequences without end."""

    def split(part: str) -> AddingSplit:
        from .adding_stream import TEST, TRAIN, VALIDATION, AddingSplit

        start, size = {
            "train": (TRAIN, None),
            "validation": (VALIDATION, data.validation_size),
            "test": (TEST, data.test_size),
        }[part]
        return AddingSplit(data.length, data.data_seed, start, size)

    def load(device: torch.device) -> Splits:
        sizes = {"seed": data.data_seed, "train": None, "validation": data.validation_size, "test": data.test_size}
        return Splits(
            split("train"),
            split("validation"),
            {"sha256": {}, "split": sizes, "permutation": None, "permutation_sha256": None},
            lambda: split("test"),
        )

    return Task(
        name="adding",
        folder=f"adding-T{int(data.length)}",
        title=f"Adding problem, T = {data.length:,}",
        length=int(data.length),
        input_size=2,
        output_size=1,
        loss="mse",
        load=load,
        test_samples=data.test_size,
        series="Adding problem",
        mean_answer_error=lambda part: split(part).mean_answer_error(),
    )
