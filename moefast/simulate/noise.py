"""Noise of one spectrum: photons of the star, sky continuum, airglow lines, detector.

Per pixel, in electrons summed over the exposures,

    variance = star + sky + (residual * max(sky here and beside))^2 + n_exposures * detector,
    error    = sqrt(variance) / (electrons per unit flux).

The star enters through its magnitude in the i band (AB, HSC) and the fraction of its light that falls into
the fibre; the sky through a continuum and the airglow lines of ``data/airglow.csv``. Where the numbers come
from, and how the result compares with the exposure time calculator of PFS, is in ``docs/noise.md``.

Design: all that depends on neither star nor seeing is computed once, in float64, by `NoiseModel`; what is
left per pixel is one float32 square root and one division, in one pass over a row that stays in the cache;
the median is found by counting (see `moefast.kernels.quality`).
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
from scipy.special import erf, ndtri

from moefast.core.compiled import njit
from moefast.core.errors import MoefastError
from moefast.core.random import uniforms_of_rows
from moefast.core.threads import in_threads
from moefast.kernels.quality import quantile, quantile_scratch

PHOTONS_AB0 = 3.631e-20 / 6.62607015e-27  # photons / s / cm2 per unit ln(lambda), AB magnitude 0
RAYLEIGH = 1e6 / (4.0 * math.pi) / 4.254517e10  # photons / s / cm2 / arcsec2
I_BAND = (6970.0, 8530.0)  # Å, half-power points of HSC i
CONTINUUM_WAVE = 7975.0  # Å, where the level of the sky continuum is given

# Absorption by the Earth's atmosphere: first and last wavelength [Å, vacuum], transmission there. Means over
# water vapour and over the R and P branches of the O2 A band, fitted to the calculator's counts of a star.
TELLURIC_BANDS = (
    (7165.0, 7345.0, 0.93, 0.93),
    (7595.0, 7621.0, 0.31, 0.31),
    (7624.0, 7690.0, 0.46, 0.98),
    (8130.0, 8350.0, 0.94, 0.94),
)


@dataclass(frozen=True)
class Instrument:
    """Telescope, fibre, spectrograph and detector: Subaru PFS, medium-resolution red arm.

    Defaults describe a fibre at three quarters of the field's radius. Mirror, fibre, vignetting, image quality
    and detector are those of the calculator's configuration ``PFS.redMR``; `efficiency`, `efficiency_peak`,
    `efficiency_curvature` and `lsf_sigma` are fitted to its output.

    Source: Subaru-PFS/spt_ExposureTimeCalculator, ``config/PFS.redMR.dat``; Sugai et al. (2015, JATIS 1,
    035001).
    """

    area: float = 5.15e5  # cm2: 8.3 m, a linear obstruction of 0.22
    vignetting: float = 0.78  # fraction that passes; 0.94 at the field's centre, 0.71 at its edge
    fibre_diameter: float = 1.045  # arcsec; 1.12 at the centre, 1.02 at the edge
    telescope_fwhm: float = 0.27  # arcsec, 0.22 of image quality and a fibre 0.1 off the star
    efficiency: float = 0.251  # atmosphere to detector at its peak, without vignetting and fibre losses
    efficiency_peak: float = 8180.0  # Å
    efficiency_curvature: float = 0.186  # relative loss 1000 Å away from the peak
    lsf_sigma: float = 0.55  # Å, profile of a sky line
    read_noise: float = 4.0  # electrons per detector pixel
    dark: float = 1e-4  # electrons / s per detector pixel
    trace_rows: float = 5.0  # detector pixels summed across the trace
    scattered: float = 0.015  # of the mean sky, in every pixel

    def throughput(self, wave: np.ndarray) -> np.ndarray:
        """Electrons per photon that reaches the mirror, at each wavelength [Å], without fibre losses."""
        away = (np.asarray(wave) - self.efficiency_peak) / 1000.0
        return self.efficiency * self.vignetting * (1.0 - self.efficiency_curvature * away**2)

    def fibre_fraction(self, seeing: np.ndarray) -> np.ndarray:
        """Fraction of a star's light in a centred fibre.

        1 - (1 + (radius / core)^2)^(1 - beta): a Moffat profile of beta = 4.765, which is that of turbulence
        (Trujillo et al. 2001, MNRAS 328, 977); FWHM in arcsec, `seeing` and telescope added in squares.
        """
        beta = 4.765
        fwhm = np.hypot(np.asarray(seeing, dtype=float), self.telescope_fwhm)
        core = fwhm / (2.0 * math.sqrt(2.0 ** (1.0 / beta) - 1.0))
        return 1.0 - (1.0 + (0.5 * self.fibre_diameter / core) ** 2) ** (1.0 - beta)


@dataclass(frozen=True)
class Exposure:
    """How long and how often: 12 x 900 s is the reference observation."""

    seconds: float = 900.0
    count: int = 12

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.count < 1:
            raise MoefastError(f"exposure: expected positive seconds and count, found {self}")


@dataclass(frozen=True)
class Sky:
    """Moonless night sky: continuum, strength of the airglow lines, error of sky subtraction.

    `continuum` and `continuum_slope` are fitted to the calculator's output.
    """

    continuum: float = 20.90  # AB magnitude per arcsec2 at 7975 Å, between the lines
    continuum_slope: float = -0.18  # AB magnitude per 1000 Å
    lines: float = 1.0  # times the intensities of data/airglow.csv
    residual: float = 0.01  # systematic error of sky subtraction, of the brightest of three pixels


def telluric_transmission(wave: np.ndarray) -> np.ndarray:
    """Transmission of `TELLURIC_BANDS` at each wavelength [Å, vacuum], linear within a band, else 1."""
    wave = np.asarray(wave, dtype=float)
    transmission = np.ones(wave.shape)
    for first, last, start, stop in TELLURIC_BANDS:
        inside = (wave >= first) & (wave <= last)
        transmission[inside] = np.interp(wave[inside], (first, last), (start, stop))
    return transmission


@lru_cache(maxsize=1)
def airglow_lines() -> tuple[np.ndarray, np.ndarray]:
    """Vacuum wavelengths [Å] and intensities [Rayleigh] of the airglow lines between 7100 and 8870 Å.

    `airglow_groups` says which of them brighten together.

    Lines of at least 0.3 Rayleigh, 686 of them: 444 of OH, 220 of O2. Intensity = 1.0645 peak FWHM.

    Source: C06 = Cosby et al. (2006, JGR 111, A12307), the supplement's table 1; H03, for 8540-8613 Å, which
    it leaves out, = Hanuschik (2003, A&A 407, 1157). Measured at Paranal. Four lines stand there twice: see
    docs/noise.md.
    """
    wave, intensity = np.array([(float(row["wave"]), float(row["rayleigh"])) for row in _airglow_table()]).T
    return _read_only(wave), _read_only(intensity)


SKY_STREAM = 11
"""Stream of `moefast.core.random` that sky factors are drawn from."""
SKY_GROUPS = ("OH 9-4", "OH 8-3", "OH 7-3", "OH 6-2", "OH 5-1", "OH 4-0", "O2", "other")
"""Airglow lines that brighten and fade together: the bands of OH by themselves, all of O2, and what is left."""


@lru_cache(maxsize=1)
def airglow_groups() -> np.ndarray:
    """Index in `SKY_GROUPS` of each of the `airglow_lines`, array of int.

    Two bands of which only the ends lie in this range count with the band of the same upper level (OH 7-2), or with
    what is left (OH 10-5).
    """
    names = [row["emitter"].replace("OH 7-2", "OH 7-3") for row in _airglow_table()]
    groups = ["O2" if name.startswith("O2") else name if name in SKY_GROUPS else "other" for name in names]
    return _read_only(np.array([SKY_GROUPS.index(group) for group in groups]))


def _airglow_table() -> list[dict[str, str]]:
    with files("moefast.simulate").joinpath("data/airglow.csv").open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@dataclass(frozen=True)
class SkyFactors:
    """How bright the sky of each star is, in units of the noise model's own.

    Attributes
    ----------
    continuum : array of shape (n,)
    lines : array of shape (n, len(SKY_GROUPS))
    """

    continuum: np.ndarray
    lines: np.ndarray

    @classmethod
    def draw(cls, rows: np.ndarray, *, seed: int, continuum: float = 0.3, lines: float = 0.5) -> SkyFactors:
        """Log-normal factors of median 1 for the stars `rows`; they depend on the seed and the row alone.

        Parameters
        ----------
        rows : array of shape (n,), integer ≥ 0
        seed : int
        continuum, lines : float
            Scatter of the natural logarithm; every group of lines is drawn by itself.
        """
        normal = ndtri(uniforms_of_rows(rows, 1 + len(SKY_GROUPS), seed=seed, stream=SKY_STREAM))
        return cls(np.exp(continuum * normal[:, 0]), np.exp(lines * normal[:, 1:]))


def _read_only(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values)
    values.flags.writeable = False
    return values


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"}, error_model="numpy")
def _errors(
    flux: np.ndarray,
    flux_unit: np.ndarray,
    star: np.ndarray,
    sky: np.ndarray,
    first: int,
    band_weight: np.ndarray,
    noise_level: np.float32,
    error: np.ndarray,
    snr: np.ndarray,
) -> None:
    """Errors (n, p) and the medians (n,) of flux / error.

    error = noise_level sqrt(max(flux, 0) star u + sky u^2), u = flux_unit * mean of the flux over the band. The sky
    (n, p) may be one row that all stars share.
    """
    n, p = flux.shape
    for i in range(n):
        background = sky[np.int64(i) if len(sky) > 1 else 0]
        ratio = np.empty(p + 1, np.float32)
        keys, scratch = np.empty(p + 2, np.int32), quantile_scratch()
        mean = 0.0
        for j in range(len(band_weight)):
            mean += flux[i, first + j] * band_weight[j]
        unit = np.float32(flux_unit[i] * mean)
        for j in range(p):
            light = max(flux[i, j], np.float32(0.0)) * star[j]
            one_sigma = noise_level * np.sqrt(unit * (light + unit * background[j]))
            error[i, j] = one_sigma
            ratio[j] = flux[i, j] / one_sigma
        snr[i] = quantile(ratio, p, 0.5, keys, scratch)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"}, error_model="numpy")
def _sky_variances(
    continuum: np.ndarray,
    lines: np.ndarray,
    continuum_factor: np.ndarray,
    line_factor: np.ndarray,
    residual: float,
    scattered: float,
    detector: float,
    unit: np.ndarray,
    out: np.ndarray,
) -> None:
    """Fill out (n, p) with unit [sky + (residual max(sky here and beside))^2 + detector + scattered mean(sky)]."""
    n, p = out.shape
    for i in range(n):
        sky = np.empty(p)
        total = 0.0
        for j in range(p):
            sky[j] = continuum_factor[i] * continuum[j]
        for k in range(len(lines)):
            factor = line_factor[i, k]
            for j in range(p):
                sky[j] += factor * lines[k, j]
        for j in range(p):
            total += sky[j]
        floor = detector + scattered * total / p
        for j in range(p):
            brightest = max(sky[max(j - 1, 0)], sky[j], sky[min(j + 1, p - 1)])
            out[i, j] = unit[j] * (sky[j] + (residual * brightest) ** 2 + floor)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"}, error_model="numpy")
def _line_flux(
    flux: np.ndarray,
    inverse_scale: np.ndarray,
    share: np.ndarray,
    lines: np.ndarray,
    inverse_response: np.ndarray,
    first: int,
    band_weight: np.ndarray,
    out: np.ndarray,
) -> None:
    """Fill out (n, p) with the flux of share (n, groups) of the electrons lines (groups, p)."""
    n, p = flux.shape
    for i in range(n):
        mean = 0.0
        for j in range(len(band_weight)):
            mean += flux[i, first + j] * band_weight[j]
        electrons = np.zeros(p)
        for k in range(len(lines)):
            factor = share[i, k] * mean * inverse_scale[i]
            for j in range(p):
                electrons[j] += factor * lines[k, j]
        for j in range(p):
            out[i, j] = electrons[j] * inverse_response[j]


class NoiseModel:
    """Errors of spectra on one wave grid.

        e_j   = s response_j / sum_k(band_weight_k f_k)         electrons per unit flux
        var_j = max(f_j, 0) / e_j + sky_variance_j / e_j^2      in units of flux squared

    with s = `electrons_per_flux(mag, seeing)`; `error` is `noise_level` sqrt(var).

    Parameters
    ----------
    wave_edges : array of shape (p + 1,)
        Pixel edges, Å in vacuum.
    instrument, sky, exposure
        What is observed with what.

    Attributes
    ----------
    response : array of shape (p,), float64
        Electrons of an AB star of magnitude 0 with all its light in the fibre, where its flux per unit
        wavelength equals its mean over the i band.
    sky_variance : array of shape (p,), float64
        Variance of sky, sky subtraction and detector, electrons squared, all exposures together.
    sky_electrons : array of shape (p,), float64
        Electrons of the sky, all exposures together.
    continuum_electrons : array of shape (p,), float64
    line_electrons : array of shape (len(SKY_GROUPS), p), float64
        The sky's parts: its continuum, and each of `SKY_GROUPS`.
    band_weight : array of shape (p,), float64
        Weights of the mean over the i band: zero outside, sum 1.
    """

    def __init__(
        self,
        wave_edges: np.ndarray,
        *,
        instrument: Instrument | None = None,
        sky: Sky | None = None,
        exposure: Exposure | None = None,
    ) -> None:
        self.instrument = instrument or Instrument()
        self.sky = sky or Sky()
        self.exposure = exposure or Exposure()
        edges = np.asarray(wave_edges, dtype=float)
        wave = 0.5 * (edges[1:] + edges[:-1])
        width = np.diff(edges)
        tool, exposure = self.instrument, self.exposure
        total = exposure.seconds * exposure.count
        collected = tool.area * tool.throughput(wave) * total
        fibre_area = math.pi * (0.5 * tool.fibre_diameter) ** 2
        lines = (*airglow_lines(), airglow_groups())
        by_group = [tuple(column[lines[2] == k] for column in lines[:2]) for k in range(len(SKY_GROUPS))]
        continuum, nothing = self._continuum_photons(edges), np.zeros(len(wave))
        self.sky_electrons = _read_only(
            collected * fibre_area * self._with_lines(continuum, edges, *lines[:2])
        )
        self.continuum_electrons = _read_only(collected * fibre_area * continuum)
        self.line_electrons = _read_only(
            collected * fibre_area * np.stack([self._with_lines(nothing, edges, *one) for one in by_group])
        )
        brightest = self.sky_electrons.copy()
        np.maximum(brightest[1:], self.sky_electrons[:-1], out=brightest[1:])
        np.maximum(brightest[:-1], self.sky_electrons[1:], out=brightest[:-1])
        per_exposure = tool.trace_rows * (tool.read_noise**2 + tool.dark * exposure.seconds)
        self._detector = per_exposure * exposure.count
        detector = self._detector + tool.scattered * self.sky_electrons.mean()
        # The error of sky subtraction is the same in every exposure: it adds up, and is not averaged out.
        self.sky_variance = _read_only(self.sky_electrons + (self.sky.residual * brightest) ** 2 + detector)
        # The star: f_lambda = 1 corresponds, in the i band, to photons per pixel proportional to lambda.
        inside = np.flatnonzero((wave > I_BAND[0]) & (wave < I_BAND[1]))
        if not len(inside):
            raise MoefastError(
                f"wave_edges: expected pixels in the i band ({I_BAND[0]:g}-{I_BAND[1]:g} Å), "
                f"found {edges[0]:g}-{edges[-1]:g} Å"
            )
        weight = np.zeros(len(wave))
        weight[inside] = wave[inside]
        self.band_weight = _read_only(weight / weight.sum())
        pivot = math.sqrt(np.sum(wave[inside]) / np.sum(1.0 / wave[inside]))
        # f_nu of an AB source is f_lambda lambda_pivot^2 / c, hence photons = f_lambda lambda / pivot^2.
        starlight = PHOTONS_AB0 * collected * telluric_transmission(wave)
        self.response = _read_only(starlight * width * wave / pivot**2)
        # In units of the largest response, so that float32 does not overflow for any magnitude up to 40.
        self._largest = self.response.max()
        relative = self._largest / self.response
        self._star = relative.astype(np.float32)
        self._sky = (self.sky_variance * relative**2).astype(np.float32)
        self._band = int(inside[0]), np.ascontiguousarray(self.band_weight[inside[0] : inside[-1] + 1])

    def _continuum_photons(self, edges: np.ndarray) -> np.ndarray:
        """Photons / s / cm2 / arcsec2 of the sky's continuum in each pixel."""
        wave = 0.5 * (edges[1:] + edges[:-1])
        sky = self.sky
        mag = sky.continuum + sky.continuum_slope * (wave - CONTINUUM_WAVE) / 1000.0
        return PHOTONS_AB0 * 10.0 ** (-0.4 * mag) * telluric_transmission(wave) * np.diff(edges) / wave

    def _with_lines(
        self, photons: np.ndarray, edges: np.ndarray, wave: np.ndarray, intensities: np.ndarray
    ) -> np.ndarray:
        """`photons` and those of airglow lines.

        The lines are as bright as they were measured, below the absorbing air.
        """
        photons, sky, sigma = photons.copy(), self.sky, self.instrument.lsf_sigma
        for line, intensity in zip(wave, intensities, strict=True):
            first, last = np.searchsorted(edges, (line - 9.0 * sigma, line + 9.0 * sigma))
            part = edges[max(first - 1, 0) : last + 1]
            share = 0.5 * np.diff(erf((part - line) / (sigma * math.sqrt(2.0))))
            photons[max(first - 1, 0) :][: len(share)] += sky.lines * RAYLEIGH * intensity * share
        return photons

    def electrons_per_flux(self, mag: np.ndarray, seeing: np.ndarray) -> np.ndarray:
        """Scale s of the electrons per unit flux, s response_j / (mean of the flux over the i band).

        Parameters
        ----------
        mag, seeing : arrays of shape (n,)
            AB magnitude in HSC i; FWHM in arcsec.

        Returns
        -------
        array of shape (n,), float64
            10^(-0.4 mag) times the fraction of the light that enters the fibre.
        """
        fraction = self.instrument.fibre_fraction(seeing)
        return 10.0 ** (-0.4 * np.asarray(mag, dtype=float)) * fraction

    def scaled_sky_variance(self, factors: SkyFactors) -> np.ndarray:
        """`sky_variance` of each star under a sky of another brightness.

        Parameters
        ----------
        factors : SkyFactors

        Returns
        -------
        array of shape (n, p), float64
            Electrons squared.
        """
        return self._scaled_sky(factors, np.ones(len(self.response)), np.float64)

    def _scaled_sky(self, factors: SkyFactors, unit: np.ndarray, dtype: type) -> np.ndarray:
        out: np.ndarray = np.empty((len(factors.continuum), len(self.response)), dtype)
        continuum = np.ascontiguousarray(factors.continuum, dtype=float)
        lines = np.ascontiguousarray(factors.lines, dtype=float)
        constants = float(self.sky.residual), float(self.instrument.scattered), float(self._detector), unit

        def fill(a: int, b: int) -> None:
            _sky_variances(
                self.continuum_electrons, self.line_electrons, continuum[a:b], lines[a:b], *constants, out[a:b]
            )  # fmt: skip

        in_threads(len(out), fill)
        return out

    def line_flux(
        self, flux: np.ndarray, mag: np.ndarray, seeing: np.ndarray, share: np.ndarray
    ) -> np.ndarray:
        """Flux that `share` of each group of airglow lines amounts to.

        Parameters
        ----------
        flux : array of shape (n, p), float32
            Noise-free flux of the star, which sets the unit.
        mag, seeing : arrays of shape (n,)
        share : array of shape (n, len(SKY_GROUPS))
            Of the light of each of `SKY_GROUPS`.

        Returns
        -------
        array of shape (n, p), float32
        """
        flux, out = np.ascontiguousarray(flux, dtype=np.float32), np.empty(flux.shape, np.float32)
        scale = 1.0 / self.electrons_per_flux(mag, seeing)
        share = np.ascontiguousarray(share, dtype=float)
        inverse = 1.0 / self.response

        def fill(a: int, b: int) -> None:
            _line_flux(flux[a:b], scale[a:b], share[a:b], self.line_electrons, inverse, *self._band, out[a:b])

        in_threads(len(flux), fill)
        return out

    def error(
        self,
        flux: np.ndarray,
        mag: np.ndarray,
        seeing: np.ndarray,
        *,
        noise_level: float = 1.0,
        factors: SkyFactors | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One-sigma errors and signal-to-noise ratios.

        A row's numbers depend on the row alone.

        Parameters
        ----------
        flux : array of shape (n, p), float32
            Noise-free flux per unit wavelength, any normalisation.
        mag, seeing : arrays of shape (n,)
            AB magnitude in HSC i; FWHM in arcsec.
        noise_level : float
            Multiplies the errors.
        factors : SkyFactors, optional
            Brightness of each star's sky.

        Returns
        -------
        error : array of shape (n, p), float32
            In the units of `flux`.
        snr_median : array of shape (n,), float64
            median(flux / error) of each spectrum.

        Raises
        ------
        MoefastError
            If the shapes do not fit each other and the wave grid.
        """
        flux = np.ascontiguousarray(flux, dtype=np.float32)
        scale = self.electrons_per_flux(mag, seeing)
        if flux.ndim != 2 or flux.shape[1] != len(self.response) or scale.shape != (len(flux),):
            raise MoefastError(
                f"flux: expected shape (n, {len(self.response)}) with n values of mag and of seeing, "
                f"found {flux.shape} with {scale.shape}"
            )
        error, snr = np.empty_like(flux), np.empty(len(flux))
        unit = 1.0 / (scale * self._largest)
        level = np.float32(noise_level)
        sky = self._sky[None]
        if factors is not None and len(flux):
            sky = self._scaled_sky(factors, (self._largest / self.response) ** 2, np.float32)

        def fill(a: int, b: int) -> None:
            own = sky[a:b] if len(sky) > 1 else sky
            _errors(flux[a:b], unit[a:b], self._star, own, *self._band, level, error[a:b], snr[a:b])

        in_threads(len(flux), fill)
        return error, snr
