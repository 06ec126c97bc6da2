"""Files of the Dark Energy Spectroscopic Instrument: coadd-*.fits and spectra-*.fits.

Facts that the code rests on: per arm B, R, Z images FLUX (1e-17 erg s⁻¹ cm⁻² Å⁻¹), IVAR and MASK (n, p) and one
WAVELENGTH (p,) in Å, vacuum and barycentric, velocities not removed. A pixel is bad where MASK is not 0 or IVAR is 0.
RESOLUTION (n, k, p) holds the line-spread function at each pixel, as k diagonals of a matrix.
FIBERMAP has a row for every spectrum; spectra-* have several of a target.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.spectra.layouts.fits_file import FitsFile
from moefast.spectra.layouts.registry import (
    Layout,
    StoredColumn,
    SurveyFile,
    check_units,
    check_wavelengths,
    fingerprint_of,
    noting,
    register,
    stored_columns,
)
from moefast.spectra.resample import Pixels
from moefast.spectra.units import flux_factor, wave_factor

__all__: list[str] = []

ARMS = ("B", "R", "Z")
BESIDE_FLUX = ("WAVELENGTH", "IVAR", "MASK")
FLUX_UNIT, WAVE_UNIT = "1e-17 erg / (s cm2 Angstrom)", "Angstrom"
"""Where a file does not say."""
NAMES = {"TARGETID": "TARGETID", "TARGET_RA": "ra", "TARGET_DEC": "dec", "FIBER": "fiberId"}
BESIDE = ("OBJTYPE", "COADD_FIBERSTATUS", "FIBERSTATUS", "NIGHT", "EXPID", "TILEID")
SCIENCE, SKY, FLUX_STANDARD = 1, 2, 3
ROWS_OF_RESOLUTION = 64
"""First rows, at least, that the line-spread function is the mean of."""
FWHM_OF_SIGMA = 2.354820045
_STANDARDS = 1 << 33 | 1 << 34 | 1 << 35
"""Bits STD_FAINT, STD_WD and STD_BRIGHT of DESI_TARGET."""
_WIDER = (
    "DESI spectra: their line-spread function (R 4000 to 5000) is wider than that of the PFS medium-resolution arm; "
    "log g is right only from a model that was fitted for it (moefast fit --simulate N --like FILE)"
)


def _arms(file: FitsFile) -> list[str]:
    """Arms that a file has anything of: one of which a part is missing is damaged, and not to be left out."""
    return [arm for arm in ARMS if any(f"{arm}_{name}" in file for name in ("FLUX", *BESIDE_FLUX))]


def _recognises(file: FitsFile) -> bool:
    return "FIBERMAP" in file and bool(_arms(file))


def _open(file: FitsFile) -> SurveyFile:
    arms = _arms(file)
    fibermap = file["FIBERMAP"]
    for arm in arms:
        for name in ("FLUX", *BESIDE_FLUX):
            _ = file[f"{arm}_{name}"]
        for name in ("FLUX", "IVAR", "MASK"):
            shape, expected = file[f"{arm}_{name}"].shape, (fibermap.n_rows, *file[f"{arm}_WAVELENGTH"].shape)
            if shape != expected:
                raise InputError(
                    f"{file.path}: HDU {arm}_{name} has shape {shape}; FIBERMAP and {arm}_WAVELENGTH ask for {expected}"
                )
    if not arms or not fibermap.n_rows:
        raise InputError(
            f"{file.path}: no spectra in this file: FIBERMAP has {fibermap.n_rows} rows, FLUX of arms {arms}"
        )
    told = stored_columns(file, fibermap)
    if "TARGETID" not in told:
        raise InputError(f"{file.path}: HDU FIBERMAP has no column TARGETID")
    of_type = [name for name in told if name == "OBJTYPE" or name.endswith("DESI_TARGET")]
    columns = {ours: told.pop(theirs) for theirs, ours in NAMES.items() if theirs in told}
    columns["targetType"] = StoredColumn(
        fibermap.n_rows,
        lambda start, stop: _target_type(file.table(fibermap, of_type, start, stop), stop - start),
    )
    columns |= {name: told.pop(name) for name in BESIDE if name in told}
    identifiers = tuple(columns)
    name = "DESI coadd" if "COADD_FIBERSTATUS" in columns or "EXP_FIBERMAP" in file else "DESI spectra"
    waves = {arm: _wave(file, arm) for arm in arms}
    for arm, wave in waves.items():
        check_wavelengths(file, file[f"{arm}_WAVELENGTH"], wave)
        flux = file[f"{arm}_FLUX"]
        check_units(file, flux, WAVE_UNIT, flux.unit() or FLUX_UNIT)
    notes: list[str] = []
    note = noting(notes)

    def read(array: str, start: int, stop: int) -> tuple[list[Pixels], dict[int, str]]:
        low, high = survey_file.needed
        # Of files that have no arm there, one tells that all pixels are lost.
        chosen = [arm for arm in arms if _overlaps(waves[arm], low, high)] or arms[:1]
        return [_read_arm(file, arm, waves[arm], start, stop, note) for arm in chosen], {}

    survey_file = SurveyFile(
        file.path, name, fibermap.n_rows, columns | told, identifiers, read, file.close, notes=notes, wider=_WIDER,
        grid=np.sort(np.concatenate(list(waves.values()))),
        line_spread=lambda: [_line_spread(file, arm) for arm in arms], fingerprint=lambda: fingerprint_of(file),
    )  # fmt: skip
    return survey_file


def _wave(file: FitsFile, arm: str) -> NDArray[np.float64]:
    hdu = file[f"{arm}_WAVELENGTH"]
    unit = wave_factor(hdu.unit() or WAVE_UNIT, f"HDU {hdu.name}")
    return np.asarray(file.image(hdu).astype(np.float64) * unit)


def _overlaps(wave: NDArray[np.float64], low: float, high: float) -> bool:
    """Whether an arm has pixels there; one with wavelengths that are not finite is left to those who refuse it."""
    return not (wave.max() < low or wave.min() > high)


def _target_type(told: dict[str, NDArray], n: int) -> NDArray[np.int16]:
    """1 science, 2 sky, 3 flux standard, 0 none of them, as PFS has it."""
    out = np.full(n, SCIENCE, np.int16)
    if "OBJTYPE" in told:
        out[told["OBJTYPE"] != "TGT"] = 0
        out[told["OBJTYPE"] == "SKY"] = SKY
    for name, values in told.items():
        if name.endswith("DESI_TARGET"):
            out[(out == SCIENCE) & ((values & _STANDARDS) != 0)] = FLUX_STANDARD
    return out


def _line_spread(file: FitsFile, arm: str) -> NDArray[np.float64] | None:
    """FWHM [Å] at each pixel: 2.355 times the standard deviation of the rows of RESOLUTION, the mean over stars."""
    if f"{arm}_RESOLUTION" not in file:
        return None
    hdu = file[f"{arm}_RESOLUTION"]
    bands = np.zeros(hdu.shape[1:])
    for start in range(0, hdu.n_rows, ROWS_OF_RESOLUTION):
        bands += file.image(hdu, start, min(start + ROWS_OF_RESOLUTION, hdu.n_rows)).sum(0, dtype=np.float64)
        if bands.any():
            break
    offset = np.arange(len(bands))[:, None] - len(bands) // 2
    with np.errstate(all="ignore"):
        total = bands.sum(0)
        mean = (bands * offset).sum(0) / total
        variance = (bands * offset**2).sum(0) / total - mean**2
        wave = _wave(file, arm)
        fwhm = np.asarray(FWHM_OF_SIGMA * np.sqrt(variance) * np.gradient(wave), np.float64)
    known = np.isfinite(fwhm) & (fwhm > 0)
    if not known.any():
        return None
    return np.asarray(np.interp(wave, wave[known], fwhm[known]))


def _read_arm(
    file: FitsFile, arm: str, wave: NDArray[np.float64], start: int, stop: int, note: Callable[[str], None]
) -> Pixels:
    flux_hdu = file[f"{arm}_FLUX"]
    where = f"HDU {arm}_FLUX"
    flux, ivar = file.image(flux_hdu, start, stop), file.image(file[f"{arm}_IVAR"], start, stop)
    mask = file.image(file[f"{arm}_MASK"], start, stop)
    if np.any(ivar < 0):
        row = int(np.flatnonzero((ivar < 0).any(1))[0])
        note(f"{file.path}: HDU {arm}_IVAR: negative from row {start + row} on; such pixels count as bad")
    # As precise as the fluxes are.
    factor = flux_factor(flux_hdu.unit() or FLUX_UNIT, wave, where).astype(flux.dtype)
    with np.errstate(all="ignore"):
        error = factor / np.sqrt(ivar)
        return Pixels.of_rows(wave, flux * factor, error, (mask != 0) | ~(ivar > 0), where)


def _refuse_velocities(file: FitsFile) -> SurveyFile:
    raise InputError(
        f"{file.path}: a table of velocities (redrock or rvspecfit): it holds no spectra; use the coadd or spectra "
        "file beside it, and name this table with --velocity"
    )


def _is_table_of_velocities(file: FitsFile) -> bool:
    return ("REDSHIFTS" in file or "RVTAB" in file) and not _arms(file)


register(Layout("DESI redrock, rvspecfit", _is_table_of_velocities, _refuse_velocities))
register(Layout("DESI coadd, DESI spectra", _recognises, _open))
