"""IndRNN in one file to copy: the layer, its exact scan that is parallel in time, and training on sequential MNIST.

    python indrnn_minimal.py [folder for MNIST]        # needs torch and torchvision

On a GPU, this trains 6 layers of 128 units for 60,000 steps; on a CPU, 2 layers of 32 for 300 steps, tested on 1,000
images.

h_t = relu(W x_t + b + u h_{t-1}) (Li et al. 2018, arXiv 1803.04831). One step is the map h -> clamp(a + u h, 0, inf).
These maps are closed under composition, so log2(T) rounds of composing neighbors give every h_t. Weights have the names
of the package `indrnn`, whose kernels are faster. This file is tested against the package.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn


class Recurrence(torch.autograd.Function):
    """h_t = relu(x_t + u h_{t-1}) for x (B, T, H) and u (H,), from h_0 = 0."""

    @staticmethod
    def forward(ctx, x, u):
        a, s, low, high = x, u.expand_as(x), torch.zeros_like(x), torch.full_like(x, 1e30)  # 1e30 stands for inf
        distance = 1
        while distance < x.shape[1]:  # after each round, step t holds the map of the last 2 * distance steps
            a0, s0, low0, high0 = (part[:, :-distance] for part in (a, s, low, high))
            a1, s1, low1, high1 = (part[:, distance:] for part in (a, s, low, high))
            one, other = (torch.clamp(a1 + s1 * end, low1, high1) for end in (low0, high0))
            later = (a1 + s1 * a0, s1 * s0, torch.minimum(one, other), torch.maximum(one, other))
            a, s, low, high = (
                torch.cat([part[:, :distance], new], 1) for part, new in zip((a, s, low, high), later, strict=True)
            )
            distance *= 2
        h = torch.clamp(a, low, high)
        ctx.save_for_backward(h, u)
        return h

    @staticmethod
    def backward(ctx, dh):  # delta_t = [h_t > 0] (dh_t + u delta_{t+1}), scanned from the end
        h, u = ctx.saved_tensors
        delta, gate = torch.where(h > 0, dh, 0.0), torch.where(h > 0, u, 0.0)
        distance = 1
        while distance < h.shape[1]:
            delta = torch.cat(
                [delta[:, :-distance] + gate[:, :-distance] * delta[:, distance:], delta[:, -distance:]], 1
            )
            gate = torch.cat([gate[:, :-distance] * gate[:, distance:], gate[:, -distance:]], 1)
            distance *= 2
        return delta, (delta[:, 1:] * h[:, :-1]).sum((0, 1))


class Layer(nn.Module):
    """Linear, recurrence with |u| <= 2^(1/T), batch norm: (B, T, D) to (B, T, H)."""

    def __init__(self, input_size, hidden_size, T, last):
        super().__init__()
        self.largest = 2 ** (1 / T)
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size).uniform_(-0.001, 0.001))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size).uniform_(1 / self.largest if last else 0, self.largest))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.norm = nn.BatchNorm1d(hidden_size)

    def forward(self, x):
        u = self.weight_hh.clamp(-self.largest, self.largest)
        h = Recurrence.apply(F.linear(x, self.weight_ih, self.bias), u)
        return self.norm(h.flatten(0, 1)).view_as(h)


class Classifier(nn.Module):
    """Layers and a classifier on the last step: (B, T, D) to (B, classes)."""

    def __init__(self, input_size=1, hidden_size=128, num_layers=6, T=784, classes=10):
        super().__init__()
        sizes = [input_size] + [hidden_size] * num_layers
        self.layers = nn.ModuleList(Layer(sizes[k], hidden_size, T, k == num_layers - 1) for k in range(num_layers))
        self.head = nn.Linear(hidden_size, classes)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, -1])


@torch.no_grad()
def accuracy(model, x, y, sample):
    """On (x, y), with batch-norm statistics of `sample`: running averages lag behind when the activations grow."""
    for layer in model.layers:
        layer.norm.reset_running_stats()
        layer.norm.momentum = None
    model.train()(sample)
    correct = sum(
        (model.eval()(part).argmax(1) == label).sum() for part, label in zip(x.split(500), y.split(500), strict=True)
    )
    return correct.item() / len(y)


def train(model, x, y, x_test, y_test, steps=60_000, batch=32, every=1_000):
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(x), (batch,), device=x.device)
        loss = F.cross_entropy(model.train()(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5)
        optimizer.step()
        if step == 10:
            print(f"step {step}: loss {loss:.3f}", flush=True)
        if step % every == 0 or step == steps:
            reached = accuracy(model, x_test, y_test, x[:500])
            print(f"step {step}: loss {loss:.3f}, test accuracy {reached:.2%}", flush=True)


if __name__ == "__main__":
    from torchvision.datasets import MNIST

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, length = ({}, {}) if device == "cuda" else ({"hidden_size": 32, "num_layers": 2}, {"steps": 300, "every": 50})
    parts = [MNIST(sys.argv[1] if len(sys.argv) > 1 else "data", train=part, download=True) for part in (True, False)]
    data = [tensor.to(device) for part in parts for tensor in (part.data.view(-1, 784, 1) / 127.5 - 1, part.targets)]
    if device == "cpu":
        data[2:] = [tensor[:1000] for tensor in data[2:]]
    train(Classifier(**size).to(device), *data, **length)
