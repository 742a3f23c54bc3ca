"""One IndRNN layer, and functions over all layers of a model.

Letters: B batch, T time steps, D input features, H hidden units, N rows of a PackedSequence.
"""

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..recurrence import BACKENDS, NONLINEARITIES
from ..recurrence.ops import recurrence
from .folding import Affine, AffineSequence, call, cast_sequence, factors
from .init import Initializer, clip_recurrent_weight, fill_input, fill_recurrent


class Steps(NamedTuple):
    """The places of the N rows of a PackedSequence in a padded (B, T, …).

    Backwards, each sequence is read from its own last step, so that both directions begin at t = 0 with h0.
    """

    place: Tensor  # (N,) place of a row in (B·T, …)
    backwards: Tensor  # (N,) its place when each sequence is reversed
    last: Tensor  # (B,) place of each sequence's last step, in either
    shape: tuple[int, int]  # B, T

    @staticmethod
    def of(batch_sizes: Tensor, device: torch.device) -> "Steps":
        """Tensors on `device` for the batch sizes (T,) of a PackedSequence, which are on the CPU."""
        B, T = int(batch_sizes[0]), len(batch_sizes)
        sequences = torch.arange(B, device="cpu")
        there = batch_sizes.unsqueeze(1) > sequences
        lengths = there.sum(0)
        step, sequence = there.nonzero().unbind(1)
        place, backwards = sequence * T + step, sequence * T + lengths[sequence] - 1 - step
        last = sequences * T + lengths - 1
        return Steps(place.to(device), backwards.to(device), last.to(device), (B, T))

    def pad(self, rows: Tensor, places: Tensor, padding: float) -> Tensor:
        """Copy rows (N, H) to their places in (B, T, H), filled with `padding`."""
        B, T = self.shape
        return rows.new_full((B * T, rows.shape[-1]), padding).index_copy(0, places, rows).view(B, T, -1)


class Weights(nn.Module):
    """The parameters of a layer or a cell: weight_ih (H, D), weight_hh (H,), bias (H,). Arguments: see `IndRNN`."""

    def __init__(
        self,
        input_size: int | None,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "relu",
        *,
        recurrent_max_abs: float | None = None,
        recurrent_min_abs: float = 0.0,
        constraint: str = "clip",
        input_init: Initializer = "linear",
        recurrent_init: Initializer = "positive",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or (input_size is not None and input_size < 1):
            raise ValueError(f"input_size and hidden_size must be at least 1, got {input_size} and {hidden_size}")
        check_choice("nonlinearity", nonlinearity, NONLINEARITIES)
        check_choice("constraint", constraint, ("clip", "project", "none"))
        largest = recurrent_min_abs if recurrent_max_abs is None else recurrent_max_abs
        if not 0 <= recurrent_min_abs <= largest < inf:
            bounds = f"{recurrent_min_abs} and {recurrent_max_abs}"
            raise ValueError(f"0 <= recurrent_min_abs <= recurrent_max_abs < infinity must hold, got {bounds}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.nonlinearity = nonlinearity
        self.recurrent_max_abs = recurrent_max_abs
        self.recurrent_min_abs = recurrent_min_abs
        self.constraint = constraint
        self._initializers = (input_init, recurrent_init)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_ih = None if input_size is None else nn.Parameter(torch.empty(hidden_size, input_size, **where))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, **where))
        self.bias = None if input_size is None or not bias else nn.Parameter(torch.empty(hidden_size, **where))
        Weights.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Initialize W and u; set b to 0."""
        input_init, recurrent_init = self._initializers
        if self.weight_ih is not None:
            fill_input(self.weight_ih, input_init)
        fill_recurrent(self.weight_hh, recurrent_init, self.recurrent_max_abs)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def recurrent_weight(self) -> Tensor:
        """Return u (H,) as the recurrence uses it: clipped if constraint is "clip"."""
        if self.constraint != "clip":
            return self.weight_hh
        return clip_recurrent_weight(self.weight_hh, self.recurrent_max_abs, self.recurrent_min_abs)

    def extra_repr(self) -> str:
        bounds = f"|u| in [{self.recurrent_min_abs}, {self.recurrent_max_abs}] by {self.constraint}"
        return f"{self.input_size}, {self.hidden_size}, {self.nonlinearity}, bias={self.bias is not None}, {bounds}"


Update = tuple[Any, Tensor, Tensor, int | Tensor]  # batch norm, mean, biased variance, values per unit


class IndRNNLayer(Weights):
    """dropout(norm(h)) with h_t = σ(W x_t + b + u ⊙ h_{t-1}) (Li et al. 2018, arXiv 1803.04831, eq. 2).

    Args:
        input_size: D, or None for a recurrence without weight_ih and bias, whose input has H features.
        reverse: read the sequence from its end; the "last" state is then the state at t = 1.
        Other arguments: see `IndRNN`, for one layer. Dropout follows this layer.

    Parameters: weight_ih (H, D), weight_hh (H,), bias (H,), and those of the module ``norm``.
    """

    share: Any = None  # `indrnn.training.distributed.Share`, which joins statistics and masks of several processes

    def __init__(
        self,
        input_size: int | None,
        hidden_size: int,
        *,
        norm: str = "none",
        dropout: float = 0.0,
        backend: str = "auto",
        reverse: bool = False,
        **weights: Any,
    ) -> None:
        super().__init__(input_size, hidden_size, **weights)
        check_choice("norm", norm, ("none", "batch"))
        check_choice("backend", backend, BACKENDS)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.dropout = dropout
        self.backend = backend
        self.reverse = reverse
        where: dict[str, Any] = {"device": self.weight_hh.device, "dtype": self.weight_hh.dtype}
        self.norm = None if norm == "none" else nn.BatchNorm1d(hidden_size, **where)

    def reset_parameters(self) -> None:
        """Initialize W and u, set b to 0, and reset the norm."""
        super().reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(
        self,
        input: Tensor | AffineSequence,
        h0: Tensor | None = None,
        steps: Steps | None = None,
        updates: list[Update] | None = None,
    ) -> tuple[AffineSequence, Tensor]:
        """Run the layer over the sequences.

        Args:
            input: (B, T, D) or an `AffineSequence`; with `steps`, the rows (N, D) of a PackedSequence.
            h0: state before the first step (B, H); None for zeros.
            updates: receives the update of the running statistics, for `update_running_statistics`. None: updated now.

        Returns:
            The sequence, (B, T, H) or (N, H), and the state after the last step (B, H) in the dtype of the weights.
        """
        weight = bias = None
        if self.weight_ih is not None:
            x, weight, bias = factors(input, self.weight_ih, self.bias)
        else:
            x = input.materialise() if isinstance(input, AffineSequence) else cast_sequence(input)
        statistics = self.norm is not None and self.norm.training
        if steps is not None:
            places = steps.backwards if self.reverse else steps.place
            x, weight = x if weight is None else F.linear(x, weight), None
            # With relu the state rests at 0 in the padding. It could grow to an infinity that spoils du.
            x = steps.pad(x, places, max(-1e30, torch.finfo(x.dtype).min) if self.nonlinearity == "relu" else 0.0)
        h, last, mean, variance = recurrence(
            x,
            self.recurrent_weight(),
            h0,
            bias,
            weight,
            statistics=statistics and steps is None,
            nonlinearity=self.nonlinearity,
            backend=self.backend,
            reverse=self.reverse and steps is None,
        )
        if steps is not None:
            rows = h.flatten(0, 1)
            h, last = rows.index_select(0, places), rows.index_select(0, steps.last).to(last.dtype)
            if statistics:
                variance, mean = torch.var_mean(h.to(last.dtype), dim=0, correction=0)
        scale = shift = mask = None
        if self.norm is not None:
            scale, shift = self._affine((mean, variance) if statistics else None, h.numel() // h.shape[-1], updates)
        if self.training and self.dropout > 0:
            keep = 1 - self.dropout
            mask = self.share.mask(last, keep) if self.share else torch.empty_like(last).bernoulli_(keep).div_(keep)
        last = last.to(self.weight_hh.dtype)
        if steps is None or mask is None:
            return AffineSequence(h, last, scale, shift, mask), last
        # Rows of one sequence are scattered, so a mask cannot be folded into its matrix.
        affine = AffineSequence(h, last, scale, shift)
        z = (affine.materialise() * mask.index_select(0, places // steps.shape[1])).to(h.dtype)
        return AffineSequence(z, (affine.last() * mask).to(last.dtype)), last

    def _affine(
        self, statistics: tuple[Tensor, Tensor] | None, n: int, updates: list[Update] | None
    ) -> tuple[Tensor, Tensor]:
        """scale and shift (H,) of the norm: from the mean and variance of n values per unit, or running ones."""
        norm = self.norm
        if not (isinstance(norm, nn.BatchNorm1d) and norm.affine and norm.track_running_stats):
            raise ValueError(f"norm must be a BatchNorm1d(affine=True, track_running_stats=True), got {norm}")
        mean, variance = cast(Any, statistics or (norm.running_mean, norm.running_var))
        if statistics and self.share:
            mean, variance, n = self.share.join(mean, variance, n)
        elif statistics and n < 2:
            raise ValueError(f"batch norm needs more than one value per unit in training, got {n}")
        if statistics and updates is None:
            update_running_statistics([(norm, mean, variance, n)])
        elif statistics and updates is not None:
            updates.append((norm, mean, variance, n))
        scale, shift, _ = call(Affine, mean, variance, norm.weight.to(mean.dtype), norm.bias.to(mean.dtype), norm.eps)
        return scale, shift

    def register_full_backward_hook(self, *_: Any, **__: Any) -> Any:
        # The hook would never run: module backward hooks see tensors only.
        raise NotImplementedError("an IndRNNLayer returns no tensor to hook; register the hook on the IndRNN")

    register_full_backward_pre_hook = register_backward_hook = register_full_backward_hook


@torch.no_grad()
def update_running_statistics(updates: Sequence[Update]) -> None:
    """Update running statistics as nn.BatchNorm1d does, those of several layers in a few operations."""
    norms, means, variances, counts = zip(*updates, strict=True)
    factor = counts[0] / (counts[0] - 1)  # the same in all layers of a stack
    if len(norms) > 1 and norms[0].momentum is not None and len({norm.momentum for norm in norms}) == 1:
        running = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
        batch = [*means, *torch._foreach_mul(variances, factor)]
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
        batch = [value.to(old.dtype) for old, value in zip(running, batch, strict=True)]
        torch._foreach_lerp_(running, batch, norms[0].momentum)
        return
    for norm, mean, variance, _ in updates:
        norm.num_batches_tracked.add_(1)
        # momentum None: the average of all batches so far; a tensor, so that a CUDA graph can hold it
        rate = norm.num_batches_tracked.to(mean.dtype).reciprocal() if norm.momentum is None else norm.momentum
        for old, value in ((norm.running_mean, mean), (norm.running_var, variance * factor)):
            old.add_((value - old) * rate)  # lerp_ has no rule for torch.func.vmap


def recurrent_layers(module: nn.Module) -> list[tuple[str, IndRNNLayer]]:
    """Return every recurrence of a model with its name, in the order of registration (depth order)."""
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, IndRNNLayer)]


@torch.no_grad()
def project_recurrent_weights_(module: nn.Module) -> None:
    """Clamp the stored u of every layer and cell with constraint "project" to its bounds, in place.

    Raises:
        ValueError: u is computed (`torch.nn.utils.parametrize`), so that clamping it would have no effect.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, Weights) and layer.constraint == "project":
            u = layer.weight_hh
            if not isinstance(u, nn.Parameter):
                raise ValueError(f"constraint='project' cannot clamp the parametrized {name}.weight_hh; use 'clip'")
            u.copy_(clip_recurrent_weight(u, layer.recurrent_max_abs, layer.recurrent_min_abs))


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
