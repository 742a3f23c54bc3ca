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
Linear stands elsewhere. Initialisers are names or functions that fill a tensor in place (see `init`).

Checkpoints of other implementations load by renaming. That of the paper's authors (Sunnydreamrain/IndRNN_pytorch,
pixelMNIST/Indrnn_plainnet.py) is an `IndRNN(..., norm="batch")`; its classifier's weights are left out here:

    def from_authors(state):
        names = {}
        for name in state:
            kind, _, rest = name.partition(".")
            if kind in ("DIs", "RNNs"):
                k, part, *_, last = rest.split(".")
                names[name] = {
                    "fc": {"weight": f"layers.{k}.weight_ih", "bias": f"layers.{k}.bias"}.get(last),
                    "indrnn1": f"layers.{k}.weight_hh",
                    "norm1": f"layers.{k}.norm.{last}",
                }[part]
        return {new: state[old] for old, new in names.items()}

That of StefOe/indrnn-pytorch (class IndRNN) has a batch norm over both directions, and cells for both even where one is
used:

    def from_stefoe(state, bidirectional):
        directions, renamed = (2 if bidirectional else 1), {}
        for name, value in state.items():
            kind, _, rest = name.partition(".")
            k, _, last = rest.partition(".")
            if kind == "cells" or (kind == "cells_bi" and bidirectional):
                layer = directions * int(k) + (kind == "cells_bi")
                renamed[f"layers.{layer}.{last.replace('bias_ih', 'bias')}"] = value
            elif kind == "bns":
                for d in range(directions):
                    part = value if value.dim() == 0 else value.chunk(directions)[d]
                    renamed[f"layers.{directions * int(k) + d}.norm.{last}"] = part
        return renamed
"""

from .folding import AffineSequence, concatenate, linear, materialise, sequences_in
from .init import clip_recurrent_weight, last_layer_lower_bound, recurrent_max
from .layer import IndRNNLayer, project_recurrent_weights_, recurrent_layers
from .rnn import IndRNN, IndRNNCell

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
    "sequences_in",
]
