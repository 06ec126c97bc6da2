"""Boosted trees on indices of weak lines, besides what other trees see: for metal-poor stars.

    depth = 1 − window / continuum,    log g = forest(depths, line features, z, ln s),

with window and continuum of each line in the spectrum that the principal components z tell: both are linear in z, and
the depth is not.

Design: metal-poor stars show few lines, and what tells log g is in the wings of Ca II, in Mg I, Fe I and the Paschen
series. Measured on the pixels of a faint star such an index is noise; in the components most of that noise is left out,
and nothing but a small matrix is needed beyond what every expert sees. Ca II and Na I on the pixels are among the line
features that come with the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moefast.core.line_features import LEAST_CONTINUUM, LINES, Line
from moefast.experts.protocol import Components, Expert, ExpertValues, Inputs, expert, read_initializers
from moefast.experts.trees import ensemble, fit_trees, forest_arrays, read_ensemble, read_forest, stacking
from moefast.kernels import Forest
from moefast.ops.arithmetic import SolvingArithmetic
from moefast.ops.on_numpy import NumPyArithmetic

if TYPE_CHECKING:
    from typing import Self

    from onnx import ModelProto

__all__ = ["MORE_LINES", "TreesOnIndices", "line_windows"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

MORE_LINES = (
    Line("MgI_8809", 8809.18, (8803.0, 8815.0), (8790.0, 8801.0), (8829.0, 8845.0)),
    Line("FeI_8516", 8516.41, (8513.0, 8520.0), (8474.0, 8489.0), (8522.0, 8530.0)),
    Line("FeI_8614", 8614.16, (8610.0, 8618.0), (8604.0, 8609.0), (8627.0, 8640.0)),
    Line("FeI_8691", 8691.01, (8687.0, 8695.0), (8680.0, 8686.0), (8698.0, 8708.0)),
    Line("FeI_8827", 8826.64, (8822.0, 8830.0), (8813.0, 8820.0), (8831.0, 8845.0)),
    Line("KI_7701", 7701.09, (7697.0, 7705.0), (7685.0, 7695.0), (7707.0, 7717.0)),
    Line("Pa_17", 8469.59, (8460.0, 8478.0), (8440.0, 8456.0), (8480.0, 8490.0)),
    Line("Pa_14", 8600.75, (8588.0, 8612.0), (8572.0, 8584.0), (8625.0, 8645.0)),
    Line("Pa_12", 8752.88, (8738.0, 8768.0), (8715.0, 8735.0), (8772.0, 8788.0)),
)
"""Gravity- and metallicity-sensitive lines besides Ca II and Na I; vacuum, as the survey's grid.

Source: wavelengths of K I, Mg I, Fe I in air from the NIST Atomic Spectra Database, brought to vacuum by the formula of
Edlén 1966; Rydberg's formula for hydrogen. Windows and sidebands are ours.
"""


def line_windows(components: Components, lines: Sequence[Line] = (*LINES, *MORE_LINES)) -> tuple[F64, F64]:
    """Mean flux in the window of each line, then its continuum, of the spectrum of components z: offsets + z windows.

    The continuum at the centre of a line is the straight line through the mean fluxes of both sidebands.

    Parameters
    ----------
    components : Components
    lines : sequence of Line
        Those that lie beyond the wave grid, in part or whole, are left out.

    Returns
    -------
    windows : array of shape (r, 2 × lines)
    offsets : array of shape (2 × lines,)
    """
    wave = np.asarray(components.wave, np.float64)
    means, continua = [], []

    def inside(low: float, high: float) -> NDArray[np.bool_]:
        return (wave >= low) & (wave < high)

    for line in lines:
        window, blue, red = (inside(*bounds) for bounds in (line.window, line.blue, line.red))
        if (
            wave[0] > line.blue[0]
            or wave[-1] < line.red[1]
            or not (window.any() and blue.any() and red.any())
        ):
            continue
        first, last = wave[blue].mean(), wave[red].mean()
        share = (line.centre - first) / (last - first)
        means.append(window / window.sum())
        continua.append((1 - share) * blue / blue.sum() + share * red / red.sum())
    columns = np.array([*means, *continua]).reshape(-1, wave.size).T
    basis, noise = (np.asarray(a, np.float64) for a in (components.basis, components.noise_shape))
    # The spectrum nearest to the star within the components: D T (Tᵀ D T)⁻¹ z.
    loaded = noise[:, None] * basis
    spectra = np.linalg.solve(basis.T @ loaded, loaded.T)
    return spectra @ columns, np.asarray(components.reference, np.float64) @ columns


@expert
@dataclass(frozen=True)
class TreesOnIndices(Expert):
    """A forest that sees the depths of lines besides line features, components and noise level.

    Attributes
    ----------
    forest : Forest
        Gives log g in dex.
    windows : array of shape (r, 2 l), float32
    offsets : array of shape (2 l,), float32
        Of `line_windows`.

    Raises
    ------
    ValueError
        Shapes do not fit.
    """

    forest: Forest
    windows: F32
    offsets: F32

    family: ClassVar[str] = "trees-indices"
    requires: ClassVar[tuple[str, ...]] = ("lightgbm",)

    def __post_init__(self) -> None:
        if self.windows.ndim != 2 or self.offsets.shape != self.windows.shape[1:] or len(self.offsets) % 2:
            raise ValueError(
                f"windows (r, 2 l) and offsets (2 l,) expected; found {self.windows.shape}, {self.offsets.shape}"
            )

    def check(self, n_experts: int, n_components: int, n_pixels: int) -> None:
        """See `Expert.check`."""
        if len(self.windows) != n_components:
            raise ValueError(f"windows of {n_components} components expected; found {len(self.windows)}")

    def describe(self, op: SolvingArithmetic, seen: Mapping[str, Any]) -> ExpertValues:
        """Depths, and one tree ensemble; see `Expert`."""
        depths = _depths(op, len(self.offsets) // 2, seen["z"])
        return ExpertValues(
            ensemble(op, self.forest, [depths, *(seen[name] for name in ("lines", "z", "log_level"))])
        )

    @classmethod
    def fit_on_components(cls, inputs: Inputs, y: NDArray, components: Components, *, seed: int) -> Self:
        """A forest fitted by `fit_trees`; see `Expert.fit_on_components`."""
        windows, offsets = (array.astype(np.float32) for array in line_windows(components))
        op = NumPyArithmetic({"windows": windows, "offsets": offsets}, np.float32)
        depths = _depths(op, len(offsets) // 2, np.asarray(inputs.z, np.float32))
        features = np.concatenate([depths, stacking(inputs)], axis=1, dtype=np.float32)
        return cls(fit_trees(features, y, sees="stacking", seed=seed).forest, windows, offsets)

    def arrays(self) -> dict[str, NDArray]:
        """Arrays of the forest, `windows` and `offsets`."""
        return forest_arrays(self.forest) | {"windows": self.windows, "offsets": self.offsets}

    @classmethod
    def from_arrays(cls, read: Callable[[str], NDArray]) -> Self:
        """The inverse of `arrays`.

        Raises
        ------
        ValueError
            They do not fit together.
        """
        return cls(read_forest(read), read("windows"), read("offsets"))

    @classmethod
    def read_nodes(cls, model: ModelProto, stem: str) -> Self:
        """From an ONNX model, to the last bit.

        Raises
        ------
        ModelError
            The trees or an array are missing, or do not fit.
        """
        forest = read_ensemble(model, stem)[0]
        return read_initializers(
            lambda read: cls(forest, read("windows"), read("offsets")), model, stem, cls.family
        )


def _depths(op: Any, n_lines: int, z: Any) -> Any:
    """Mean depth of each line, (n, l)."""
    both = op.affine(z, op.number("windows"), op.number("offsets"))
    window = op.part(both, 1, 0, n_lines)
    continuum = op.larger(op.part(both, 1, n_lines, 2 * n_lines), op.constant(LEAST_CONTINUUM))
    return op.subtract(op.constant(1.0), op.divide(window, continuum))
