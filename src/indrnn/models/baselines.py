"""The networks the IndRNN is compared with: `torch.nn.LSTM`, `torch.nn.GRU` and `torch.nn.RNN`, classifying the last
step.

B: sequences, T: time steps, D: input features, H: hidden units, K: outputs.
"""

import torch
from torch import Tensor, nn

from indrnn.config.schema import LSTMConfig, RNNConfig
from indrnn.data import Task

from .indrnn import classifier


class LSTMClassifier(nn.Module):
    """`nn.LSTM` (cuDNN on a CUDA device) and a linear classifier on its last output.

    Input weights are Glorot uniform and recurrent weights orthogonal, gate by gate (Glorot & Bengio 2010; Saxe et al.
    2014, arXiv 1312.6120; as in Keras and most published LSTM baselines), and the forget gate starts open (Gers et al.
    2000; Jozefowicz et al. 2015). PyTorch's own default, U(-1/sqrt(H), 1/sqrt(H)) for every weight and bias, leaves the
    forget gate near one half, which forgets a pixel after a few of the 784 steps and would make a weak baseline. Gate
    by gate, because Glorot's bound for all four gates together is half of that for one gate.

    ``bias_init="chrono"`` starts the forget gates with memories of 1 to T steps instead: b_f = log U[1, T - 1] and
    b_i = -b_f (Tallec & Ollivier 2018, arXiv 1804.11188, section 4), the published remedy for long sequences.
    ``weight_init="pytorch"`` keeps nn.LSTM's own weights; the biases are set even then.

    On MNIST it has 68,362 parameters with 128 units, 86,122 with 144 (``lstm_matched``).
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
        self._initialise(model, task.length)

    @torch.no_grad()
    def _initialise(self, model: LSTMConfig, length: int) -> None:
        for weight_ih, weight_hh, bias_ih, bias_hh in self.lstm.all_weights:
            if model.weight_init == "glorot":
                _glorot_by_gate(weight_ih, weight_hh, 4)
            # nn.LSTM adds both biases: only the first is set, or it would count twice.
            nn.init.zeros_(bias_ih)
            nn.init.zeros_(bias_hh)
            input_gate, forget_gate, _, _ = bias_ih.chunk(4)
            if model.bias_init == "forget":
                forget_gate.fill_(model.forget_bias)
            else:
                # At least 2, or the interval would be empty.
                forget_gate.uniform_(1, max(length - 1, 2)).log_()
                input_gate.copy_(-forget_gate)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, D) to logits (B, K)."""
        _, (h_last, _) = self.lstm(x)
        return self.head(self.dropout(h_last[-1]))


def _glorot_by_gate(weight_ih: Tensor, weight_hh: Tensor, gates: int) -> None:
    for input_weight, recurrent_weight in zip(weight_ih.chunk(gates), weight_hh.chunk(gates), strict=True):
        nn.init.xavier_uniform_(input_weight)
        nn.init.orthogonal_(recurrent_weight)


class GRUClassifier(nn.Module):
    """`nn.GRU` (Cho et al. 2014, arXiv 1406.1078) and a linear classifier on its last output, configured like a network
    from outside the package (configs/model/gru.yaml).

    Input weights are Glorot uniform and recurrent weights orthogonal, gate by gate, as the LSTM's; biases are 0.
    """

    def __init__(self, task: Task, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.gru = nn.GRU(task.input_size, hidden_size, num_layers, batch_first=True)
        self.head = classifier(hidden_size, task)
        for weight_ih, weight_hh, bias_ih, bias_hh in self.gru.all_weights:
            _glorot_by_gate(weight_ih, weight_hh, 3)
            nn.init.zeros_(bias_ih)
            nn.init.zeros_(bias_hh)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, D) to logits (B, K)."""
        _, h_last = self.gru(x)
        return self.head(h_last[-1])


class RNNClassifier(nn.Module):
    """`nn.RNN` and a linear classifier on its last output.

    With relu it starts as the IRNN (Le, Jaitly & Hinton 2015, arXiv 1504.00941): recurrent identity, biases 0, input
    weights N(0, 0.001²), without which a fully connected relu network does not train over hundreds of steps. With tanh
    the recurrent matrix is orthogonal and the input weights are Glorot uniform.
    """

    def __init__(self, model: RNNConfig, task: Task) -> None:
        super().__init__()
        self.rnn = nn.RNN(
            task.input_size, model.hidden_size, model.num_layers, nonlinearity=model.nonlinearity, batch_first=True
        )
        self.head = classifier(model.hidden_size, task)
        for weight_ih, weight_hh, bias_ih, bias_hh in self.rnn.all_weights:
            if model.nonlinearity == "relu":
                nn.init.normal_(weight_ih, std=0.001)
                nn.init.eye_(weight_hh)
            else:
                nn.init.xavier_uniform_(weight_ih)
                nn.init.orthogonal_(weight_hh)
            nn.init.zeros_(bias_ih)
            nn.init.zeros_(bias_hh)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, D) to logits (B, K)."""
        _, h_last = self.rnn(x)
        return self.head(h_last[-1])
