"""The recurrence (x + b is given) and a layer, by every implementation, at several sizes.

B sequences, T time steps, H units (inputs and outputs alike), batch-major memory. The backends are timed next to a copy
of the input, PyTorch loops over time, and nn.LSTM with equal units and with equal parameters, in turns. On a GPU, calls
under 1 ms are also timed as CUDA graphs.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from math import nan, sqrt
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from indrnn.layers import AffineSequence, IndRNNLayer, recurrent_max, sequences_in
from indrnn.recurrence import available_backends, indrnn_recurrence, resolve_backend
from indrnn.report.style import figure, save
from indrnn.training.device import precision_refusal

from .timing import Work, capture, seconds_of, time_interleaved

COPY, LOOP = "copy", "loop"
LSTM, LSTM_EQUAL_PARAMETERS = "lstm", "lstm_equal_parameters"
LABELS = {
    "numba": "IndRNN, numba", "triton": "IndRNN, triton", "scan": "IndRNN, scan", "reference": "IndRNN, reference",
    LSTM: "nn.LSTM of equal units", LSTM_EQUAL_PARAMETERS: "nn.LSTM of equal parameters",
    LOOP: "PyTorch loop over time",
}  # fmt: skip
DTYPES = ("float32", "bfloat16")
TENSORS_MOVED = {"forward": 2, "backward": 3}  # at least: x and h; h, dh and dx
LONGEST_LOOP = 1024  # time steps
LONGEST_GRAPH = 1e-3  # seconds; the launches of a longer call do not matter


def measure(sizes: Iterable[tuple[int, int, int]], device: torch.device, seconds: float) -> Iterator[list[Any]]:
    """Time every implementation at every size (B, T, H), each for about ``seconds``; yield all rows after each size.

    limit_seconds is a copy's time for the bytes that the pass must move at least. An implementation that fails (out of
    memory, a size that its library does not support) has the status "failed" and a reason.
    """
    rows: list[dict[str, Any]] = []
    for size, op in product(sizes, ("recurrence", "layer")):
        common = {"op": op, **dict(zip("BTH", size, strict=True)), "reason": None}
        works: dict[tuple[str, str, str, str], Work] = {}
        tensors = {dtype: torch.randn(2, *size, device=device, dtype=getattr(torch, dtype)) for dtype in DTYPES}
        for name, dtype in implementations(op, size[1], device):
            try:
                for which, work in prepare(op, name, *tensors[dtype]).items():
                    short = seconds_of(work, device) < LONGEST_GRAPH
                    works[name, dtype, which, "eager"] = work
                    if short and device.type == "cuda" and name not in (LOOP, "reference"):
                        works[name, dtype, which, "graph"] = capture(work)
            except Exception as error:  # out of memory, a compiler, a launch: each raises its own type
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                rows.append({**common, "implementation": name, "dtype": dtype, "status": "failed", "reason": reason})
        timed = time_interleaved(works, device, seconds)
        for (name, dtype, which, launch), times in timed.items():
            copy = timed.get((COPY, dtype, "forward", launch))
            limit = copy and copy["median_seconds"] * TENSORS_MOVED[which] / TENSORS_MOVED["forward"]
            labels = {"implementation": name, "dtype": dtype, "which": which, "launch": launch, "status": "measured"}
            rows.append({**common, **labels, **times, "limit_seconds": limit})
        yield rows


def implementations(op: str, T: int, device: torch.device) -> list[tuple[str, str]]:
    """The names and dtypes to time: loops only up to LONGEST_LOOP, layers in bfloat16 only on CPUs that support it."""
    backends = [name for name in available(device) if name != "reference" or T <= LONGEST_LOOP]
    kernels = [name for name in backends if name.startswith(("numba", "triton"))]
    loops = [LOOP] if T <= LONGEST_LOOP else []
    in_float32, in_bfloat16 = [COPY, *loops, *backends], [COPY, *kernels]
    if op == "layer":
        lstms = [LSTM, LSTM_EQUAL_PARAMETERS]
        in_float32, in_bfloat16 = [*lstms, *backends], [*lstms, *kernels]
        if device.type == "cuda" or precision_refusal("bfloat16", device):
            in_bfloat16 = []
    return [*product(in_float32, ["float32"]), *product(in_bfloat16, ["bfloat16"])]


def available(device: torch.device) -> list[str]:
    """The backends that run on ``device``; triton also with each strategy, as triton/scan."""
    names = [name for name, reason in available_backends(device).items() if reason is None]
    return names + ["triton/sequential", "triton/scan"] * ("triton" in names)


def forced(strategy: str | None) -> AbstractContextManager[None]:
    """Within the block, every Triton launch uses this strategy; if it is None or empty, the backend chooses."""
    if not strategy:
        return nullcontext()
    from indrnn.recurrence import triton_gpu

    return triton_gpu.forced(strategy)


def prepare(op: str, name: str, x: Tensor, dh: Tensor) -> dict[str, Work]:
    """The calls to time by pass, for x and dh (B, T, H): forward without autograd, and backward from a kept graph; of a
    layer, its training step (forward, gradients of input and weights)."""
    if name == COPY:
        target = torch.empty_like(x)
        return {"forward": lambda: target.copy_(x)}
    _, T, H = x.shape
    backend, _, strategy = name.partition("/")
    inputs = [x := x.detach().requires_grad_()]
    if name in (LSTM, LSTM_EQUAL_PARAMETERS):  # fastest with weights and state in bfloat16 too
        lstm = nn.LSTM(H, H if name == LSTM else lstm_units(H), batch_first=True, device=x.device, dtype=x.dtype)
        inputs += lstm.parameters()
    elif op == "layer":
        layer = IndRNNLayer(H, H, recurrent_max_abs=recurrent_max(T), backend=backend, device=x.device)
        inputs += layer.parameters()
    else:
        inputs.append((torch.rand(H, device=x.device) * recurrent_max(T)).requires_grad_())

    def compute() -> Tensor:
        if name in (LSTM, LSTM_EQUAL_PARAMETERS):
            return lstm(x)[0]
        if name == LOOP:
            return loop(*inputs)[0]
        with forced(strategy):
            if op == "recurrence":
                return indrnn_recurrence(*inputs, backend=backend)[0]
            with sequences_in(x.dtype):  # as between two layers: weights and state stay float32
                return layer(AffineSequence(x, x[:, -1]))[0].h

    h = compute()
    dh = dh[..., : h.shape[-1]].contiguous()

    def backward(output: Tensor) -> object:
        with forced(strategy):
            return torch.autograd.grad(output, inputs, dh, retain_graph=True)

    if op == "layer":
        return {"step": lambda: backward(compute())}
    return {"forward": torch.no_grad()(compute), "backward": lambda: backward(h)}


def lstm_units(H: int) -> int:
    """Units of the LSTM on H inputs with about as many parameters as an IndRNN layer: 4 n (H + n + 2) = H² + 2 H."""
    return max(1, round((-(H + 2) + sqrt((H + 2) ** 2 + H * H + 2 * H)) / 2))


def loop(x: Tensor, u: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A PyTorch loop over time, as fast as PyTorch's operators allow; h (B, T, H) and h_last (B, H)."""
    state = torch.zeros_like(x[:, 0]) if h0 is None else h0
    states = []
    # Of x[:, t], the backward pass would fill a gradient of x's size for each of the T selections.
    for x_t in x.unbind(1):
        state = torch.relu(x_t + u * state)
        states.append(state)
    return torch.stack(states, 1), state


def ratios(frame: pd.DataFrame, device: torch.device) -> pd.DataFrame:
    """Time ratios, the fairest comparisons first, one column per size; from CUDA graphs where those were timed."""
    ours = resolve_backend("auto", device)
    size = "B=" + frame["B"].astype(str) + ", T=" + frame["T"].astype(str)
    frame = frame.assign(size=size).sort_values("launch", kind="stable")
    columns = ["implementation", "dtype", "op", "which"]
    times = frame.pivot_table("median_seconds", "size", columns, aggfunc="last", sort=False)

    def seconds(name: str, dtype: str, *passes: str) -> Any:
        op = "layer" if passes == ("step",) else "recurrence"
        return sum(times.get((name, dtype, op, which), nan) for which in passes)

    lines = {}
    both = seconds(LOOP, "float32", *TENSORS_MOVED) / seconds(ours, "float32", *TENSORS_MOVED)
    lines[f"{LABELS[LOOP]} / {ours}: recurrence, forward + backward"] = both
    kinds = (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"))
    for name, (theirs, dtype) in product((LSTM_EQUAL_PARAMETERS, LSTM), kinds):
        ratio = seconds(name, theirs, "step") / seconds(ours, dtype, "step")
        lines[f"{LABELS[name]}, {theirs} / {ours}, {dtype}: layer, training step"] = ratio
    for name, dtype, which in product(available(device), DTYPES, TENSORS_MOVED):
        ratio = seconds(name, dtype, which) / seconds(COPY, dtype, "forward")
        lines[f"{name} / copy of its input: {which}, {dtype}"] = ratio
    return pd.DataFrame(lines, index=times.index).T.dropna(how="all")


def draw(frame: pd.DataFrame, folder: Path, stem: str) -> list[Path]:
    """Write ``stem``.png and .svg: time against T at the first batch size in float32, one panel per pass.

    ``frame``: the rows of a file ``recurrence-*.csv``.
    """
    first = frame.iloc[0]
    frame = frame[(frame["B"] == first["B"]) & (frame["dtype"] == "float32") & (frame["status"] == "measured")]
    frame = frame.sort_values("launch", kind="stable")
    with figure(1, 3, width=10.5, height=4.2, sharey=True) as (drawing, axes):
        passes = (("recurrence", "forward"), ("recurrence", "backward"), ("layer", "step"))
        for axis, (op, which) in zip(axes, passes, strict=True):
            panel = frame[(frame["op"] == op) & (frame["which"] == which)]
            axis.set(title=f"{op}, {which}".capitalize(), xlabel="Time steps T", xscale="log", yscale="log")
            axis.set_xticks(panel["T"].unique(), panel["T"].unique())
            axis.minorticks_off()
            axis.plot(panel.groupby("T")["limit_seconds"].last(), "--", color="gray", label="copy of as many bytes")
            times = panel.pivot_table("median_seconds", "T", "implementation", aggfunc="last")
            for index, name in enumerate(LABELS):
                if name in times:
                    axis.plot(times[name], "o-", color=f"C{index}", label=LABELS[name])
        axes[0].set_ylabel("Seconds")
        handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        title = f"{first['device']}, B = {first['B']}, H = {first['H']}, float32, {first['date']}, medians"
        drawing.legend(handles.values(), handles, loc="outside lower center", ncols=4, title=title)
        return save(drawing, folder, stem)
