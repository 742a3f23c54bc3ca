"""IndRNN: independently recurrent networks, fast and exact, compared honestly with the LSTM.

The public names are loaded on first use, so that ``import indrnn`` (and every command's ``--help``) does not pay for
importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .layers import IndRNN, IndRNNCell, last_layer_lower_bound, recurrent_max
    from .models import build_model
    from .recurrence import available_backends, indrnn_recurrence
    from .training import load_run, train

__version__ = "0.1.0"

_HOME = {
    "IndRNN": "layers",
    "IndRNNCell": "layers",
    "available_backends": "recurrence",
    "build_model": "models",
    "indrnn_recurrence": "recurrence",
    "last_layer_lower_bound": "layers",
    "load_run": "training",
    "recurrent_max": "layers",
    "train": "training",
}

__all__ = [
    "IndRNN",
    "IndRNNCell",
    "available_backends",
    "build_model",
    "indrnn_recurrence",
    "last_layer_lower_bound",
    "load_run",
    "recurrent_max",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
