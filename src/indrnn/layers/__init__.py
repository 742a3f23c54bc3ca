"""IndRNN layers: `IndRNN`, a drop-in replacement for torch.nn.RNN, and `IndRNNLayer`, from which networks are built.

A layer takes a tensor (B, T, D) or an `AffineSequence` and returns an `AffineSequence` and the state (B, H) after the
last step. The sequence is z = mask ⊙ (scale ⊙ h + shift), h after batch norm and dropout, which is folded into the
next matrix instead of being computed:

    first = IndRNNLayer(1, 128, norm="batch", dropout=0.1, recurrent_max_abs=recurrent_max(784))
    second = IndRNNLayer(128, 128, norm="batch")
    sequence, _ = first(x)                      # x (B, T, 1)
    sequence, _ = second(sequence)              # the norm and the mask fold into second.weight_ih
    logits = classifier(sequence.last())        # normalizes the last step only

`linear` reads a sequence as a tensor (for a residual sum), `concatenate` joins several (for a dense network).
"""

from .folding import AffineSequence, concatenate, linear, sequences_in
from .init import last_layer_lower_bound, recurrent_max
from .layer import IndRNNLayer, project_recurrent_weights_, recurrent_layers
from .rnn import IndRNN, IndRNNCell

__all__ = [
    "AffineSequence",
    "IndRNN",
    "IndRNNCell",
    "IndRNNLayer",
    "concatenate",
    "last_layer_lower_bound",
    "linear",
    "project_recurrent_weights_",
    "recurrent_layers",
    "recurrent_max",
    "sequences_in",
]
