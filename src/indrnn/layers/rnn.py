"""IndRNN: a stack of layers with the interface of torch.nn.RNN. IndRNNCell: one step, as torch.nn.RNNCell."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..recurrence.reference import activate
from .folding import AffineSequence, concatenate
from .init import Initializer
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
    dropout keeps its mask over time; norm, bounds, initial values and backend are new; shapes that do not fit raise
    ValueError instead of RuntimeError; dropout=1 and proj_size are not supported. At T = 1 a call takes several times
    as long as torch.nn.RNN's: use `IndRNNCell`, which does not.

    Raises:
        ValueError: an argument is outside the values listed here.
    """

    proj_size = 0

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
        recurrent_init: Initializer | list[Initializer] = "positive",
        **options: Any,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        initializers: Any = recurrent_init if isinstance(recurrent_init, list) else [recurrent_init] * num_layers
        if recurrent_init == "last_layer":
            initializers[:-1] = ["positive"] * (num_layers - 1)
        if len(initializers) != num_layers:
            raise ValueError(f"recurrent_init must have {num_layers} entries, one per layer, got {len(initializers)}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.bidirectional = bidirectional
        self.num_directions = 2 if bidirectional else 1
        self._dropout = dropout
        self.layers = nn.ModuleList(
            IndRNNLayer(
                input_size if k == 0 else hidden_size * self.num_directions,
                hidden_size,
                nonlinearity=nonlinearity,
                bias=bias,
                dropout=dropout,
                recurrent_init=initializer,
                reverse=reverse,
                **options,
            )
            for k, initializer in enumerate(initializers)
            for reverse in (False, True)[: self.num_directions]
        )
        for _, layer in recurrent_layers(self)[-self.num_directions :]:
            layer.dropout = 0.0

    # torch.nn.RNN's attributes. Assigning one raises AttributeError, because the layers would not change.
    nonlinearity = property(lambda self: self.layers[0].nonlinearity)
    bias = property(lambda self: self.layers[0].bias is not None)
    dropout = property(lambda self: self._dropout)

    def flatten_parameters(self) -> None:
        """Do nothing, as torch.nn.RNN does on a CPU: there is no cuDNN weight buffer."""

    def reset_parameters(self) -> None:
        """Initialize all parameters."""
        for _, layer in recurrent_layers(self):
            layer.reset_parameters()

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run all layers over the sequences.

        Args:
            input: (T, B, D), or (B, T, D) if batch_first, or unbatched (T, D), in the dtype of the weights; or a
                PackedSequence, sorted or not. B may be 0.
            hx: initial states, (L, B, H), (2L, B, H) if bidirectional, without B if unbatched. None: zeros.

        Returns:
            output: the last layer's output, normalized if there is a norm, shaped as the input with K features; a
                PackedSequence for a PackedSequence.
            h_n: the state of every layer after each sequence's own last step (first step, if it reads backwards),
                shaped as hx and in the dtype of the weights. Pass it as hx to continue the sequences.

        Raises:
            ValueError: shapes, dtypes or devices do not fit.
        """
        data, features = input.data if isinstance(input, PackedSequence) else input, self.input_size
        if data.dim() not in (2, 3) or data.shape[-1] != features:
            raise ValueError(f"input must have 2 or 3 dimensions and {features} features, got {tuple(data.shape)}")
        dtype = next(self.parameters()).dtype
        if data.dtype != dtype and not torch.is_autocast_enabled(data.device.type):
            raise ValueError(f"input is {data.dtype}, but the weights are {dtype}; convert one of them with .to()")
        steps, order, batched = None, None, True
        if isinstance(input, PackedSequence):
            x, batch_sizes, order, back = input
            steps = Steps.of(batch_sizes, x.device)
        else:
            batched = input.dim() != 2
            # (B, T, D) internally: batch-major memory is the fast path
            x = input.unsqueeze(0) if not batched else input if self.batch_first else input.transpose(0, 1)
        states = None
        if hx is not None:
            batch = () if not batched else x.shape[:1] if steps is None else steps.shape[:1]
            expected = (len(self.layers), *batch, self.hidden_size)
            if not isinstance(hx, Tensor):
                raise ValueError(f"hx must be a tensor, got {type(hx).__name__}; an IndRNN has no cell state")
            if hx.shape != expected:
                raise ValueError(f"hx must have shape {expected}, got {tuple(hx.shape)}")
            hx = hx if batched else hx.unsqueeze(1)
            states = (hx if order is None else hx.index_select(1, order)).unbind(0)
        sequence, last = self.run(x, states, steps)
        output, h_n = sequence.materialise(), torch.stack(last)
        if steps is not None:
            h_n = h_n if back is None else h_n.index_select(1, back)
            return PackedSequence(output, batch_sizes, order, back), h_n
        if not batched:
            return output.squeeze(0), h_n.squeeze(1)
        return output if self.batch_first else output.transpose(0, 1), h_n

    def run(
        self, x: Tensor, states: Sequence[Tensor | None] | None = None, steps: Steps | None = None
    ) -> tuple[AffineSequence, list[Tensor]]:
        """Map x (B, T, D), or (N, D) with `steps`, to the last layer's output, its norm and dropout still folded, and
        every layer's last state (B, H)."""
        states = states or [None] * len(self.layers)
        sequence: Any = x
        last: list[Tensor] = []
        apart = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        updates: list[Update] | None = None if apart else []
        for k in range(0, len(self.layers), self.num_directions):
            outputs = []
            for layer, state in zip(self.layers[k:][: self.num_directions], states[k:], strict=False):
                output, final = layer(sequence, state, steps, updates)
                outputs.append(output)
                last.append(final)
            sequence = outputs[0] if len(outputs) == 1 else concatenate(outputs)
        if updates:
            update_running_statistics(updates)
        return sequence, last


class IndRNNCell(Weights):
    """One step, h' = σ(W x + b + u ⊙ h), a drop-in replacement for torch.nn.RNNCell.

    >>> import torch
    >>> from indrnn import IndRNNCell
    >>> cell, h = IndRNNCell(10, 20), torch.zeros(3, 20)
    >>> for x in torch.randn(6, 3, 10):
    ...     h = cell(x, h)
    >>> h.shape
    torch.Size([3, 20])

    Args and parameters: as one layer of `IndRNN`, with the arguments in the order of RNNCell.
    """

    weight_ih: nn.Parameter

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Map input (B, D) or (D,) and hx (B, H) or (H,), None for zeros, to the next state.

        Raises:
            RuntimeError, ValueError: shapes or dtypes do not fit.
        """
        if input.dim() not in (1, 2):
            raise ValueError(f"input must be (B, D) or (D,), got {tuple(input.shape)}")
        a = nn.functional.linear(input, self.weight_ih, self.bias)
        if hx is not None:
            if hx.shape != a.shape or hx.dtype not in (a.dtype, self.weight_hh.dtype):
                got = f"{hx.dtype} {tuple(hx.shape)}"
                raise ValueError(f"hx must be {self.weight_hh.dtype} {tuple(a.shape)}, got {got}")
            a = a + self.recurrent_weight() * hx
        return activate(a, self.nonlinearity)
