"""Units of flux and wavelength, and the refraction of air.

Everything that is read becomes flux density f_λ in 1e-17 erg s⁻¹ cm⁻² Å⁻¹ at vacuum wavelengths in Å. Units are told by
the file or by the caller, in any notation that astropy reads; none is guessed.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError

__all__ = [
    "LIGHT_SPEED",
    "air_to_vacuum",
    "flux_factor",
    "is_flux_per_wavelength",
    "read_unit",
    "velocity_factor",
    "wave_factor",
]

LIGHT_SPEED = 299_792.458
"""km/s."""
_REFERENCE = 8000.0
_SURFACE = "erg s^-1 cm^-2 per Å, Jy, nJy, W m^-2 per µm"


def read_unit(unit: Any, where: str) -> Any:
    """The astropy unit meant by text or a unit.

    Raises
    ------
    InputError
        If there is no such unit.
    """
    from astropy import units

    try:
        with warnings.catch_warnings():
            # Several slashes are discouraged, and mean the same.
            warnings.simplefilter("ignore", units.UnitsWarning)
            return units.Unit(unit)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{where}: {unit!r} is no unit that astropy knows ({error}); say it as astropy does, such as nJy or "
            "1e-17 erg / (s cm2 Angstrom)"
        ) from error


@lru_cache(maxsize=256)
def wave_factor(unit: Any, where: str) -> float:
    """Å per `unit` of wavelength.

    Raises
    ------
    InputError
        If it is no length.
    """
    from astropy import units

    try:
        # Units are defined by powers of ten, and multiplied in floating point.
        return float(f"{read_unit(unit, where).to(units.AA):.14g}")
    except units.UnitConversionError as error:
        raise InputError(
            f"{where}: wavelengths in {unit} found, expected a length such as nm or Angstrom"
        ) from error


def velocity_factor(unit: Any, where: str) -> float:
    """km/s per `unit` of velocity.

    Raises
    ------
    InputError
        If it is no velocity.
    """
    from astropy import units

    try:
        return float(f"{read_unit(unit, where).to(units.km / units.s):.14g}")
    except units.UnitConversionError as error:
        raise InputError(f"{where}: found {unit or 'no unit'}, expected a velocity such as km/s") from error


def flux_factor(unit: Any, wave: NDArray[np.float64], where: str) -> NDArray[np.float64]:
    """What flux in `unit` is multiplied with to be f_λ in 1e-17 erg s⁻¹ cm⁻² Å⁻¹.

    f_λ = f_ν c / λ² for densities per frequency, f_λ = n_λ h c / λ for photons.

    Parameters
    ----------
    unit : unit, or text that is one
        Of a flux density in energy or photons, per wavelength or frequency; dimensionless means f_λ on some scale.
    wave : array of shape (p,)
        Wavelengths in Å.
    where : str
        File and HDU, for the message.

    Raises
    ------
    InputError
        If the unit is unknown or no flux density; counts and electrons are none until they are calibrated.
    """
    scale, power = _conversion(unit, where)
    wave = np.atleast_1d(np.asarray(wave, np.float64))
    factor = np.full(wave.shape, scale)
    # A general power takes longer than all the rest of the reading.
    ratio = wave / _REFERENCE if power > 0 else _REFERENCE / wave
    for _ in range(abs(power)):
        factor *= ratio
    return factor


def is_flux_per_wavelength(unit: Any, where: str) -> bool:
    """Whether flux in `unit` is f_λ on some scale.

    Raises
    ------
    InputError
        If the unit is unknown or no flux density.
    """
    return _conversion(unit, where)[1] == 0


@lru_cache(maxsize=256)
def _conversion(unit: Any, where: str) -> tuple[float, int]:
    """Factor at 8000 Å, and the power of λ that it goes with; kept, because astropy takes milliseconds for it."""
    from astropy import units

    wanted = units.Unit("1e-17 erg / (s cm2 Angstrom)")
    found = read_unit(unit, where)
    if found.physical_type == "dimensionless":
        return float(found.to(units.dimensionless_unscaled)), 0
    # All of these are powers of λ: conversion at one wavelength and an exponent are exact.
    try:
        ratio = [
            float((1 * found).to(wanted, equivalencies=units.spectral_density(at * units.AA)).value)
            for at in (_REFERENCE, 2 * _REFERENCE)
        ]
    except units.UnitConversionError as error:
        raise InputError(
            f"{where}: flux in {found} found, expected a flux density ({_SURFACE}); counts and electrons must be "
            "flux-calibrated first"
        ) from error
    return ratio[0], round(np.log2(ratio[1] / ratio[0]))


def air_to_vacuum(wave_air: NDArray[np.float64]) -> NDArray[np.float64]:
    """Vacuum wavelengths [Å] from air; inverse of Ciddor (1996, Appl. Opt. 35, 1566) as used by VALD."""
    s2 = (1e4 / np.asarray(wave_air)) ** 2
    n = 1 + 8.336624212083e-5 + 2.408926869968e-2 / (130.1065924522 - s2)
    return wave_air * (n + 1.599740894897e-4 / (38.92568793293 - s2))
