"""The recurrence on the CPU, compiled by Numba at its first use (no compiler is needed on the machine)."""

from .launch import DTYPES, FORMS_PRODUCT, NONLINEARITIES, backward, forward, unavailable_reason

__all__ = ["DTYPES", "FORMS_PRODUCT", "NONLINEARITIES", "backward", "forward", "unavailable_reason"]
