"""IndRNN: a stack of layers with the interface of torch.nn.RNN; IndRNNCell: one step, as torch.nn.RNNCell."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..recurrence.reference import activate
from .folding import AffineSequence, concatenate, materialise
from .init import Initialiser
from .layer import IndRNNLayer, Steps, Weights, check_flag, check_size, check_tensor, recurrent_layers


class IndRNN(nn.Module):
    """A stack of IndRNN layers (Li et al. 2018, arXiv 1803.04831), used as torch.nn.RNN is.

        h_t = σ(W x_t + b + u ⊙ h_{t-1})

    >>> import torch
    >>> from indrnn import IndRNN, recurrent_max
    >>> rnn = IndRNN(200, 100, num_layers=2, batch_first=True, recurrent_max_abs=recurrent_max(40))
    >>> output, h_n = rnn(torch.randn(64, 40, 200))
    >>> output.shape, h_n.shape
    (torch.Size([64, 40, 100]), torch.Size([2, 64, 100]))

    Below B are sequences, T time steps, D input features, H hidden units, L layers; K is H, or 2H if bidirectional.

    Args:
        input_size: D.
        hidden_size: H.
        num_layers: L; each layer reads the output of the one before it.
        nonlinearity: σ: "relu", "tanh", "identity" or "leaky_relu" (slope 0.01).
        bias: whether b exists.
        batch_first: (B, T, …) instead of (T, B, …) for input and output.
        dropout: probability in [0, 1) after each layer but the last, in training; all steps of a sequence share a mask.
        bidirectional: every layer reads the sequence in both directions; the next layer reads the outputs of both.
        norm: of each layer's output: "none", or "batch", over batch and time. Each direction has its own.
        recurrent_max_abs: largest |u|, or None for no bound. ``recurrent_max(T)`` suits sequences of T steps.
        recurrent_min_abs: smallest |u|.
        constraint: how the bounds are kept: "clip" in the forward pass (no gradient reaches a weight outside);
            "project", stored weights are clamped whenever you call `indrnn.layers.project_recurrent_weights_`; "none",
            they only set the range of initial values.
        input_init: W: "linear", U(±1/√D) as nn.Linear; "kaiming", Kaiming uniform with a = 8; "small_uniform",
            U(±0.001); "small_normal", N(0, 0.001²); or a function that fills a tensor in place. b starts at 0.
        recurrent_init: u: "positive", U[0, m]; "symmetric", U[−m, m], with m = recurrent_max_abs or 1; or a function;
            or a list of these, one for each layer.
        backend: of the recurrence: "auto", "reference", "scan", "numba" (CPU) or "triton" (CUDA).
        device, dtype: of the parameters, as for every torch module.

    Parameters: ``rnn.layers[k]`` is layer k with weight_ih (H, D), weight_hh (H,), which is u, and bias (H,), and its
    module ``norm``. If bidirectional, ``layers[2 * k]`` reads layer k's input forwards and ``layers[2 * k + 1]``
    backwards. The states h0 and h_n are in the order of ``layers``.

    What differs from torch.nn.RNN: one recurrent weight per unit instead of a matrix; one bias; relu is the default;
    dropout keeps its mask over time; lengths, norm, bounds, initial values and backend are new; shapes that do not fit
    raise ValueError instead of RuntimeError; dropout=1 is refused; there is no proj_size.

    Raises:
        ValueError: an argument outside what is listed here. TypeError: a size that is no int, a flag that is no bool.
    """

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
        input_init: Initialiser = "linear",
        recurrent_init: Initialiser | Sequence[Initialiser] = "positive",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("input_size", input_size)
        check_size("num_layers", num_layers)
        check_flag("batch_first", batch_first)
        check_flag("bidirectional", bidirectional)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.bidirectional = bidirectional
        self.num_directions = 2 if bidirectional else 1
        if isinstance(recurrent_init, str) or callable(recurrent_init):
            recurrent_init = [recurrent_init] * num_layers
        if len(recurrent_init) != num_layers:
            raise ValueError(
                f"recurrent_init must hold one entry for each of {num_layers} layers, got {len(recurrent_init)}"
            )
        self.layers = nn.ModuleList(
            IndRNNLayer(
                input_size if k == 0 else hidden_size * self.num_directions,
                hidden_size,
                nonlinearity=nonlinearity,
                bias=bias,
                norm=norm,
                dropout=dropout if k < num_layers - 1 else 0.0,
                recurrent_max_abs=recurrent_max_abs,
                recurrent_min_abs=recurrent_min_abs,
                constraint=constraint,
                input_init=input_init,
                recurrent_init=recurrent_init[k],
                backend=backend,
                reverse=reverse,
                device=device,
                dtype=dtype,
            )
            for k in range(num_layers)
            for reverse in (False, True)[: self.num_directions]
        )
        if not 0 <= dropout < 1:  # with a single layer, no layer has checked it
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")

    def reset_parameters(self) -> None:
        """Initialise all parameters again."""
        for _, layer in recurrent_layers(self):
            layer.reset_parameters()

    def _first(self) -> IndRNNLayer:
        first = self.layers[0]
        assert isinstance(first, IndRNNLayer)
        return first

    def forward(
        self,
        input: Tensor | PackedSequence,
        h0: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run all layers over the sequences.

        Args:
            input: (T, B, D), or (B, T, D) if batch_first, or unbatched (T, D), in the dtype of the weights; or a
                PackedSequence, sorted or not. B may be 0.
            h0: states before the first step, (L, B, H), (2L, B, H) if bidirectional, without B if unbatched; None:
                zeros.
            lengths: how many steps each of the B sequences has, 1 to T, where the rest of `input` is padding. Padding
                is never read: it changes no state and no batch-norm statistics, and its gradient is 0.

        Returns:
            output: the last layer's, normalised if there is a norm, shaped as the input with K features, 0 in padding;
                a PackedSequence for a PackedSequence.
            h_n: the state of every layer after each sequence's own last step (first step, if it reads backwards),
                shaped as h0. Passing it on as h0 continues the sequences.

        Raises:
            ValueError: shapes, dtypes, devices or lengths that do not fit.
        """
        dtype = self._first().weight_hh.dtype
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: a PackedSequence has its own, leave them out")
            x, batch_sizes, order, back = input
            check_tensor("input", x, dtype)
            counts = batch_sizes.tolist()
            B = counts[0]
            own = (batch_sizes.unsqueeze(1) > torch.arange(B)).sum(0)
            steps = Steps.of(own.to(x.device), len(counts))
            states = self._initial_states(h0, B, batched=True)
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
        # (B, T, D) internally: batch-major memory is the fast one
        x = input.unsqueeze(0) if not batched else input if self.batch_first else input.transpose(0, 1)
        B, T = x.shape[:2]
        states = self._initial_states(h0, B, batched)
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
        """The last layer's output, norm and dropout still folded (see `indrnn.layers.folding`), and every layer's last
        state (B, H), from x (B, T, D), or (N, D) with `steps`."""
        if states is None:
            states = [None] * len(self.layers)
        sequence: Tensor | AffineSequence = x
        last: list[Tensor] = []
        for k in range(0, len(self.layers), self.num_directions):
            outputs = []
            for layer, state in zip(self.layers[k:][: self.num_directions], states[k:], strict=False):
                output, final = layer(sequence, state, steps) if steps is not None else layer(sequence, state)
                outputs.append(output)
                last.append(final)
            sequence = outputs[0] if len(outputs) == 1 else concatenate(outputs)
        assert isinstance(sequence, AffineSequence)
        return sequence, last

    def _initial_states(self, h0: Tensor | None, B: int, batched: bool) -> Sequence[Tensor | None]:
        layers = len(self.layers)
        if h0 is None:
            return [None] * layers
        check_tensor("h0", h0, self._first().weight_hh.dtype)
        expected = (layers, B, self.hidden_size) if batched else (layers, self.hidden_size)
        if tuple(h0.shape) != expected:
            raise ValueError(f"h0 must have shape {expected}, got {tuple(h0.shape)}")
        return (h0 if batched else h0.unsqueeze(1)).unbind(0)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, batch_first={self.batch_first}"
        return f"{text}, bidirectional=True" if self.bidirectional else text


def _checked_lengths(lengths: Tensor | Sequence[int], B: int, T: int, device: torch.device) -> Tensor:
    lengths = torch.as_tensor(lengths, device=device)
    if lengths.shape != (B,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            f"lengths must be {B} integers, one for each sequence, got {lengths.dtype} {tuple(lengths.shape)}"
        )
    if B > 0 and not 1 <= int(lengths.min()) <= int(lengths.max()) <= T:
        raise ValueError(f"lengths must be in 1…{T}, got {int(lengths.min())}…{int(lengths.max())}")
    return lengths.long()


class IndRNNCell(Weights):
    """One step, h' = σ(W x + b + u ⊙ h), used as torch.nn.RNNCell is.

    >>> import torch
    >>> from indrnn import IndRNNCell
    >>> cell, h = IndRNNCell(10, 20), torch.zeros(3, 20)
    >>> for x in torch.randn(6, 3, 10):
    ...     h = cell(x, h)
    >>> h.shape
    torch.Size([3, 20])

    Args and parameters as for one layer of `IndRNN`; the bounds on u are kept by clipping in the forward pass.

    Raises:
        ValueError, TypeError: as `IndRNN`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "relu",
        *,
        recurrent_max_abs: float | None = None,
        recurrent_min_abs: float = 0.0,
        input_init: Initialiser = "linear",
        recurrent_init: Initialiser = "positive",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        bounds = (recurrent_max_abs, recurrent_min_abs, "clip")
        initialisers = (input_init, recurrent_init)
        check_size("input_size", input_size)
        super().__init__(input_size, hidden_size, nonlinearity, bias, bounds, initialisers, device, dtype)
        self.reset_parameters()

    def forward(self, input: Tensor, h: Tensor | None = None) -> Tensor:
        """Input (B, D) or (D,) and h (B, H) or (H,), None for zeros, to the next h.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        assert self.weight_ih is not None
        check_tensor("input", input, self.weight_ih.dtype)
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise ValueError(f"input must be (B, {self.input_size}) or ({self.input_size},), got {tuple(input.shape)}")
        a = nn.functional.linear(input, self.weight_ih, self.bias)
        if h is not None:
            check_tensor("h", h, self.weight_ih.dtype)
            if h.shape != a.shape:
                raise ValueError(f"h must have shape {tuple(a.shape)}, got {tuple(h.shape)}")
            a = a + self.recurrent_weight() * h
        return activate(a, self.nonlinearity)
