"""IndRNN layers. `IndRNN` drops in where torch.nn.RNN stood; models are built from `IndRNNLayer`.

A layer takes a tensor (B, T, D) or an `AffineSequence` and returns an `AffineSequence` and the state (B, H) after the
last step. The sequence stands for z = mask ⊙ (scale ⊙ h + shift), that is h after batch norm and dropout, which is
never computed where its reader multiplies it by a matrix:

    first = IndRNNLayer(1, 128, norm="batch", dropout=0.1, recurrent_max_abs=recurrent_max(784))
    second = IndRNNLayer(128, 128, norm="batch")
    sequence, _ = first(x)                      # x (B, T, 1)
    sequence, _ = second(sequence)              # the norm and the mask fold into second.weight_ih
    logits = classifier(sequence.last())        # normalises the last step only

    y = linear(sequence, weight, bias)          # z Wᵀ + b as a tensor (B, T, K), for a residual sum
    both = concatenate([sequence, other])       # side by side, for a dense network
    z = sequence.materialise()                  # a tensor (B, T, H), where nothing else will do

``IndRNNLayer(None, 128, ...)`` is a recurrence without input weights (one parameter, weight_hh), for networks whose
Linear stands elsewhere. Initialisers are names or functions that fill a tensor in place (see `initial`).
"""

from .bounds import clip_recurrent_weight, last_layer_lower_bound, recurrent_max
from .layer import IndRNNLayer, project_recurrent_weights_, recurrent_layers
from .rnn import IndRNN, IndRNNCell
from .sequence import AffineSequence, concatenate, linear, materialise

__all__ = [
    "AffineSequence",
    "IndRNN",
    "IndRNNCell",
    "IndRNNLayer",
    "clip_recurrent_weight",
    "concatenate",
    "last_layer_lower_bound",
    "linear",
    "materialise",
    "project_recurrent_weights_",
    "recurrent_layers",
    "recurrent_max",
]
