"""Noise of one spectrum: photons of the star, sky continuum, OH lines, detector.

Per pixel, in electrons summed over the exposures,

    variance = star + sky + (sky_residual * sky)^2 + n_exposures * detector,
    sigma = sqrt(variance) / electrons_per_unit_flux.

The star enters through its magnitude in the i band (AB, HSC) and the fraction of a Moffat profile that
falls into the fibre; the sky through a continuum surface brightness and the Meinel bands of OH computed
from molecular constants. Two numbers were tuned to the published distribution of signal-to-noise ratios
(see docs/simulator.md): `Instrument.efficiency` and `Sky.oh_factor`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numba import njit, prange

from moefast.errors import MoefastError

PHOTONS_AB0 = 3.631e-20 / 6.62607015e-27  # photons / s / cm2 per unit ln(lambda), AB magnitude 0
RAYLEIGH = 1e6 / (4.0 * math.pi) / 4.254517e10  # photons / s / cm2 / arcsec2
I_BAND = (6970.0, 8530.0)  # Å, half-power points of HSC i


@dataclass(frozen=True)
class Instrument:
    """Telescope, fibre and detector: round numbers of Subaru PFS, medium-resolution red arm.

    Sources: Sugai et al. (2015, JATIS 1, 035001) and Tamura et al. (2016, SPIE 9908) for mirror, fibre and
    detector; `efficiency` (atmosphere to detector, without fibre losses) is the tuned factor.
    """

    area: float = 5.3e5  # cm2
    fibre_diameter: float = 1.12  # arcsec
    efficiency: float = 0.185
    read_noise: float = 4.0  # electrons per detector pixel
    dark: float = 3.9e-4  # electrons / s per detector pixel
    trace_rows: float = 5.5  # detector pixels summed across the trace
    resolving_power: float = 5000.0

    def throughput(self, wave: np.ndarray) -> np.ndarray:
        """Efficiency at each wavelength [Å]: a shallow parabola around 7850 Å."""
        return self.efficiency * (1.0 - 0.15 * ((wave - 7850.0) / 1000.0) ** 2)

    def fibre_fraction(self, seeing: np.ndarray) -> np.ndarray:
        """Fraction of a star's light in a centred fibre, Moffat profile with beta = 3, FWHM in arcsec."""
        core = np.asarray(seeing, dtype=float) / (2.0 * math.sqrt(2.0 ** (1.0 / 3.0) - 1.0))
        return 1.0 - (1.0 + (0.5 * self.fibre_diameter / core) ** 2) ** -2.0


@dataclass(frozen=True)
class Exposure:
    """How long and how often: 12 x 900 s is the reference observation."""

    seconds: float = 900.0
    count: int = 12

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.count < 1:
            raise MoefastError(f"exposure: expected positive seconds and count, found {self}")


@dataclass(frozen=True)
class OHBand:
    """One Meinel band: levels, the P1(2) line that fixes its position [Å, air], intensity [Rayleigh]."""

    upper: int
    lower: int
    p1_2: float
    rayleigh: float


# P1(2) lines from Osterbrock et al. (1996, PASP 108, 277); intensities rounded from Krassovsky, Shefov &
# Yarin (1962, Planet. Space Sci. 9, 883).
OH_BANDS = (
    OHBand(8, 3, 7316.282, 350.0),
    OHBand(4, 0, 7571.746, 80.0),
    OHBand(9, 4, 7794.112, 270.0),
    OHBand(5, 1, 7964.650, 330.0),
    OHBand(6, 2, 8399.170, 900.0),
    OHBand(7, 3, 8885.850, 1100.0),
)


@dataclass(frozen=True)
class Sky:
    """Night sky: continuum (moonless, zodiacal light and airglow), OH strength and subtraction error."""

    continuum: float = 21.0  # AB magnitude per arcsec2 between the OH lines
    oh_factor: float = 3.0  # times the intensities of OH_BANDS
    residual: float = 0.01  # systematic error of sky subtraction, of the sky itself
    rotational_temperature: float = 195.0  # K
    bands: tuple[OHBand, ...] = field(default=OH_BANDS, repr=False)


def _oh_levels(v: int, j: np.ndarray, ladder: int) -> np.ndarray:
    """Rotational terms [cm^-1] of OH X 2Pi, ladder 1 (Omega 3/2) or 2 (1/2), Hill & Van Vleck's formula."""
    b = 18.550 - 0.7150 * v
    y = -139.1 / b
    square = (j + 0.5) ** 2
    root = 0.5 * np.sqrt(4.0 * square + y * (y - 4.0))
    return b * (square - 1.0 + (root if ladder == 2 else -root)) - 1.9e-3 * (square - 0.25) ** 2


def oh_lines(
    bands: tuple[OHBand, ...] = OH_BANDS, temperature: float = 195.0
) -> tuple[np.ndarray, np.ndarray]:
    """Vacuum wavelengths [Å] and intensities [Rayleigh] of the OH lines.

    Rotational line strengths are those of Hund's case a; populations are thermal at `temperature`.
    """
    waves, intensities = [], []
    for band in bands:
        anchor = 1e8 / (band.p1_2 * 1.0002745)  # air to vacuum, good to 0.01 Å here
        # P1(2) goes from N' = 1, J' = 3/2 to N'' = 2, J'' = 5/2.
        origin = anchor - _oh_levels(band.upper, np.array(1.5), 1) + _oh_levels(band.lower, np.array(2.5), 1)
        band_waves, band_strengths = [], []
        for ladder, omega in ((1, 1.5), (2, 0.5)):
            j = np.arange(omega, 12.0)
            term = _oh_levels(band.upper, j, ladder)
            population = np.exp(-1.4388 * (term - _oh_levels(band.upper, np.array(1.5), 1)) / temperature)
            for step, strength in (
                (-1, (j * j - omega**2) / j),
                (0, (2 * j + 1) * omega**2 / (j * (j + 1))),
                (1, ((j + 1) ** 2 - omega**2) / (j + 1)),
            ):
                use = j + step >= omega
                lower = _oh_levels(band.lower, (j + step)[use], ladder)
                band_waves.append(1e8 / (origin + term[use] - lower))
                band_strengths.append((population * strength)[use])
        strengths = np.concatenate(band_strengths)
        waves.append(np.concatenate(band_waves))
        intensities.append(band.rayleigh * strengths / strengths.sum())
    return np.concatenate(waves), np.concatenate(intensities)


@njit(cache=True, parallel=True, fastmath=True)
def _sigma(
    flux: np.ndarray,
    scale: np.ndarray,
    response: np.ndarray,
    sky_variance: np.ndarray,
    band: np.ndarray,
    band_weight: np.ndarray,
    noise_level: float,
    error: np.ndarray,
    snr: np.ndarray,
) -> None:
    """Errors (n, p) and median signal-to-noise ratios (n,)."""
    n, p = flux.shape
    for i in prange(n):
        mean = 0.0
        for j in range(band[0], band[1]):
            mean += flux[i, j] * band_weight[j]
        electrons = scale[i] / mean
        ratio = np.empty(p, dtype=np.float32)
        for j in range(p):
            per_flux = electrons * response[j]
            star = max(flux[i, j], 0.0) * per_flux
            error[i, j] = noise_level * math.sqrt(star + sky_variance[j]) / per_flux
            ratio[j] = flux[i, j] / error[i, j]
        snr[i] = np.median(ratio)


def _read_only(values: np.ndarray) -> np.ndarray:
    values.flags.writeable = False
    return values


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
        continuum = PHOTONS_AB0 * 10.0 ** (-0.4 * self.sky.continuum) * width / wave
        # Electrons per pixel over all exposures.
        self.sky_electrons = collected * fibre_area * (continuum + self._oh_photons(edges))
        per_exposure = tool.trace_rows * (tool.read_noise**2 + tool.dark * exposure.seconds)
        self.detector_variance = per_exposure * exposure.count
        self.sky_variance = _read_only(
            self.sky_electrons + (self.sky.residual * self.sky_electrons) ** 2 + self.detector_variance
        )
        # The star: f_lambda = 1 corresponds, in the i band, to photons per pixel proportional to lambda.
        inside = np.flatnonzero((wave > I_BAND[0]) & (wave < I_BAND[1]))
        self._band = np.array([inside[0], inside[-1] + 1])
        weight = np.zeros(len(wave))
        weight[inside] = wave[inside]
        self.band_weight = _read_only(weight / weight.sum())
        pivot = math.sqrt(np.sum(wave[inside]) / np.sum(1.0 / wave[inside]))
        # f_nu of an AB source is f_lambda lambda_pivot^2 / c, hence photons = f_lambda lambda / pivot^2.
        self.response = _read_only(PHOTONS_AB0 * collected * width * wave / pivot**2)

    def _oh_photons(self, edges: np.ndarray) -> np.ndarray:
        """OH photons / s / cm2 / arcsec2 in each pixel after the line-spread function."""
        waves, rayleigh = oh_lines(self.sky.bands, self.sky.rotational_temperature)
        spread = waves / self.instrument.resolving_power / 2.354820045 * math.sqrt(2.0)
        cumulative = np.zeros(len(edges))
        erf = np.frompyfunc(math.erf, 1, 1)
        for wave, sigma, strength in zip(waves, spread, rayleigh, strict=True):
            cumulative += 0.5 * strength * erf((edges - wave) / sigma).astype(float)
        return self.sky.oh_factor * RAYLEIGH * np.diff(cumulative)

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

    def error(
        self, flux: np.ndarray, mag: np.ndarray, seeing: np.ndarray, *, noise_level: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """One-sigma errors and signal-to-noise ratios.

        Parameters
        ----------
        flux : array of shape (n, p), float32
            Noise-free flux per unit wavelength, any normalisation.
        mag, seeing : arrays of shape (n,)
            AB magnitude in HSC i; FWHM in arcsec.
        noise_level : float
            Multiplies the errors.

        Returns
        -------
        error : array of shape (n, p), float32
            In the units of `flux`.
        snr_median : array of shape (n,), float64
            median(flux / error) of each spectrum.
        """
        error = np.empty(flux.shape, dtype=np.float32)
        snr = np.empty(len(flux))
        if len(flux):
            _sigma(
                flux, self.electrons_per_flux(mag, seeing), self.response, self.sky_variance, self._band,
                self.band_weight, float(noise_level), error, snr,
            )  # fmt: skip
        return error, snr
