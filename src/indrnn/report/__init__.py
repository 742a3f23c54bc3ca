"""Run folders -> tables and figures."""

import os
import sys
from contextlib import suppress

# A backend in MPLBACKEND that is not installed here, such as a notebook's, makes the import of matplotlib fail.
if "matplotlib" not in sys.modules and (backend := os.environ.pop("MPLBACKEND", "")):
    import matplotlib

    os.environ["MPLBACKEND"] = backend
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = backend
