"""minGRU (Feng et al. 2024, "Were RNNs all we needed?", arXiv 2410.01201), parallel in time.

B batch, T time steps, D input features, H hidden units, K outputs.

The gate and the candidate do not depend on the state, so the recurrence is linear and scans:

    z_t = sigmoid(W_z x_t + b_z),  c_t = g(W_h x_t + b_h),  h_t = (1 - z_t) ⊙ h_{t-1} + z_t ⊙ c_t,  h_0 = 0,

with g(a) = a + 0.5 for a >= 0 and sigmoid(a) below. Every state is then positive, and the scan can use logarithms
(their appendix B): with A_t = sum_{s<=t} log(1 - z_s),

    h_t = exp(A_t + logsumexp_{s<=t}(log z_s + log c_s - A_s)).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indrnn.data import Task

from .indrnn import classifier


def log_g(a: Tensor) -> Tensor:
    """log g(a), without the overflow of computing g first (their listing 6)."""
    return torch.where(a >= 0, (F.relu(a) + 0.5).log(), -F.softplus(-a))


def scan_logarithms(log_keep: Tensor, log_add: Tensor) -> Tensor:
    """h (B, T, H) with h_t = keep_t ⊙ h_{t-1} + add_t and h_0 = 0, from the logarithms (B, T, H) of both factors."""
    kept = log_keep.cumsum(1)
    return (kept + torch.logcumsumexp(log_add - kept, 1)).exp()


class MinGRU(nn.Module):
    """One layer: x (B, T, D) to h (B, T, H), every h_t > 0."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(input_size, hidden_size)
        self.candidate = nn.Linear(input_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return scan_logarithms(-F.softplus(gate), -F.softplus(-gate) + log_g(self.candidate(x)))


class MinGRUClassifier(nn.Module):
    """MinGRU layers, each followed by batch norm over batch and time, and a classifier on the last step."""

    def __init__(self, task: Task, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        sizes = [task.input_size, *[hidden_size] * num_layers]
        self.layers = nn.ModuleList(MinGRU(*pair) for pair in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden_size) for _ in self.layers)
        self.head = classifier(hidden_size, task)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, D) to logits (B, K)."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = layer(x)
            x = norm(h.flatten(0, 1)).view_as(h)
        return self.head(x[:, -1])
