"""Write and read what a run leaves behind: its folder, metrics, TensorBoard events and result."""

from .files import replacing
from .folder import RunFolder, open_run, run_folder
from .metrics import MetricsWriter, read_metrics
from .result import (
    Result,
    command_line,
    environment,
    git,
    no_better_than_chance,
    read_result,
    running_code,
    wilson_interval,
    write_result,
)
from .tensorboard import TensorBoardWriter, tensorboard_command, tensorboard_link

__all__ = [
    "MetricsWriter",
    "Result",
    "RunFolder",
    "TensorBoardWriter",
    "command_line",
    "environment",
    "git",
    "no_better_than_chance",
    "open_run",
    "read_metrics",
    "read_result",
    "replacing",
    "run_folder",
    "running_code",
    "tensorboard_command",
    "tensorboard_link",
    "wilson_interval",
    "write_result",
]
