"""What the physics allows: R² ceilings of a set of labelled spectra, by Fisher information and by Bayes.

Design: one pass over the spectra, block by block. The Fisher bound needs labels and errors only and works for any
file; the Bayes ceiling needs to know how the file was made (the attribute `settings` of `moefast simulate`). What is
found is one JSON document: a summary, the same groups as in every evaluation, and a few numbers per star, so that
nothing has to be computed twice. The ceilings of the reference sets come with the package and are found by the
fingerprint of the set.
"""

from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, kstest

from moefast.ceilings import bayes, fisher
from moefast.core import metrics
from moefast.core.atomic import write_atomically
from moefast.core.errors import InputError
from moefast.core.groups import groups_of
from moefast.core.progress import RowProgress, StageProgress
from moefast.core.random import NOISE_SEED, standard_normals
from moefast.simulate.emulator import LABELS
from moefast.simulate.forward import ForwardModel
from moefast.simulate.noise import SkyFactors
from moefast.simulate.rows import SEEING_MEDIAN, Settings
from moefast.simulate.sets import Identity, identify
from moefast.simulate.visit import VISIT_PARAMS, sky_of
from moefast.spectra.quality import assess, good_pixels
from moefast.spectra.spectrum_set import SpectrumSet, open_spectra

__all__ = [
    "BLOCK_ROWS",
    "PUBLISHED_CRLB",
    "BlockBounds",
    "Ceiling",
    "StarBounds",
    "compute",
    "known",
    "read",
    "write",
]

_LOG = logging.getLogger(__name__)

Method = Literal["auto", "both", "fisher", "bayes"]
F64 = NDArray[np.float64]

SCHEMA_VERSION = 1
BLOCK_ROWS = 512
LEAST_ESS = 200.0
RANK_BINS = 20
NUISANCES = ("redshift", "ebv", "velocity", "line_spread")
PUBLISHED_CRLB = ((18.0, 0.9993), (20.0, 0.989), (21.5, 0.874), (22.0, 0.698), (22.5, 0.265), (23.0, 0.0))
"""(magnitude, R²max) of the five-parameter bound, as published for a test set that is not public."""
FREE_LABELS = ("T_eff", "M_H", "C_M", "a_M")
"""Labels that are freed one after the other beside log g."""


@dataclass(frozen=True)
class Ceiling:
    """The ceilings of one set.

    Attributes
    ----------
    summary : dict
        JSON-ready; see `compute`.
    stars : dict of str to array of shape (n,), float64
        row; log_g, T_eff, M_H, snr_norm, snr_median; crlb and crlb_prior [dex²]; bayes, bayes_sd and
        monte_carlo_error [dex], ess and rank, as far as they were computed.
    """

    summary: dict[str, Any]
    stars: dict[str, F64]

    def r2(self) -> dict[str, float]:
        """R² ceilings by name, as every evaluation takes them."""
        found: dict[str, float] = {}
        if self.summary["bayes"]:
            found["bayes"] = self.summary["bayes"]["r2"]
        if self.summary["fisher"]:
            found |= {f"fisher {name}": value for name, value in self.summary["fisher"]["r2"].items()}
        return found


def compute(
    paths: str | Path | Iterable[str | Path],
    *,
    method: Method = "auto",
    stars: int | None = None,
    target_ess: float = bayes.TARGET_ESS,
    seed: int = 0,
    threads: int | None = None,
    name: str | None = None,
    progress: StageProgress | None = None,
    spread: Callable[..., Iterator[BlockBounds]] | None = None,
) -> Ceiling:
    """Compute the ceilings of labelled spectra.

    Parameters
    ----------
    paths : path, folder, pattern, or several
        Spectra with the labels T_eff, log_g, M_H; a_M and C_M count as 0 where a file has none.
    method : "auto", "both", "fisher" or "bayes"
        "auto" is both if the files say how they were made, else the Fisher bound alone.
    stars : int, optional
        Use the first rows only.
    target_ess : float
        Effective sample size of each star's posterior.
    seed : int
        Of the posterior samples.
    threads : int, optional
        As many as there are cores if absent.
    name : str, optional
        Name of the set.
    progress : callable, optional
        Called with the name of the stage, "ceiling", rows done and rows in all.
    spread : callable, optional
        Has the rows computed elsewhere: called with what makes a `StarBounds`, the number
        of rows, and a callback that is told of them.

    Returns
    -------
    Ceiling

    Raises
    ------
    LabelError
        Labels are missing or not finite.
    InputError
        A file cannot be read, or does not say what the Bayes ceiling needs.
    """
    stars_of = StarBounds(paths, method=method, target_ess=target_ess, seed=seed, threads=threads)
    spectra, settings, forward, labels = (
        stars_of.spectra,
        stars_of.settings,
        stars_of.forward,
        stars_of.labels,
    )
    identity = identify(spectra.shards[0]) if len(spectra.shards) == 1 else None
    parameters, with_bayes, stored = stars_of.parameters, stars_of.with_bayes, stars_of.stored
    n = min(stars or spectra.n_rows, spectra.n_rows)
    _LOG.info("%d stars; Fisher bound: %s, Bayes ceiling: %s", n, method != "bayes", with_bayes)
    found: dict[str, list[F64]] = {}
    shares: list[F64] = []
    order = FREE_LABELS
    names: tuple[str, ...] = ()
    seconds = {"fisher": 0.0, "bayes": 0.0}
    likelihoods = 0
    report: RowProgress = partial(progress or (lambda *_: None), "ceiling")
    report(0, n)
    blocks = stars_of.blocks((0, n), report) if spread is None else spread(stars_of.arguments, n, report)
    for block in blocks:
        for key, values in block.columns.items():
            found.setdefault(key, []).append(values)
        if block.share is not None:
            shares.append(block.share)
        names = block.names
        likelihoods += block.likelihoods
        for key, spent in block.seconds.items():
            seconds[key] += spent
    table = {key: np.concatenate(parts) for key, parts in found.items()}
    table |= {key: np.asarray(labels[key][:n], dtype=float) for key in labels}
    summary: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "data_set": {
            "name": name or _name(spectra, identity),
            "fingerprint": spectra.fingerprint(),
            "reference_set": None if identity is None else identity._asdict(),
            "n": n,
            "n_rows": spectra.n_rows,
            "noise_seed": None if stored else NOISE_SEED,
            "settings": None if settings is None else json.loads(settings.to_json()),
            "log_g_variance": float(table["log_g"].var()),
        },
        "fisher": None,
        "bayes": None,
    }
    if method != "bayes":
        summary["fisher"] = {
            "parameters": list(names),
            "prior_on_labels": None
            if settings is None
            else "uniform in the simulated ranges, as 12 / range²",
            "r2": _fisher_r2(table, np.ones(n, dtype=bool)),
            "schur": {
                "free": ["log_g", *order, *(key for key in names if key not in LABELS)],
                "median_share": np.median(np.concatenate(shares), axis=0).tolist(),
            },
            "by_magnitude": _by_magnitude(forward, {k: v[:n] for k, v in parameters.items()}),
            "seconds": seconds["fisher"],
        }
    if with_bayes:
        summary["bayes"] = _bayes_summary(table, seconds["bayes"], likelihoods, target_ess, seed)
    summary["groups"] = _groups(table)
    return Ceiling(summary, table)


class BlockBounds(NamedTuple):
    """What is found of a block of stars.

    `columns` of the stars; `share` of the information that each label takes, None without the Fisher bound, and `names`
    of its parameters; numbers of `likelihoods`; and `seconds` by method.
    """

    columns: dict[str, F64]
    share: F64 | None
    names: tuple[str, ...]
    likelihoods: int
    seconds: dict[str, float]


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
        spectra, forward, method, visit = self.spectra, self.forward, self.method, self.visit
        for block in spectra.blocks(BLOCK_ROWS, array="noisy" if self.stored else "flux", rows=span):
            rows = np.arange(block.first_row, block.first_row + len(block))
            if not self.stored:
                block.flux += standard_normals(NOISE_SEED, rows, spectra.n_pixels) * block.error
            good = good_pixels(block.flux, block.error, block.mask)
            quality = assess(block.flux, block.error, good, block.mask)
            sky = sky_shapes = share = None
            if visit is not None:
                # In the units in which stars and their noise were drawn; the likelihood leaves the scale free.
                divisor = visit["median"][rows, None].astype(np.float32)
                block.flux, block.error = block.flux * divisor, block.error * divisor
                sky = sky_of({name: values[rows] for name, values in visit.items()})[0]
            error = block.error if good is None else np.where(good, block.error, np.inf)
            here = {key: values[rows] for key, values in self.parameters.items()}
            columns: dict[str, F64] = {
                "row": rows.astype(float),
                "snr_norm": quality.snr_norm.astype(float),
                "snr_median": quality.snr_median.astype(float),
            }
            names: tuple[str, ...] = ()
            seconds, likelihoods = {"fisher": 0.0, "bayes": 0.0}, 0
            if method != "bayes":
                begin = time.perf_counter()
                if sky is not None:
                    sky_shapes = _sky_shapes(forward, here, self.observation, rows, sky)
                names, matrices = fisher.information(forward, here, error, sky_shapes)
                bare = fisher.prior_information(forward, names, labels=False)
                columns["crlb"] = fisher.bounds(matrices, bare)
                columns["crlb_prior"] = fisher.bounds(
                    matrices, fisher.prior_information(forward, names, labels=True)
                )
                free = (*FREE_LABELS, *(key for key in names if key not in LABELS))
                share = fisher.retained(matrices, names, bare, free)
                seconds["fisher"] = time.perf_counter() - begin
            if self.with_bayes and self.settings is not None:
                begin = time.perf_counter()
                mag, seeing = self.observation["mag"][rows], self.observation["seeing"][rows]
                if not self._checked:
                    _check_errors(spectra, forward, here, block.error, mag, seeing, sky)
                    self._checked = True
                star = bayes.posteriors(
                    forward, _library(self.settings), rows, block.flux, block.error, mag, seeing, here,
                    good=good, sky=sky, target_ess=self.target_ess, seed=self.seed, threads=self.threads,
                    progress=partial(_report_star, progress, int(rows[0]) - span[0], span[1] - span[0]),
                )  # fmt: skip
                columns |= {
                    "bayes": star.mean,
                    "bayes_sd": star.sd,
                    "monte_carlo_error": star.monte_carlo_error,
                }
                columns |= {"ess": star.ess, "rank": star.rank[:, LABELS.index("log_g")]}
                columns |= {f"rank_{key}": star.rank[:, i] for i, key in enumerate(LABELS) if key != "log_g"}
                likelihoods = int(star.n_likelihoods.sum())
                seconds["bayes"] = time.perf_counter() - begin
            yield BlockBounds(columns, share, names, likelihoods, seconds)
            progress(int(rows[-1]) + 1 - span[0], span[1] - span[0])


def _report_star(progress: RowProgress, before: int, total: int, done: int) -> None:
    """Report a star of a block."""
    progress(before + done, total)


def known(spectra: SpectrumSet) -> Ceiling | None:
    """The ceiling that comes with the package, if `spectra` is a part of a reference set that has one."""
    identity = identify(spectra.shards[0]) if len(spectra.shards) == 1 else None
    if identity is None:
        return None
    source = files("moefast.ceilings") / "data" / f"{identity.reference_set}-{identity.part}.json.gz"
    if not source.is_file():
        return None
    with as_file(source) as path:
        found = read(path)
    return found if found.summary["data_set"]["reference_set"] == identity._asdict() else None


def _name(spectra: SpectrumSet, identity: Identity | None) -> str:
    if identity is not None:
        return f"{identity.reference_set} {identity.part}"
    return " + ".join(shard.path.name for shard in spectra.shards[:3])


@lru_cache(maxsize=2)
def _library(settings: Settings) -> bayes.TemplateLibrary:
    return bayes.TemplateLibrary.draw(ForwardModel(settings))


# --- what the files say --------------------------------------------------------------------------------


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


# --- summaries -----------------------------------------------------------------------------------------


def _fisher_r2(table: Mapping[str, F64], members: NDArray[np.bool_]) -> dict[str, float]:
    """1 − CRLB/Var(log g): mean and median over stars, without and with the prior on the labels."""
    variance = table["log_g"][members].var()
    return {
        "mean": float(1 - table["crlb"][members].mean() / variance),
        "median": float(1 - np.median(table["crlb"][members]) / variance),
        "mean, with prior": float(1 - table["crlb_prior"][members].mean() / variance),
        "median, with prior": float(1 - np.median(table["crlb_prior"][members]) / variance),
    }


def _by_magnitude(forward: ForwardModel, parameters: dict[str, F64], stars: int = 1000) -> list[dict]:
    """The bound for the same stars at fixed magnitudes and the median seeing, beside the published curve."""
    some = {key: values[:stars] for key, values in parameters.items()}
    n = len(some["log_g"])
    variance = parameters["log_g"].var()
    crlb: list[list[F64]] = [[] for _ in PUBLISHED_CRLB]
    for first in range(0, n, BLOCK_ROWS):
        here = {key: values[first : first + BLOCK_ROWS] for key, values in some.items()}
        flux = forward.flux(here)
        seeing = np.full(len(flux), SEEING_MEDIAN)
        for (mag, _), parts in zip(PUBLISHED_CRLB, crlb, strict=True):
            error, _ = forward.noise.error(
                flux, np.full(len(flux), mag), seeing, noise_level=forward.settings.noise_level
            )
            names, matrices = fisher.information(forward, here, error)
            parts.append(fisher.bounds(matrices, fisher.prior_information(forward, names, labels=False)))
    rows = []
    for (mag, published), parts in zip(PUBLISHED_CRLB, crlb, strict=True):
        values = np.concatenate(parts)
        mean, median = 1 - values.mean() / variance, 1 - np.median(values) / variance
        rows.append(
            {"mag": mag, "n": n, "mean": float(mean), "median": float(median), "published": published}
        )
    return rows


def rank_statistics(ranks: F64) -> dict[str, Any]:
    """Simulation-based calibration: ranks of the truth must be uniform on (0, 1).

    Source: Talts et al. 2018, arXiv:1804.06788.
    """
    counts, _ = np.histogram(ranks, bins=RANK_BINS, range=(0, 1))
    expected = len(ranks) / RANK_BINS
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return {
        "histogram": counts.tolist(),
        "chi2": statistic,
        "chi2_p": float(chi2.sf(statistic, RANK_BINS - 1)),
        "ks_p": float(kstest(ranks, "uniform").pvalue),
    }


def _bayes_summary(
    table: Mapping[str, F64], seconds: float, likelihoods: int, target_ess: float, seed: int
) -> dict[str, Any]:
    log_g, mean, sd = table["log_g"], table["bayes"], table["bayes_sd"]
    expected = 1 - (sd**2).mean() / log_g.var()
    achieved = metrics.bootstrap(log_g, mean)
    ranks = {"log_g": table["rank"]} | {
        key: table[f"rank_{key}"]
        for key in LABELS
        if key != "log_g" and np.isfinite(table[f"rank_{key}"]).all()
    }
    return {
        "r2": float(expected),
        "r2_interval": _r2_interval(log_g, sd),
        "r2_of_posterior_means": achieved.value,
        "r2_of_posterior_means_interval": [achieved.low, achieved.high],
        "rmse": metrics.rmse(log_g, mean),
        "error_coverage": metrics.coverage(log_g, mean, sd),
        "monte_carlo_error": {
            "median": float(np.median(table["monte_carlo_error"])),
            "largest": float(table["monte_carlo_error"].max()),
            # Noise of the means adds to their squared error: what R² of them loses by it.
            "r2_lost": float((table["monte_carlo_error"] ** 2).mean() / log_g.var()),
        },
        "effective_sample_size": {
            "target": target_ess,
            "smallest": float(table["ess"].min()),
            "percentile_1": float(np.percentile(table["ess"], 1)),
            "median": float(np.median(table["ess"])),
            "share_of_stars_at_least_200": float((table["ess"] >= LEAST_ESS).mean()),
        },
        "ranks": {key: rank_statistics(values) for key, values in ranks.items()},
        "likelihoods_per_star": likelihoods / len(log_g),
        "seed": seed,
        "seconds": seconds,
    }


def _r2_interval(log_g: F64, sd: F64) -> list[float]:
    """95 % percentile interval of the expected R² over stars; resamples of one star alone have no R²."""
    rng = np.random.default_rng(metrics.SEED)
    n, resampled = len(log_g), []
    for _ in range(metrics.N_RESAMPLES):
        chosen = rng.integers(0, n, n)
        if np.ptp(log_g[chosen]) > 0:
            resampled.append(1 - (sd[chosen] ** 2).mean() / log_g[chosen].var())
    return np.quantile(resampled, [0.025, 0.975]).tolist()


def _groups(table: Mapping[str, F64]) -> dict[str, list[dict[str, Any]]]:
    """Ceilings of the groups that every evaluation reports, R² within each group."""
    groups = groups_of(table["T_eff"], table["M_H"], table["snr_norm"], table["snr_median"])
    return {
        kind: [_group(table, name, members) for name, members in members_of]
        for kind, members_of in groups.items()
    }


def _group(table: Mapping[str, F64], name: str, members: NDArray[np.bool_]) -> dict[str, Any]:
    out: dict[str, Any] = {"name": name, "n": int(members.sum())}
    if members.sum() < 2 or not table["log_g"][members].var() > 0:
        return out
    out["snr_median"] = float(np.median(table["snr_median"][members]))
    if "crlb" in table:
        out["fisher"] = _fisher_r2(table, members)
    if "bayes" in table:
        log_g = table["log_g"][members]
        out["bayes"] = float(1 - (table["bayes_sd"][members] ** 2).mean() / log_g.var())
        achieved = metrics.bootstrap(log_g, table["bayes"][members])
        out["bayes_means"] = achieved.value
        out["bayes_means_interval"] = [achieved.low, achieved.high]
    return out


# --- files ---------------------------------------------------------------------------------------------


def write(ceiling: Ceiling, path: str | Path, *, overwrite: bool = True) -> None:
    """Write as JSON, compressed if the name ends in .gz.

    Raises
    ------
    OutputError
    """
    stars = {
        key: [int(v) for v in values] if key == "row" else [_rounded(v) for v in values]
        for key, values in ceiling.stars.items()
    }
    text = json.dumps({**ceiling.summary, "stars": stars}, ensure_ascii=False, allow_nan=False)
    content = (text + "\n").encode()
    if str(path).endswith(".gz"):
        # No time stamp: the same ceiling gives the same bytes.
        content = gzip.compress(content, mtime=0)
    write_atomically(path, content, overwrite=overwrite)


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


def read(path: str | Path) -> Ceiling:
    """Read what `write` wrote.

    Raises
    ------
    InputError
        The file is missing, damaged, of another schema or no ceiling.
    """
    try:
        content = Path(path).read_bytes()
        if str(path).endswith(".gz"):
            content = gzip.decompress(content)
        document = json.loads(content)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: is no readable ceiling ({error})") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION or "stars" not in document:
        raise InputError(
            f"{path}: expected a ceiling of schema {SCHEMA_VERSION}, found {version}; make it with moefast ceiling"
        )
    stars = {
        key: np.array([np.nan if v is None else v for v in values], dtype=float)
        for key, values in document.pop("stars").items()
    }
    return Ceiling(document, stars)
