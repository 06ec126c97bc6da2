"""CUDA code runs in Numba's simulator only if the variable is set before Numba is imported: in a process of its own."""

import os

collect_ignore = [] if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1" else ["simulator"]
