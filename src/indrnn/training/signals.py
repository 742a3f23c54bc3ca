"""SIGINT and SIGTERM, noted, so that a run finishes its current step and saves a checkpoint."""

import signal
import threading
from types import FrameType
from typing import Any

from ..errors import RunError

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(RunError):  # noqa: N818
    """The run was interrupted and can be resumed. exit_code is that of a shell: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class NotedSignals:
    """Within a ``with`` block, ``received`` is the first signal, or 0; a second signal stops the process at once.

    SIGUSR2 counts too if it has a handler, such as submitit's: a cluster sends it before the time limit or a
    preemption. Outside the main thread Python allows no handlers.
    """

    received = 0

    def __enter__(self) -> "NotedSignals":
        numbers: list[int] = [*STOPPING] if threading.current_thread() is threading.main_thread() else []
        if numbers and hasattr(signal, "SIGUSR2") and callable(signal.getsignal(signal.SIGUSR2)):
            numbers.append(signal.SIGUSR2)
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in STOPPING:
            signal.signal(each, signal.SIG_DFL)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
