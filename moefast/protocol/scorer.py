"""What scores the stars of a test set, block by block: noise added, the subject asked, simpler fits on the same stars.

Design: test spectra carry noise exactly once: `noisy` where a file has it, otherwise a draw from the stored seed that
belongs to the row, so that every model meets the same noisy stars. The simpler fits that a model folder carries are
scored on the same stars in the same pass; the oracle is the model's experts with true bins. What is found of a block
depends on its rows alone, so that blocks may be scored anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.core.grids import Grid, SnrGrid, assign_snr_bins
from moefast.core.progress import RowProgress
from moefast.core.random import standard_normals
from moefast.core.threads import one_blas_thread
from moefast.experts.linear_form import LinearForm
from moefast.experts.template import TemplateMeans
from moefast.mixture import hat_weights
from moefast.model import SHIPPED, Model, shipped_path
from moefast.posterior.mixture import AnyMixture, PosteriorMixture
from moefast.protocol.comparisons import BAYES_GATE, ORACLE, SNR_ORACLE
from moefast.protocol.subject import PeerSubject, Subject, open_subject
from moefast.simulate.sets import Identity, identify_spectra
from moefast.spectra.quality import assess, good_pixels
from moefast.spectra.source import Block
from moefast.spectra.spectrum_set import SpectrumSet, open_spectra
from moefast.spectra.wave import same_wave

__all__ = ["BLOCK_ROWS", "Scored", "Scorer", "oracle_name"]

BLOCK_ROWS = 2048
"""Spectra that are read and looked at together."""


class Scored(NamedTuple):
    """Of a block, or of many: columns of the stars, predictions of simpler fits, and seconds of scoring."""

    columns: dict[str, NDArray]
    references: dict[str, NDArray[np.float64]]
    seconds: float

    @classmethod
    def joined(cls, blocks: Iterable[Scored]) -> Scored:
        """All blocks as one, in their order."""
        parts = list(blocks)
        return cls(
            {key: np.concatenate([part.columns[key] for part in parts]) for key in parts[0].columns},
            {key: np.concatenate([part.references[key] for part in parts]) for key in parts[0].references},
            sum(part.seconds for part in parts),
        )

    def of(self, chosen: NDArray[np.bool_]) -> Scored:
        """The same of some stars."""
        columns, references = ({key: v[chosen] for key, v in each.items()} for each in self[:2])
        return Scored(columns, references, self.seconds)


class Scorer:
    """What scores the stars of a test set; parameters and errors are those of `moefast.protocol.evaluate.evaluate`.

    Attributes
    ----------
    arguments : dict
        What makes another one, elsewhere.
    spectra : SpectrumSet
    labels : dict of str to array of shape (n,)
        T_eff [K], log_g and M_H [dex]; NaN where there is none.
    labelled : array of shape (n,), bool
    identity : Identity or None
        Which part of a reference set the spectra are, if they are one.
    drawn : bool
        Whether noise is added.
    about_noise : dict
        noise, noise_level and noise_seed, as `moefast.protocol.report.DataSet` holds them.
    subject : Subject
    beside : Model or None
        The model whose simpler fits are scored on the same stars.
    block_rows : int
        Rows of a block.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        model: Model | str | Path | None,
        *,
        peer: str | None,
        noise: str,
        noise_level: float,
        noise_seed: int,
        backend: str,
    ) -> None:
        if peer is not None and model is not None:
            raise InputError("a model or a peer is evaluated, not both; leave one out")
        if noise not in ("auto", "draw", "none"):
            raise InputError(f"noise: auto, draw or none expected, found {noise!r}")
        if not noise_level > 0:
            raise InputError(f"the noise level must be positive, found {noise_level}")
        self.arguments = {
            "paths": paths, "model": model, "peer": peer, "noise": noise, "noise_level": noise_level,
            "noise_seed": noise_seed, "backend": backend,
        }  # fmt: skip
        spectra = self.spectra = open_spectra(paths)
        self.stored = (
            noise == "auto" and noise_level == 1.0 and all("noisy" in s.arrays for s in spectra.shards)
        )
        self.drawn = noise != "none" and not self.stored
        self.noise_level, self.noise_seed = noise_level, noise_seed
        self.about_noise: dict[str, Any] = {
            "noise": "stored" if self.stored else "drawn" if self.drawn else "none",
            "noise_level": None if noise == "none" else noise_level,
            "noise_seed": noise_seed if self.drawn else None,
        }
        labels = self.labels = spectra.labels(("T_eff", "log_g", "M_H"), partial=True)
        labelled = self.labelled = np.isfinite(np.sum([*labels.values()], axis=0))
        self.identity = identify_spectra(spectra)
        self.subject: Subject
        if peer is not None:
            name = "z0" if self.identity is None else self.identity.reference_set
            self.subject = PeerSubject.open(peer, spectra, name)
        else:
            self.subject = open_subject(model, spectra, backend=backend, noise=self.about_noise)
        self.block_rows = BLOCK_ROWS if self.subject.rows_at_once is None else self.subject.rows_at_once
        self.beside = _model_beside(self.subject, spectra, self.identity)
        self.grid = self.beside.grid if self.beside else None
        self.bins = np.zeros(spectra.n_rows, np.int16)
        if isinstance(self.grid, Grid):
            # Stars without labels are predicted and not measured; any bin will do.
            self.bins[labelled] = self.grid.assign(labels["T_eff"][labelled], labels["M_H"][labelled])

    def score(self, rows: tuple[int, int], report: RowProgress) -> Iterator[Scored]:
        """What is found of each block of some rows, in order."""
        spectra = self.spectra
        for block in spectra.blocks(self.block_rows, array="noisy" if self.stored else "flux", rows=rows):
            here = np.arange(block.first_row, block.first_row + len(block))
            if self.noise_level != 1.0:
                block.error *= np.float32(self.noise_level)
            if self.drawn:
                draw = standard_normals(self.noise_seed, here, spectra.n_pixels)
                draw *= block.error
                block.flux += draw
            good = good_pixels(block.flux, block.error, block.mask)
            quality = assess(block.flux, block.error, good, block.mask)
            begin = time.perf_counter()
            columns = self.subject.predict(block, good, int(spectra.first_rows[block.shard]))
            seconds = time.perf_counter() - begin
            columns |= {"snr_norm": quality.snr_norm, "snr_median": quality.snr_median}
            if isinstance(self.grid, SnrGrid):
                self.bins[here] = self.grid.assign(np.nan_to_num(quality.snr_norm))
            references: dict[str, NDArray[np.float64]] = {}
            if self.beside is not None:
                # The bits of a product may depend on the number of threads.
                with one_blas_thread():
                    references = _reference_predictions(
                        self.beside, self.subject, block, good, self.bins[here], quality.snr_norm
                    )
            yield Scored(columns, references, seconds)
            report(int(here[-1]) + 1 - rows[0], rows[1] - rows[0])


def _model_beside(subject: Subject, spectra: SpectrumSet, identity: Identity | None) -> Model | None:
    """The model whose simpler fits are scored beside: the subject itself, else a shipped one where it fits."""
    if subject.model is not None:
        return subject.model
    of_set = identity.reference_set if identity is not None else None
    shipped = Model.load(shipped_path(of_set) if of_set in SHIPPED else None)
    return shipped if same_wave(shipped.mixture.wave, spectra.wave) else None


def _reference_predictions(
    beside: Model,
    subject: Subject,
    block: Block,
    good: NDArray[np.bool_] | None,
    bins: NDArray[np.integer],
    snr_norm: NDArray,
) -> dict[str, NDArray[np.float64]]:
    """Simpler fits on the same noisy stars; for a model of moefast also its own experts with true bins."""
    log_level, experts = _experts(beside.mixture, block)
    own, by_snr = beside is subject.model, assign_snr_bins(np.nan_to_num(snr_norm))
    out = {
        key: _linear(form, beside, block, good, log_level, by_snr if key == SNR_ORACLE else bins)
        for key, form in beside.references.items()
        # An oracle knows the true bins: it says what a better gate could gain, and only of the model that it is of.
        if own or not key.startswith(ORACLE)
    }
    if own and beside.mixture.n_experts > 1:
        here = np.arange(len(block)), bins
        out |= {
            key: np.clip(each[here].astype(np.float64), *beside.mixture.label_range)
            for key, each in experts.items()
        }
        out |= _other_gate(beside.mixture, block)
    return out


def _other_gate(mixture: AnyMixture, block: Block) -> dict[str, NDArray[np.float64]]:
    """The same experts mixed by Bayes' rule, where there is a library and the gate is not just that."""
    if isinstance(mixture, PosteriorMixture) or (
        not np.any(mixture.gate[2]) and mixture.place(TemplateMeans) is None
    ):
        return {}
    found = mixture.by_evidence(block.flux, block.error, block.mask)
    return {} if found is None else {BAYES_GATE: found}


def _experts(mixture: AnyMixture, block: Block) -> tuple[NDArray, dict[str, NDArray]]:
    """The noise level of each star, and what each expert says: the linear ones, and those that the mixture uses."""
    if isinstance(mixture, PosteriorMixture):
        found = mixture.predict(block.flux, block.error, block.mask)
        return found.log_level, {oracle_name(mixture): found.expert_log_g}
    prepared = mixture.prepare(block.flux, block.error, block.mask)
    experts = {"oracle-ridge": prepared.linear_log_g, oracle_name(mixture): prepared.expert_log_g}
    return prepared.log_level, experts


def oracle_name(mixture: AnyMixture) -> str:
    """Name of a mixture's own experts with true bins."""
    return "oracle-ridge" if mixture.is_linear else "oracle-hybrid"


def _linear(
    form: LinearForm,
    model: Model,
    block: Block,
    good: NDArray[np.bool_] | None,
    log_level: NDArray,
    bins: NDArray[np.integer],
) -> NDArray[np.float64]:
    """Predictions of a reference fit for a block, each star by the expert of its bin where there are several."""
    flux = np.maximum(block.flux, 0) if form.clipped else block.flux
    x = flux - model.mixture.reference
    if good is not None:
        x[~good] = 0
    p, k, m = form.weights.shape
    values = (x @ form.weights.reshape(p, k * m)).reshape(-1, k, m).astype(np.float64) + form.intercepts
    if m > 1:
        hat = hat_weights(np.clip(log_level, form.levels[0], form.levels[-1]), form.levels)
        each = (values * hat[:, None]).sum(2)
    else:
        each = values[:, :, 0]
    chosen = each[:, 0] if k == 1 else each[np.arange(len(x)), bins]
    return np.clip(chosen, *model.mixture.label_range)
