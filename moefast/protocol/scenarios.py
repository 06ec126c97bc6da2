"""Scenarios: a fixed table of things that go wrong with spectra, and what a model says of each.

A silent failure is a star without any flag that lies beyond three of its claimed errors (or has no number and no flag).
Where there is no star, every spectrum without a flag is one.

Design: stars are the first of `test_10k` of the set `z0`, changed in one way each, so that a scenario differs from the
first row of the table in nothing else. Whatever is drawn belongs to the row of the star. A model is asked as
`moefast predict` asks it, flags included, whatever its recipe; a new scenario is one more entry of `SCENARIOS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moefast.core import metrics
from moefast.core.errors import MoefastError
from moefast.core.random import NOISE_STREAM, add_noise, standard_normals, uniforms_of_rows
from moefast.core.text import number, percent, table
from moefast.model import Model
from moefast.predicting.columns import columns_of
from moefast.predicting.engines import open_engine, score_block
from moefast.simulate.emulator import LABELS, Emulator
from moefast.simulate.gaps import GAPS
from moefast.simulate.noise import SKY_GROUPS, NoiseModel
from moefast.simulate.nuisance import LIGHT_SPEED
from moefast.simulate.rows import Settings, SimulatedBlock, noise_model, simulate_rows
from moefast.simulate.sets import REFERENCE_SETS
from moefast.spectra.quality import Flag
from moefast.spectra.source import Block

__all__ = [
    "FLAGS",
    "SCENARIOS",
    "Measures",
    "Scenario",
    "Spectra",
    "format_text",
    "gauge",
    "measure",
    "run_scenarios",
    "scenario_table",
]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Kind = Literal["reference", "star", "no star"]

FLAGS = (
    Flag.UNLIKE_TRAINING,
    Flag.NO_DATA,
    Flag.LOW_CONFIDENCE,
    Flag.FEW_GOOD_PIXELS,
    Flag.OUT_OF_GRID,
    Flag.BAD_ERROR,
)
"""What counts as a flag: each of them tells a user that the number is not to be trusted as it stands."""

LARGEST_SILENT = 0.01
LARGEST_UNFLAGGED = 0.05
"""Where there is no star."""
LARGEST_FALSE = 0.02
"""Share of `FALSE_FLAG` on the reference sets, where nothing is wrong."""
FALSE_FLAG = Flag.UNLIKE_TRAINING
SIGMAS = 3.0

BASE_SET, BASE_PART = "z0", "test_10k"
SEED = 72_001
"""Of everything that a scenario draws and that is no noise."""
ROWS_AT_ONCE = 500
CALCIUM_CORE = (8543.0, 8546.0)
"""Å, vacuum: the middle of Ca II 8544, where a star that moves shows it."""
AIR = 1.000275
"""Refractive index of air in this arm; between its ends it differs by 4e-7, 0.1 km/s."""


@dataclass(frozen=True)
class Spectra:
    """What a model gets to see, and what is true.

    Attributes
    ----------
    flux, error : arrays of shape (n, p), float32
    log_g : array of shape (n,), float64, or None
        None where there is no star.
    mask : array of shape (n, p), bool, or None
        True where a pixel is lost.
    """

    flux: F32
    error: F32
    log_g: F64 | None
    mask: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class BaseStars:
    """Rows of the base set, and what it takes to observe others in their place.

    Attributes
    ----------
    first, stop : int
        Rows of the part `BASE_PART`.
    block : SimulatedBlock
        As the set has them, with noise.
    emulator : Emulator
    noise : NoiseModel
    """

    first: int
    stop: int
    block: SimulatedBlock
    emulator: Emulator
    noise: NoiseModel

    @property
    def rows(self) -> NDArray[np.int64]:
        """Row numbers."""
        return np.arange(self.first, self.stop)

    @property
    def log_g(self) -> F64:
        """True log g."""
        return self.block.params["log_g"]

    @property
    def noisy(self) -> F32:
        """Noisy flux."""
        assert self.block.noisy is not None
        return self.block.noisy

    def uniforms(self, count: int, stream: int) -> F64:
        """Random numbers of a scenario, shape (n, count)."""
        return uniforms_of_rows(self.rows, count, seed=SEED, stream=stream)

    def observed(self, flux: F32, log_g: F64 | None = None) -> Spectra:
        """Other light in place of the stars', of the same magnitude, sky and draw of noise."""
        error, _ = self.noise.error(flux, self.block.params["mag"], self.block.params["seeing"])
        noisy = add_noise(flux, error, _base_seed(), self.rows, stream=NOISE_STREAM)
        return Spectra(noisy, error, log_g)


@dataclass(frozen=True)
class Scenario:
    """One thing that goes wrong.

    Attributes
    ----------
    name : str
        Short; a key of the results.
    what : str
        What is done to the spectra, in a line.
    kind : {"reference", "star", "no star"}
        Whether nothing is wrong (a set by its name), something is, or there is no log g at all.
    make : callable
        Spectra of some `BaseStars`.
    """

    name: str
    what: str
    kind: Kind
    make: Callable[[BaseStars], Spectra]


def _base_seed() -> int:
    return REFERENCE_SETS[BASE_SET].parts[BASE_PART].seed


# --- what goes wrong ---------------------------------------------------------------------------------------


def _of_set(name: str) -> Callable[[BaseStars], Spectra]:
    return _simulated(REFERENCE_SETS[name].settings)


def _simulated(settings: Settings) -> Callable[[BaseStars], Spectra]:
    def make(stars: BaseStars) -> Spectra:
        block = simulate_rows(
            stars.first, stars.stop, seed=_base_seed(), settings=settings, emulator=stars.emulator
        )
        assert block.noisy is not None
        return Spectra(block.noisy, block.error, block.params["log_g"], block.mask)

    return make


def _times(factor: Callable[[F64], F64]) -> Callable[[BaseStars], Spectra]:
    """Flux and error times a function of wavelength [Å]."""

    def make(stars: BaseStars) -> Spectra:
        curve = factor(stars.emulator.wave).astype(np.float32)
        return Spectra(stars.noisy * curve, stars.block.error * curve, stars.log_g)

    return make


def _scale(value: float) -> Callable[[BaseStars], Spectra]:
    return _times(lambda wave: np.full(wave.shape, value))


def _tilt(wave: F64) -> F64:
    return 1.0 + 0.1 * ((wave - wave[0]) / (wave[-1] - wave[0]) - 0.5)


def _f_nu(wave: F64) -> F64:
    return (wave / np.median(wave)) ** 2


def _continuum_normalised(stars: BaseStars) -> Spectra:
    """Divided by a cubic through the upper half of the flux without noise."""
    wave, flux = stars.emulator.wave, stars.block.flux
    u = np.linspace(-1.0, 1.0, len(wave))
    design = np.polynomial.legendre.legvander(u, 3)
    continuum = np.empty(flux.shape)
    for i, row in enumerate(flux.astype(float)):
        used = np.ones(len(u), dtype=bool)
        for _ in range(4):
            continuum[i] = design @ np.linalg.lstsq(design[used], row[used])[0]
            used = row >= continuum[i]
    return Spectra(
        (stars.noisy / continuum).astype(np.float32),
        (stars.block.error / continuum).astype(np.float32),
        stars.log_g,
    )


def _moved(velocity: float) -> Callable[[BaseStars], Spectra]:
    """Stars that all move at `velocity` [km/s]."""
    shift = velocity / LIGHT_SPEED
    return _simulated(replace(REFERENCE_SETS[BASE_SET].settings, redshift=(shift, shift)))


def _gap(kind: str) -> Callable[[BaseStars], Spectra]:
    def make(stars: BaseStars) -> Spectra:
        lost = GAPS[kind](stars.emulator.wave, stars.rows, SEED)
        return Spectra(stars.noisy, stars.block.error, stars.log_g, lost)

    return make


def _small_errors(stars: BaseStars) -> Spectra:
    return Spectra(stars.noisy, stars.block.error * np.float32(0.5), stars.log_g)


def _sky_residuals(stars: BaseStars) -> Spectra:
    """A share of 3 % (1 sigma) of each group of airglow lines is left."""
    normal = standard_normals(SEED, stars.rows, len(SKY_GROUPS), stream=1).astype(float)
    params = stars.block.params
    left = stars.noise.line_flux(stars.block.flux, params["mag"], params["seeing"], 0.03 * normal)
    return Spectra(stars.noisy + left, stars.block.error, stars.log_g)


def _cosmic_rays(stars: BaseStars) -> Spectra:
    """Ten hits of three pixels, 10 to 300 times the error high, log-uniform."""
    hits = 10
    flux, p = stars.noisy.copy(), len(stars.emulator.wave)
    uniform = stars.uniforms(2 * hits, 2)
    first = (uniform[:, :hits] * (p - 2)).astype(int)
    height = 10.0 * 30.0 ** uniform[:, hits:]
    for j, profile in enumerate((0.5, 1.0, 0.5)):
        for i, (pixels, heights) in enumerate(zip(first + j, height, strict=True)):
            np.add.at(flux[i], pixels, (profile * heights * stars.block.error[i, pixels]).astype(np.float32))
    return Spectra(flux, stars.block.error, stars.log_g)


def _blend(stars: BaseStars) -> Spectra:
    """Three tenths of the light are another star's: a further row of the same seed."""
    other = simulate_rows(
        stars.first + 100_000, stars.stop + 100_000, seed=_base_seed(), emulator=stars.emulator, noisy=False
    )
    flux = (0.7 * stars.block.flux + 0.3 * other.flux).astype(np.float32)
    return stars.observed(flux, stars.log_g)


def _outside(stars: BaseStars) -> Spectra:
    """Stars of 6250 to 6750 K: the emulator ends at 6000 K and is continued linearly."""
    labels = np.stack([stars.block.params[name] for name in LABELS], axis=1)
    edge = stars.emulator.limits["T_eff"][1]
    labels[:, 0] = edge
    beyond = 250.0 + 500.0 * stars.uniforms(1, 3)
    flux = stars.emulator.flux(labels).astype(float)
    for i in range(0, len(flux), 50):
        slope = stars.emulator.derivatives(labels[i : i + 50])[:, 0]
        flux[i : i + 50] += beyond[i : i + 50] * slope
    return stars.observed(flux.astype(np.float32), stars.log_g)


def _black_body(stars: BaseStars) -> Spectra:
    """Planck's law at 8000 K, median 1, under the noise of the stars."""
    wave = stars.emulator.wave * 1e-8
    light = wave**-5.0 / np.expm1(1.438777 / (wave * 8000.0))
    flux = np.repeat((light / np.median(light)).astype(np.float32)[None], len(stars.rows), axis=0)
    return stars.observed(flux)


def _noise_only(stars: BaseStars) -> Spectra:
    return Spectra(stars.noisy - stars.block.flux, stars.block.error, None)


def _constant(value: float) -> Callable[[BaseStars], Spectra]:
    return lambda stars: Spectra(np.full_like(stars.noisy, value), stars.block.error, None)


_SCALES = (0.9, 0.95, 0.98, 1.02, 1.1)
SCENARIOS: dict[str, Scenario] = {
    one.name: one
    for one in (
        *(
            Scenario(name, f"the reference set {name}: nothing is wrong", "reference", _of_set(name))
            for name in REFERENCE_SETS
        ),
        *(
            Scenario(f"scale {value:g}", f"flux and error times {value:g}", "star", _scale(value))
            for value in _SCALES
        ),
        Scenario("tilt 10 %", "flux and error times a slope of 10 % from end to end", "star", _times(_tilt)),
        Scenario("F_nu", "flux per unit frequency in place of wavelength, median 1", "star", _times(_f_nu)),
        Scenario(
            "continuum-normalised",
            "divided by a cubic continuum, median about 1",
            "star",
            _continuum_normalised,
        ),
        Scenario(
            "air wavelengths",
            "wavelengths in air taken as in vacuum",
            "star",
            _moved(LIGHT_SPEED * (1.0 / AIR - 1.0)),
        ),
        Scenario("100 km/s", "velocity of 100 km/s that nobody knows", "star", _moved(100.0)),
        Scenario("300 km/s", "velocity of 300 km/s that nobody knows", "star", _moved(300.0)),
        Scenario(
            "reddening",
            "E(B-V) of 0.05 to 0.2 mag",
            "star",
            _simulated(replace(REFERENCE_SETS[BASE_SET].settings, reddening=(0.05, 0.2))),
        ),
        *(
            Scenario(f"gap: {kind}", f"lost pixels: {kind}", "star", _gap(kind))
            for kind in GAPS
            if kind != "none"
        ),
        Scenario("errors too small", "claimed errors half of the true ones", "star", _small_errors),
        Scenario("sky residuals", "3 % of the sky lines left in the flux", "star", _sky_residuals),
        Scenario("cosmic rays", "ten hits of three pixels, not masked", "star", _cosmic_rays),
        Scenario("blend", "30 % of the light from another star", "star", _blend),
        Scenario("outside the labels", "T_eff 6250 to 6750 K, beyond the training set", "star", _outside),
        Scenario("black body", "Planck's law at 8000 K", "no star", _black_body),
        Scenario("noise only", "noise of the sky without a star", "no star", _noise_only),
        Scenario("zeros", "flux 0 in every pixel", "no star", _constant(0.0)),
        Scenario("constant", "flux 1 in every pixel, without noise", "no star", _constant(1.0)),
    )
}
"""The table, by name."""


def scenario_table() -> dict[str, Any]:
    """What is fixed of the scenarios, JSON-ready: names, kinds, marks, flags, seeds."""
    return {
        "base": [BASE_SET, BASE_PART],
        "seed": SEED,
        "flags": [str(flag.name) for flag in FLAGS],
        "false_flag": str(FALSE_FLAG.name),
        "sigmas": SIGMAS,
        "marks": {
            "silent": LARGEST_SILENT,
            "unflagged where there is no star": LARGEST_UNFLAGGED,
            "false flags": LARGEST_FALSE,
        },
        "scenarios": {one.name: {"what": one.what, "kind": one.kind} for one in SCENARIOS.values()},
    }


def gauge(n: int = 4) -> dict[str, list[float]]:
    """Numbers that every scenario's first spectra must give: they change if what is done to the spectra changes.

    Parameters
    ----------
    n : int
        Stars of each scenario.

    Returns
    -------
    dict of str to list
        Mean flux in the blue and in the red quarter of the pixels and in `CALCIUM_CORE`, root mean square of
        flux / error and mean error over all pixels, all to three significant digits, and the number of lost pixels.
    """
    stars = next(_stars(n, Emulator.load()))
    wave = stars.emulator.wave
    quarter = len(wave) // 4
    core = slice(*np.searchsorted(wave, CALCIUM_CORE).tolist())
    parts = (slice(0, quarter), slice(len(wave) - quarter, None), core)
    found = {}
    for name, scenario in SCENARIOS.items():
        spectra = scenario.make(stars)
        flux, error = spectra.flux.astype(float), spectra.error.astype(float)
        numbers = (
            *(flux[:, part].mean() for part in parts),
            math.sqrt(((flux / error) ** 2).mean()),
            error.mean(),
        )
        lost = 0 if spectra.mask is None else int(spectra.mask.sum())
        # A mean of noise alone would be rounded relative to nothing.
        found[name] = [float(f"{value:.3g}") if abs(value) > 1e-3 else 0.0 for value in numbers] + [lost]
    return found


# --- measuring ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measures:
    """What a model makes of a scenario.

    Attributes
    ----------
    n : int
        Spectra.
    r2, within_1_sigma, within_2_sigma, bias, median_error : float or None
        Of all spectra, flagged or not; None where there is no star. A prediction that is no number counts as the mean
        label and outside its error. 2 sigma stands for 1.96.
    flagged, unlike, silent : float
        Shares: with any of `FLAGS`, with UNLIKE_TRAINING, and of silent failures.
    flags : dict of str to float
        Share with each of `FLAGS`.
    """

    n: int
    r2: float | None
    within_1_sigma: float | None
    within_2_sigma: float | None
    bias: float | None
    median_error: float | None
    flagged: float
    unlike: float
    silent: float
    flags: dict[str, float]


def measure(columns: Mapping[str, NDArray], log_g: F64 | None) -> Measures:
    """Measures of predictions.

    Parameters
    ----------
    columns : mapping
        log_g, log_g_err and flag, each of shape (n,), as `moefast predict` writes them.
    log_g : array of shape (n,), or None
        The truth; None where there is no star.
    """
    flag = np.asarray(columns["flag"]).astype(np.uint32)
    each = {str(one.name): (flag & np.uint32(one)) != 0 for one in FLAGS}
    flagged = np.logical_or.reduce(list(each.values()))
    shares = {name: float(rows.mean()) for name, rows in each.items()}
    about: dict[str, Any] = {
        "n": len(flag),
        "flagged": float(flagged.mean()),
        "unlike": shares[str(Flag.UNLIKE_TRAINING.name)],
        "flags": shares,
    }
    if log_g is None:
        about |= dict.fromkeys(("r2", "within_1_sigma", "within_2_sigma", "bias", "median_error"))
        return Measures(silent=float((~flagged).mean()), **about)
    predicted, error = (np.asarray(columns[name], dtype=float) for name in ("log_g", "log_g_err"))
    usable = np.isfinite(predicted) & np.isfinite(error) & (error > 0)
    away = np.full(len(flag), np.inf)
    away[usable] = np.abs(predicted - log_g)[usable] / error[usable]
    finite = np.isfinite(predicted)
    return Measures(
        r2=_finite(metrics.r2(log_g, predicted)),
        within_1_sigma=float((away <= 1.0).mean()),
        within_2_sigma=float((away <= 1.96).mean()),
        bias=_finite((predicted - log_g)[finite].mean()) if finite.any() else None,
        median_error=_finite(np.median(error[usable])) if usable.any() else None,
        silent=float((~flagged & (away > SIGMAS)).mean()),
        **about,
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def verdict(kind: Kind, found: Measures) -> str:
    """pass, or what exceeds its mark."""
    if kind == "no star":
        over = [("unflagged", found.silent, LARGEST_UNFLAGGED)]
    else:
        over = [("silent", found.silent, LARGEST_SILENT)]
        if kind == "reference":
            over.append(("false flags", found.flags[str(FALSE_FLAG.name)], LARGEST_FALSE))
    missed = [what for what, share, mark in over if share > mark]
    return f"FAIL: {', '.join(missed)}" if missed else "pass"


def choose_scenarios(names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The names, if all are those of `SCENARIOS`; all of these without any. MoefastError if one is not."""
    if unknown := [name for name in names or () if name not in SCENARIOS]:
        raise MoefastError(f"scenario {unknown[0]!r} is unknown; choose of {', '.join(SCENARIOS)}")
    return names or tuple(SCENARIOS)


def run_scenarios(
    model: Model,
    *,
    n: int = 1000,
    names: tuple[str, ...] | None = None,
    backend: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """What a model makes of every scenario.

    Parameters
    ----------
    model : Model
    n : int
        Stars of each scenario, at most as many as the part `BASE_PART` has.
    names : tuple of str, optional
        Which of `SCENARIOS`; all if absent.
    backend : "auto", "cpu" or "cuda"
    progress : callable, optional
        Called with the number of spectra done and the number of all.

    Returns
    -------
    dict
        JSON-ready: model, n, marks, and per scenario what, kind, verdict and the `Measures`.

    Raises
    ------
    MoefastError
        `n` or a name is out of range, or the model is of another wave grid than the simulator.
    """
    largest = REFERENCE_SETS[BASE_SET].parts[BASE_PART].n_rows or 0
    if not 2 <= n <= largest:
        raise MoefastError(f"n: expected 2 to {largest} stars, found {n}")
    names = choose_scenarios(names)
    emulator = Emulator.load()
    model.check_wave(emulator.wave, "the simulator")
    engine, where = open_engine(model.mixture, backend)
    done = 0
    parts: dict[str, list[dict[str, NDArray]]] = {name: [] for name in names}
    truths: dict[str, list[F64]] = {name: [] for name in names}
    for stars in _stars(n, emulator):
        for name in names:
            spectra = SCENARIOS[name].make(stars)
            mask = spectra.mask if spectra.mask is not None and spectra.mask.any() else None
            block = Block(stars.first, 0, spectra.flux, spectra.error, mask, {})
            columns = columns_of(model, *score_block(engine, block, stars.first))
            parts[name].append({key: columns[key] for key in ("log_g", "log_g_err", "flag")})
            if spectra.log_g is not None:
                truths[name].append(spectra.log_g)
            done += len(stars.rows)
            if progress is not None:
                progress(done, n * len(names))
    results = {}
    for name in names:
        joined = {key: np.concatenate([part[key] for part in parts[name]]) for key in parts[name][0]}
        found = measure(joined, np.concatenate(truths[name]) if truths[name] else None)
        one = SCENARIOS[name]
        results[name] = {"what": one.what, "kind": one.kind, "verdict": verdict(one.kind, found)} | vars(
            found
        )
    return {
        "model": {"name": model.name, "recipe": model.manifest["recipe"], "sha256": model.hash},
        "backend": where.name,
        "n": n,
        "marks": scenario_table()["marks"],
        "scenarios": results,
    }


def _stars(n: int, emulator: Emulator) -> Iterator[BaseStars]:
    settings = REFERENCE_SETS[BASE_SET].settings
    noise = noise_model(emulator, settings)
    for first in range(0, n, ROWS_AT_ONCE):
        stop = min(first + ROWS_AT_ONCE, n)
        block = simulate_rows(
            first, stop, seed=_base_seed(), settings=settings, emulator=emulator, noise=noise
        )
        yield BaseStars(first, stop, block, emulator, noise)


def format_text(found: Mapping[str, Any]) -> str:
    """The results of `run_scenarios` as a table for a terminal."""
    rows = [
        (
            name,
            number(one["r2"]),
            percent(one["within_1_sigma"]),
            number(one["median_error"], 2),
            percent(one["flagged"]),
            percent(one["unlike"]),
            percent(one["silent"]),
            one["verdict"],
        )
        for name, one in found["scenarios"].items()
    ]
    header = ("scenario", "R²", "1σ", "error", "flagged", "unlike", "silent", "")
    marks = found["marks"]
    failed = sum(one["verdict"] != "pass" for one in found["scenarios"].values())
    return "\n".join(
        [
            f"{found['model']['name']}, {found['n']} stars of {BASE_SET} {BASE_PART} in each scenario",
            "",
            *table(header, rows),
            "",
            "silent: no flag and more than 3 of its errors from the truth; where there is no star, no flag. Marks: at "
            f"most {percent(marks['silent'])} silent,",
            f"{percent(marks['unflagged where there is no star'])} unflagged where there is no star, "
            f"{percent(marks['false flags'])} {FALSE_FLAG.name} on the reference sets. "
            f"{len(rows) - failed} of {len(rows)} pass.",
        ]
    )
