"""One IndRNN layer with its norm, and functions over all layers of a model.

Letters: B batch, T time steps, D input features, H hidden units, N all time steps of sequences that differ in length.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..recurrence import BACKENDS, NONLINEARITIES
from ..recurrence.dispatch import SMALL_INPUT_SIZE, state_dtype
from ..recurrence.ops import recurrence
from .folding import AffineSequence, factors, materialise, project
from .init import Initialiser, check_bounds, clip_recurrent_weight, fill_input, fill_recurrent

CONSTRAINTS = ("clip", "project", "none")
NORMS = ("none", "batch")


class Weights(nn.Module):
    """The parameters of a layer or a cell: weight_ih (H, D), weight_hh (H,), bias (H,), checked, drawn and clipped."""

    def __init__(
        self,
        input_size: int | None,
        hidden_size: int,
        nonlinearity: str,
        bias: bool,
        bounds: tuple[float | None, float, str],
        initialisers: tuple[Initialiser, Initialiser],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_size("input_size", 1 if input_size is None else input_size)
        check_size("hidden_size", hidden_size)
        check_flag("bias", bias)
        check_choice("nonlinearity", nonlinearity, NONLINEARITIES)
        self.recurrent_max_abs, self.recurrent_min_abs, self.constraint = bounds
        check_bounds(self.recurrent_max_abs, self.recurrent_min_abs)
        check_choice("constraint", self.constraint, CONSTRAINTS)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.nonlinearity = nonlinearity
        self._initialisers = initialisers

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.weight_ih = None if input_size is None else parameter(hidden_size, input_size)
        self.weight_hh = parameter(hidden_size)
        self.bias = None if input_size is None or not bias else parameter(hidden_size)

    def reset_parameters(self) -> None:
        """Draw W and u; b = 0."""
        input_init, recurrent_init = self._initialisers
        with torch.no_grad():
            if self.weight_ih is not None:
                fill_input(self.weight_ih, input_init)
            fill_recurrent(self.weight_hh, recurrent_init, self.recurrent_max_abs)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def recurrent_weight(self) -> Tensor:
        """u (H,) as the recurrence uses it: clipped if constraint is "clip"."""
        if self.constraint != "clip":
            return self.weight_hh
        return clip_recurrent_weight(self.weight_hh, self.recurrent_max_abs, self.recurrent_min_abs)

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}", f"nonlinearity={self.nonlinearity}"]
        if self.input_size is not None and self.bias is None:
            parts.append("bias=False")
        if self.recurrent_max_abs is not None or self.recurrent_min_abs:
            limits = f"[{self.recurrent_min_abs:.6g}, {self.recurrent_max_abs or float('inf'):.6g}]"
            parts.append(f"|u| in {limits} by {self.constraint}")
        return ", ".join(parts)


def check_size(name: str, size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name} must be an int, got {size!r}")
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")


def check_flag(name: str, flag: bool) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, got {flag!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_tensor(name: str, value: object, dtype: torch.dtype) -> None:
    """Raise ValueError unless `value` is a tensor of the dtype of the weights (of any under autocast, which casts)."""
    if not isinstance(value, Tensor):
        hint = "; an IndRNN has no cell state: pass h alone" if isinstance(value, tuple) else ""
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}{hint}")
    if value.dtype != dtype and not _autocasts(value.device):
        remedy = f"convert it by {name}.to({dtype})"
        if value.is_floating_point():
            remedy += f", or the module by .to({value.dtype})"
        raise ValueError(f"{name} is {value.dtype}, but the weights are {dtype}: {remedy}")


def _autocasts(device: torch.device) -> bool:
    """Whether autocast is on there; a device that cannot have it (meta) is not asked, for PyTorch would raise."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


@dataclass(frozen=True)
class Steps:
    """The N time steps that sequences of different lengths have, as rows (N, …) that follow time and then the batch, as
    in a PackedSequence, and where a recurrence over (B, T, H) finds them.

    Backwards, a sequence is read from its own last step, so that both directions begin at t = 0 with h0.
    """

    sequence: Tensor  # (N,) the sequence that a row belongs to
    place: Tensor  # (N,) of a row in (B·T, …), where time runs forwards
    backwards: Tensor  # (N,) the same, where time runs backwards from each sequence's own last step
    last: Tensor  # (B,) the place of each sequence's last step, in either
    shape: tuple[int, int]  # B, T

    @staticmethod
    def of(lengths: Tensor, T: int) -> "Steps":
        """For lengths (B,), each in 1…T."""
        every = torch.arange(T, device=lengths.device)
        step, sequence = (every.unsqueeze(1) < lengths).nonzero().unbind(1)
        first = sequence * T
        last = torch.arange(len(lengths), device=lengths.device) * T + lengths - 1
        return Steps(sequence, first + step, last[sequence] - step, last, (len(lengths), T))

    def pad(self, rows: Tensor, places: Tensor, padding: float = 0.0) -> Tensor:
        """Rows (N, H) put into (B, T, H), `padding` elsewhere."""
        B, T = self.shape
        return rows.new_full((B * T, rows.shape[-1]), padding).index_copy(0, places, rows).view(B, T, -1)


class BatchShare(Protocol):
    """Joins this process's part of a batch with those of other processes."""

    def join(self, mean: Tensor, variance: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """From mean and variance (H,) of this part's n values per unit, those of all parts and their number."""

    def mask(self, like: Tensor, keep: float) -> Tensor:
        """This part's rows (b, H) of a dropout mask drawn for the whole batch."""


class IndRNNLayer(Weights):
    """dropout(norm(h)) with h_t = σ(W x_t + b + u ⊙ h_{t-1}) (Li et al. 2018, arXiv 1803.04831, eq. 2).

    Takes (B, T, D) or an `AffineSequence`, and returns an `AffineSequence` of (B, T, H) and the state after the last
    step (B, H): batch norm and dropout are not computed but folded into the next product (see `folding`).

    Args:
        input_size: D, or None for a recurrence alone: no weight_ih and no bias, the input has H features.
        reverse: read the sequence from its end; the state "after the last step" is then the one at t = 1.
        The others are those of `IndRNN`, for one layer; dropout follows this layer.

    Parameters: weight_ih (H, D), weight_hh (H,), bias (H,); the norm's own are in the module `norm`.
    """

    share: BatchShare | None = None
    """Set where several processes train together (`indrnn.training.distributed`)."""

    def __init__(
        self,
        input_size: int | None,
        hidden_size: int,
        *,
        nonlinearity: str = "relu",
        bias: bool = True,
        norm: str = "none",
        dropout: float = 0.0,
        recurrent_max_abs: float | None = None,
        recurrent_min_abs: float = 0.0,
        constraint: str = "clip",
        input_init: Initialiser = "linear",
        recurrent_init: Initialiser = "positive",
        backend: str = "auto",
        reverse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        bounds = (recurrent_max_abs, recurrent_min_abs, constraint)
        initialisers = (input_init, recurrent_init)
        super().__init__(input_size, hidden_size, nonlinearity, bias, bounds, initialisers, device, dtype)
        check_choice("norm", norm, NORMS)
        check_choice("backend", backend, BACKENDS)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.dropout = dropout
        self.backend = backend
        self.reverse = reverse
        self.norm = None if norm == "none" else nn.BatchNorm1d(hidden_size, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W and u, set b to 0, and reset the norm."""
        super().reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(
        self, input: Tensor | AffineSequence, h0: Tensor | None = None, steps: Steps | None = None
    ) -> tuple[AffineSequence, Tensor]:
        """(B, T, D) and the state before the first step (B, H), None for zeros, to the sequence (B, T, H) and the state
        after the last step (B, H). With `steps`, where sequences differ in length, (N, D) to (N, H).

        Raises:
            ValueError: shapes, dtypes or devices that do not fit.
        """
        if not isinstance(input, AffineSequence):
            check_tensor("input", input, self.weight_hh.dtype)
            features = self.input_size or self.hidden_size
            if input.shape[-1:] != (features,) or input.dim() != (3 if steps is None else 2):
                expected = "(B, T" if steps is None else "(N"
                raise ValueError(f"input must have shape {expected}, {features}), got {tuple(input.shape)}")
        if h0 is not None:
            check_tensor("h0", h0, self.weight_hh.dtype)
        bias: Tensor | None = None
        weight: Tensor | None = None
        if self.weight_ih is None:
            x = materialise(input)
        elif isinstance(input, Tensor) and steps is None and _enters_unmultiplied(input):
            (x, weight), bias = factors(input, self.weight_ih), self.bias
        else:
            x, bias = project(input, self.weight_ih, self.bias)
        statistics = self.norm is not None and _uses_batch_statistics(self.norm)
        places = None if steps is None else steps.backwards if self.reverse else steps.place
        if steps is not None and places is not None:
            # relu comes to rest at 0 in the padding, instead of growing there to an infinity that spoils du
            x = steps.pad(x, places, -1e30 if self.nonlinearity == "relu" else 0.0)
        h, last, mean, variance = recurrence(
            x,
            self.recurrent_weight(),
            None if h0 is None else h0.to(state_dtype(x.dtype)),
            bias,
            weight,
            statistics=statistics and steps is None,
            nonlinearity=self.nonlinearity,
            backend=self.backend,
            reverse=self.reverse and steps is None,
        )
        if steps is not None and places is not None:
            flat = h.flatten(0, 1)
            h, last = flat.index_select(0, places), flat.index_select(0, steps.last).to(last.dtype)
            if statistics:
                variance, mean = torch.var_mean(h.to(self.weight_hh.dtype), dim=0, correction=0)
        scale = shift = None
        if self.norm is not None:
            n: int | Tensor = h.numel() // h.shape[-1]
            if statistics and self.share is not None:
                mean, variance, n = self.share.join(mean, variance, h.numel() // h.shape[-1])
            scale, shift = _affine_of(self.norm, mean, variance, n)
        mask = self._mask(last)
        if steps is not None and mask is not None:
            # rows of one sequence are not together, so its mask cannot be folded into a matrix
            affine = AffineSequence(h, last, scale, shift)
            z = affine.materialise() * mask.index_select(0, steps.sequence)
            return AffineSequence(z, affine.last() * mask), last
        return AffineSequence(h, last, scale, shift, mask), last

    def _mask(self, last: Tensor) -> Tensor | None:
        if not self.training or self.dropout == 0:
            return None
        keep = 1 - self.dropout
        if self.share is not None:
            return self.share.mask(last, keep)
        return torch.empty_like(last).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        if self.reverse:
            parts.append("reverse=True")
        return ", ".join(parts)


def _enters_unmultiplied(input: Tensor) -> bool:
    """Whether the recurrence forms W x. Not under autocast, which chooses the dtype of products."""
    return input.shape[-1] <= SMALL_INPUT_SIZE and not _autocasts(input.device)


def _uses_batch_statistics(norm: nn.BatchNorm1d) -> bool:
    """Whether the module would normalise with the statistics of the current batch."""
    return norm.training or norm.running_mean is None


def _affine_of(
    norm: nn.BatchNorm1d, mean: Tensor | None, variance: Tensor | None, n: int | Tensor
) -> tuple[Tensor, Tensor]:
    """scale and shift (H,) such that ``norm(h) = scale ⊙ h + shift``; the running statistics are updated as
    ``norm(h)`` would.

    Args:
        norm: the module that owns weight, bias and running statistics.
        mean, variance: of h over the n = B·T values a unit (variance biased), if `_uses_batch_statistics`.
        n: values per unit.

    Raises:
        ValueError: one value per unit has no variance, as in torch.
    """
    if _uses_batch_statistics(norm):
        assert mean is not None
        assert variance is not None
        if isinstance(n, int) and n < 2:
            raise ValueError(f"batch norm needs more than one value per unit in training, got {n}")
        if norm.training:
            _update_running(norm, mean.detach(), variance.detach() * (n / (n - 1)))
    else:
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    return scale, shift


@torch.no_grad()
def _update_running(norm: nn.BatchNorm1d, mean: Tensor, unbiased_variance: Tensor) -> None:
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    # momentum None: the average of all batches so far; kept on the device, so that a CUDA graph can hold it
    rate = norm.num_batches_tracked.to(mean.dtype).reciprocal() if norm.momentum is None else norm.momentum
    norm.running_mean.mul_(1 - rate).add_(mean * rate)
    norm.running_var.mul_(1 - rate).add_(unbiased_variance * rate)


def recurrent_layers(module: nn.Module) -> list[tuple[str, IndRNNLayer]]:
    """Every recurrence of a model with its name, in the order they were registered (depth order)."""
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, IndRNNLayer)]


@torch.no_grad()
def project_recurrent_weights_(module: nn.Module) -> None:
    """Clamp the stored u of every layer with constraint "project" into its bounds, in place."""
    for _, layer in recurrent_layers(module):
        if layer.constraint == "project":
            u = layer.weight_hh
            u.copy_(clip_recurrent_weight(u, layer.recurrent_max_abs, layer.recurrent_min_abs))
