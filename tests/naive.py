"""Slow, obvious implementations for tests to compare with. They share no code with the package."""

import numpy as np
import torch

SIGMA = {
    "relu": lambda a: a.clamp(min=0),
    "tanh": torch.tanh,
    "identity": lambda a: a,
    "leaky_relu": lambda a: torch.where(a > 0, a, 0.01 * a),
}


def recurrence(x, u, h0=None, bias=None, nonlinearity="relu"):
    """h_t = σ(x_t + bias + u h_{t-1}) step by step; autograd differentiates it. Returns h and its last step."""
    state = torch.zeros_like(x[:, 0]) if h0 is None else h0
    steps = []
    for x_t in x.unbind(1):
        a = x_t + u * state
        state = SIGMA[nonlinearity](a if bias is None else a + bias)
        steps.append(state)
    return torch.stack(steps, dim=1), state


def tensorflow_layer(inputs, input_kernel, recurrent_kernel, bias, state, recurrent_max_abs=None):
    """One layer as the TensorFlow ports publish it, in NumPy: inputs (B, T, D), input_kernel (D, H)

        gate_inputs = inputs[:, t] · input_kernel;  recurrent_update = state * recurrent_kernel
        state = relu(gate_inputs + recurrent_update + bias)

    with recurrent_kernel clipped by value to ±recurrent_max_abs.
    """
    if recurrent_max_abs is not None:
        recurrent_kernel = np.minimum(np.maximum(recurrent_kernel, -recurrent_max_abs), recurrent_max_abs)
    outputs = []
    for t in range(inputs.shape[1]):
        gate_inputs = inputs[:, t] @ input_kernel
        recurrent_update = state * recurrent_kernel
        state = np.maximum(gate_inputs + recurrent_update + bias, 0)
        outputs.append(state)
    return np.stack(outputs, axis=1), state
