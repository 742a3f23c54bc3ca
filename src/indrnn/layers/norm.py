"""Normalisation beside a recurrence: built from its name, and batch norm as an affine map per unit."""

import torch
from torch import Tensor, nn

NORMS = ("none", "batch", "layer")
POSITIONS = ("before", "after")


def make_norm(name: str, size: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module | None:
    """The module for "batch" (nn.BatchNorm1d) or "layer" (nn.LayerNorm), None for "none"."""
    if name == "batch":
        return nn.BatchNorm1d(size, device=device, dtype=dtype)
    if name == "layer":
        return nn.LayerNorm(size, device=device, dtype=dtype)
    if name == "none":
        return None
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {name!r}")


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a norm to x (B, T, H); batch norm takes its statistics over batch and time."""
    if isinstance(norm, nn.BatchNorm1d):
        normalised: Tensor = norm(x.flatten(0, 1)).view(x.shape)
        return normalised
    return torch.as_tensor(norm(x))


def uses_batch_statistics(norm: nn.BatchNorm1d) -> bool:
    """Whether the module would normalise with the statistics of the batch at hand."""
    return norm.training or norm.running_mean is None


def affine_of(norm: nn.BatchNorm1d, mean: Tensor | None, variance: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """scale and shift (H,) such that ``norm(h) = scale ⊙ h + shift``; the running statistics are updated as
    ``norm(h)`` would.

    Args:
        norm: the module that owns weight, bias and running statistics.
        mean, variance: of h over the n = B·T values a unit (variance biased), if `uses_batch_statistics`.
        n: values per unit.

    Raises:
        ValueError: one value per unit has no variance, as in torch.
    """
    if uses_batch_statistics(norm):
        assert mean is not None
        assert variance is not None
        if n < 2:
            raise ValueError("batch norm needs more than one value per unit in training, got B = T = 1")
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
