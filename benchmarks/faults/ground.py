"""What all campaigns need: spectra in several layouts, models, and what is right for them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from astropy.io import fits

from moefast.core.errors import MoefastError
from moefast.model import Model
from moefast.predicting.files import predict
from moefast.protocol.evaluate import Evaluation, evaluate
from moefast.simulate import simulate_file
from moefast.spectra.quality import Flag
from moefast.spectra.spectrum_set import open_spectra
from moefast.spectra.tables import read_table

__all__ = ["N_SPECTRA", "SUFFIXES", "Ground", "options_of", "prepare"]

N_SPECTRA = 8
SUFFIXES = (".h5", ".parquet", ".fits")
_AT_REST: dict[str, Any] = {"velocity": 0.0}
"""Options for files of surveys: to fit velocities takes a second, and damage does the same without."""
_NUMBERS = ("log_g", "log_g_err", "chi2", "flag", "snr_median")


@dataclass(frozen=True)
class Ground:
    """What all campaigns need.

    Attributes
    ----------
    folder : Path
        For everything.
    spectra : Path
        Spectra in the layout of the simulator.
    variants : dict of str to Path
        The same stars stored otherwise, and those in layouts of surveys.
    tables : dict of str to dict
        For each variant the table that is right.
    model, small : Model
        The default model, and one that is written quickly.
    evaluation : Evaluation
        Of the first variant.
    """

    folder: Path
    spectra: Path
    variants: dict[str, Path]
    tables: dict[str, dict[str, np.ndarray]]
    model: Model
    small: Model
    evaluation: Evaluation

    @property
    def log(self) -> Path:
        """What a case says; beside the folder of the case, so that nothing but results lies in that."""
        return self.folder / "log"

    def fresh(self) -> Path:
        """An empty folder for one case."""
        place = self.folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place

    def is_right(self, path: Path, variant: str = "contiguous") -> bool:
        """Whether a table has the right numbers, and the right identifiers as far as it has any."""
        try:
            columns, _ = read_table(path)
        except MoefastError:
            return False
        expected = self.tables[variant]
        return set(_NUMBERS) <= set(columns) <= set(expected) and all(
            np.array_equal(values, expected[name], equal_nan=values.dtype.kind == "f")
            for name, values in columns.items()
        )

    def is_right_or_marked(self, path: Path, variant: str) -> bool:
        """Whether a table is right but for rows that are marked as unreadable."""
        try:
            columns, _ = read_table(path)
        except MoefastError:
            return False
        expected = self.tables[variant]
        if not set(_NUMBERS) <= set(columns) <= set(expected):
            return False
        lost = (columns["flag"] & np.uint32(Flag.NO_DATA)) != 0
        return bool(np.isnan(columns["log_g"][lost]).all()) and all(
            np.array_equal(
                columns[name][~lost], expected[name][~lost], equal_nan=columns[name].dtype.kind == "f"
            )
            for name in columns
        )


def options_of(path: Path) -> dict[str, Any]:
    """Options of `predict` for a variant."""
    return _AT_REST if path.suffix == ".fits" else {}


def prepare(folder: Path) -> Ground:
    """Simulate the spectra, predict them undisturbed, and load all code that the cases will need."""
    spectra = folder / "spectra.h5"
    simulate_file(spectra, N_SPECTRA, seed=1)
    variants = {
        "contiguous": spectra,
        "compressed": _compressed(spectra, folder / "compressed.h5"),
        "DESI": _desi(spectra, folder / "coadd-1.fits"),
        "PFS": _pfs_object(spectra, folder / "pfsObject-1.fits"),
    }
    model = Model.load("observed")
    tables = {}
    for name, path in variants.items():
        table = folder / f"right-{path.stem}.h5"
        predict(path, model, table, backend="cpu", **options_of(path))
        tables[name] = read_table(table)[0]
    for suffix in SUFFIXES:
        predict(spectra, model, folder / f"right{suffix}", backend="cpu")
    small = Model.load("z0")
    evaluation = evaluate(spectra, small, backend="cpu")
    return Ground(folder, spectra, variants, tables, model, small, evaluation)


def _compressed(spectra: Path, path: Path) -> Path:
    """The same spectra in compressed chunks with a mask."""
    with h5py.File(spectra) as source, h5py.File(path, "w") as target:
        for name in ("flux", "error", "noisy"):
            values = source[f"dataset/arrays/{name}/value"][()]
            target.create_dataset(
                f"dataset/arrays/{name}/value", data=values, chunks=(4, 1024), compression="gzip"
            )
        bad = np.zeros(values.shape, np.int32)
        bad[::2, 100:400] = 1
        target.create_dataset(
            "dataset/arrays/mask/value", data=bad, chunks=(4, 1024), compression="gzip", shuffle=True
        )
        target["spectrumdataset/wave"] = source["spectrumdataset/wave"][()]
        source.copy("dataset/params", target["dataset"])
    return path


def _read(spectra: Path) -> tuple[np.ndarray, Any]:
    opened = open_spectra(spectra)
    return opened.wave, next(iter(opened.blocks(N_SPECTRA, prefetch=False)))


def _named(hdu: Any, name: str) -> Any:
    hdu.name = name
    return hdu


def _table(name: str, **columns: tuple[str, Any]) -> Any:
    made = [fits.Column(key, form, array=array) for key, (form, array) in columns.items()]
    return _named(fits.BinTableHDU.from_columns(made), name)


def _desi(spectra: Path, path: Path) -> Path:
    """Two arms of a coadd."""
    wave, block = _read(spectra)
    n = len(block)
    middle = len(wave) // 2
    hdus = [
        fits.PrimaryHDU(),
        _table(
            "FIBERMAP",
            TARGETID=("K", 39633345008634465 + np.arange(n)),
            TARGET_RA=("D", np.full(n, 105.5)),
            OBJTYPE=("3A", ["TGT"] * n),
            COADD_FIBERSTATUS=("J", np.zeros(n, int)),
        ),
    ]
    for arm, part in (("R", slice(0, middle + 40)), ("Z", slice(middle - 40, None))):
        image = fits.ImageHDU(10 * block.flux[:, part], name=f"{arm}_FLUX")
        image.header["BUNIT"] = "10**-17 erg/(s cm2 Angstrom)"
        hdus += [
            fits.ImageHDU(wave[part], name=f"{arm}_WAVELENGTH"),
            image,
            fits.ImageHDU(0.01 / block.error[:, part] ** 2, name=f"{arm}_IVAR"),
            fits.ImageHDU(np.zeros(block.flux[:, part].shape, "i4"), name=f"{arm}_MASK"),
        ]
    fits.HDUList(hdus).writeto(path)
    return path


def _pfs_object(spectra: Path, path: Path) -> Path:
    """One star of several visits; PFS stores f_ν in nJy against nm."""
    wave, block = _read(spectra)
    to_nu = 1e-17 * wave**2 / 2.99792458e18 / 1e-32
    nu, nu_error = (10 * a[0] * to_nu for a in (block.flux, block.error))
    target = _table("TARGET", filterName=("5A", ["i_hsc"]), fiberFlux=("E", [1.0]))
    target.header.update(
        {"CATID": 1, "TRACT": 1, "PATCH": "1,1", "OBJID": 77, "RA": 1.0, "DEC": 2.0, "HIERARCH TARGETTYPE": 1}
    )
    mask = fits.ImageHDU(np.zeros(len(wave), "i4"), name="MASK")
    mask.header["MP_BAD"], mask.header["MP_CR"] = 0, 3
    hdus = [
        fits.PrimaryHDU(),
        fits.ImageHDU(nu.astype("f4"), name="FLUX"),
        mask,
        fits.ImageHDU(wave / 10, name="WAVELENGTH"),
        target,
        fits.ImageHDU(np.stack([nu_error**2] * 3).astype("f4"), name="COVAR"),
        _table(
            "OBSERVATIONS",
            visit=("J", 1 + np.arange(3)), arm=("3A", ["bmn"] * 3), fiberId=("J", np.full(3, 116)),
        ),
        _table(
            "FLUX_TABLE",
            wavelength=("D", wave / 10), flux=("E", nu), error=("E", nu_error), mask=("K", 0 * nu),
        ),
    ]  # fmt: skip
    fits.HDUList(hdus).writeto(path)
    return path
