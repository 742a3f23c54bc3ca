"""IndRNN: independently recurrent networks, fast and exact, compared with the LSTM under equal budgets.

The public names are imported on first use, so that ``import indrnn`` and ``--help`` do not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .layers import IndRNN, IndRNNCell, last_layer_lower_bound, recurrent_max
    from .models import build_model
    from .recurrence import available_backends, indrnn_recurrence
    from .training import load_run, train

__version__ = "0.1.0"

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
    if name in __all__:
        # Each of these imports those before it.
        for home in ("recurrence", "layers", "models", "training"):
            module = import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
