"""What a run says while it works (on stderr: a bar on a terminal, elsewhere a line now and then), and Ctrl-C and
SIGTERM, which it hears: the current step is finished first; a second signal stops at once."""

import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from tqdm import tqdm

from ..errors import RunError

LINE_EVERY = 30.0  # seconds, where there is no terminal


class Progress:
    """Steps done, steps/s, training loss, last validation accuracy (or loss) and time left."""

    def __init__(self, label: str, step: int, max_steps: int) -> None:
        self._label = label
        self._max_steps = max_steps
        self._train = self._validation = ""
        self._rate = 0.0
        self._last_line = time.monotonic()
        self._bar = (
            tqdm(desc=label, initial=step, total=max_steps, unit="step", dynamic_ncols=True, file=sys.stderr)
            if sys.stderr.isatty()
            else None
        )

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def trained(self, step: int, loss: float, rate: float) -> None:
        """A log interval is over; `rate` in steps/s."""
        self._train, self._rate = f"loss {loss:.4f}", rate
        if self._bar is None and time.monotonic() - self._last_line >= LINE_EVERY:
            self._line(step)
        self._show()

    def evaluated(self, step: int, loss: float, accuracy: float | None) -> None:
        self._validation = f"val loss {loss:.4f}" if accuracy is None else f"val {accuracy:.2%}"
        if self._bar is None:
            self._line(step)
        self._show()

    def say(self, message: str) -> None:
        """A line of its own that stays."""
        if self._bar is None:
            print(message, file=sys.stderr, flush=True)
        else:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, (self._train, self._validation))), refresh=False)

    def _line(self, step: int) -> None:
        self._last_line = time.monotonic()
        left = f"{tqdm.format_interval((self._max_steps - step) / self._rate)} left" if self._rate else ""
        rate = f"{self._rate:.1f} steps/s" if self._rate else ""
        parts = (f"{self._label}: step {step}/{self._max_steps}", rate, self._train, self._validation, left)
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


class Interrupted(RunError):  # noqa: N818
    """The run was asked to stop and can go on later. exit_code is the shell's: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Interrupts:
    """Within a ``with`` block, ``received`` is the number of the first SIGINT or SIGTERM, else None; also of SIGUSR2
    where something handles it, as submitit does: a cluster's notice ahead of the time limit or a preemption.

    Outside the main thread, where Python allows no handlers, signals act as they did.
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
