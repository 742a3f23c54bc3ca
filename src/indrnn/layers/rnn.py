"""IndRNN: a stack of layers with the interface of torch.nn.RNN; IndRNNCell: one step, as torch.nn.RNNCell."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..recurrence import NONLINEARITIES
from ..recurrence.reference import activate
from .bounds import check_bounds, clip_recurrent_weight
from .initial import Initialiser, fill_bias, fill_input, fill_recurrent
from .layer import IndRNNLayer
from .sequence import AffineSequence, materialise


class IndRNN(nn.Module):
    """A stack of IndRNN layers (Li et al. 2018, arXiv 1803.04831), used as torch.nn.RNN is.

        h_t = σ(W x_t + b + u ⊙ h_{t-1})

    Args:
        input_size, hidden_size, num_layers: D, H, L.
        nonlinearity, bias, norm, norm_position, recurrent_max_abs, recurrent_min_abs, constraint, backend: of every
            layer, see `IndRNNLayer`. For a sequence of T steps ``recurrent_max_abs=recurrent_max(T)`` is a good bound.
        batch_first: (B, T, …) instead of (T, B, …) for input and output.
        dropout: probability after each layer but the last, in training; one mask a sequence, shared by all steps.
        input_init, recurrent_init, bias_init: a name or a function for all layers, or a list of L of them.

    Input (T, B, D), or (B, T, D) if batch_first, or unbatched (T, D); h0 (L, B, H), or (L, H) unbatched; zeros if None.
    Returns the last layer's output (normalised if there is a norm), shaped as the input with H features, and h_n, the
    states of all layers after the last step (L, B, H) or (L, H). Passing h_n on as h0 continues a sequence.

    Raises:
        ValueError: sizes, shapes or dtypes that do not fit.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        nonlinearity: str = "relu",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        norm: str = "none",
        norm_position: str = "after",
        recurrent_max_abs: float | None = None,
        recurrent_min_abs: float = 0.0,
        constraint: str = "clip",
        input_init: Initialiser | Sequence[Initialiser] = "linear",
        recurrent_init: Initialiser | Sequence[Initialiser] = "positive",
        bias_init: Initialiser | Sequence[Initialiser] = "zeros",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.batch_first = batch_first
        input_inits = _per_layer("input_init", input_init, num_layers)
        recurrent_inits = _per_layer("recurrent_init", recurrent_init, num_layers)
        bias_inits = _per_layer("bias_init", bias_init, num_layers)
        self.layers = nn.ModuleList(
            IndRNNLayer(
                input_size if k == 0 else hidden_size,
                hidden_size,
                nonlinearity=nonlinearity,
                bias=bias,
                norm=norm,
                norm_position=norm_position,
                dropout=dropout if k < num_layers - 1 else 0.0,
                recurrent_max_abs=recurrent_max_abs,
                recurrent_min_abs=recurrent_min_abs,
                constraint=constraint,
                input_init=input_inits[k],
                recurrent_init=recurrent_inits[k],
                bias_init=bias_inits[k],
                backend=backend,
                device=device,
                dtype=dtype,
            )
            for k in range(num_layers)
        )

    def forward(self, input: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if input.dim() not in (2, 3):
            raise ValueError(f"input must have 2 dimensions (unbatched) or 3, got shape {tuple(input.shape)}")
        if input.shape[-1] != self.input_size:
            raise ValueError(f"input must have {self.input_size} features, got shape {tuple(input.shape)}")
        batched = input.dim() == 3
        # (B, T, D) inside, whatever came: batch-major memory is the fast one
        x = input.unsqueeze(0) if not batched else input if self.batch_first else input.transpose(0, 1)
        states = self._initial_states(h0, x.shape[0], batched)
        sequence: Tensor | AffineSequence = x
        last = []
        for layer, state in zip(self.layers, states, strict=True):
            sequence, final = layer(sequence, state)
            last.append(final)
        output, h_n = materialise(sequence), torch.stack(last)
        if not batched:
            return output.squeeze(0), h_n.squeeze(1)
        return output if self.batch_first else output.transpose(0, 1), h_n

    def _initial_states(self, h0: Tensor | None, B: int, batched: bool) -> Sequence[Tensor | None]:
        if h0 is None:
            return [None] * self.num_layers
        expected = (self.num_layers, B, self.hidden_size) if batched else (self.num_layers, self.hidden_size)
        if tuple(h0.shape) != expected:
            raise ValueError(f"h0 must have shape {expected}, got {tuple(h0.shape)}")
        return (h0 if batched else h0.unsqueeze(1)).unbind(0)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, batch_first={self.batch_first}"


def _per_layer(name: str, value: Initialiser | Sequence[Initialiser], num_layers: int) -> Sequence[Initialiser]:
    if isinstance(value, str) or callable(value):
        return [value] * num_layers
    if len(value) != num_layers:
        raise ValueError(f"{name} must hold one entry for each of {num_layers} layers, got {len(value)}")
    return value


class IndRNNCell(nn.Module):
    """One step, h' = σ(W x + b + u ⊙ h), used as torch.nn.RNNCell is; the parameters are those of `IndRNNLayer`.

    Input (B, D) or (D,), h (B, H) or (H,), zeros if None; returns the shape of h.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        nonlinearity: str = "relu",
        bias: bool = True,
        recurrent_max_abs: float | None = None,
        recurrent_min_abs: float = 0.0,
        input_init: Initialiser = "linear",
        recurrent_init: Initialiser = "positive",
        bias_init: Initialiser = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if nonlinearity not in NONLINEARITIES:
            raise ValueError(f"nonlinearity must be one of {', '.join(NONLINEARITIES)}, got {nonlinearity!r}")
        check_bounds(recurrent_max_abs, recurrent_min_abs)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.nonlinearity = nonlinearity
        self.recurrent_max_abs = recurrent_max_abs
        self.recurrent_min_abs = recurrent_min_abs
        self._initialisers = (input_init, recurrent_init, bias_init)
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W and u and set b."""
        input_init, recurrent_init, bias_init = self._initialisers
        with torch.no_grad():
            fill_input(self.weight_ih, input_init)
            fill_recurrent(self.weight_hh, recurrent_init, self.recurrent_max_abs)
            if self.bias is not None:
                fill_bias(self.bias, bias_init)

    def forward(self, input: Tensor, h: Tensor | None = None) -> Tensor:
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise ValueError(f"input must be (B, {self.input_size}) or ({self.input_size},), got {tuple(input.shape)}")
        a = nn.functional.linear(input, self.weight_ih, self.bias)
        if h is not None:
            if h.shape != a.shape:
                raise ValueError(f"h must have shape {tuple(a.shape)}, got {tuple(h.shape)}")
            a = a + clip_recurrent_weight(self.weight_hh, self.recurrent_max_abs, self.recurrent_min_abs) * h
        return activate(a, self.nonlinearity)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, nonlinearity={self.nonlinearity}"
