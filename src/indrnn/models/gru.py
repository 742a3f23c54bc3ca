"""`torch.nn.GRU` (Cho et al. 2014, arXiv 1406.1078) as a sequence classifier, built as a network from outside is."""

from torch import Tensor, nn

from indrnn.data import Task


class GRUClassifier(nn.Module):
    """`nn.GRU` (cuDNN on a CUDA device) and a linear classifier on its last output.

    Input weights are Glorot uniform, recurrent weights orthogonal gate by gate, biases 0, as the LSTM's here.
    """

    def __init__(self, task: Task, hidden_size: int = 128, num_layers: int = 1) -> None:
        super().__init__()
        self.gru = nn.GRU(task.input_size, hidden_size, num_layers, batch_first=True)
        self.head = nn.Linear(hidden_size, task.output_size)
        for weight_ih, weight_hh, bias_ih, bias_hh in self.gru.all_weights:
            for input_weight, recurrent_weight in zip(weight_ih.chunk(3), weight_hh.chunk(3), strict=True):
                nn.init.xavier_uniform_(input_weight)
                nn.init.orthogonal_(recurrent_weight)
            nn.init.zeros_(bias_ih)
            nn.init.zeros_(bias_hh)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, D) to logits (B, K)."""
        _, h_last = self.gru(x)
        logits: Tensor = self.head(h_last[-1])
        return logits
