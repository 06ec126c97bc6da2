"""The simulator as a likelihood: what an observer would see of a star with supposed parameters.

    x = f(θ) (1 + Σ_k a_k P_k) + m Σ_g b_g S_g + σ(f(θ)) ε,    a_k, b_g, ε ~ N(0, 1),
    f(θ) = reddened, shifted, emulated flux,    m = its mean over the band of the magnitude.

Design: the same pieces that generate rows (`emulator`, `nuisance`, `noise`), seen from the other side. A star is a
point z with a standard normal prior in every coordinate: Φ(z) is the quantile of a uniform parameter, z itself the
scaled value of a normal one. Parameters that the settings do not vary have no coordinate. Magnitude and seeing are
known, as they are to an observer; the calibration coefficients a_k are linear and are marginalised by the likelihood.
Where visits differ, the brightness of each star's sky is known, too (its errors tell it), and the width of its
line-spread function is one coordinate more. What sky subtraction leaves of each group of lines, b_g, is linear, and
so is the scale of a spectrum that was divided by its own noisy median: as a_0 with a prior width of `SCALE_WIDTH`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from moefast.core.errors import MoefastError

from .emulator import LABELS, Emulator
from .noise import NoiseModel, SkyFactors
from .nuisance import LIGHT_SPEED, calibration_basis, doppler, extinction, redden, velocity_limit
from .rows import Settings, noise_model
from .visit import broaden

__all__ = ["SCALE_WIDTH", "ForwardModel"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

VELOCITY_STEP = 5.0  # km/s, for the central difference: a tenth of a pixel
LINE_SPREAD_STEP = 0.02
SCALE_WIDTH = 0.3
"""Prior width of the scale of spectra that are divided by their own noisy median: as good as free."""


@dataclass(frozen=True)
class ForwardModel:
    """Spectra and their variances as functions of the parameters that `settings` draw.

    Attributes
    ----------
    settings : Settings
        What was simulated.
    emulator : Emulator
    noise : NoiseModel
    uniform : dict of str to (float, float)
        Varied parameters with a uniform prior, in the order of the coordinates: labels [K, dex], redshift, ebv [mag],
        line_spread (width of the line-spread function over the emulator's).
    velocity_scatter : float
        Standard deviation of the last coordinate [km/s]; 0 if velocities are not varied.
    """

    settings: Settings
    emulator: Emulator = field(default_factory=Emulator.load)
    noise: NoiseModel = field(init=False)
    uniform: dict[str, tuple[float, float]] = field(init=False)
    _fixed: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        if self.settings.fast_share:
            raise MoefastError(
                "the ceiling of stars whose velocities have two scatters is not known; simulate them without fast_share"
            )
        ranges = dict(zip(LABELS, self.settings.label_ranges, strict=True))
        ranges |= {"redshift": self.settings.redshift, "ebv": self.settings.reddening}
        spread = 0.0 if self.settings.visit is None else self.settings.visit.line_spread
        ranges["line_spread"] = (1.0 - spread, 1.0 + spread)
        values = {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
        object.__setattr__(self, "uniform", {n: r for n, r in values.items() if r[0] < r[1]})
        object.__setattr__(self, "_fixed", {n: r[0] for n, r in values.items() if r[0] == r[1]})
        object.__setattr__(self, "noise", noise_model(self.emulator, self.settings))

    @property
    def velocity_scatter(self) -> float:
        """Standard deviation of the velocity [km/s]."""
        return self.settings.velocity_scatter

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter of each coordinate."""
        return (*self.uniform, *(("velocity",) if self.velocity_scatter else ()))

    @property
    def calibration_shapes(self) -> F64 | None:
        """Shapes of what multiplies a spectrum, (k, p), each of unit variance; None if nothing does.

        The calibration error, with the tilt of a visit in the first shape, and the scale last.
        """
        visit, wave = self.settings.visit, self.emulator.wave
        basis = calibration_basis(wave)
        widths = np.full(len(basis), self.settings.calibration)
        if visit is not None:
            # A tilt t is t u/2 with u from -1 to 1, and the first shape is a multiple of u.
            widths[0] = math.hypot(widths[0], visit.tilt * 0.5 / basis[0, -1])
        shapes = (widths[:, None] * basis)[widths > 0]
        if visit is not None and visit.own_median:
            shapes = np.concatenate([shapes, np.full((1, len(wave)), SCALE_WIDTH)])
        return shapes if len(shapes) else None

    def sky_shapes(self, mag: float, seeing: float, sky: SkyFactors) -> F64 | None:
        """What sky subtraction leaves of each group of lines, (g, p), each of unit variance, for a band mean of 1.

        Parameters
        ----------
        mag, seeing : float
        sky : SkyFactors
            Of this one star.

        Returns
        -------
        array of shape (g, p), float64, or None
            None if sky subtraction is perfect; groups without light in this arm are left out.
        """
        visit = self.settings.visit
        if visit is None or not visit.sky_residual:
            return None
        scale = self.noise.electrons_per_flux(np.array([mag]), np.array([seeing]))[0]
        shapes = sky.lines[0][:, None] * self.noise.line_electrons / (scale * self.noise.response)
        return visit.sky_residual * shapes[self.noise.line_electrons.any(axis=1)]

    def parameters(self, z: F64) -> dict[str, F64]:
        """Values of all parameters, each (n,), at coordinates (n, d)."""
        n = len(z)
        values = {name: np.full(n, value) for name, value in self._fixed.items()}
        for column, (name, (low, high)) in zip(z.T, self.uniform.items(), strict=False):
            values[name] = low + (high - low) * ndtr(column)
        values.setdefault("line_spread", np.ones(n))
        values["velocity"] = self.velocity_scatter * z[:, -1] if self.velocity_scatter else np.zeros(n)
        return values

    def flux(self, parameters: dict[str, F64]) -> F32:
        """Noise-free spectra without calibration error, shape (n, p).

        Velocities beyond what the emulator's margin allows count as the limit: draws from the far tail of a proposal
        may lie there, stars do not.
        """
        labels = np.column_stack([parameters[name] for name in LABELS])
        coefficients = self.emulator.coefficients(labels).astype(np.float32)
        padded = coefficients @ self.emulator.basis
        padded += self.emulator.mean
        return self._observed(padded, parameters)

    def derivatives(self, parameters: dict[str, F64]) -> tuple[tuple[str, ...], F64]:
        """Derivatives of `flux` by the five labels and by the varied nuisances.

        Returns
        -------
        names : tuple of str
            The labels, then redshift, ebv, line_spread, velocity as far as they vary.
        derivatives : array of shape (n, n_names, p), float64
            Per K, dex, unit redshift, mag, unit width and km/s.
        """
        labels = np.column_stack([parameters[name] for name in LABELS])
        slopes = self.emulator.derivatives(labels, padded=True)
        n, n_labels, p = slopes.shape
        repeated = {name: np.repeat(values, n_labels) for name, values in parameters.items()}
        moved = self._observed(slopes.reshape(n * n_labels, p).astype(np.float32), repeated)
        parts = [moved.reshape(n, n_labels, -1).astype(float)]
        names = list(LABELS)
        for name in ("redshift", "ebv", "line_spread", "velocity"):
            if name == "ebv" and name in self.uniform:
                per_magnitude = -0.4 * math.log(10.0) * extinction(self.emulator.wave)
                parts.append((self.flux(parameters) * per_magnitude)[:, None].astype(float))
            elif name == "redshift" and name in self.uniform:
                step = VELOCITY_STEP / LIGHT_SPEED
                parts.append(self._difference(parameters, name, step)[:, None])
            elif name == "line_spread" and name in self.uniform:
                parts.append(self._difference(parameters, name, LINE_SPREAD_STEP)[:, None])
            elif name == "velocity" and self.velocity_scatter:
                parts.append(self._difference(parameters, name, VELOCITY_STEP)[:, None])
            else:
                continue
            names.append(name)
        return tuple(names), np.concatenate(parts, axis=1)

    def variance_terms(self, mag: float, seeing: float, sky: SkyFactors | None = None) -> dict[str, F64]:
        """Arguments of `moefast.kernels.gaussian_log_likelihood` that describe the noise of one star.

        Its sky is as bright as the noise model's if `sky` is None.
        """
        dark = self.noise.sky_variance if sky is None else self.noise.scaled_sky_variance(sky)[0]
        scale = self.noise.electrons_per_flux(np.array([mag]), np.array([seeing]))[0]
        inverse = 1.0 / (scale * self.noise.response)
        square = self.settings.noise_level**2
        return {
            "constant": np.zeros(len(inverse)),
            "linear": square * inverse,
            "quadratic": square * dark * inverse**2,
            "band_weight": self.noise.band_weight,
        }

    def _observed(self, padded: F32, parameters: dict[str, F64]) -> F32:
        velocity = LIGHT_SPEED * (
            (1.0 + parameters["redshift"]) * (1.0 + parameters["velocity"] / LIGHT_SPEED) - 1.0
        )
        margin = self.emulator.margin
        if "line_spread" in self.uniform:
            low, high = self.uniform["line_spread"]
            wave = self.emulator.wave
            step = (wave[-1] - wave[0]) / (len(wave) - 1)
            padded_wave = wave[0] + step * (np.arange(len(self.emulator.mean)) - margin)
            padded = broaden(padded, np.clip(parameters["line_spread"], low, high), padded_wave)
        if self.velocity_scatter or "redshift" in self.uniform or velocity.any():
            limit = velocity_limit(self.emulator)
            flux = doppler(padded, np.clip(velocity, -limit, limit), self.emulator.wave)
        else:
            flux = np.ascontiguousarray(padded[:, margin : padded.shape[1] - margin])
        if "ebv" in self.uniform or parameters["ebv"].any():
            redden(flux, parameters["ebv"], self.emulator.wave, out=flux)
        return flux

    def _difference(self, parameters: dict[str, F64], name: str, step: float) -> F64:
        higher = self.flux(parameters | {name: parameters[name] + step}).astype(float)
        lower = self.flux(parameters | {name: parameters[name] - step}).astype(float)
        return (higher - lower) / (2.0 * step)
