"""Files of the Subaru Prime Focus Spectrograph: pfsCalibrated, pfsCoadd, pfsSingle, pfsObject, pfsStar.

Facts that the code rests on (2D pipeline and Galactic-archaeology pipeline): wavelengths in nm, vacuum and barycentric,
the star's own velocity not removed; flux f_ν in nJy; mask bits are named by MP_ keywords, per file or per spectrum, and
their numbers differ between versions. FLUXTABLE holds pixels near those of the detector; it is read where there is one.
WAVELENGTH, FLUX and COVAR are resampled to a grid of the whole spectrograph: there the noise of a pixel and of its next
two neighbours is correlated, and variance + 2 (covariances) is what the variance of independent pixels would be.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.spectra.layouts.fits_file import FitsFile, Hdu
from moefast.spectra.layouts.registry import (
    Layout,
    Reader,
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

__all__ = ["BAD_BITS", "visit_hash"]

BAD_BITS = frozenset(
    {
        "BAD", "SAT", "INTRP", "CR", "SUSPECT", "NO_DATA", "BAD_FLAT", "BAD_FIBERTRACE", "BAD_SKY", "BAD_FLUXCAL",
        "BAD_FIBERNORMS", "UNMASKEDNAN", "NO_CONTINUUM",
    }
)  # fmt: skip
"""Names of mask bits that make a pixel bad: what the survey's pipelines reject, in coadding or in fitting."""
MANY = ("TARGET", "OBSERVATIONS", "METADATA")
TABLES = ("FLUXTABLE", "FLUX_TABLE")
TARGETS = ("catId", "tract", "patch", "objId", "ra", "dec", "targetType")
FLUX_UNIT, WAVE_UNIT = "nJy", "nm"
"""Where a file does not say."""
ROWS = 4096
"""Rows of METADATA that are read together."""
_63_BITS = (1 << 63) - 1
_METADATA_BIT = re.compile(r"MP_(\w+?)\s*:\s*(\d+)")
_LOW_RESOLUTION = (
    "has no medium-resolution red arm (arms {arms!r}, expected an m among them): the low-resolution arm does not "
    "resolve the lines that log g rests on; use exposures with the medium-resolution arm"
)


class _Bits:
    """Which bits of a mask are bad, and which have a name."""

    def __init__(self, names: dict[str, int]) -> None:
        self.bad = sum(1 << bit for name, bit in names.items() if name in BAD_BITS)
        self.named = sum(1 << bit for bit in names.values())

    @classmethod
    def of_header(cls, *hdus: Hdu) -> _Bits:
        names: dict[str, int] = {}
        for hdu in hdus:
            for key, value in hdu.header.items():
                if key.startswith("MP_") and isinstance(value, int):
                    names.setdefault(key[3:], value)
        return cls(names)

    @classmethod
    def of_text(cls, text: str) -> _Bits:
        return cls({name: int(bit) for name, bit in _METADATA_BIT.findall(text)})


def _bad_pixels(
    mask: NDArray, bits: list[_Bits], starts: NDArray[np.int64], where: str, note: Callable[[str], None]
) -> tuple[NDArray[np.bool_], dict[int, str]]:
    """Bad pixels, and rows whose mask cannot be read because no bit has a name."""
    if not mask.any():
        return np.zeros(len(mask), bool), {}
    lengths = np.diff(starts)
    bad_bits = np.repeat([b.bad for b in bits], lengths)
    named = np.repeat([b.named for b in bits], lengths)
    mask = mask.astype(np.int64)
    bad = (mask & bad_bits) != 0
    unnamed = (mask & ~named) != 0
    faults: dict[int, str] = {}
    if unnamed.any():
        used = int(np.bitwise_or.reduce((mask & ~named)[unnamed]))
        numbers = [bit for bit in range(63) if used >> bit & 1]
        for row in np.unique(np.searchsorted(starts, np.flatnonzero(unnamed), side="right") - 1):
            if not bits[row].named:
                faults[int(row)] = (
                    f"{where}: mask bits {', '.join(map(str, numbers))} are set, and no MP_ keyword names any bit: "
                    "good and bad pixels cannot be told apart"
                )
        note(
            f"{where}: mask bits {', '.join(map(str, numbers))} have no name in the file; such pixels count as bad"
        )
    return bad | unnamed, faults


def _pixels(
    wave: NDArray, flux: NDArray, error: NDArray, bad: NDArray[np.bool_], starts: NDArray[np.int64], where: str,
    units: tuple[str, str],
) -> Pixels:  # fmt: skip
    """Units to Å and f_λ. `wave` may be that of one row, if all have the same."""
    wave = wave.astype(np.float64) * wave_factor(units[0] or WAVE_UNIT, where)
    with np.errstate(all="ignore"):
        factor = flux_factor(units[1] or FLUX_UNIT, wave, where)
        if len(factor) != len(flux):
            factor = np.tile(factor, len(starts) - 1)
        return Pixels(wave, flux * factor, error * factor, bad, starts, where)


def _check_table(file: FitsFile, table: Hdu) -> None:
    for name in ("wavelength", "flux", "error", "mask"):
        if name not in table.columns:
            raise InputError(
                f"{file.path}: HDU {table.name} has no column {name!r}; it has {', '.join(table.columns)}"
            )
    check_units(file, table, table.unit("wavelength") or WAVE_UNIT, table.unit("flux") or FLUX_UNIT)


def _check_images(file: FitsFile) -> None:
    """HDUs of spectra that are images; wavelengths that all rows share."""
    hdus = [file[name] for name in ("FLUX", "MASK", "COVAR")]
    check_units(file, hdus[0], WAVE_UNIT, hdus[0].unit() or FLUX_UNIT)
    if "WAVELENGTH" in file:
        hdu = file["WAVELENGTH"]
        check_units(file, hdu, hdu.unit() or WAVE_UNIT, FLUX_UNIT)
        if not hdu.is_table and len(hdu.shape) == 1:
            check_wavelengths(file, hdu, file.image(hdu))


# -- many stars in one file: pfsCalibrated, pfsCoadd ---------------------------------------------------------------


def _is_many(file: FitsFile) -> bool:
    return file.has_columns("TARGET", "targetId", "catId", "objId") and all(name in file for name in MANY)


def _open_many(file: FitsFile) -> SurveyFile:
    target, observations = file["TARGET"], file["OBSERVATIONS"]
    n = target.n_rows
    if not n:
        raise InputError(f"{file.path}: HDU TARGET has no rows: no spectra in this file")
    told = stored_columns(file, target)
    ids = told.pop("targetId")[:]
    seen = file.table(observations, ["targetId", "visit", "arm", "fiberId"])
    columns: dict[str, NDArray | StoredColumn] = {name: told[name] for name in TARGETS if name in told}
    arms = _of_observations(file, ids, seen, columns)
    if all("m" not in each for each in arms):
        raise InputError(f"{file.path}: {_LOW_RESOLUTION.format(arms=str(arms[0]))}")
    bits = _bits_of_targets(file, ids)
    table = file.first_of(*TABLES)
    identifiers = tuple(columns)
    columns |= {name: values for name, values in told.items() if name not in columns}
    # Every target has one visit in a pfsCalibrated.
    name = (
        "pfsCalibrated"
        if np.array_equal(np.unique(seen["targetId"], return_counts=True)[1], np.ones(n))
        else "pfsCoadd"
    )
    notes: list[str] = []
    note = noting(notes)
    rows = _table_rows(file, table, ids) if table is not None else None
    if table is not None:
        _check_table(file, table)
    else:
        _check_images(file)

    def read(array: str, start: int, stop: int) -> tuple[list[Pixels], dict[int, str]]:
        if table is not None and rows is not None:
            pixels, faults = _from_table(file, table, rows[start:stop], bits[start:stop], note)
        else:
            pixels, faults = _from_images(file, start, stop, bits[start:stop], note)
        for row in range(stop - start):
            if "m" not in arms[start + row]:
                faults.setdefault(row, _LOW_RESOLUTION.format(arms=str(arms[start + row])))
        return [pixels], faults

    return _survey_file(file, name, columns, identifiers, read, notes)


def _bits_of_targets(file: FitsFile, ids: NDArray) -> list[_Bits]:
    """Names of the mask bits of each target; texts of many targets, mostly alike, do not stay in memory."""
    metadata = file["METADATA"]
    known: dict[str, _Bits] = {"": _Bits.of_text("")}
    of_target: dict[int, _Bits] = {}
    for start in range(0, metadata.n_rows, ROWS):
        told = file.table(metadata, ["targetId", "metadata"], start, min(start + ROWS, metadata.n_rows))
        for target, text in zip(told["targetId"].tolist(), told["metadata"].tolist(), strict=True):
            if text not in known:
                known[text] = _Bits.of_text(text)
            of_target[target] = known[text]
    return [of_target.get(target, known[""]) for target in ids.tolist()]


def _survey_file(
    file: FitsFile, name: str, columns: dict[str, NDArray | StoredColumn], identifiers: tuple[str, ...], read: Reader,
    notes: list[str],
) -> SurveyFile:  # fmt: skip
    return SurveyFile(
        file.path, name, columns["nVisit"].shape[0], columns, identifiers, read, file.close, notes=notes,
        fingerprint=lambda: fingerprint_of(file),
    )  # fmt: skip


def visit_hash(visits: NDArray[np.integer]) -> int:
    """The survey's pfsVisitHash of the exposures of a coadd.

    The last 63 bits of the SHA-1 of the list of their numbers as Python writes it, each as bytes: ``[b'1', b'2']``.

    Source: `createHash` and `calculatePfsVisitHash` of Subaru-PFS/datamodel; checked against names of its files.
    """
    text = "[" + ", ".join(f"b'{visit}'" for visit in np.unique(visits).tolist()) + "]"
    return int.from_bytes(hashlib.sha1(text.encode(), usedforsecurity=False).digest()[-8:], "big") & _63_BITS


def _of_observations(
    file: FitsFile, ids: NDArray, seen: dict[str, NDArray], columns: dict[str, NDArray | StoredColumn]
) -> list[str]:
    """Arms of each target; adds fiberId, visit, nVisit and pfsVisitHash to the columns."""
    order = np.argsort(seen["targetId"], kind="stable")
    sorted_ids = seen["targetId"][order]
    first, stop = np.searchsorted(sorted_ids, ids), np.searchsorted(sorted_ids, ids, side="right")
    if np.any(first == stop):
        row = int(np.flatnonzero(first == stop)[0])
        raise InputError(
            f"{file.path}: HDU OBSERVATIONS has no row of targetId {ids[row]} (row {row} of TARGET)"
        )
    n_visit = stop - first
    columns["fiberId"] = seen["fiberId"][order[first]]
    if np.all(n_visit == 1):
        columns["visit"] = seen["visit"][order[first]]
    columns["nVisit"] = n_visit.astype(np.int32)
    hashes: dict[bytes, int] = {}
    visits = seen["visit"][order]
    columns["pfsVisitHash"] = np.array(
        [
            hashes.get(key := visits[a:b].tobytes()) or hashes.setdefault(key, visit_hash(visits[a:b]))
            for a, b in zip(first, stop, strict=True)
        ],
        np.int64,
    )
    if np.all(n_visit == 1):
        return [sys.intern(arm) for arm in seen["arm"][order[first]].tolist()]
    arms = seen["arm"][order].tolist()
    return [sys.intern("".join(sorted(set("".join(arms[a:b]))))) for a, b in zip(first, stop, strict=True)]


def _table_rows(file: FitsFile, table: Hdu, ids: NDArray) -> NDArray[np.int64]:
    """Row of FLUXTABLE of every target, −1 if there is none."""
    there = file.table(table, ["targetId"])["targetId"]
    if np.array_equal(there, ids):
        return np.arange(len(ids), dtype=np.int64)
    places = {value: row for row, value in enumerate(there.tolist())}
    if len(places) < len(there):
        raise InputError(f"{file.path}: HDU {table.name}: a targetId occurs more than once")
    return np.array([places.get(value, -1) for value in ids.tolist()], np.int64)


def _from_table(
    file: FitsFile, table: Hdu, rows: NDArray[np.int64], bits: list[_Bits], note: Callable[[str], None]
) -> tuple[Pixels, dict[int, str]]:
    where = f"HDU {table.name}"
    there = rows >= 0
    faults = {int(row): f"{where} has no row of this target" for row in np.flatnonzero(~there)}
    units = table.unit("wavelength"), table.unit("flux")
    if not there.any():
        empty = np.empty(0)
        return Pixels(
            empty, empty, empty, np.empty(0, bool), np.zeros(len(rows) + 1, np.int64), where
        ), faults
    low, high = int(rows[there].min()), int(rows[there].max()) + 1
    chosen = (
        None if high - low == len(rows) and np.array_equal(rows, np.arange(low, high)) else rows[there] - low
    )
    found = {
        name: file.ragged(table, name, low, high, chosen) for name in ("wavelength", "flux", "error", "mask")
    }
    lengths = np.diff(found["wavelength"][1])
    fits = np.ones(len(lengths), bool)
    for name, (_, begins) in found.items():
        for row in np.flatnonzero((np.diff(begins) != lengths) & fits):
            fits[row] = False
            faults[int(np.flatnonzero(there)[row])] = (
                f"{where}: {np.diff(begins)[row]} values of {name}, {lengths[row]} wavelengths"
            )
    if not fits.all():
        for name, (values, begins) in found.items():
            found[name] = values[np.repeat(fits, np.diff(begins))], begins
        lengths = np.where(fits, lengths, 0)
    whole = np.zeros(len(rows), np.int64)
    whole[there] = lengths
    starts = np.concatenate([[0], np.cumsum(whole)]).astype(np.int64)
    bad, unreadable = _bad_pixels(found["mask"][0], bits, starts, where, note)
    wave, flux, error = (found[name][0] for name in ("wavelength", "flux", "error"))
    return _pixels(wave, flux, error, bad, starts, where, units), faults | unreadable


def _values(
    file: FitsFile, hdu: Hdu, start: int, stop: int, column: str = "value"
) -> tuple[NDArray, NDArray[np.int64]]:
    """Rows of an image (n, p), or of a table with rows of varying length."""
    if hdu.is_table:
        return file.ragged(hdu, column, start, stop)
    values = file.image(hdu, start, stop)
    return values.ravel(), np.arange(len(values) + 1, dtype=np.int64) * values.shape[-1]


def _from_images(
    file: FitsFile, start: int, stop: int, bits: list[_Bits], note: Callable[[str], None]
) -> tuple[Pixels, dict[int, str]]:
    hdus = {name: file[name] for name in ("WAVELENGTH", "FLUX", "MASK", "COVAR")}
    flux, starts = _values(file, hdus["FLUX"], start, stop)
    mask, mask_starts = _values(file, hdus["MASK"], start, stop)
    if not hdus["WAVELENGTH"].is_table and len(hdus["WAVELENGTH"].shape) == 1:
        wave = file.image(hdus["WAVELENGTH"])
        wave_starts = np.arange(stop - start + 1) * len(wave)
    else:
        wave, wave_starts = _values(file, hdus["WAVELENGTH"], start, stop)
    if hdus["COVAR"].is_table:
        parts = [file.ragged(hdus["COVAR"], f"row_{k}", start, stop) for k in range(3)]
        covar_starts, parts = parts[0][1], [part[0] for part in parts]  # type: ignore[misc]
    else:
        covar = file.image(hdus["COVAR"], start, stop)
        parts = [covar[:, k].ravel() for k in range(3)]  # type: ignore[misc]
        covar_starts = np.arange(stop - start + 1) * covar.shape[-1]
    for name, begins in (("MASK", mask_starts), ("WAVELENGTH", wave_starts), ("COVAR", covar_starts)):
        if not np.array_equal(begins, starts):
            row = int(np.flatnonzero(np.diff(begins) != np.diff(starts))[0])
            raise InputError(
                f"{file.path}: row {start + row}: HDU {name} has {np.diff(begins)[row]} pixels, FLUX "
                f"{np.diff(starts)[row]}"
            )
    bad, faults = _bad_pixels(mask, bits, starts, "HDU MASK", note)
    error, negative = _independent(*parts)  # type: ignore[arg-type]
    if negative:
        note("HDU COVAR: negative variances; such pixels count as bad")
    units = hdus["WAVELENGTH"].unit(), hdus["FLUX"].unit()
    return _pixels(wave, flux, error, bad, starts, "HDU FLUX", units), faults


def _independent(variance: NDArray, beside: NDArray, beyond: NDArray) -> tuple[NDArray, bool]:
    """1σ that independent pixels would have to have to be as good as these, and whether a variance is negative."""
    variance = variance.astype(np.float64)
    with np.errstate(all="ignore"):
        whole = variance + 2 * np.nan_to_num(beside) + 2 * np.nan_to_num(beyond)
        # Covariances that take nearly all of it away are none.
        error = np.sqrt(np.where(whole > 0.1 * variance, whole, variance))
    return error, bool(np.any(variance < 0))


# -- one star in a file: pfsSingle, pfsObject, pfsStar ---------------------------------------------------------------


def _is_one(file: FitsFile) -> bool:
    return (
        "FLUX" in file
        and "TARGET" in file
        and "CATID" in file["TARGET"].header
        and "OBJID" in file["TARGET"].header
    )


def _open_one(file: FitsFile) -> SurveyFile:
    header = file["TARGET"].header
    observations = file["OBSERVATIONS"]
    seen = file.table(observations, ["visit", "arm", "fiberId"])
    if not observations.n_rows:
        raise InputError(f"{file.path}: HDU OBSERVATIONS has no rows: a coadd of nothing")
    arms = "".join(sorted(set("".join(seen["arm"].tolist()))))
    if "m" not in arms:
        raise InputError(f"{file.path}: {_LOW_RESOLUTION.format(arms=arms)}")
    columns: dict[str, NDArray | StoredColumn] = {
        name: np.array([header[name.upper()]], "f8" if name in {"ra", "dec"} else None)
        for name in TARGETS
        if name.upper() in header
    }
    n_visit = len(np.unique(seen["visit"]))
    columns["fiberId"] = seen["fiberId"][:1]
    single = n_visit == 1 and "STELLARPARAM" not in file
    if n_visit == 1:
        columns["visit"] = seen["visit"][:1]
    columns["nVisit"] = np.array([n_visit], np.int32)
    columns["pfsVisitHash"] = np.array([visit_hash(seen["visit"])], np.int64)
    identifiers = tuple(columns)
    if "STELLARPARAM" in file:
        columns |= _stellar_parameters(file)
    name = "pfsStar" if "STELLARPARAM" in file else "pfsSingle" if single else "pfsObject"
    notes: list[str] = []
    note = noting(notes)
    table = file.first_of(*reversed(TABLES))
    bits = _Bits.of_header(*(hdu for hdu in (table, file.first_of("MASK"), file.hdus[0]) if hdu is not None))
    if table is not None and not table.n_rows:
        raise InputError(f"{file.path}: HDU {table.name} has no rows: an empty coadd")

    if table is not None:
        _check_table(file, table)
    else:
        _check_images(file)

    def read(array: str, start: int, stop: int) -> tuple[list[Pixels], dict[int, str]]:
        if table is None:
            pixels, faults = _one_image(file, bits, note)
            return [pixels], faults
        where = f"HDU {table.name}"
        told = file.table(table, ["wavelength", "flux", "error", "mask"])
        starts = np.array([0, table.n_rows], np.int64)
        bad, faults = _bad_pixels(told["mask"], [bits], starts, where, note)
        units = table.unit("wavelength"), table.unit("flux")
        return [_pixels(told["wavelength"], told["flux"], told["error"], bad, starts, where, units)], faults

    return _survey_file(file, name, columns, identifiers, read, notes)


def _one_image(file: FitsFile, bits: _Bits, note: Callable[[str], None]) -> tuple[Pixels, dict[int, str]]:
    hdu = file["FLUX"]
    flux, mask, covar = file.image(hdu), file.image(file["MASK"]), file.image(file["COVAR"])
    if "WAVELENGTH" in file:
        wave, unit = file.image(file["WAVELENGTH"]), file["WAVELENGTH"].unit()
    else:
        wave, unit = _world_coordinates(file, hdu), str(hdu.header.get("CUNIT1", ""))
    if not (wave.shape == flux.shape == mask.shape == covar.shape[1:]):
        raise InputError(
            f"{file.path}: FLUX {flux.shape}, WAVELENGTH {wave.shape}, MASK {mask.shape} and COVAR {covar.shape} do "
            "not fit together"
        )
    starts = np.array([0, len(flux)], np.int64)
    bad, faults = _bad_pixels(mask, [bits], starts, "HDU MASK", note)
    error, negative = _independent(covar[0], covar[1], covar[2])
    if negative:
        note("HDU COVAR: negative variances; such pixels count as bad")
    return _pixels(wave, flux, error, bad, starts, "HDU FLUX", (unit, hdu.unit())), faults


def _world_coordinates(file: FitsFile, hdu: Hdu) -> NDArray[np.float64]:
    keys = ("CRVAL1", "CRPIX1", "CDELT1") if "CDELT1" in hdu.header else ("CRVAL1", "CRPIX1", "CD1_1")
    if not all(key in hdu.header for key in keys):
        raise InputError(
            f"{file.path}: HDU WAVELENGTH is missing, and the header of FLUX has no {', '.join(keys)}"
        )
    value, pixel, step = (float(hdu.header[key]) for key in keys)
    return np.asarray(value + (np.arange(hdu.shape[-1]) + 1 - pixel) * step, np.float64)


def _stellar_parameters(file: FitsFile) -> dict[str, NDArray]:
    """What the survey's own fit says of the star: v_los, and pfsStar_T_eff, … each with its error.

    Its labels are no truth to compare with, and have names of their own.
    """
    table = file.table(file["STELLARPARAM"])
    out: dict[str, NDArray] = {}
    for param, value, error in zip(table["param"], table["value"], table["valueErr"], strict=True):
        name = "v_los" if param == "v_los" else f"pfsStar_{param}"
        out.setdefault(name, np.array([value]))
        out.setdefault(f"{name}Err", np.array([error]))
    return out


# -- refused -------------------------------------------------------------------------------------------------------


def _refuse_merged(file: FitsFile) -> SurveyFile:
    raise InputError(
        f"{file.path}: a pfsMerged: counts in e-/nm that are not flux-calibrated; use the pfsCalibrated or pfsSingle "
        "of the same visit"
    )


def _refuse_catalogue(file: FitsFile) -> SurveyFile:
    raise InputError(
        f"{file.path}: a pfsStarCatalog: it holds no spectra; use the pfsStar, pfsObject or pfsCoadd files, and name "
        "this catalogue with --velocity"
    )


register(
    Layout(
        "pfsMerged",
        lambda file: all(name in file for name in ("FIBERID", "NORM", "CONFIG", "FLUX")),
        _refuse_merged,
    )
)
register(Layout("pfsStarCatalog", lambda file: "STARCATALOG" in file, _refuse_catalogue))
register(Layout("pfsCalibrated, pfsCoadd", _is_many, _open_many))
register(Layout("pfsSingle, pfsObject, pfsStar", _is_one, _open_one))
