"""The networks the IndRNN is compared with: `torch.nn.LSTM`, `torch.nn.GRU`, `torch.nn.RNN` and minGRU.

B: sequences, T: time steps, D: input features, H: hidden units, K: outputs.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indrnn.config.schema import GRUConfig, LSTMConfig
from indrnn.data import Task

from .indrnn import classifier


class LSTMClassifier(nn.Module):
    """`nn.LSTM` (cuDNN on a CUDA device) and a linear classifier on its last output.

    Input weights are Glorot uniform and recurrent weights orthogonal, gate by gate (Glorot & Bengio 2010; Saxe et al.
    2014, arXiv 1312.6120; as in Keras and most published LSTM baselines). The forget gate starts open (Gers et al.
    2000; Jozefowicz et al. 2015). PyTorch's default, U(-1/sqrt(H), 1/sqrt(H)) for every weight and bias, leaves the
    forget gate near one half, which forgets a pixel after a few steps and would make a weak baseline. Gate by gate,
    because Glorot's bound for all four gates together is half of the bound for one.

    ``bias_init="chrono"`` starts the forget gates with memories of 1 to T steps: b_f = log U[1, T - 1] and b_i = -b_f
    (Tallec & Ollivier 2018, arXiv 1804.11188, section 4). ``weight_init="pytorch"`` keeps nn.LSTM's own weights; the
    biases are set all the same.

    On MNIST it has 68,362 parameters with 128 units, 86,122 with 144, about as many as the IndRNN.
    """

    def __init__(self, model: LSTMConfig, task: Task) -> None:
        super().__init__()
        self.lstm = nn.LSTM(
            task.input_size,
            model.hidden_size,
            model.num_layers,
            batch_first=True,
            # nn.LSTM applies dropout between layers only, and warns if there is just one.
            dropout=model.dropout if model.num_layers > 1 else 0.0,
        )
        self.dropout = nn.Dropout(model.dropout)
        self.head = classifier(model.hidden_size, task)
        _initialize(self.lstm, 4 if model.weight_init == "glorot" else None)
        with torch.no_grad():
            for _, _, bias, _ in self.lstm.all_weights:  # nn.LSTM adds two biases; the other one stays 0
                input_gate, forget_gate, _, _ = bias.chunk(4)
                if model.bias_init == "forget":
                    forget_gate.fill_(model.forget_bias)
                else:
                    forget_gate.uniform_(1, max(task.length - 1, 2)).log_()  # a non-empty interval for any T
                    input_gate.copy_(-forget_gate)

    def forward(self, x: Tensor) -> Tensor:
        _, (h_last, _) = self.lstm(x)
        return self.head(self.dropout(h_last[-1]))


@torch.no_grad()
def _initialize(rnn: nn.RNNBase, gates: int | None) -> None:
    """Gate by gate, Glorot uniform input weights and orthogonal recurrent weights. None: keep the weights. Biases 0."""
    for weight_ih, weight_hh, bias_ih, bias_hh in rnn.all_weights:
        for input_weight, recurrent_weight in zip(
            weight_ih.chunk(gates or 1), weight_hh.chunk(gates or 1), strict=True
        ):
            if gates:
                nn.init.xavier_uniform_(input_weight)
                nn.init.orthogonal_(recurrent_weight)
        nn.init.zeros_(bias_ih)
        nn.init.zeros_(bias_hh)


class RNNClassifier(nn.Module):
    """`nn.RNN` or `nn.GRU` (Cho et al. 2014, arXiv 1406.1078) and a linear classifier on its last output.

    A relu RNN starts as the IRNN (Le, Jaitly & Hinton 2015, arXiv 1504.00941): recurrent identity and input weights
    N(0, 0.001²), without which a fully connected relu network does not train over hundreds of steps. A tanh RNN and a
    GRU have orthogonal recurrent and Glorot uniform input weights, gate by gate. Biases are 0.
    """

    def __init__(self, model: GRUConfig, task: Task) -> None:
        super().__init__()
        sizes = (task.input_size, model.hidden_size, model.num_layers)
        nonlinearity = getattr(model, "nonlinearity", None)
        self.rnn = nn.RNN(*sizes, nonlinearity, batch_first=True) if nonlinearity else nn.GRU(*sizes, batch_first=True)
        self.head = classifier(model.hidden_size, task)
        _initialize(self.rnn, {"relu": None, "tanh": 1, None: 3}[nonlinearity])
        if nonlinearity == "relu":
            for weight_ih, weight_hh, *_ in self.rnn.all_weights:
                nn.init.normal_(weight_ih, std=0.001)
                nn.init.eye_(weight_hh)

    def forward(self, x: Tensor) -> Tensor:
        _, h_last = self.rnn(x)
        return self.head(h_last[-1])


class MinGRU(nn.Module):
    """One minGRU layer (Feng et al. 2024, "Were RNNs all we needed?", arXiv 2410.01201), parallel in time.

        z_t = sigmoid(W_z x_t + b_z),  c_t = g(W_h x_t + b_h),  h_t = (1 - z_t) ⊙ h_{t-1} + z_t ⊙ c_t,  h_0 = 0

    with g(a) = a + 0.5 for a >= 0 and sigmoid(a) below. Gate and candidate do not read the state, so the recurrence is
    linear and scans. All factors are positive, so the scan uses logarithms (appendix B):
    with A_t = sum_{s<=t} log(1 - z_s), h_t = exp(A_t + logsumexp_{s<=t}(log z_s + log c_s - A_s)).
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(input_size, hidden_size)
        self.candidate = nn.Linear(input_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, D) to h (B, T, H), every h_t > 0."""
        gate, a = self.gate(x), self.candidate(x)
        log_g = torch.where(a >= 0, (F.relu(a) + 0.5).log(), -F.softplus(-a))  # does not overflow (listing 6)
        kept = -F.softplus(gate).cumsum(1)
        return (kept + torch.logcumsumexp(log_g - F.softplus(-gate) - kept, 1)).exp()


class MinGRUClassifier(nn.Module):
    """minGRU layers, each followed by batch norm over batch and time, and a classifier on the last step."""

    def __init__(self, model: GRUConfig, task: Task) -> None:
        super().__init__()
        sizes = [task.input_size, *[model.hidden_size] * model.num_layers]
        self.layers = nn.ModuleList(MinGRU(*pair) for pair in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm1d(model.hidden_size) for _ in self.layers)
        self.head = classifier(model.hidden_size, task)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = layer(x)
            x = norm(h.flatten(0, 1)).view_as(h)
        return self.head(x[:, -1])
