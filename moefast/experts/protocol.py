"""What an expert may see of a star, what it says of it, and what a family of experts must be able to do.

Design: linear experts are arrays of the mixture, on which everything else stands. Every other family is one class that
derives from `Expert` and registers itself with the decorator `expert`. It describes what it computes once, on an
arithmetic (`moefast.ops.arithmetic`): read in NumPy and float64 that is the contract, in float32 what predicts unless
the family brings something faster, in ONNX the exported nodes. Its arrays are read back from these nodes, so that the
ONNX file stays the only home of a model's numbers. A family that can be fitted on the stars of one bin says how in
`fit`, and then stands beside the others in `moefast.fitting.Options.families`.

A family of one's own needs no change here: a class decorated with `moefast.expert` in a module that is imported before
the model is fitted or read (`import_families`, the option --expert of commands), or one that an installed package names
under the entry point `moefast.experts`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module, metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError, ModelError
from moefast.core.threads import in_threads, one_blas_thread
from moefast.ops.arithmetic import SolvingArithmetic
from moefast.ops.on_numpy import NumPyArithmetic

if TYPE_CHECKING:
    from typing import Self

    from onnx import ModelProto

__all__ = [
    "ENTRY_POINTS",
    "CleanStars",
    "Components",
    "Expert",
    "ExpertValues",
    "Inputs",
    "Place",
    "expert",
    "family",
    "fitted_clean",
    "fitted_in_bins",
    "fitted_on_components",
    "import_families",
    "in_tiles",
    "on_flux",
    "read_initializers",
]

Own = TypeVar("Own")
Class = TypeVar("Class", bound="type[Expert]")

ENTRY_POINTS = "moefast.experts"
"""Group of entry points by which an installed package names its families: `name = "package.module:Class"`."""
TILE = 64
"""Stars that are evaluated at once by default."""
_FAMILIES: dict[str, type[Expert]] = {}


class Inputs(NamedTuple):
    """What experts may see of n stars.

    Attributes
    ----------
    z : array of shape (n, r), float32
        Noise-white principal components.
    log_level : array of shape (n,), float32
        ln s, the noise level over that of the training set.
    lines : array of shape (n, 9), float32
        `moefast.core.line_features.LINE_FEATURES`.
    x : array of shape (n, p), float32, or None
        Flux as it is, with the reference spectrum in the place of bad pixels; only for experts with `needs_flux`.
    value, linear : array of shape (n,), float32, dex, or None
        Log g of the expert beside which a residual stands, and of the linear expert of the same bin; only for residuals
        that say so.
    least_level : array of shape (n,), float32, or None
        ln s, but not below the lowest level of the training set: with less noise than that, spectra differ from a
        library by more than noise.
    """

    z: NDArray
    log_level: NDArray
    lines: NDArray
    x: NDArray | None = None
    value: NDArray | None = None
    linear: NDArray | None = None
    least_level: NDArray | None = None

    def columns(self, dtype: Any) -> dict[str, NDArray]:
        """What there is by name, (n, …), as a description sees it."""
        present = {name: value for name, value in self._asdict().items() if value is not None}
        tall = {name: value[:, None] if value.ndim == 1 else value for name, value in present.items()}
        return {name: np.ascontiguousarray(value, dtype) for name, value in tall.items()}


class CleanStars(NamedTuple):
    """Stars without noise, for families that draw noise themselves.

    Attributes
    ----------
    flux, error : array of shape (n, p), float32
        Flux without noise, and 1σ; the reference spectrum in the place of bad pixels.
    reference, noise_shape : array of shape (p,)
        Of the mixture: what is subtracted from flux, and the mean noise variance D.
    """

    flux: NDArray
    error: NDArray
    reference: NDArray
    noise_shape: NDArray


class Components(NamedTuple):
    """What principal components mean: flux ≈ reference + noise_shape · (basis z), for families that measure lines.

    Attributes
    ----------
    wave : array of shape (p,), Å
    reference, noise_shape : array of shape (p,)
        Of the mixture: what is subtracted from flux, and the mean noise variance D.
    basis : array of shape (p, r)
        Noise-white principal components: z = basisᵀ (flux − reference).
    """

    wave: NDArray
    reference: NDArray
    noise_shape: NDArray
    basis: NDArray


class ExpertValues(NamedTuple):
    """What experts say of n stars: arrays of shape (n, 1) of one expert, or (n, K) of those of all bins.

    Attributes
    ----------
    log_g : array, dex
    noise : array, dex, or None
        1σ that the noise of the pixels leaves; None if that of the linear expert in whose place it stands is meant.
    evidence : array of shape (n, K), or None
        Logarithm of how well the star fits each bin; it is added to the gate's logits.
    """

    log_g: Any
    noise: Any = None
    evidence: Any = None


class Expert:
    """A family of experts; log g in dex. Subclasses are frozen dataclasses of arrays, float32 or int64.

    Attributes
    ----------
    family : str
        Name of the family.
    short : bool
        Whether matrices that half precision holds exactly are stored in it.
    on_cuda : bool
        Whether the CUDA kernels know the family.
    has_noise : bool
        Whether it says itself what the noise of the pixels leaves; if not, that of the linear expert counts.
    fits_on_flux : bool
        Whether `fit` is given flux, `Inputs.x`, which takes memory in proportion to the pixels.
    requires : tuple of str
        Modules without which it cannot be fitted.
    """

    family: ClassVar[str]
    short: ClassVar[bool] = False
    on_cuda: ClassVar[bool] = False
    has_noise: ClassVar[bool] = False
    fits_on_flux: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ()

    @property
    def needs_flux(self) -> bool:
        """Whether `Inputs.x` must be given."""
        return False

    @property
    def stem(self) -> str:
        """What the names of its numbers in a file begin with; "" if only its place tells that."""
        return ""

    @property
    def words(self) -> str:
        """The family in words, for messages."""
        return f"experts of the family {self.family}"

    def describe(self, op: SolvingArithmetic, seen: Mapping[str, Any]) -> ExpertValues:
        """What it says of n stars.

        Parameters
        ----------
        op : SolvingArithmetic
            With the numbers of `arrays`.
        seen : mapping of str to value
            `z` (n, r), `log_level` and `least_level` (n, 1), `lines` (n, 9), `x` (n, p), and of residuals `value` and
            `linear` (n, 1), as in `Inputs`.

        Raises
        ------
        ModelError
            The family does not say what it computes.
        """
        raise ModelError(f"{self.words} do not say what they compute; give the family a method describe")

    def evaluate(self, inputs: Inputs) -> ExpertValues:
        """What it says of n stars, float32. The numbers of a star do not depend on those beside it."""
        op = NumPyArithmetic(self.arrays(), np.float32)
        return in_tiles(lambda seen: self.describe(op, seen), inputs.columns(np.float32), TILE)

    def evaluate_reference(self, inputs: Inputs) -> ExpertValues:
        """The same in float64: the contract of `evaluate` and of the ONNX nodes."""
        return self.describe(NumPyArithmetic(self.arrays()), inputs.columns(np.float64))

    def predict(self, inputs: Inputs) -> NDArray:
        """Log g by one expert, (n,), float32."""
        return np.asarray(self.evaluate(inputs).log_g[:, 0])

    def predict_reference(self, inputs: Inputs) -> NDArray:
        """The same in float64, (n,)."""
        return np.asarray(self.evaluate_reference(inputs).log_g[:, 0])

    def check(self, n_experts: int, n_components: int, n_pixels: int) -> None:
        """Refuse a mixture of another shape.

        Raises
        ------
        ValueError
        """

    def of_bin(self, k: int) -> Expert | None:
        """The part of it that speaks for one bin, as an expert of a single bin; None if it has no parts."""
        return self

    def arrays(self) -> dict[str, NDArray]:
        """Everything that it is made of, float32 or int64, by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_arrays(cls, read: Callable[[str], NDArray]) -> Self:
        """The inverse of `arrays`; ValueError where they do not fit together."""
        return cls(**{item.name: read(item.name) for item in fields(cls)})  # type: ignore[arg-type]

    @classmethod
    def read_nodes(cls, model: ModelProto, stem: str) -> Self:
        """From an ONNX model, to the last bit; ModelError where an array is missing or does not fit."""
        return read_initializers(cls.from_arrays, model, stem, cls.family)

    @classmethod
    def fit(cls, inputs: Inputs, y: NDArray, *, seed: int) -> Self:
        """One expert, for the stars of one bin.

        Parameters
        ----------
        inputs : Inputs
            z, log_level and lines of n stars with noise; x, too, if the family `fits_on_flux`.
        y : array of shape (n,), dex
            Log g.
        seed : int

        Raises
        ------
        InputError
            This family is not fitted bin by bin.
        """
        raise InputError(f"the family {cls.family} is not fitted bin by bin; give it a method fit")

    @classmethod
    def fit_clean(cls, stars: CleanStars, y: NDArray, *, seed: int) -> Self:
        """The same from stars without noise, for families that draw it themselves; instead of `fit`.

        Parameters
        ----------
        stars : CleanStars
        y : array of shape (n,), dex
            Log g.
        seed : int

        Raises
        ------
        InputError
            This family has no such fit.
        """
        raise InputError(f"the family {cls.family} is not fitted to clean stars; give it a method fit_clean")

    @classmethod
    def fit_on_components(cls, inputs: Inputs, y: NDArray, components: Components, *, seed: int) -> Self:
        """The same as `fit`, for families that must know what the components are; instead of `fit`.

        Parameters
        ----------
        inputs, y, seed
            As for `fit`.
        components : Components

        Raises
        ------
        InputError
            This family has no such fit.
        """
        raise InputError(
            f"the family {cls.family} is not fitted on components; give it a method fit_on_components"
        )


@dataclass(frozen=True)
class Place:
    """Where an expert stands in a mixture.

    Attributes
    ----------
    expert : Expert
    bins : tuple of int
        Those in whose place it stands. If it has values of all bins, each takes its own; of one value all take that.
        None if only its evidence counts.
    added : bool
        It is a residual: added to the value of whatever expert stands there.

    Raises
    ------
    ValueError
        No bin, one of them twice, or a residual in several.
    """

    expert: Expert
    bins: tuple[int, ...]
    added: bool = False

    def __post_init__(self) -> None:
        several = len(set(self.bins)) < len(self.bins) or (self.added and len(self.bins) != 1)
        if several or not (self.bins or self.expert.stem):
            raise ValueError(
                f"an expert stands in one bin or several different ones, a residual in one; found {self.bins}"
            )

    @property
    def stem(self) -> str:
        """What the names of the expert's numbers in a file begin with."""
        return self.expert.stem or f"{'residuals' if self.added else 'experts'}.{self.bins[0]}"


def expert(cls: Class) -> Class:
    """Register a family; a decorator.

    Raises
    ------
    InputError
        Another class has that name, or the class has none.
    """
    name = getattr(cls, "family", "")
    if not (isinstance(cls, type) and issubclass(cls, Expert) and isinstance(name, str) and name):
        raise InputError(
            f"{cls!r} must derive from moefast.experts.protocol.Expert and have a name, `family`"
        )
    known = _FAMILIES.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise InputError(
            f"the family {name!r} is that of {known.__module__}.{known.__qualname__} already; choose another name "
            f"for {cls.__module__}.{cls.__qualname__}"
        )
    _FAMILIES[name] = cls
    return cls


@cache
def _import_own() -> None:
    """Import every module beside this one: those that hold a family register it."""
    for module in iter_modules(import_module("moefast.experts").__path__):
        import_module(f"moefast.experts.{module.name}")


def family(name: str) -> type[Expert]:
    """The class of a family, by name; entry points are looked up where no module that is loaded has registered it.

    Raises
    ------
    ModelError
        It is unknown.
    """
    _import_own()
    if name not in _FAMILIES:
        for point in metadata.entry_points(group=ENTRY_POINTS, name=name):
            expert(point.load())
    if name not in _FAMILIES:
        raise ModelError(
            f"experts of the family {name!r} are unknown here; import the module that defines them (--expert "
            f"FILE.py of commands), or install the package that brings them (known are {', '.join(sorted(_FAMILIES))})"
        )
    return _FAMILIES[name]


def fitted_in_bins() -> set[str]:
    """Names of the families that say how they are fitted bin by bin, those of entry points among them."""
    _import_own()
    for point in metadata.entry_points(group=ENTRY_POINTS):
        family(point.name)
    ways = ("fit", "fit_clean", "fit_on_components")
    return {name for name, cls in _FAMILIES.items() if any(_overrides(cls, way) for way in ways)}


def fitted_clean(name: str) -> bool:
    """Whether a family is fitted to stars without noise."""
    return _overrides(family(name), "fit_clean")


def fitted_on_components(name: str) -> bool:
    """Whether a family must know what the components are."""
    return _overrides(family(name), "fit_on_components")


def on_flux(name: str) -> bool:
    """Whether a family is fitted to pixels, and sees them when it is asked."""
    return family(name).fits_on_flux or fitted_clean(name)


def _overrides(cls: type[Expert], method: str) -> bool:
    return getattr(cls, method).__func__ is not getattr(Expert, method).__func__


def import_families(source: str) -> tuple[str, ...]:
    """Import the families of a Python file or module, and give their names.

    Parameters
    ----------
    source : str
        Path of a file that ends in `.py`, or the name of a module that Python finds.

    Raises
    ------
    InputError
        It cannot be imported, or registers no family.
    """
    _import_own()
    name = str(Path(source).resolve()) if source.endswith(".py") else source
    if name not in sys.modules:
        try:
            if source.endswith(".py"):
                _import_file(name)
            else:
                import_module(name)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{source}: experts cannot be imported from it: {type(error).__name__}: {error}; name a Python file "
                "that ends in .py, or a module that is installed"
            ) from error
    families = tuple(sorted(key for key, cls in _FAMILIES.items() if cls.__module__ == name))
    if not families:
        raise InputError(
            f"{source}: defines no family of experts; derive a class from moefast.Expert and decorate it with "
            "@moefast.expert"
        )
    return families


def _import_file(name: str) -> None:
    """Import a file under its path as the name, which no other module has."""
    spec = spec_from_file_location(name, name)
    if spec is None or spec.loader is None:
        raise InputError(f"{name}: is no Python file")
    module = module_from_spec(spec)
    # Dataclasses look their module up while it is made.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def in_tiles(
    describe: Callable[[dict[str, NDArray]], ExpertValues], seen: Mapping[str, NDArray], rows: int
) -> ExpertValues:
    """What a description says in float32, so many stars at a time.

    BLAS rounds differently at the edges of its own tiles: every product has the same shape, the last one filled up, and
    a star lies at the same place of it however the rows are shared out to threads.
    """
    n = len(seen["log_level"])
    parts: list[ExpertValues | None] = [None] * max(1, -(-n // rows))

    def run(first: int, stop: int) -> None:
        for tile in range(first, stop):
            few = min(rows, n - tile * rows)
            block = {name: value[tile * rows : tile * rows + rows] for name, value in seen.items()}
            if few < rows:
                block = {
                    name: np.concatenate([v, np.repeat(v[-1:], rows - few, 0)]) if few else v
                    for name, v in block.items()
                }
            # What a bad spectrum overflows stays in its own row.
            with np.errstate(over="ignore", invalid="ignore"):
                found = describe(block)
            parts[tile] = ExpertValues(*(None if v is None else v[:few] for v in found))

    with one_blas_thread():
        in_threads(len(parts), run, least=1)
    columns = zip(*(part for part in parts if part is not None), strict=True)
    return ExpertValues(*(None if c[0] is None else np.concatenate(c).astype(np.float32) for c in columns))


def read_initializers(
    make: Callable[[Callable[[str], NDArray]], Own], model: ModelProto, stem: str, what: str
) -> Own:
    """What `make(read)` makes of the initializers `{stem}.{name}`, `read(name)` giving an array.

    Parameters
    ----------
    make : callable
        Raises ValueError or TypeError where they do not fit together.
    model : ModelProto
    stem : str
    what : str
        What is read, for messages.

    Raises
    ------
    ModelError
        An initializer is missing, not finite, or they do not fit together.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def read(name: str) -> NDArray:
        tensor = tensors.get(f"{stem}.{name}")
        if tensor is None:
            raise ModelError(
                f"the ONNX model lacks the initializer '{stem}.{name}'; write it again with this moefast"
            )
        array = np.array(numpy_helper.to_array(tensor))
        if array.dtype not in (np.float32, np.float16, np.int64):
            raise ValueError(f"{name} is {array.dtype}, float32 or int64 expected")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite")
        return array

    try:
        return make(read)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"the {what} {stem!r} of the ONNX model cannot be read: {error}; write it again"
        ) from error
