"""One IndRNN layer, and what is done to all layers of a model: listing them, projecting their weights."""

import torch
from torch import Tensor, nn

from ..recurrence import NONLINEARITIES
from ..recurrence.dispatch import state_dtype
from ..recurrence.ops import recurrence
from .bounds import check_bounds, clip_recurrent_weight
from .initial import Initialiser, fill_bias, fill_input, fill_recurrent
from .norm import POSITIONS, affine_of, make_norm, normalise, uses_batch_statistics
from .sequence import AffineSequence, materialise, project

CONSTRAINTS = ("clip", "project", "none")


class IndRNNLayer(nn.Module):
    """dropout(norm(h)) with h_t = σ(W x_t + b + u ⊙ h_{t-1}) (Li et al. 2018, arXiv 1803.04831, eq. 2).

    Takes (B, T, D) or an `AffineSequence`, and returns an `AffineSequence` of (B, T, H) and the state after the last
    step (B, H): batch norm and dropout are not computed but folded into whatever reads the sequence (see `sequence`).

    Args:
        input_size: D, or None for a recurrence alone: no weight_ih and no bias, the input has H features.
        hidden_size: H.
        nonlinearity: σ: relu, tanh, identity or leaky_relu.
        bias: whether b exists.
        norm: "none", "batch" (over batch and time) or "layer"; norm_position: "after" the recurrence or "before" it.
        dropout: probability, in training; one mask a sequence, shared by all time steps.
        recurrent_max_abs, recurrent_min_abs: bounds on |u|; None, 0: no bound.
        constraint: how they are kept: "clip" in the forward pass (no gradient reaches a weight outside), "project"
            when the trainer calls `project_recurrent_weights_`, "none": they only set the range of initial values.
        input_init, recurrent_init, bias_init: a function that fills the tensor in place, or a name (see `initial`).
        backend: of the recurrence (see `indrnn.recurrence.resolve_backend`).

    Parameters: weight_ih (H, D), weight_hh (H,), bias (H,); the norm's own are in the module `norm`.
    """

    def __init__(
        self,
        input_size: int | None,
        hidden_size: int,
        *,
        nonlinearity: str = "relu",
        bias: bool = True,
        norm: str = "none",
        norm_position: str = "after",
        dropout: float = 0.0,
        recurrent_max_abs: float | None = None,
        recurrent_min_abs: float = 0.0,
        constraint: str = "clip",
        input_init: Initialiser = "linear",
        recurrent_init: Initialiser = "positive",
        bias_init: Initialiser = "zeros",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if nonlinearity not in NONLINEARITIES:
            raise ValueError(f"nonlinearity must be one of {', '.join(NONLINEARITIES)}, got {nonlinearity!r}")
        if norm_position not in POSITIONS:
            raise ValueError(f"norm_position must be one of {', '.join(POSITIONS)}, got {norm_position!r}")
        if constraint not in CONSTRAINTS:
            raise ValueError(f"constraint must be one of {', '.join(CONSTRAINTS)}, got {constraint!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        check_bounds(recurrent_max_abs, recurrent_min_abs)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.nonlinearity = nonlinearity
        self.norm_position = norm_position
        self.dropout = dropout
        self.recurrent_max_abs = recurrent_max_abs
        self.recurrent_min_abs = recurrent_min_abs
        self.constraint = constraint
        self.backend = backend
        self._initialisers = (input_init, recurrent_init, bias_init)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.weight_ih = None if input_size is None else parameter(hidden_size, input_size)
        self.weight_hh = parameter(hidden_size)
        self.bias = None if input_size is None or not bias else parameter(hidden_size)
        self.norm = make_norm(norm, hidden_size, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W and u, set b, and reset the norm."""
        input_init, recurrent_init, bias_init = self._initialisers
        with torch.no_grad():
            if self.weight_ih is not None:
                fill_input(self.weight_ih, input_init)
            fill_recurrent(self.weight_hh, recurrent_init, self.recurrent_max_abs)
            if self.bias is not None:
                fill_bias(self.bias, bias_init)
        if isinstance(self.norm, nn.BatchNorm1d | nn.LayerNorm):
            self.norm.reset_parameters()

    def recurrent_weight(self) -> Tensor:
        """u (H,) as the recurrence uses it: clipped if constraint is "clip"."""
        if self.constraint != "clip":
            return self.weight_hh
        return clip_recurrent_weight(self.weight_hh, self.recurrent_max_abs, self.recurrent_min_abs)

    def forward(self, input: Tensor | AffineSequence, h0: Tensor | None = None) -> tuple[AffineSequence, Tensor]:
        """(B, T, D) and the state before the first step (B, H), None for zeros, to the sequence (B, T, H) and the state
        after the last step (B, H)."""
        bias: Tensor | None = None
        if self.weight_ih is None:
            x = materialise(input)
        else:
            x, bias = project(input, self.weight_ih, self.bias)
        norm = self.norm
        if norm is not None and self.norm_position == "before":
            x, bias, norm = normalise(norm, x if bias is None else x + bias), None, None
        folded = norm if isinstance(norm, nn.BatchNorm1d) else None
        h, last, mean, variance = recurrence(
            x,
            self.recurrent_weight(),
            None if h0 is None else h0.to(state_dtype(x.dtype)),
            bias,
            statistics=folded is not None and uses_batch_statistics(folded),
            nonlinearity=self.nonlinearity,
            backend=self.backend,
        )
        mask = self._mask(last)
        if folded is not None:
            scale, shift = affine_of(folded, mean, variance, h.shape[0] * h.shape[1])
            return AffineSequence(h, last, scale, shift, mask), last
        if norm is not None:
            # the last step anew from its copy, so that a reader of it alone leaves the rest without gradient
            return AffineSequence(normalise(norm, h), normalise(norm, last), mask=mask), last
        return AffineSequence(h, last, mask=mask), last

    def _mask(self, last: Tensor) -> Tensor | None:
        if not self.training or self.dropout == 0:
            return None
        keep = 1 - self.dropout
        return torch.empty_like(last).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}", f"nonlinearity={self.nonlinearity}"]
        if self.input_size is not None and self.bias is None:
            parts.append("bias=False")
        if self.norm is not None:
            parts.append(f"norm_position={self.norm_position}")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        if self.recurrent_max_abs is not None or self.recurrent_min_abs:
            limits = f"[{self.recurrent_min_abs:.6g}, {self.recurrent_max_abs or float('inf'):.6g}]"
            parts.append(f"|u| in {limits} by {self.constraint}")
        return ", ".join(parts)


def recurrent_layers(module: nn.Module) -> list[tuple[str, IndRNNLayer]]:
    """Every recurrence of a model with its name, in the order they were registered (depth order)."""
    return [(name, each) for name, each in module.named_modules() if isinstance(each, IndRNNLayer)]


@torch.no_grad()
def project_recurrent_weights_(module: nn.Module) -> None:
    """Clamp the stored u of every layer with constraint "project" into its bounds, in place."""
    for _, layer in recurrent_layers(module):
        if layer.constraint == "project":
            u = layer.weight_hh
            u.copy_(clip_recurrent_weight(u, layer.recurrent_max_abs, layer.recurrent_min_abs))
