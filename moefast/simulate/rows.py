"""Rows of a simulated survey: labels, flux, error, noisy flux, each a pure function of (seed, row)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from moefast.errors import MoefastError

from .emulator import LABELS, Emulator
from .noise import Exposure, Instrument, NoiseModel, Sky
from .streams import add_noise, row_uniforms

BLOCK_ROWS = 2048  # 100 MB of flux, error and noisy at 4096 pixels
PARAMS = {"id": "int64"} | dict.fromkeys(
    (*LABELS, "mag", "seeing", "redshift", "snr"), "float64"
)  # fmt: skip

SEEING_MEDIAN = 0.75  # arcsec
SEEING_SCATTER = 0.12

Range = tuple[float, float]


@dataclass(frozen=True)
class Settings:
    """What is simulated: ranges of the labels and the observation (units: mag, arcsec, K, dex).

    Labels and magnitude are uniform in their ranges; seeing is log-normal (median `SEEING_MEDIAN`, scatter
    `SEEING_SCATTER` in the natural logarithm), cut to its range.
    """

    mag: Range = (20.5, 22.5)
    seeing: Range = (0.5, 1.5)
    t_eff: Range = (3750.0, 6000.0)
    log_g: Range = (1.0, 5.0)
    m_h: Range = (-2.5, 0.75)
    a_m: Range = (-0.3, 0.5)
    c_m: Range = (-0.5, 0.5)
    noise_level: float = 1.0
    exposure: Exposure = field(default_factory=Exposure)
    instrument: Instrument = field(default_factory=Instrument)
    sky: Sky = field(default_factory=Sky)

    def __post_init__(self) -> None:
        for name in ("mag", "seeing", "t_eff", "log_g", "m_h", "a_m", "c_m"):
            low, high = getattr(self, name)
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise MoefastError(
                    f"{name}: expected two finite numbers in rising order, found {low:g}, {high:g}"
                )
        if self.seeing[0] <= 0:
            raise MoefastError(f"seeing: expected a positive FWHM in arcsec, found {self.seeing[0]:g}")
        if not (math.isfinite(self.noise_level) and self.noise_level >= 0):
            raise MoefastError(f"noise_level: expected a number of at least 0, found {self.noise_level:g}")

    @property
    def label_ranges(self) -> tuple[Range, ...]:
        """Ranges in the order of `LABELS`."""
        return self.t_eff, self.log_g, self.m_h, self.a_m, self.c_m


@dataclass
class SimulatedBlock:
    """Consecutive simulated rows.

    Attributes
    ----------
    first_row : int
    params : dict of str to array of shape (n,)
        id (the row), T_eff, log_g, M_H, a_M, C_M, mag, seeing, redshift (0), snr (median flux / error).
    flux, error, noisy : arrays of shape (n, 4096), float32
        noisy = flux + error * normal; error is noise_level times the physical sigma.
    """

    first_row: int
    params: dict[str, np.ndarray]
    flux: np.ndarray
    error: np.ndarray
    noisy: np.ndarray


def simulate_rows(
    first: int,
    stop: int,
    *,
    seed: int,
    settings: Settings | None = None,
    emulator: Emulator | None = None,
    noise: NoiseModel | None = None,
) -> SimulatedBlock:
    """Rows `first` to `stop` - 1 of the survey with this seed.

    A row is the same, bit for bit, in whatever block it is made. Block sizes around 2000 are fastest.

    Parameters
    ----------
    first, stop : int
        Row numbers, 0 <= first <= stop.
    seed : int
        0 to 2^64 - 1.
    settings : Settings, optional
    emulator, noise : optional
        To be used instead of the shipped emulator and of the noise model that `settings` describe.
    """
    if not 0 <= first <= stop:
        raise MoefastError(f"rows: expected 0 <= first <= stop, found {first}, {stop}")
    if not 0 <= seed < 2**64:
        raise MoefastError(f"seed: expected 0 to 2^64 - 1, found {seed}")
    settings = settings or Settings()
    emulator = emulator or Emulator.load()
    noise = noise or noise_model(emulator, settings)
    uniform = row_uniforms(first, stop, 7, seed=seed)
    ranges = np.array([*settings.label_ranges, settings.mag])
    drawn = ranges[:, 0] + (ranges[:, 1] - ranges[:, 0]) * uniform[:, :6]
    labels, mag, seeing = drawn[:, :5], drawn[:, 5], _seeing(uniform[:, 6], settings.seeing)
    flux = emulator.flux(labels)
    error, snr = noise.error(flux, mag, seeing, noise_level=settings.noise_level)
    noisy = np.empty_like(flux)
    if len(flux):
        add_noise(first, np.uint64(seed), flux, error, noisy)
    params: dict[str, np.ndarray] = {"id": np.arange(first, stop, dtype=np.int64)}
    params |= {name: labels[:, i].copy() for i, name in enumerate(LABELS)}
    params |= {"mag": mag.copy(), "seeing": seeing.copy(), "redshift": np.zeros(len(flux)), "snr": snr}
    return SimulatedBlock(first, params, flux, error, noisy)


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


def simulate_file(
    path: str | Path,
    n_rows: int,
    *,
    seed: int,
    settings: Settings | None = None,
    noisy: bool = True,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write rows 0 to `n_rows` - 1 in the layout of the PFS simulator.

    Parameters
    ----------
    path : str or Path
        The file appears under this name only when it is complete.
    n_rows : int
    seed : int
    settings : Settings, optional
    noisy : bool
        Whether to store the noisy flux beside flux and error.
    overwrite : bool
        Whether an existing file may be replaced.
    progress : callable, optional
        Called with the number of rows done after each block.
    """
    from moefast.spectra.files import SpectrumWriter

    if n_rows < 1:
        raise MoefastError(f"n_rows: expected at least 1, found {n_rows}")
    settings = settings or Settings()
    emulator = Emulator.load()
    noise = noise_model(emulator, settings)
    attrs = {
        "simulator": "moefast.simulate",
        "seed": str(seed),
        "settings": json.dumps(asdict(settings), sort_keys=True),
        "emulator": json.dumps(dict(emulator.provenance), sort_keys=True),
    }
    arrays = ("flux", "error", "noisy") if noisy else ("flux", "error")
    with SpectrumWriter(
        path,
        n_rows=n_rows,
        wave=emulator.wave,
        wave_edges=emulator.wave_edges,
        arrays=arrays,
        params=PARAMS,
        attrs=attrs,
        overwrite=overwrite,
    ) as writer:
        for first in range(0, n_rows, BLOCK_ROWS):
            stop = min(first + BLOCK_ROWS, n_rows)
            block = simulate_rows(first, stop, seed=seed, settings=settings, emulator=emulator, noise=noise)
            writer.write(first, params=block.params, **{name: getattr(block, name) for name in arrays})
            if progress is not None:
                progress(stop)
