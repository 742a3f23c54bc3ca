"""The recurrence on the CPU, compiled by Numba at its first use (no compiler is needed on the machine)."""

from .launch import DTYPES, NONLINEARITIES, backward, forward, unavailable_reason

__all__ = ["DTYPES", "NONLINEARITIES", "backward", "forward", "unavailable_reason"]
