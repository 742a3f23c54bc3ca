"""What a run leaves behind: its folder, metrics, TensorBoard events, environment and result; and reading them again."""

from .environment import command_line, environment, git, running_code
from .files import replacing
from .folder import RunFolder, open_run, run_folder
from .metrics import MetricsWriter, read_metrics
from .result import Result, read_result, write_result
from .runs import Run, read_runs
from .statistics import wilson_interval
from .tensorboard import TensorBoardWriter, tensorboard_command, tensorboard_link

__all__ = [
    "MetricsWriter",
    "Result",
    "Run",
    "RunFolder",
    "TensorBoardWriter",
    "command_line",
    "environment",
    "git",
    "open_run",
    "read_metrics",
    "read_result",
    "read_runs",
    "replacing",
    "run_folder",
    "running_code",
    "tensorboard_command",
    "tensorboard_link",
    "wilson_interval",
    "write_result",
]
