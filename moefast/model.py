"""A fitted model as a folder: `model.onnx` holds every number, `manifest.json` says what they are.

Design: nothing in the folder is executable. The ONNX file is the only home of the weights: other programs run it,
moefast reads its initializers. The manifest lists every file with its SHA-256; sizes and hashes are checked before
anything is parsed. A folder is written beside its final name and renamed, so it is complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moefast.core.archives import read_archive
from moefast.core.atomic import (
    partial_folder,
    publish_folder,
    recover_folder,
    refuse_impossible,
    remove_quietly,
)
from moefast.core.errors import ModelError, OutputError, WaveGridError
from moefast.core.grids import Grid, SnrGrid, read_grid
from moefast.core.version import __version__
from moefast.experts.linear_form import LinearForm
from moefast.mixture import Mixture
from moefast.posterior.mixture import AnyMixture, PosteriorMixture
from moefast.spectra.wave import describe_difference, same_wave

if TYPE_CHECKING:
    from astropy.table import Table

__all__ = ["MANIFEST", "SCHEMA", "SHIPPED", "Model", "check_target", "predict_with", "shipped_path"]

SHIPPED = ("observed", "z0", "survey")
"""Models that come with moefast: for observed spectra, the default; two by the reference set that they know best."""

SCHEMA = 3
"""2: experts in principal components, of several families. 3: posteriors over clouds besides, told by `kind`."""
READABLE = (2, SCHEMA)
"""Schemas that are read."""
MANIFEST = "manifest.json"
ONNX = "model.onnx"
REFERENCES = "references.npz"
WHAT = "moefast model"
LARGEST_MANIFEST = 16 * 2**20
LARGEST_FILE = 2**31
"""Bytes of a file of a model: what an ONNX file with embedded weights may have."""
_PACKAGES = ("numpy", "scipy", "numba", "h5py", "onnx")


_PREDICTORS: dict[str, Callable[..., Table]] = {}


def predict_with(function: Callable[..., Table]) -> None:
    """Register what `Model.predict` calls: it stands on a floor above this one."""
    _PREDICTORS["arrays"] = function


@dataclass(frozen=True, repr=False)
class Model:
    """A fitted mixture with its manifest.

    Attributes
    ----------
    mixture : Mixture or PosteriorMixture
    manifest : dict
        Everything about the model that is not a weight.
    references : dict of str to LinearForm
        Simpler fits of the same training set, to compare with; may be empty.
    path : Path or None
        The folder it came from.
    """

    mixture: AnyMixture
    manifest: dict[str, Any]
    references: dict[str, LinearForm]
    path: Path | None = None

    def __repr__(self) -> str:
        wave = self.mixture.wave
        return (
            f"<Model {self.name}: {self.mixture.n_experts} experts, {wave.size} pixels, "
            f"{wave[0]:.1f}-{wave[-1]:.1f} Å>"
        )

    def predict(self, flux: Any, error: Any = None, **how: Any) -> Table:
        """Predict log g for spectra in memory, with the numbers and columns of ``moefast predict``.

        Parameters
        ----------
        flux : array of shape (p,) or (n, p), quantity, masked array, NDData or specutils spectrum, or a list of spectra
            Flux of one star, or of n.
        error : array of the same shape
            1σ. Not for objects that have an uncertainty of their own.
        **how
            `wave`, `mask`, `velocity`, `unit`, `medium`, `telluric`, `backend`: see `moefast.predict_arrays`, which
            this calls.

        Returns
        -------
        astropy.table.Table
            One row for each spectrum, in order, with units, descriptions and flags.

        Examples
        --------
        ::

            model = moefast.load("observed")
            model.predict(flux, error, wave=wave, velocity=-26.0)["log_g", "log_g_err", "flag"]
        """
        if "arrays" not in _PREDICTORS:
            raise RuntimeError("load the model by moefast.load, which brings what predicts along")
        return _PREDICTORS["arrays"](flux, error, self, **how)

    @classmethod
    def of_mixture(
        cls,
        mixture: AnyMixture,
        references: dict[str, LinearForm],
        *,
        recipe: str,
        grid: Grid | SnrGrid,
        training: dict[str, Any],
        summary: dict[str, Any],
    ) -> Model:
        """Make a model of a fitted mixture.

        Parameters
        ----------
        mixture : Mixture or PosteriorMixture
        references : dict of str to LinearForm
            Simpler fits of the same training set.
        recipe : str
            How it was fitted.
        grid : Grid or SnrGrid
            Bins of the experts.
        training : dict
            What it was fitted on; `log_g_std` among it.
        summary : dict
            What happened on the way; `chi2_limit` among it. For a posterior also `log_level`, the lowest and highest of
            the training set; `library`, where `slope_widths` and `sky_width` are prior widths of the nuisances; and
            where there are any, `distance_limit`, a table {"log_strength": […], "limit": […]}, `strength_limit`,
            `least_chi2_limit` and `foreign_limit`.
        """
        wave = mixture.wave
        label_spread = float(training["log_g_std"])
        manifest = {
            "schema": SCHEMA,
            "what": WHAT,
            "kind": mixture.kind,
            "moefast_version": __version__,
            "recipe": recipe,
            "grid": grid.to_dict(),
            "wave": {
                "unit": "Angstrom",
                "pixels": wave.size,
                "first": float(wave[0]),
                "last": float(wave[-1]),
                "sha256": _wave_hash(wave),
                "values": wave.tolist(),
            },
            "preprocessing": {
                "flux": _flux_words(mixture),
                "bad_pixels": "zero weight: not finite, error <= 0, or masked",
            },
            **_of_posterior(mixture, summary),
            "label_range": list(mixture.label_range),
            "limits": {
                "chi2": summary["chi2_limit"],
                "log_g_err": 0.8 * label_spread,
                **_limits(mixture, summary),
            },
            "training": training,
            "fit": summary,
            "packages": {name: metadata.version(name) for name in _PACKAGES},
        }
        return cls(mixture, manifest, references)

    @property
    def grid(self) -> Grid | SnrGrid:
        """Bins of the experts."""
        return read_grid(self.manifest["grid"])

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest, which holds those of all other files; empty for a model never saved."""
        return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest() if self.path else ""

    @property
    def name(self) -> str:
        """The model in a few words."""
        shipped = self.path is not None and self.path.resolve().parent == shipped_path().resolve().parent
        origin = (
            f"{self.path.name}, shipped with moefast"
            if shipped and self.path
            else str(self.path or "not saved")
        )
        return f"{self.manifest['recipe']} ({origin})"

    def check_wave(self, wave: NDArray[np.float64], where: str) -> None:
        """Refuse spectra on another wave grid.

        Raises
        ------
        WaveGridError
            With both grids in the message.
        """
        mine = self.mixture.wave
        if not same_wave(mine, wave):
            raise WaveGridError(
                f"{where}: spectrumdataset/wave is not that of the model {self.name}: "
                f"{describe_difference(wave, mine)}. Fit a model on spectra of this grid, or choose one with -m"
            )

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Model:
        """Write the model folder, verified against ONNX Runtime first; returns the model as read back.

        Raises
        ------
        OutputError
            The folder exists and is not to be replaced, is not a model folder, or cannot be written.
        ModelError
            The ONNX graph does not give the numbers of the mixture.
        """
        from moefast.export import export_model

        target = Path(folder)
        check_target(target, overwrite)
        partial = partial_folder(target)
        try:
            export_model(self.mixture, partial / ONNX, metadata={"recipe": self.manifest["recipe"]})
            if self.references:
                _write_references(partial / REFERENCES, self.references)
            files = {
                item.name: {"sha256": _hash(item), "bytes": item.stat().st_size}
                for item in sorted(partial.iterdir())
            }
            # As it will be read: the checksum must not depend on what JSON does to keys and tuples.
            manifest = json.loads(json.dumps({**self.manifest, "files": files}, allow_nan=False))
            manifest["checksum"] = _checksum(manifest)
            text = json.dumps(manifest, indent=1, allow_nan=False)
            (partial / MANIFEST).write_text(text + "\n", encoding="utf-8")
            publish_folder(partial, target, overwrite=overwrite)
        except OSError as error:
            raise OutputError(f"{target}: cannot be written ({error.strerror})") from error
        finally:
            remove_quietly(partial)
        return Model.load(target)

    @classmethod
    def load(cls, folder: str | Path | None = None) -> Model:
        """Read a model folder, or a model shipped with moefast.

        Parameters
        ----------
        folder : path or one of `SHIPPED`, optional
            A model folder of that name is meant first; the first of `SHIPPED` if absent.

        Raises
        ------
        ModelError
            The folder is missing, incomplete, altered since it was written, or of another schema.
        """
        if folder is None:
            path = shipped_path()
        elif str(folder) in SHIPPED and not (Path(folder) / MANIFEST).exists():
            path = shipped_path(str(folder))
        else:
            path = Path(folder)
        try:
            return cls._read(path)
        except ModelError:
            raise
        except Exception as error:
            # A manifest can say anything, with fitting checksums, too.
            raise ModelError(
                f"{path}: not a model of moefast, or not to be trusted ({type(error).__name__}: {error}); fit it again"
            ) from error

    @classmethod
    def _read(cls, path: Path) -> Model:
        from moefast.export import load, read_mixture

        manifest, files = cls._read_manifest(path)
        wave = cls._check_entries(path, manifest)
        mixture = read_mixture(load(path / ONNX), wave)
        if (kind := manifest.get("kind", Mixture.kind)) != mixture.kind:
            raise ModelError(
                f"{path / MANIFEST}: is that of a {kind}, but {ONNX} holds a {mixture.kind}; copy the model again"
            )
        references = _read_references(path / REFERENCES, wave.size) if REFERENCES in files else {}
        return cls(mixture, manifest, references, path)

    @staticmethod
    def _read_manifest(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, str]]]:
        """The manifest of a folder, and size and SHA-256 of the files that it lists, compared with what is there."""
        if path.is_file():
            raise ModelError(
                f"{path}: is a file, and a model is a folder; name it, or a shipped model ({', '.join(SHIPPED)}), "
                "after -m, and spectra without it"
            )
        if not (path / MANIFEST).is_file():
            raise ModelError(
                f"{path}: no {MANIFEST} here, so this is no model folder; make one with "
                f"`moefast fit TRAIN… -o model/`, or name a shipped model: {', '.join(SHIPPED)}"
            )
        if (path / MANIFEST).stat().st_size > LARGEST_MANIFEST:
            raise ModelError(
                f"{path / MANIFEST}: larger than {LARGEST_MANIFEST} bytes; not a manifest of moefast"
            )
        try:
            manifest = json.loads(
                (path / MANIFEST).read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite
            )
            schema = manifest["schema"]
            files = {
                str(name): (int(entry["bytes"]), str(entry["sha256"]))
                for name, entry in dict(manifest["files"]).items()
            }
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelError(
                f"{path / MANIFEST}: not a manifest of moefast ({error}); fit the model again"
            ) from error
        if schema not in READABLE:
            raise ModelError(
                f"{path / MANIFEST}: schema {schema} found, this moefast reads schema "
                f"{' and '.join(map(str, READABLE))}; "
                "fit the model again or install the moefast that wrote it "
                f"({manifest.get('moefast_version', 'unknown')})"
            )
        if manifest.get("checksum") != _checksum(manifest):
            raise ModelError(
                f"{path / MANIFEST}: its checksum does not fit; it was altered, copy the model again"
            )
        if ONNX not in files:
            raise ModelError(f"{path / MANIFEST}: {ONNX} is not listed; fit the model again")
        for name, (size, digest) in files.items():
            _check_file(path, name, size, digest)
        return manifest, files

    @staticmethod
    def _check_entries(path: Path, manifest: Mapping[str, Any]) -> NDArray[np.float64]:
        """Refuse a manifest in which an entry is missing or of the wrong type; gives the wave grid."""
        try:
            wave = np.array(manifest["wave"]["values"], np.float64)
            if _wave_hash(wave) != manifest["wave"]["sha256"]:
                raise ModelError(f"{path / MANIFEST}: the wave grid was altered; fit the model again")
            limits = manifest["limits"]
            _ = (
                manifest["grid"],
                float(limits["chi2"]),
                float(limits["log_g_err"]),
                [float(v) for v in limits["log_level"]],
                [float(limits.get(name, 0.0)) for name in ("strength", "least_chi2", "foreign")],
            )
            said = [limits["chi2"], limits["log_g_err"], *limits["log_level"]]
            if not all(math.isfinite(float(v)) for v in said) or len(said) != 4:
                raise ValueError("limits that are not finite")
            if not isinstance(manifest["recipe"], str) or not isinstance(manifest["training"], dict):
                raise TypeError("recipe or training")
            if "distance" in limits:
                _check_distance(limits["distance"])
            sketch = manifest["training"].get("row_sketch")
            if sketch is not None and not (
                isinstance(sketch, list) and all(isinstance(v, str) and int(v, 16) < 2**64 for v in sketch)
            ):
                raise TypeError("row_sketch")
            _ = [
                (float(low), float(high))
                for low, high in dict(manifest["training"].get("labels", {})).values()
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{path / MANIFEST}: {error!r} is missing or of the wrong type; fit the model again"
            ) from error
        try:
            read_grid(manifest["grid"])
        except ModelError as error:
            raise ModelError(f"{path / MANIFEST}: {error}") from error
        return wave


def _finite(text: str) -> float:
    """A number of a manifest; ValueError if it is beyond what a number can be, such as 1e999."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no number")
    return number


def shipped_path(name: str = SHIPPED[0]) -> Path:
    """Folder of a model shipped with moefast."""
    return Path(str(resources.files("moefast"))) / "shipped" / name


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a folder that must not be written: known before hours of fitting, not after.

    Raises
    ------
    OutputError
        The folder exists and is not to be replaced, or is not a model folder, or has no parent.
    """
    refuse_impossible(target)
    recover_folder(target)
    if not target.absolute().parent.is_dir():
        raise OutputError(f"{target}: the folder {target.absolute().parent} does not exist; create it first")
    if not target.exists():
        return
    if not overwrite:
        raise OutputError(f"{target}: exists already; choose another name, or replace it with --overwrite")
    if not target.is_dir() or target.is_symlink():
        raise OutputError(f"{target}: exists and is not a folder; it will not be replaced")
    # Replacing removes everything inside: a manifest.json of something else, or a stray file, must be safe.
    others = sorted({item.name for item in target.iterdir()} - {MANIFEST, ONNX, REFERENCES})
    if others:
        raise OutputError(
            f"{target}: is not a model folder, or holds more than a model ({others[0]}); it will not be replaced"
        )
    if (target / MANIFEST).exists() and not _is_ours(target / MANIFEST):
        raise OutputError(f"{target}: {MANIFEST} is not that of a model; it will not be replaced")


def _flux_words(mixture: AnyMixture) -> str:
    if isinstance(mixture, PosteriorMixture):
        return "in any unit: the scale is a nuisance, and a reference spectrum of that scale is subtracted"
    return "normalised to a median near 1, as the survey's files are; a reference spectrum is subtracted"


def _of_posterior(mixture: AnyMixture, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of a posterior alone."""
    if not isinstance(mixture, PosteriorMixture):
        return {}
    library = summary["library"]
    widths = [float(width) for width in library["slope_widths"]]
    if len(widths) + mixture.n_sky != mixture.n_nuisances:
        raise ValueError(f"{mixture.n_nuisances - mixture.n_sky} slope_widths expected; found {len(widths)}")
    return {
        "labels": list(mixture.label_names),
        "nuisances": {
            "scale_width": mixture.scale_width,
            "slope_widths": widths,
            "calibrated": list(mixture.calibrated),
            "sky_width": float(library["sky_width"]),
        },
    }


def _limits(mixture: AnyMixture, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Within what a spectrum is like those of the training set."""
    if not isinstance(mixture, PosteriorMixture):
        return {"log_level": [float(mixture.knots[0]), float(mixture.knots[-1])]}
    low, high = (float(level) for level in summary["log_level"])
    limits: dict[str, Any] = {"log_level": [low, high]}
    if "distance_limit" in summary:
        table = {key: [float(v) for v in summary["distance_limit"][key]] for key in _DISTANCE}
        _check_distance(table)
        limits["distance"] = table
    for name in ("strength", "least_chi2", "foreign"):
        if f"{name}_limit" in summary:
            limits[name] = float(summary[f"{name}_limit"])
    return limits


_DISTANCE = ("log_strength", "limit")


def _check_distance(table: Mapping[str, Any]) -> None:
    """Refuse a table between whose entries nothing can be interpolated.

    Raises
    ------
    ValueError
    """
    x, y = (np.array(table[key], np.float64) for key in _DISTANCE)
    if x.ndim != 1 or x.shape != y.shape or not x.size or not (np.diff(x) >= 0).all():
        raise ValueError(
            f"the limits of distance must be given at ascending log_strength; found {dict(table)}"
        )


def _is_ours(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["what"] == WHAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _wave_hash(wave: NDArray[np.float64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(wave, "<f8").tobytes()).hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of all that a manifest says, but for this number itself."""
    said = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _check_file(folder: Path, name: str, n_bytes: int, digest: str) -> None:
    path = folder / name
    if Path(name).name != name:
        raise ModelError(
            f"{folder / MANIFEST}: {name!r} points outside the model folder; do not trust this model"
        )
    if not path.is_file():
        raise ModelError(f"{path}: missing; the model folder is incomplete, copy it again")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ModelError(f"{path}: {size} bytes; a file of a model has {LARGEST_FILE} at most")
    if size != n_bytes:
        raise ModelError(f"{path}: {size} bytes found, {n_bytes} expected; copy the model again")
    if _hash(path) != digest:
        raise ModelError(
            f"{path}: its SHA-256 differs from the manifest's; it was altered, copy the model again"
        )


def _write_references(path: Path, references: dict[str, LinearForm]) -> None:
    arrays: dict[str, NDArray] = {}
    for i, (name, form) in enumerate(references.items()):
        arrays[f"{i}.name"] = np.frombuffer(name.encode(), np.uint8)
        arrays[f"{i}.weights"], arrays[f"{i}.intercepts"], arrays[f"{i}.levels"] = (
            form.weights,
            form.intercepts,
            form.levels,
        )
        arrays[f"{i}.clipped"] = np.array(form.clipped)
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _read_references(path: Path, n_pixels: int) -> dict[str, LinearForm]:
    try:
        held = read_archive(path)
        count = sum(key.endswith(".name") for key in held)
        forms = {
            held[f"{i}.name"].tobytes().decode(): LinearForm(
                held[f"{i}.weights"], held[f"{i}.intercepts"], held[f"{i}.levels"], bool(held[f"{i}.clipped"])
            )
            for i in range(count)
        }
        for name, form in forms.items():
            numbers = (form.weights, form.intercepts, form.levels)
            if any(a.dtype.kind != "f" or not np.isfinite(a).all() for a in numbers) or form.weights.shape != (
                n_pixels, *form.intercepts.shape,
            ):  # fmt: skip
                raise ValueError(
                    f"{name!r} has weights of shape {form.weights.shape} or numbers that are not finite"
                )
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{path}: not the references of a model ({error}); fit the model again") from error
    return forms
