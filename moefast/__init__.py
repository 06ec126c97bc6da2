"""moefast: surface gravities for millions of faint stellar spectra.

Public names: `load` a model, `fit` one, `predict` files or `predict_arrays` with it, `evaluate` it, `look_at` a single
star and `draw_star`, and the `Model` itself; `Expert` and the decorator `expert` for a family of experts of one's own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moefast.core.version import __version__ as __version__

__all__ = [
    "Expert", "Model", "draw_star", "evaluate", "expert", "fit", "load", "look_at", "predict", "predict_arrays",
]  # fmt: skip

if TYPE_CHECKING:
    from moefast.experts.protocol import Expert, expert
    from moefast.inspection.star import look_at
    from moefast.inspection.star_picture import draw_star
    from moefast.model import Model
    from moefast.predicting.arrays import predict_arrays
    from moefast.predicting.files import predict
    from moefast.protocol.evaluate import evaluate
    from moefast.recipes import fit

    load = Model.load

# ONNX Runtime sends what it runs to its makers, and writes an identifier of the machine below the user's cache
# folder, as soon as it is loaded: no call comes early enough. Whoever wants that sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HERE = Path(__file__).parent
if not (_HERE / "kernels").is_dir() and (_HERE.parent / "kernels").is_dir():
    # Python started inside a clone finds this folder before the package that is installed; the kernels lie beside it.
    __path__.append(str(_HERE.parent))

# Imported on first use: `moefast --help` must not wait for Numba.
_HOMES = {
    "Expert": "moefast.experts.protocol",
    "Model": "moefast.model",
    "draw_star": "moefast.inspection.star_picture",
    "evaluate": "moefast.protocol.evaluate",
    "expert": "moefast.experts.protocol",
    "fit": "moefast.recipes",
    "look_at": "moefast.inspection.star",
    "predict": "moefast.predicting.files",
    "predict_arrays": "moefast.predicting.arrays",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in {"load", "Model", "fit"}:
        # Models predict arrays by it.
        import_module("moefast.predicting.arrays")
    if name == "load":
        return import_module("moefast.model").Model.load
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'moefast' has no attribute {name!r}")
