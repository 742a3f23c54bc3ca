"""What was aimed at, beside what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from .contenders import COPY, LOOP, LOOP_UNBIND, LSTM
from .rows import Row

FASTEST = {"cpu": ("numba",), "cuda": ("triton",)}


@dataclass(frozen=True)
class Target:
    """One aim, for some with an easier value that is required before it; without an aim the figure stands there for
    comparison. ``measured`` is None where a needed point was skipped."""

    text: str
    aim: float | None
    measured: float | None
    at_least: bool
    required: float | None = None

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        if self.aim is None:
            return "for comparison"
        if self._met(self.aim):
            return "pass"
        return "miss" if self.required is None or not self._met(self.required) else "meets what is required"

    def _met(self, value: float) -> bool:
        assert self.measured is not None
        return self.measured >= value if self.at_least else self.measured <= value


class Times:
    """Median seconds by what was measured."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {
            (row.op, row.implementation, row.which, row.launch, row.B, row.T): row
            for row in rows
            if row.status == "measured"
        }

    def seconds(self, op: str, name: str, which: str, launch: str, B: int, T: int) -> float | None:
        row = self._rows.get((op, name, which, launch, B, T))
        return None if row is None else row.median_seconds

    def share(self, op: str, name: str, which: str, launch: str, B: int, T: int) -> float | None:
        row = self._rows.get((op, name, which, launch, B, T))
        return None if row is None else row.share_of_limit


def recurrence_targets(rows: Sequence[Row], device_type: str) -> list[Target]:
    """The aims for the recurrence and a layer, at H = 128, for the fastest backend of the device."""
    times = Times(rows)
    return _cuda(times) if device_type == "cuda" else _cpu(times)


def _cpu(times: Times) -> list[Target]:
    name = FASTEST["cpu"][0]
    copy = times.seconds("recurrence", COPY, "forward", "eager", 32, 784)
    forward, backward = (times.seconds("recurrence", name, each, "eager", 32, 784) for each in ("forward", "backward"))
    layer, lstm = (times.seconds("layer", each, "step", "eager", 32, 784) for each in (name, LSTM))
    at = "B=32, T=784"
    return [
        Target(f"{name} forward over a copy of its input, {at}", 1.6, _ratio(forward, copy), False, 1.8),
        Target(f"{name} backward over a copy of its input, {at}", 3.0, _ratio(backward, copy), False, 3.5),
        *_loop_targets(times, name, _sum(forward, backward), required=200),
        Target(f"nn.LSTM layer over {name} layer, training step, {at}", 8, _ratio(lstm, layer), True),
    ]


def _cuda(times: Times) -> list[Target]:
    name = FASTEST["cuda"][0]
    copy, forward = (times.seconds("recurrence", each, "forward", "graph", 32, 784) for each in (COPY, name))
    ours = _sum(*(times.seconds("recurrence", name, each, "eager", 32, 784) for each in ("forward", "backward")))
    found = [
        Target(f"{name} forward over a copy of its input, B=32, T=784", 2.0, _ratio(forward, copy), False),
        Target(
            f"{name} forward, share of copy bandwidth, B=512, T=784",
            0.8,
            times.share("recurrence", name, "forward", "graph", 512, 784),
            True,
        ),
    ]
    for T, aim in ((1024, 50), (4096, 100)):
        layer, lstm = (times.seconds("layer", each, "step", "graph", 32, T) for each in (name, LSTM))
        text = f"cuDNN LSTM layer over {name} layer, training step, B=32, T={T}"
        found.append(Target(text, aim, _ratio(lstm, layer), True))
    return [*found, *_loop_targets(times, name, ours)]


def _loop_targets(times: Times, name: str, ours: float | None, required: float | None = None) -> list[Target]:
    text = f"over {name}, forward + backward, B=32, T=784"
    loop, unbound = (_both(times, each, 32, 784) for each in (LOOP, LOOP_UNBIND))
    return [
        Target(f"PyTorch loop {text}", 300, _ratio(loop, ours), True, required),
        Target(f"PyTorch loop with unbind {text}", None, _ratio(unbound, ours), True),
    ]


def table(targets: Sequence[Target]) -> str:
    """Markdown."""
    lines = ["| target | required | aim | measured | |", "|---|---|---|---|---|"]
    for each in targets:
        measured = "" if each.measured is None else f"{each.measured:.3g}"
        sign = "≥" if each.at_least else "≤"
        required = "" if each.required is None else f"{sign} {each.required:g}"
        aim = "" if each.aim is None else f"{sign} {each.aim:g}"
        lines.append(f"| {each.text} | {required} | {aim} | {measured} | {each.verdict} |")
    return "\n".join(lines)


def _both(times: Times, name: str, B: int, T: int) -> float | None:
    return _sum(*(times.seconds("recurrence", name, each, "eager", B, T) for each in ("forward", "backward")))


def _sum(*values: float | None) -> float | None:
    return None if any(value is None for value in values) else sum(value for value in values if value is not None)


def _ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or under is None else over / under
