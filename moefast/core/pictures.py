"""What every picture needs: text that is shown as it is, and matplotlib whatever the environment asks of it.

Design: we draw on canvases of our own, so the backend that MPLBACKEND names (Jupyter sets one that other environments
lack) is never used; it must only not keep matplotlib from being imported.
"""

from __future__ import annotations

import os
import sys

__all__ = ["literal"]

if "matplotlib" not in sys.modules:
    _asked = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib as mpl
    finally:
        if _asked is not None:
            os.environ["MPLBACKEND"] = _asked
    if _asked is not None:
        try:
            # As if it had been imported by the caller, who may want to see figures.
            mpl.rcParams["backend"] = _asked
        except ValueError:
            mpl.rcParams["backend"] = "agg"


def literal(text: str) -> str:
    """Names of files and models, in which a dollar sign is no mathematics."""
    return text.replace("$", r"\$")
