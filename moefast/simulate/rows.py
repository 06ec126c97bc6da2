"""Rows of a simulated survey: labels, flux, error, noisy flux, each a pure function of (seed, row)."""

from __future__ import annotations

import itertools
import json
import math
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import lru_cache
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from scipy.special import ndtri

from moefast.core.errors import MoefastError
from moefast.core.random import NOISE_STREAM, add_noise, row_uniforms

from .emulator import LABELS, Emulator
from .noise import Exposure, Instrument, NoiseModel, Sky
from .nuisance import (
    LIGHT_SPEED,
    N_CALIBRATION,
    calibrate,
    calibration_basis,
    doppler,
    redden,
    velocity_limit,
)
from .visit import VISIT_PARAMS, Visit, broaden, median_of_good, sky_of

ROWS_AT_REST = 256
CALIBRATION = tuple(f"calibration_{k + 1}" for k in range(N_CALIBRATION))
PARAMS = {"id": "int64"} | dict.fromkeys(
    (*LABELS, "mag", "seeing", "redshift", "velocity", "ebv", *CALIBRATION, "snr"), "float64"
)
"""Columns of the params table: what is switched off is 0. `columns_of` adds those of visits that differ."""
MEASURED = ("snr", "median")
"""Columns that are only known with the spectrum itself."""

SEEING_MEDIAN = 0.75  # arcsec
SEEING_SCATTER = 0.12
SETTINGS_SCHEMA = 1
LARGEST_NORMAL = 6.4
"""Quantile of the last of 2^32 uniform numbers: a Gaussian drawn from one of them goes no further."""

# Streams of `moefast.core.random.row_uniforms`. One each, so that switching a nuisance on moves no other number.
VELOCITY_STREAM, REDSHIFT_STREAM, REDDENING_STREAM, CALIBRATION_STREAM = 2, 3, 4, 5
FAST_STREAM = 14

Range = tuple[float, float]


@dataclass(frozen=True)
class Settings:
    """What is simulated: ranges of the labels and the observation (units: mag, arcsec, K, dex).

    Labels and magnitude are uniform in their ranges; seeing is log-normal (median `SEEING_MEDIAN`, scatter
    `SEEING_SCATTER` in the natural logarithm), cut to its range. Each nuisance has a switch of its own:

    Attributes
    ----------
    velocity_scatter : float
        Standard deviation of Gaussian velocities about 0 [km/s]; 0 is off.
    fast_share, fast_scatter : float
        Probability that a star's velocity has a standard deviation of `fast_scatter` [km/s] instead; 0 is off.
    redshift : (float, float)
        Range of a uniform redshift; (0, 0) is off.
    reddening : (float, float)
        Range of a uniform E(B-V) [mag]; (0, 0) is off.
    calibration : float
        rms of a smooth relative error of the flux calibration; 0 is off.
    visit : Visit or None
        How visits differ in sky, gaps, line-spread function and normalisation; None if they do not.
    """

    mag: Range = (20.5, 22.5)
    seeing: Range = (0.5, 1.5)
    t_eff: Range = (3750.0, 6000.0)
    log_g: Range = (1.0, 5.0)
    m_h: Range = (-2.5, 0.75)
    a_m: Range = (-0.3, 0.5)
    c_m: Range = (-0.5, 0.5)
    velocity_scatter: float = 0.0
    fast_share: float = 0.0
    fast_scatter: float = 0.0
    redshift: Range = (0.0, 0.0)
    reddening: Range = (0.0, 0.0)
    calibration: float = 0.0
    noise_level: float = 1.0
    exposure: Exposure = field(default_factory=Exposure)
    instrument: Instrument = field(default_factory=Instrument)
    sky: Sky = field(default_factory=Sky)
    visit: Visit | None = None

    def __post_init__(self) -> None:
        for name in ("mag", "seeing", "t_eff", "log_g", "m_h", "a_m", "c_m", "redshift", "reddening"):
            low, high = getattr(self, name)
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise MoefastError(
                    f"{name}: expected two finite numbers in rising order, found {low:g}, {high:g}"
                )
        if self.seeing[0] <= 0:
            raise MoefastError(f"seeing: expected a positive FWHM in arcsec, found {self.seeing[0]:g}")
        if not 0 <= self.fast_share <= 1:
            raise MoefastError(f"fast_share: expected a share from 0 to 1, found {self.fast_share:g}")
        for name in ("noise_level", "velocity_scatter", "fast_scatter", "calibration"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise MoefastError(f"{name}: expected a number of at least 0, found {value:g}")

    @property
    def label_ranges(self) -> tuple[Range, ...]:
        """Ranges in the order of `LABELS`."""
        return self.t_eff, self.log_g, self.m_h, self.a_m, self.c_m

    @property
    def moving(self) -> bool:
        """Whether spectra are shifted at all."""
        return self.widest_scatter > 0 or any(self.redshift)

    @property
    def widest_scatter(self) -> float:
        """The larger of the standard deviations of velocities [km/s]."""
        return max(self.velocity_scatter, self.fast_scatter if self.fast_share else 0.0)

    @property
    def largest_velocity(self) -> float:
        """Largest velocity, either way, that redshift and velocity can add up to [km/s]."""
        velocity = LARGEST_NORMAL * self.widest_scatter / LIGHT_SPEED
        return LIGHT_SPEED * max(
            abs((1.0 + z) * (1.0 + sign * velocity) - 1.0) for z in self.redshift for sign in (-1, 1)
        )

    def to_json(self) -> str:
        """The settings as JSON text, which `from_json` reads.

        Without visits that differ, or stars that are fast, the text does not speak of them: it is part of the
        fingerprint of sets that are older than they.
        """
        plain = asdict(self)
        if self.visit is None:
            del plain["visit"]
        if not self.fast_share:
            del plain["fast_share"], plain["fast_scatter"]
        return json.dumps({"schema": SETTINGS_SCHEMA} | plain, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Settings from the text of `to_json`.

        Raises
        ------
        MoefastError
            If the text is not such JSON, of another schema, or has names or values that do not belong there.
        """
        try:
            found = json.loads(text)
        except ValueError as error:
            raise MoefastError(f"settings: not JSON: {error}") from error
        schema = found.pop("schema", None) if isinstance(found, dict) else None
        if schema != SETTINGS_SCHEMA:
            raise MoefastError(f"settings: expected schema {SETTINGS_SCHEMA}, found {schema}")
        found = {"visit": None, "fast_share": 0.0, "fast_scatter": 0.0} | found
        return _from_plain(cls, found, "settings")


def _from_plain(kind: Any, value: Any, name: str) -> Any:
    """What `asdict` and JSON made plain, as the declared type again."""
    if is_dataclass(kind) and isinstance(kind, type):
        names = {f.name for f in fields(kind) if f.init}
        if not isinstance(value, dict) or set(value) != names:
            found = sorted(value) if isinstance(value, dict) else value
            raise MoefastError(f"{name}: expected the entries {', '.join(sorted(names))}, found {found}")
        hints = get_type_hints(kind)
        return kind(**{key: _from_plain(hints[key], value[key], f"{name}.{key}") for key in names})
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        inner = inner[:1] * len(value) if isinstance(value, list) and inner[-1] is Ellipsis else inner
        if not isinstance(value, list) or len(value) != len(inner):
            raise MoefastError(f"{name}: expected a list of {len(inner)} entries, found {value!r}")
        return tuple(
            _from_plain(k, v, f"{name}[{i}]") for i, (k, v) in enumerate(zip(inner, value, strict=True))
        )
    if get_origin(kind) is types.UnionType:
        if value is None and type(None) in get_args(kind):
            return None
        return _from_plain(next(k for k in get_args(kind) if k is not type(None)), value, name)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise MoefastError(f"{name}: expected {kind.__name__}, found {value!r}")
    return kind(value)


def columns_of(settings: Settings) -> dict[str, str]:
    """Columns of the params table under these settings, name and dtype."""
    return PARAMS if settings.visit is None else PARAMS | VISIT_PARAMS


@dataclass
class SimulatedBlock:
    """Consecutive simulated rows.

    Attributes
    ----------
    first_row : int
    params : dict of str to array of shape (n,)
        id (the row), T_eff [K], log_g, M_H, a_M, C_M [dex], mag, seeing [arcsec], redshift, velocity [km/s], ebv [mag],
        calibration_1 … calibration_4 (a_j, in units of `calibration_basis` times the set's rms), snr (median of
        flux / error, before the calibration error), and `moefast.simulate.visit.VISIT_PARAMS` where visits differ.
    flux, error : arrays of shape (n, 4096), float32
        Flux without noise; error is noise_level times the physical sigma. The calibration error multiplies the flux and
        not the error: what it does is not in the variance that an observer knows.
    noisy : array of shape (n, 4096), float32, or None
        flux + error * normal; None if it was not asked for.
    mask : array of shape (n, 4096), bool, or None
        True where a pixel is lost; None if the settings lose none. Flux and error stand there as everywhere.
    """

    first_row: int
    params: dict[str, np.ndarray]
    flux: np.ndarray
    error: np.ndarray
    noisy: np.ndarray | None
    mask: np.ndarray | None = None


def simulate_params(
    first: int, stop: int, *, seed: int, settings: Settings | None = None
) -> dict[str, np.ndarray]:
    """Labels, conditions and nuisances of rows `first` to `stop` - 1, all of `columns_of` but `MEASURED`.

    Parameters
    ----------
    first, stop : int
        Row numbers, 0 <= first <= stop.
    seed : int
        0 to 2^64 - 1.
    settings : Settings, optional

    Raises
    ------
    MoefastError
        If rows or seed are out of range.
    """
    if not 0 <= first <= stop:
        raise MoefastError(f"rows: expected 0 <= first <= stop, found {first}, {stop}")
    if not 0 <= seed < 2**64:
        raise MoefastError(f"seed: expected 0 to 2^64 - 1, found {seed}")
    settings = settings or Settings()
    n = stop - first

    def uniforms(count: int, stream: int) -> np.ndarray:
        return row_uniforms(first, stop, count, seed=seed, stream=stream)

    def between(limits: Range, stream: int) -> np.ndarray:
        if not any(limits):
            return np.zeros(n)
        return limits[0] + (limits[1] - limits[0]) * uniforms(1, stream)[:, 0]

    uniform = row_uniforms(first, stop, 7, seed=seed)
    ranges = np.array([*settings.label_ranges, settings.mag])
    drawn = ranges[:, 0] + (ranges[:, 1] - ranges[:, 0]) * uniform[:, :6]
    params: dict[str, np.ndarray] = {"id": np.arange(first, stop, dtype=np.int64)}
    params |= {name: drawn[:, i].copy() for i, name in enumerate((*LABELS, "mag"))}
    params["seeing"] = _seeing(uniform[:, 6], settings.seeing)
    params["redshift"] = between(settings.redshift, REDSHIFT_STREAM)
    scatter = np.full(n, settings.velocity_scatter)
    if settings.fast_share:
        scatter[uniforms(1, FAST_STREAM)[:, 0] < settings.fast_share] = settings.fast_scatter
    params["velocity"] = scatter * ndtri(uniforms(1, VELOCITY_STREAM)[:, 0]) if scatter.any() else np.zeros(n)
    params["ebv"] = between(settings.reddening, REDDENING_STREAM)
    bent = np.zeros((n, N_CALIBRATION))
    if settings.calibration:
        bent = ndtri(uniforms(N_CALIBRATION, CALIBRATION_STREAM))
    params |= {name: bent[:, k].copy() for k, name in enumerate(CALIBRATION)}
    return params if settings.visit is None else params | settings.visit.params(params["id"], seed=seed)


def simulate_rows(
    first: int,
    stop: int,
    *,
    seed: int,
    settings: Settings | None = None,
    emulator: Emulator | None = None,
    noise: NoiseModel | None = None,
    noisy: bool = True,
    out: np.ndarray | None = None,
) -> SimulatedBlock:
    """Rows `first` to `stop` - 1 of the survey with this seed.

    A row is the same, bit for bit, in whatever block it is made. Block sizes around 1000 are fastest.

    Parameters
    ----------
    first, stop : int
        Row numbers, 0 <= first <= stop.
    seed : int
        0 to 2^64 - 1.
    settings : Settings, optional
    emulator, noise : optional
        To be used instead of the shipped emulator and of the noise model that `settings` describe.
    noisy : bool
        Whether to draw the noise.
    out : array of shape (stop - first, 4096), float32, C-contiguous, optional
        Where to put the flux. Block after block in the same memory is up to half as fast again: fresh memory costs a
        page fault per page.

    Raises
    ------
    MoefastError
        If rows or seed are out of range, labels outside the emulator's, or velocities beyond its margin.
    """
    settings = settings or Settings()
    emulator = emulator or Emulator.load()
    noise = noise or noise_model(emulator, settings)
    params = simulate_params(first, stop, seed=seed, settings=settings)
    labels = np.stack([params[name] for name in LABELS], axis=1)
    visit = settings.visit
    if settings.moving or visit is not None:
        check_velocity(settings, emulator)
        velocity = velocity_of(params)
        width = params["line_spread"] if visit is not None else None
        flux = shifted(emulator, labels, velocity, first, out, width)
    else:
        flux = emulator.flux(labels, out, first_row=first)
    if any(settings.reddening):
        redden(flux, params["ebv"], emulator.wave, out=flux)
    if visit is not None:
        return _visited(first, seed, settings, emulator, noise, params, flux, noisy)
    error, snr = noise.error(flux, params["mag"], params["seeing"], noise_level=settings.noise_level)
    if settings.calibration:
        amplitudes = np.stack([params[name] for name in CALIBRATION], axis=1)
        calibrate(flux, amplitudes, settings.calibration * calibration_basis(emulator.wave), out=flux)
    draws = None
    if noisy:
        draws = add_noise(flux, error, seed, np.arange(first, stop), stream=NOISE_STREAM)
    return SimulatedBlock(first, params | {"snr": snr}, flux, error, draws)


def _visited(
    first: int,
    seed: int,
    settings: Settings,
    emulator: Emulator,
    noise: NoiseModel,
    params: dict[str, np.ndarray],
    flux: np.ndarray,
    noisy: bool,
) -> SimulatedBlock:
    """Stars under their own sky: see `moefast.simulate.visit`. `flux` is changed."""
    visit = settings.visit
    assert visit is not None
    conditions, rows = (params["mag"], params["seeing"]), params["id"]
    factors, residuals = sky_of(params)
    error, snr = noise.error(flux, *conditions, noise_level=settings.noise_level, factors=factors)
    left = noise.line_flux(flux, *conditions, residuals * factors.lines)
    calibrate_and_tilt(flux, params, settings, emulator.wave)
    flux += left
    mask = visit.gaps.lost_pixels(emulator.wave, rows, seed=seed)
    draws = None
    median = np.ones(len(rows))
    if noisy or visit.own_median:
        draws = add_noise(flux, error, seed, rows, stream=NOISE_STREAM)
    if visit.own_median and draws is not None:
        median = median_of_good(draws, mask)
        for values in (flux, error, draws):
            values /= median[:, None].astype(np.float32)
    return SimulatedBlock(
        first, params | {"snr": snr, "median": median}, flux, error, draws if noisy else None, mask
    )


def calibrate_and_tilt(
    flux: np.ndarray, params: Mapping[str, np.ndarray], settings: Settings, wave: np.ndarray
) -> None:
    """Give flux (n, p) its calibration errors and, where visits differ, the tilt of its continuum; it is changed."""
    basis = calibration_basis(wave)
    amplitudes = settings.calibration * np.stack([params[name] for name in CALIBRATION], axis=1)
    # The first of the shapes is the tilt: u/2 is so many times as large.
    amplitudes[:, 0] += params.get("tilt", np.zeros(len(flux))) * 0.5 / basis[0, -1]
    calibrate(flux, amplitudes, basis, out=flux)


def velocity_of(params: Mapping[str, np.ndarray]) -> np.ndarray:
    """Velocity of each star, redshift and velocity together [km/s]."""
    return np.asarray(
        LIGHT_SPEED * ((1.0 + params["redshift"]) * (1.0 + params["velocity"] / LIGHT_SPEED) - 1.0)
    )


def shifted(
    emulator: Emulator,
    labels: np.ndarray,
    velocity: np.ndarray,
    first_row: int,
    out: np.ndarray | None = None,
    width: np.ndarray | None = None,
    wave: np.ndarray | None = None,
) -> np.ndarray:
    """Emulated spectra in motion, a few at a time: those at rest stay in the cache.

    `wave` are the emulator's pixels, those of its detector if absent, or more of them to either side.
    """
    n, wave = len(labels), emulator.wave if wave is None else wave
    flux = np.empty((n, len(wave)), dtype=np.float32) if out is None else out
    padded = np.empty((min(n, ROWS_AT_REST), len(emulator.mean)), dtype=np.float32)
    step = (emulator.wave[-1] - emulator.wave[0]) / (len(emulator.wave) - 1)
    padded_wave = emulator.wave[0] + step * (np.arange(len(emulator.mean)) - emulator.margin)
    # Parts end where the emulator's tiles do.
    cuts = [0, *range(ROWS_AT_REST - first_row % ROWS_AT_REST, n, ROWS_AT_REST), n] if n else [0]
    for a, b in itertools.pairwise(cuts):
        rest = emulator.padded_flux(labels[a:b], padded[: b - a], first_row=first_row + a)
        if width is not None:
            rest = broaden(rest, width[a:b], padded_wave)
        doppler(rest, velocity[a:b], wave, flux[a:b])
    return flux


def check_velocity(settings: Settings, emulator: Emulator, beyond: int = 0) -> None:
    """Refuse velocities that the emulator's margin, less `beyond` pixels of it, does not hold."""
    limit = velocity_limit(emulator, beyond)
    if settings.largest_velocity > limit:
        fastest, scatter, (low, high) = settings.largest_velocity, settings.widest_scatter, settings.redshift
        margin = emulator.margin - beyond
        raise MoefastError(
            f"velocities up to {fastest:.0f} km/s ({LARGEST_NORMAL:g} times the scatter {scatter:g} km/s, redshift "
            f"{low:g} to {high:g}) are asked for; the emulator's {margin} pixels beyond the detector allow "
            f"{limit:.0f} km/s"
        )


def _seeing(uniform: np.ndarray, limits: Range) -> np.ndarray:
    """Quantiles of the log-normal cut to `limits`, by its cumulative sum on a fine grid."""
    log_grid = np.linspace(math.log(limits[0]), math.log(limits[1]), 1001)
    exponent = 0.5 * ((log_grid - math.log(SEEING_MEDIAN)) / SEEING_SCATTER) ** 2
    density = np.exp(exponent.min() - exponent)
    cumulative = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    return np.exp(np.interp(uniform, cumulative / cumulative[-1], log_grid))


def noise_model(emulator: Emulator, settings: Settings) -> NoiseModel:
    """The noise model that `settings` describe, on the emulator's wave grid."""
    return _noise_model(emulator.wave_edges.tobytes(), settings.instrument, settings.sky, settings.exposure)


@lru_cache(maxsize=4)
def _noise_model(wave_edges: bytes, instrument: Instrument, sky: Sky, exposure: Exposure) -> NoiseModel:
    return NoiseModel(np.frombuffer(wave_edges), instrument=instrument, sky=sky, exposure=exposure)
