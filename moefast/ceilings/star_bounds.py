"""Bounds and posteriors of the stars of a set, block by block, and what its files must say for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moefast.ceilings import bayes, fisher
from moefast.core.errors import InputError
from moefast.core.progress import RowProgress
from moefast.core.random import NOISE_SEED, standard_normals
from moefast.simulate.emulator import LABELS
from moefast.simulate.forward import ForwardModel
from moefast.simulate.noise import SkyFactors
from moefast.simulate.rows import Settings
from moefast.simulate.visit import VISIT_PARAMS, sky_of
from moefast.spectra.quality import assess, good_pixels
from moefast.spectra.source import Block
from moefast.spectra.spectrum_set import SpectrumSet, open_spectra

__all__ = ["BLOCK_ROWS", "FREE_LABELS", "BlockBounds", "Method", "StarBounds"]

_LOG = logging.getLogger(__name__)

Method = Literal["auto", "both", "fisher", "bayes"]
F64 = NDArray[np.float64]

BLOCK_ROWS = 512
NUISANCES = ("redshift", "ebv", "velocity", "line_spread")
FREE_LABELS = ("T_eff", "M_H", "C_M", "a_M")
"""Labels that are freed one after the other beside log g."""


class BlockBounds(NamedTuple):
    """What is found of a block of stars, or of many.

    `columns` of the stars; `share` of the information that each label takes, (n, 0) without the Fisher bound, and
    `names` of its parameters; numbers of `likelihoods`; and `seconds` by method.
    """

    columns: dict[str, F64]
    share: F64
    names: tuple[str, ...]
    likelihoods: int
    seconds: dict[str, float]

    @classmethod
    def joined(cls, blocks: Iterable[BlockBounds]) -> BlockBounds:
        """All blocks as one, in their order."""
        parts = list(blocks)
        return cls(
            {key: np.concatenate([part.columns[key] for part in parts]) for key in parts[0].columns},
            np.concatenate([part.share for part in parts]),
            parts[-1].names,
            sum(part.likelihoods for part in parts),
            {method: sum(part.seconds[method] for part in parts) for method in parts[0].seconds},
        )


class StarBounds:
    """Bounds and posteriors of stars, block by block; parameters and errors are those of `compute`.

    `arguments` are what makes another one, elsewhere.
    """

    def __init__(
        self,
        paths: str | Path | Iterable[str | Path],
        *,
        method: Method,
        target_ess: float,
        seed: int,
        threads: int | None,
    ) -> None:
        paths = [paths] if isinstance(paths, str | Path) else list(paths)
        self.arguments = {
            "paths": paths, "method": method, "target_ess": target_ess, "seed": seed, "threads": threads,
        }  # fmt: skip
        self.method, self.target_ess, self.seed, self.threads = method, target_ess, seed, threads
        spectra = self.spectra = open_spectra(paths)
        settings = self.settings = _settings(spectra, needed=method in {"both", "bayes"})
        self.forward = ForwardModel(settings or Settings())
        _check_wave(spectra, self.forward)
        self.with_bayes = method != "fisher" and settings is not None
        self.labels = spectra.labels(("T_eff", "log_g", "M_H"))
        self.parameters = self.labels | _others(spectra, self.forward)
        visit = None if settings is None else settings.visit
        self.observation = _observation(spectra, needed=self.with_bayes or visit is not None)
        self.visit = None if visit is None else spectra.params(tuple(VISIT_PARAMS))
        self.stored = all("noisy" in shard.arrays for shard in spectra.shards)
        self._checked = False

    def blocks(self, span: tuple[int, int], progress: Callable[[int, int], None]) -> Iterator[BlockBounds]:
        """What is found of each block of some rows, in order."""
        spectra, visit = self.spectra, self.visit
        for block in spectra.blocks(BLOCK_ROWS, array="noisy" if self.stored else "flux", rows=span):
            rows = np.arange(block.first_row, block.first_row + len(block))
            if not self.stored:
                block.flux += standard_normals(NOISE_SEED, rows, spectra.n_pixels) * block.error
            good = good_pixels(block.flux, block.error, block.mask)
            quality = assess(block.flux, block.error, good, block.mask)
            sky = None
            if visit is not None:
                # In the units in which stars and their noise were drawn; the likelihood leaves the scale free.
                divisor = visit["median"][rows, None].astype(np.float32)
                block.flux, block.error = block.flux * divisor, block.error * divisor
                sky = sky_of({name: values[rows] for name, values in visit.items()})[0]
            found = BlockBounds(
                {
                    "row": rows.astype(float),
                    "snr_norm": quality.snr_norm.astype(float),
                    "snr_median": quality.snr_median.astype(float),
                },
                np.empty((len(block), 0)),
                (),
                0,
                {"fisher": 0.0, "bayes": 0.0},
            )
            if self.method != "bayes":
                found = self._with_fisher(found, block, rows, good, sky)
            if self.with_bayes and self.settings is not None:
                report = partial(_report_star, progress, int(rows[0]) - span[0], span[1] - span[0])
                found = self._with_bayes(found, block, rows, good, sky, self.settings, report)
            yield found
            progress(int(rows[-1]) + 1 - span[0], span[1] - span[0])

    def _with_fisher(
        self,
        found: BlockBounds,
        block: Block,
        rows: NDArray[np.integer],
        good: NDArray[np.bool_] | None,
        sky: SkyFactors | None,
    ) -> BlockBounds:
        """The same with the Fisher bound of each star."""
        begin = time.perf_counter()
        forward, parameters = self.forward, {key: values[rows] for key, values in self.parameters.items()}
        error = block.error if good is None else np.where(good, block.error, np.inf)
        shapes = None if sky is None else _sky_shapes(forward, parameters, self.observation, rows, sky)
        names, matrices = fisher.information(forward, parameters, error, shapes)
        bare = fisher.prior_information(forward, names, labels=False)
        columns = {
            "crlb": fisher.bounds(matrices, bare),
            "crlb_prior": fisher.bounds(matrices, fisher.prior_information(forward, names, labels=True)),
        }
        free = (*FREE_LABELS, *(key for key in names if key not in LABELS))
        return found._replace(
            columns=found.columns | columns,
            share=fisher.retained(matrices, names, bare, free),
            names=names,
            seconds=found.seconds | {"fisher": time.perf_counter() - begin},
        )

    def _with_bayes(
        self,
        found: BlockBounds,
        block: Block,
        rows: NDArray[np.integer],
        good: NDArray[np.bool_] | None,
        sky: SkyFactors | None,
        settings: Settings,
        report: Callable[[int], None],
    ) -> BlockBounds:
        """The same with the posterior of each star."""
        begin = time.perf_counter()
        forward, parameters = self.forward, {key: values[rows] for key, values in self.parameters.items()}
        mag, seeing = self.observation["mag"][rows], self.observation["seeing"][rows]
        if not self._checked:
            _check_errors(self.spectra, forward, parameters, block.error, mag, seeing, sky)
            self._checked = True
        star = bayes.posteriors(
            forward, _library(settings), rows, block.flux, block.error, mag, seeing, parameters, good=good, sky=sky,
            target_ess=self.target_ess, seed=self.seed, threads=self.threads, progress=report,
        )  # fmt: skip
        columns = {
            "bayes": star.mean,
            "bayes_sd": star.sd,
            "monte_carlo_error": star.monte_carlo_error,
            "ess": star.ess,
            "rank": star.rank[:, LABELS.index("log_g")],
            **{f"rank_{key}": star.rank[:, i] for i, key in enumerate(LABELS) if key != "log_g"},
        }
        return found._replace(
            columns=found.columns | columns,
            likelihoods=int(star.n_likelihoods.sum()),
            seconds=found.seconds | {"bayes": time.perf_counter() - begin},
        )


def _report_star(progress: RowProgress, before: int, total: int, done: int) -> None:
    """Report a star of a block."""
    progress(before + done, total)


@lru_cache(maxsize=2)
def _library(settings: Settings) -> bayes.TemplateLibrary:
    return bayes.TemplateLibrary.draw(ForwardModel(settings))


def _settings(spectra: SpectrumSet, *, needed: bool) -> Settings | None:
    texts = {str(shard.attrs.get("settings", "")) for shard in spectra.shards}
    if texts == {""}:
        if needed:
            raise InputError(
                f"{spectra.shards[0].path}: has no attribute settings, so it is not known from which distribution its "
                "stars were drawn; the Bayes ceiling needs a file of moefast simulate (the Fisher bound does not)"
            )
        return None
    if len(texts) > 1:
        raise InputError(
            "the files were simulated with different settings; compute the ceiling of each kind by itself"
        )
    return Settings.from_json(texts.pop())


def _check_wave(spectra: SpectrumSet, forward: ForwardModel) -> None:
    wave = forward.emulator.wave
    if spectra.wave.shape != wave.shape or not np.allclose(spectra.wave, wave, rtol=0, atol=1e-3):
        raise InputError(
            f"{spectra.shards[0].path}: ceilings are computed on the emulator's wave grid, {len(wave)} pixels from "
            f"{wave[0]:.2f} to {wave[-1]:.2f} Å; found {len(spectra.wave)} pixels from {spectra.wave[0]:.2f} to "
            f"{spectra.wave[-1]:.2f} Å"
        )


def _others(spectra: SpectrumSet, forward: ForwardModel) -> dict[str, F64]:
    """Abundances and nuisances of every row: as of a spectrum without any where a file has no such column or value."""
    names = ("a_M", "C_M", *NUISANCES)
    present = [name for name in names if name in spectra.columns]
    columns = spectra.params(present)
    limits = forward.emulator.limits
    out = {}
    for name in names:
        values = np.zeros(spectra.n_rows)
        if name in columns:
            values = np.nan_to_num(np.asarray(columns[name], dtype=float), nan=0.0)
        elif name == "line_spread":
            values += 1.0
        if name in limits:
            values = np.clip(values, *limits[name])
        out[name] = values
    return out


def _observation(spectra: SpectrumSet, *, needed: bool) -> dict[str, F64]:
    missing = [name for name in ("mag", "seeing") if name not in spectra.columns]
    if not missing:
        return spectra.params(("mag", "seeing"))
    if needed:
        raise InputError(
            f"{spectra.shards[0].path}: dataset/params has no column {missing[0]}; the Bayes ceiling needs it"
        )
    return {}


def _check_errors(
    spectra: SpectrumSet,
    forward: ForwardModel,
    parameters: dict[str, F64],
    error: NDArray[np.float32],
    mag: F64,
    seeing: F64,
    sky: SkyFactors | None,
) -> None:
    """The likelihood is right only if the file's noise is what this version would give the same stars."""
    flux = forward.flux(parameters)
    level = forward.settings.noise_level
    expected, _ = forward.noise.error(flux, mag, seeing, noise_level=level, factors=sky)
    ratio = float(np.median(error / expected))
    scatter = float(np.percentile(np.abs(error / expected - ratio), 99))
    if abs(ratio - 1) > 1e-3 or scatter > 5e-3:
        raise InputError(
            f"{spectra.shards[0].path}: its errors are {ratio:.4f} ± {scatter:.4f} of what this version of moefast "
            "simulates for the same stars; simulate the file again"
        )


def _sky_shapes(
    forward: ForwardModel,
    parameters: dict[str, F64],
    observation: dict[str, F64],
    rows: NDArray[np.integer],
    sky: SkyFactors,
) -> F64 | None:
    """What sky subtraction may leave in each star, (n, g, p), in shapes of unit variance."""
    level = forward.flux(parameters) @ forward.noise.band_weight
    shapes = [
        forward.sky_shapes(
            observation["mag"][row], observation["seeing"][row],
            SkyFactors(sky.continuum[i : i + 1], sky.lines[i : i + 1]),
        )
        for i, row in enumerate(rows)
    ]  # fmt: skip
    return (
        None if shapes[0] is None else np.stack([mean * one for mean, one in zip(level, shapes, strict=True)])
    )
