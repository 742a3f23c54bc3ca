"""IndRNN: a stack of layers with the interface of torch.nn.RNN. IndRNNCell: one step, as torch.nn.RNNCell."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..recurrence.reference import activate
from .folding import AffineSequence, concatenate, materialise
from .init import Initializer, check_dropout, check_size, check_tensor, is_range
from .layer import IndRNNLayer, Steps, Update, Weights, recurrent_layers, update_running_statistics


class IndRNN(nn.Module):
    """A stack of IndRNN layers (Li et al. 2018, arXiv 1803.04831), a drop-in replacement for torch.nn.RNN.

        h_t = σ(W x_t + b + u ⊙ h_{t-1})

    The tutorial's layer: three parameters, and an output shaped like an LSTM's.

    >>> import torch
    >>> from indrnn import IndRNN, recurrent_max
    >>> x = torch.randn(64, 40, 200)
    >>> rnn = IndRNN(200, 100, batch_first=True, recurrent_max_abs=recurrent_max(40))
    >>> [(name, tuple(parameter.shape)) for name, parameter in rnn.layers[0].named_parameters()]
    [('weight_ih', (100, 200)), ('weight_hh', (100,)), ('bias', (100,))]
    >>> output, h_n = rnn(x)
    >>> output.shape
    torch.Size([64, 40, 100])

    Its initialization of several layers: u ~ U[0, RECURRENT_MAX], in the last layer U[LAST_LAYER_LOWER_BOUND,
    RECURRENT_MAX]. ``recurrent_init="last_layer"`` is short for this list:

    >>> from indrnn import last_layer_lower_bound
    >>> high, low = recurrent_max(40), last_layer_lower_bound(40)
    >>> rnn = IndRNN(200, 100, 2, recurrent_max_abs=high, recurrent_init=[(0, high), (low, high)])
    >>> bool((rnn.layers[1].weight_hh >= low).all())
    True

    B are sequences, T time steps, D input features, H hidden units, L layers; K is H, or 2H if bidirectional.

    Args:
        input_size: D.
        hidden_size: H.
        num_layers: L. Each layer reads the output of the one before it.
        nonlinearity: σ, "relu", "tanh", "identity" or "leaky_relu" (slope 0.01).
        bias: whether b exists.
        batch_first: use (B, T, …) instead of (T, B, …) for input and output.
        dropout: probability in [0, 1) after each layer but the last, in training. All steps of a sequence share a mask.
        bidirectional: read the sequence in both directions in every layer. The next layer reads both outputs.
        norm: "none", or "batch" for batch norm of each layer's output over batch and time, per direction.
        recurrent_max_abs: largest |u|, or None for no bound. ``recurrent_max(T)`` suits sequences of T steps.
        recurrent_min_abs: smallest |u|.
        constraint: how the bounds are enforced. "clip": in the forward pass (no gradient reaches a weight outside).
            "project": `indrnn.layers.project_recurrent_weights_` clamps the stored weights when you call it. "none":
            the bounds only set the range of initial values.
        input_init: W. "linear": U(±1/√D) as nn.Linear; "kaiming": Kaiming uniform with a = 8; "small_uniform":
            U(±0.001); "small_normal": N(0, 0.001²); a range (low, high); or a function that fills a tensor in place.
            b starts at 0.
        recurrent_init: u, with m = recurrent_max_abs or 1. "positive": U[0, m]; "symmetric": U[−m, m]; "last_layer":
            U[1/m, m] in the last layer and "positive" below it; a range (low, high); a function; or a list with one of
            these per layer.
        backend: of the recurrence: "auto", "reference", "scan", "numba" (CPU) or "triton" (CUDA).
        device, dtype: of the parameters.

    Parameters: ``rnn.layers[k]`` is layer k with weight_ih (H, D), weight_hh (H,), which is u, bias (H,), and module
    ``norm``. If bidirectional, ``layers[2 * k]`` reads layer k's input forwards and ``layers[2 * k + 1]`` backwards.
    The states hx and h_n are in the order of ``layers``.

    Differences from torch.nn.RNN: one recurrent weight per unit instead of a matrix; one bias; relu is the default;
    dropout keeps its mask over time; lengths, norm, bounds, initial values and backend are new; shapes that do not fit
    raise ValueError instead of RuntimeError; dropout=1 and proj_size are not supported. At T = 1 a call
    takes several times as long as torch.nn.RNN's: use `IndRNNCell`, which does not.

    Raises:
        ValueError: an argument is outside the values listed here. TypeError: a size is no int.
    """

    proj_size = 0
    _dropout_after_last = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "relu",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        norm: str = "none",
        recurrent_max_abs: float | None = None,
        recurrent_min_abs: float = 0.0,
        constraint: str = "clip",
        input_init: Initializer = "linear",
        recurrent_init: Initializer | Sequence[Initializer] = "positive",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("input_size", input_size)
        check_size("num_layers", num_layers)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.bidirectional = bidirectional
        self.num_directions = 2 if bidirectional else 1
        initializers = _per_layer(recurrent_init, num_layers)
        self.layers = nn.ModuleList(
            IndRNNLayer(
                input_size if k == 0 else hidden_size * self.num_directions,
                hidden_size,
                nonlinearity=nonlinearity,
                bias=bias,
                norm=norm,
                recurrent_max_abs=recurrent_max_abs,
                recurrent_min_abs=recurrent_min_abs,
                constraint=constraint,
                input_init=input_init,
                recurrent_init=initializers[k],
                backend=backend,
                reverse=reverse,
                device=device,
                dtype=dtype,
            )
            for k in range(num_layers)
            for reverse in (False, True)[: self.num_directions]
        )
        self.dropout = dropout

    @property
    def dropout(self) -> float:
        """Probability after each layer but the last. Assigning it changes the layers."""
        return self._dropout

    @dropout.setter
    def dropout(self, dropout: float) -> None:
        check_dropout(dropout)
        self._dropout = dropout
        for k, (_, layer) in enumerate(recurrent_layers(self)):
            last = k >= len(self.layers) - self.num_directions
            layer.dropout = dropout if not last or self._dropout_after_last else 0.0

    @property
    def nonlinearity(self) -> str:
        return self._first().nonlinearity

    @property
    def bias(self) -> bool:
        return self._first().bias is not None

    def flatten_parameters(self) -> None:
        """Do nothing, as torch.nn.RNN does on a CPU: there is no cuDNN weight buffer."""

    def reset_parameters(self) -> None:
        """Initialize all parameters again."""
        for _, layer in recurrent_layers(self):
            layer.reset_parameters()

    def _first(self) -> IndRNNLayer:
        first = self.layers[0]
        assert isinstance(first, IndRNNLayer)
        return first

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run all layers over the sequences.

        Args:
            input: (T, B, D), or (B, T, D) if batch_first, or unbatched (T, D), in the dtype of the weights; or a
                PackedSequence, sorted or not. B may be 0.
            hx: states before the first step, (L, B, H), (2L, B, H) if bidirectional, without B if unbatched. None:
                zeros.
            lengths: number of steps of each of the B sequences, 1 to T, if the rest of `input` is padding. Padding is
                never read: it changes no state and no batch-norm statistics, and its gradient is 0.

        Returns:
            output: the last layer's output, normalized if there is a norm, shaped as the input with K features, 0 in
                padding; a PackedSequence for a PackedSequence.
            h_n: the state of every layer after each sequence's own last step (first step, if it reads backwards),
                shaped as hx and in the dtype of the weights. Pass it as hx to continue the sequences.

        Raises:
            ValueError: shapes, dtypes, devices or lengths do not fit.
        """
        dtype = self._first().weight_hh.dtype
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: a PackedSequence has its own; omit them")
            x, batch_sizes, order, back = input
            check_tensor("input", x, dtype)
            B = int(batch_sizes[0])
            own = (batch_sizes.unsqueeze(1) > torch.arange(B, device=batch_sizes.device)).sum(0)
            steps = Steps.of(own.to(x.device), len(batch_sizes))
            states = self._initial_states(hx, B, batched=True)
            if order is not None:
                states = [None if state is None else state.index_select(0, order) for state in states]
            sequence, last = self.run(x, states, steps)
            h_n = torch.stack(last)
            return (
                PackedSequence(materialise(sequence), batch_sizes, order, back),
                h_n if back is None else h_n.index_select(1, back),
            )
        check_tensor("input", input, dtype)
        if input.dim() not in (2, 3):
            raise ValueError(f"input must have 2 dimensions (unbatched) or 3, got shape {tuple(input.shape)}")
        if input.shape[-1] != self.input_size:
            raise ValueError(f"input must have {self.input_size} features, got shape {tuple(input.shape)}")
        batched = input.dim() == 3
        # (B, T, D) internally: batch-major memory is the fast path
        x = input.unsqueeze(0) if not batched else input if self.batch_first else input.transpose(0, 1)
        B, T = x.shape[:2]
        states = self._initial_states(hx, B, batched)
        if lengths is None:
            sequence, last = self.run(x, states)
            output = materialise(sequence)
        else:
            steps = Steps.of(_checked_lengths(lengths, B, T, x.device), T)
            sequence, last = self.run(x.flatten(0, 1).index_select(0, steps.place), states, steps)
            output = steps.pad(materialise(sequence), steps.place)
        h_n = torch.stack(last)
        if not batched:
            return output.squeeze(0), h_n.squeeze(1)
        return output if self.batch_first else output.transpose(0, 1), h_n

    def run(
        self, x: Tensor, states: Sequence[Tensor | None] | None = None, steps: Steps | None = None
    ) -> tuple[AffineSequence, list[Tensor]]:
        """Map x (B, T, D), or (N, D) with `steps`, to the last layer's output, its norm and dropout still folded, and
        every layer's last state (B, H)."""
        if states is None:
            states = [None] * len(self.layers)
        sequence: Tensor | AffineSequence = x
        last: list[Tensor] = []
        together = not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
        updates: list[Update] | None = [] if together else None
        for k in range(0, len(self.layers), self.num_directions):
            outputs = []
            for layer, state in zip(self.layers[k:][: self.num_directions], states[k:], strict=False):
                output, final = layer(sequence, state, steps, updates)
                outputs.append(output)
                last.append(final)
            sequence = outputs[0] if len(outputs) == 1 else concatenate(outputs)
        if updates:
            update_running_statistics(updates)
        assert isinstance(sequence, AffineSequence)
        return sequence, last

    def _initial_states(self, hx: Tensor | None, B: int, batched: bool) -> Sequence[Tensor | None]:
        layers = len(self.layers)
        if hx is None:
            return [None] * layers
        check_tensor("hx", hx, self._first().weight_hh.dtype)
        expected = (layers, B, self.hidden_size) if batched else (layers, self.hidden_size)
        if tuple(hx.shape) != expected:
            raise ValueError(f"hx must have shape {expected}, got {tuple(hx.shape)}")
        return (hx if batched else hx.unsqueeze(1)).unbind(0)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, batch_first={self.batch_first}"
        return f"{text}, bidirectional=True" if self.bidirectional else text


def _per_layer(init: Initializer | Sequence[Initializer], num_layers: int) -> Sequence[Initializer]:
    """One initializer of u per layer."""
    if init == "last_layer":
        return ["positive"] * (num_layers - 1) + ["last_layer"]
    if isinstance(init, str) or callable(init) or is_range(init):
        return [init] * num_layers  # type: ignore[list-item]
    if len(init) != num_layers:
        raise ValueError(f"recurrent_init must have one entry for each of {num_layers} layers, got {len(init)}")
    return init  # type: ignore[return-value]


def _checked_lengths(lengths: Tensor | Sequence[int], B: int, T: int, device: torch.device) -> Tensor:
    lengths = torch.as_tensor(lengths, device=device)
    if lengths.shape != (B,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be {B} integers, one per sequence, got {lengths.dtype} {tuple(lengths.shape)}")
    if B > 0 and not 1 <= int(lengths.min()) <= int(lengths.max()) <= T:
        raise ValueError(f"lengths must be in 1…{T}, got {int(lengths.min())}…{int(lengths.max())}")
    return lengths.long()


class IndRNNCell(Weights):
    """One step, h' = σ(W x + b + u ⊙ h), a drop-in replacement for torch.nn.RNNCell.

    >>> import torch
    >>> from indrnn import IndRNNCell
    >>> cell, h = IndRNNCell(10, 20), torch.zeros(3, 20)
    >>> for x in torch.randn(6, 3, 10):
    ...     h = cell(x, h)
    >>> h.shape
    torch.Size([3, 20])

    Args and parameters: as one layer of `IndRNN`, with the arguments in the order of RNNCell. |u| is clipped in the
    forward pass.

    Raises:
        ValueError, TypeError: as `IndRNN`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "relu", **options: Any
    ) -> None:
        check_size("input_size", input_size)
        super().__init__(input_size, hidden_size, bias, nonlinearity, **options)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Map input (B, D) or (D,) and hx (B, H) or (H,), None for zeros, to the next state.

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        assert self.weight_ih is not None
        check_tensor("input", input, self.weight_ih.dtype)
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise ValueError(f"input must be (B, {self.input_size}) or ({self.input_size},), got {tuple(input.shape)}")
        a = nn.functional.linear(input, self.weight_ih, self.bias)
        if hx is not None:
            check_tensor("hx", hx, self.weight_ih.dtype)
            if hx.shape != a.shape:
                raise ValueError(f"hx must have shape {tuple(a.shape)}, got {tuple(hx.shape)}")
            a = a + self.recurrent_weight() * hx
        return activate(a, self.nonlinearity)
