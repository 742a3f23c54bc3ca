"""The one operation of this project, h_t = σ(x_t + u ⊙ h_{t-1}), on every backend.

``indrnn_recurrence`` is the public function. Its backends and the interface they keep are in `dispatch`; the
definition is `reference`. Numba and Triton are imported when they are first asked for, never before.
"""

from ..config.schema import BACKENDS, NONLINEARITIES
from .dispatch import available_backends, resolve_backend
from .ops import indrnn_recurrence

__all__ = ["BACKENDS", "NONLINEARITIES", "available_backends", "indrnn_recurrence", "resolve_backend"]
