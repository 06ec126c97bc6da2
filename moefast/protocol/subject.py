"""What is evaluated: a model folder, an ONNX file, a table of predictions that somebody else made, or a peer.

Design: a subject turns a block of noisy spectra into columns of predictions, and says what it is. Everything else
(noise, SNRs, groups, references) is the evaluation's, the same for all.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moefast.backend import Backend, resolve_backend
from moefast.core.errors import BackendError, InputError, ModelError, WaveGridError
from moefast.core.grids import Grid
from moefast.core.threads import one_blas_thread
from moefast.model import Model
from moefast.peers.choose import peer
from moefast.peers.least_squares import SpectralModel, fit_labels
from moefast.predicting.columns import columns_of
from moefast.predicting.engines import open_engine, score_block, warm_up
from moefast.protocol.predictions import SUFFIXES, PredictionTable, read_predictions
from moefast.simulate.emulator import LABELS
from moefast.spectra.source import Block
from moefast.spectra.spectrum_set import SpectrumSet
from moefast.spectra.wave import describe_difference, same_wave

__all__ = ["ModelSubject", "OnnxSubject", "PeerSubject", "Subject", "TableSubject", "open_subject"]

INPUTS = ("flux", "error")
_OUTPUTS = ("log_g", "log_g_err", "weights")
TIME_LIMIT = 600.0
"""Seconds that a foreign ONNX file may take for a block of spectra."""


class Subject(Protocol):
    """Something that predicts log g.

    Attributes
    ----------
    about : dict
        kind ("model", "onnx", "table" or "peer"), name, sha256: JSON values for the report.
    model : Model or None
        The model folder behind it, whose simpler fits are scored beside.
    expert_grid : Grid or None
        Bins of its experts, if it has experts with bins.
    where : Backend or None
        Where it computes; None if it was computed elsewhere.
    rows_at_once : int or None
        Rows of a block at most, where progress would not be seen otherwise.
    """

    @property
    def about(self) -> dict[str, Any]:
        """See above."""
        ...

    @property
    def model(self) -> Model | None:
        """See above."""
        ...

    @property
    def expert_grid(self) -> Grid | None:
        """See above."""
        ...

    @property
    def where(self) -> Backend | None:
        """See above."""
        ...

    @property
    def rows_at_once(self) -> int | None:
        """See above."""
        ...

    def predict(self, block: Block, good: NDArray[np.bool_] | None, base: int) -> dict[str, NDArray]:
        """Columns of a block: log_g; log_g_err and weight_k if there are any; all of shape (n,).

        Parameters
        ----------
        block : Block
        good : array of shape (n, p), bool, or None
        base : int
            Row of the set that the block's file begins with.
        """
        ...


TRAINING = ("files", "fingerprint", "n_spectra", "noise", "noise_level", "seed")
"""What a report says of the training set, from the manifest of the model."""


@dataclass(frozen=True)
class ModelSubject:
    """A model of moefast; see `Subject`."""

    model: Model
    about: dict[str, Any]
    expert_grid: Grid | None
    where: Backend
    _engine: Any
    rows_at_once: None = None

    @classmethod
    def open(cls, model: Model, backend: str) -> ModelSubject:
        """Ready to score, compiled code loaded."""
        engine, where = open_engine(model.mixture, backend)
        warm_up(engine, model.mixture.n_pixels)
        training = model.manifest.get("training", {})
        about = {
            "kind": "model",
            "name": model.manifest["recipe"],
            "sha256": model.hash,
            # What the milestones need: runs of one recipe differ in what they were fitted on.
            "training": {key: training[key] for key in TRAINING if key in training},
        }
        grid = model.grid if model.mixture.n_experts > 1 and isinstance(model.grid, Grid) else None
        return cls(model, about, grid, where, engine)

    def predict(self, block: Block, good: NDArray[np.bool_] | None, base: int) -> dict[str, NDArray]:
        """See `Subject.predict`."""
        columns = columns_of(self.model, *score_block(self._engine, block, block.first_row - base))
        return {
            name: columns[name] for name in columns if name in {"log_g", "log_g_err"} or "weight_" in name
        }


@dataclass(frozen=True)
class OnnxSubject:
    """An ONNX graph: flux, error (n, p) float32 → log_g (n,), optionally log_g_err (n,) and weights (n, K)."""

    about: dict[str, Any]
    where: Backend
    _session: Any
    _outputs: tuple[str, ...]
    _path: Path
    model: None = None
    expert_grid: None = None
    rows_at_once: None = None

    @classmethod
    def open(cls, path: Path, spectra: SpectrumSet, backend: str) -> OnnxSubject:
        """Check the file and start it.

        Raises
        ------
        ModelError
            The file is refused, or has other inputs or outputs.
        WaveGridError
            It was made for another number of pixels, or says that its wave grid is another one.
        BackendError
        """
        from moefast.export.foreign import load_foreign
        from moefast.export.session import on_the_cpu, start_session

        proto = load_foreign(path)
        where = resolve_backend(backend)
        try:
            session = start_session(proto, where.name)
        except BackendError as error:
            if backend != "auto":
                raise
            reason = f"{where.device} was found but cannot be used: {error}"
            where = Backend("cpu", resolve_backend("cpu").device, reason)
            session = start_session(proto, where.name)
        if where.name == "cuda" and (note := on_the_cpu(session)):
            where = replace(where, reason=f"{where.reason}; {note}")
        inputs = {entry.name: entry for entry in session.get_inputs()}
        outputs = [entry.name for entry in session.get_outputs()]
        if set(inputs) != set(INPUTS) or any(entry.type != "tensor(float)" for entry in inputs.values()):
            found = ", ".join(f"{name} {entry.type}" for name, entry in inputs.items())
            raise ModelError(f"{path}: inputs flux and error, both tensor(float), expected; found {found}")
        if "log_g" not in outputs:
            raise ModelError(f"{path}: an output log_g is expected; found {', '.join(outputs)}")
        for name in INPUTS:
            shape = inputs[name].shape
            if len(shape) != 2 or isinstance(shape[0], int):
                raise ModelError(f"{path}: {name} must be (any number of spectra, pixels); found {shape}")
            if isinstance(shape[1], int) and shape[1] != spectra.n_pixels:
                raise WaveGridError(
                    f"{path}: takes spectra of {shape[1]} pixels; the test set has {spectra.n_pixels}"
                )
        said = {entry.key: entry.value for entry in proto.metadata_props}
        if {"wave_first", "wave_last"} <= said.keys():
            ends = (float(said["wave_first"]), float(said["wave_last"]))
            if not np.allclose(ends, spectra.wave[[0, -1]], rtol=0, atol=0.01):
                raise WaveGridError(
                    f"{path}: was made for {ends[0]:.3f}-{ends[1]:.3f} Å; the test set has "
                    f"{spectra.wave[0]:.3f}-{spectra.wave[-1]:.3f} Å"
                )
        about = {
            "kind": "onnx",
            "name": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "wave_checked": "wave_first" in said,
        }
        subject = cls(about, where, session, tuple(name for name in _OUTPUTS if name in outputs), path)
        ones = np.ones((1, spectra.n_pixels), np.float32)
        subject.predict(Block(0, 0, ones, ones), None, 0)
        return subject

    def predict(self, block: Block, good: NDArray[np.bool_] | None, base: int) -> dict[str, NDArray]:
        """See `Subject.predict`; a bad pixel is one whose error is NaN, as in moefast's own graphs."""
        # Only now: other subjects need no ONNX Runtime.
        from moefast.export.session import run_within

        error = block.error if good is None else np.where(good, block.error, np.float32(np.nan))
        try:
            found = run_within(
                TIME_LIMIT, self._session, list(self._outputs), {"flux": block.flux, "error": error}
            )
        except TimeoutError as reason:
            raise ModelError(
                f"{self._path}: has not scored {len(block)} spectra within {TIME_LIMIT:g} s; does a loop in it end?"
            ) from reason
        except Exception as reason:
            first = (str(reason).splitlines() or [type(reason).__name__])[0]
            raise ModelError(f"{self._path}: ONNX Runtime cannot run it ({first})") from reason
        columns: dict[str, NDArray] = {}
        for name, values in zip(self._outputs, found, strict=True):
            n = len(block)
            if name == "weights":
                if values.ndim != 2 or len(values) != n:
                    raise ModelError(
                        f"{self._path}: weights of shape ({n}, experts) expected; found {values.shape}"
                    )
                columns |= {f"weight_{k}": values[:, k] for k in range(values.shape[1])}
            elif values.size == n and values.shape[0] == n:
                columns[name] = values.reshape(n)
            else:
                raise ModelError(f"{self._path}: {name} of shape ({n},) expected; found {values.shape}")
        return columns


@dataclass(frozen=True)
class TableSubject:
    """Predictions made elsewhere; see `Subject`."""

    about: dict[str, Any]
    expert_grid: Grid | None
    _table: PredictionTable
    model: None = None
    where: None = None
    rows_at_once: None = None

    @classmethod
    def open(cls, path: Path, spectra: SpectrumSet, noise: dict[str, Any]) -> TableSubject:
        """Read the table, and make sure that it was made of the noise that the stars are measured with.

        Parameters
        ----------
        path : Path
        spectra : SpectrumSet
        noise : dict
            noise, noise_level and noise_seed of the evaluation.

        Raises
        ------
        InputError
        """
        table = read_predictions(path, spectra)
        _check_noise(path, table.attrs, noise)
        name = table.attrs.get("subject") or table.attrs.get("model") or path.name
        about = {"kind": "table", "name": str(name), "sha256": table.sha256}
        grid = table.attrs.get("expert_grid")
        return cls(about, Grid.from_dict(grid) if grid else None, table)

    def predict(self, block: Block, good: NDArray[np.bool_] | None, base: int) -> dict[str, NDArray]:
        """See `Subject.predict`."""
        return {name: values[block.rows] for name, values in self._table.columns.items()}


def _check_noise(path: Path, attrs: dict[str, Any], noise: dict[str, Any]) -> None:
    """A prediction of other noise, or of none, is no prediction of these spectra."""
    if "noise" in attrs:
        theirs = {key: attrs.get(key) for key in noise}
        if theirs != noise:
            raise InputError(f"{path}: was made with {theirs}, the evaluation with {noise}; use the same")
        return
    array = {"stored": "noisy", "none": "flux"}.get(noise["noise"])
    if array is None:
        raise InputError(
            f"{path}: the noise of this evaluation is drawn while scoring, so no table can have met it. Use spectra "
            "with the array noisy (moefast simulate writes it), or --noise none if flux is observed"
        )
    used = attrs.get("array")
    if used is not None and used != array:
        raise InputError(
            f"{path}: was made of the array {used}; this evaluation measures on {array} "
            f"(predict with --array {array}, or choose another --noise)"
        )


@dataclass(frozen=True)
class PeerSubject:
    """What others fit labels with, star by star, on one core; see `Subject`."""

    about: dict[str, Any]
    where: Backend
    _spectral_model: SpectralModel
    model: None = None
    expert_grid: None = None
    rows_at_once: int = 64

    @classmethod
    def open(cls, name: str, spectra: SpectrumSet, reference_set: str) -> PeerSubject:
        """A peer by its name; one that learns from labelled stars takes those of the reference set.

        Raises
        ------
        InputError
            There is no such peer.
        WaveGridError
            The test set has another wave grid than the emulator.
        """
        chosen = peer(name)
        model = chosen.open(reference_set)
        if not same_wave(model.wave, spectra.wave):
            raise WaveGridError(
                f"{spectra.shards[0].path}: peer {name} needs spectra on the simulator's wave grid; "
                f"{describe_difference(spectra.wave, model.wave)}"
            )
        digest = hashlib.sha256(model.columns.tobytes()).hexdigest()
        about = {"kind": "peer", "name": name, "what": chosen.what, "sha256": digest}
        return cls(about, resolve_backend("cpu"), model)

    def predict(self, block: Block, good: NDArray[np.bool_] | None, base: int) -> dict[str, NDArray]:
        """See `Subject.predict`."""
        with one_blas_thread():
            found = [
                fit_labels(self._spectral_model, flux, error, None if good is None else good[i])
                for i, (flux, error) in enumerate(zip(block.flux, block.error, strict=True))
            ]
        at = LABELS.index("log_g")
        return {
            "log_g": np.array([one.labels[at] for one in found]),
            "log_g_err": np.array([one.errors[at] for one in found]),
        }


def open_subject(
    what: Model | str | Path | None, spectra: SpectrumSet, *, backend: str, noise: dict[str, Any]
) -> Subject:
    """The subject behind a model, the path of a model folder, an ONNX file or a table; None is the model that is
    shipped first.

    Raises
    ------
    ModelError, InputError, BackendError, WaveGridError
    """  # noqa: D205
    if what is None or isinstance(what, Model):
        model = what if isinstance(what, Model) else Model.load()
    else:
        path = Path(what)
        if path.suffix.lower() == ".onnx" and not os.path.isdir(path):
            return OnnxSubject.open(path, spectra, backend)
        if path.suffix.lower() in SUFFIXES and not os.path.isdir(path):
            return TableSubject.open(path, spectra, noise)
        model = Model.load(path)
    model.check_wave(spectra.wave, str(spectra.shards[0].path))
    return ModelSubject.open(model, backend)
