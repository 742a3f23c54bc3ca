"""Ctrl-C and SIGTERM during training: the current step is finished first; a second signal stops at once."""

import signal
import threading
from types import FrameType
from typing import Any

from ..errors import RunError


class Interrupted(RunError):  # noqa: N818
    """The run was asked to stop and can resume later. exit_code is that of a shell: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Interrupts:
    """Within a ``with`` block, ``received`` is the number of the first SIGINT or SIGTERM, else None. SIGUSR2 counts too
    if it has a handler, such as submitit's: a cluster sends it before the time limit or a preemption.

    Outside the main thread, where Python allows no handlers, signals keep their usual effect.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            numbers = [*self.SIGNALS]
            if hasattr(signal, "SIGUSR2") and callable(signal.getsignal(signal.SIGUSR2)):
                numbers.append(signal.SIGUSR2)
            self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for handled in self.SIGNALS:
            signal.signal(handled, signal.SIG_DFL)
