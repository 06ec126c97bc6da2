"""How fast files of surveys are predicted, against merely reading them with astropy in the same run.

    python -m moefast.benchmarks.survey_files FOLDER --rows 20000 --files 5000

writes a DESI coadd of so many rows and so many pfsObject files of one star each to FOLDER (stars of `z0` with noise;
62 kB a row and 0.5 MB a file, in the sizes of real ones), reads the flux, error and mask of each with astropy, reads
them with `moefast.spectra` alone, and predicts them with a model: as spectra at rest, and the first of them with fitted
velocities. Files are read once before: all find them in the cache of the system, as far as it has room, and differ by
their own work. Nothing of this is compared with an absolute time. Files are written row by row and removed at the end
with --remove.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from moefast.core.errors import BenchmarkError
from moefast.core.text import counted, table
from moefast.model import Model
from moefast.predicting.files import predict
from moefast.simulate.source import SimulatedSpectra
from moefast.spectra.opening import open_prepared
from moefast.spectra.prepared import Preparation

__all__ = ["run", "write_coadd", "write_objects"]

C = 2.99792458e18
"""Å/s."""
ROWS = 512
"""Spectra that are read together."""
FITTED = 2000
"""Spectra at most whose velocities are fitted: that costs the same for every one."""
WAVE_R, WAVE_Z = 5760 + 0.8 * np.arange(2326), 7520 + 0.8 * np.arange(2881)
BITS = {"BAD": 0, "SAT": 1, "INTRP": 2, "CR": 3, "SUSPECT": 7, "NO_DATA": 8}
GRID_PIXELS = 13_293
"""Pixels of the merged grid of a pfsObject, which its FLUX, MASK, SKY and COVAR have."""


def _stars(n: int) -> tuple[NDArray, NDArray, NDArray]:
    """Wavelengths of the simulator, noisy flux and errors of `n` stars, few of them different."""
    spectra = SimulatedSpectra.of_set("z0", rows=(0, min(n, ROWS)))
    block = next(iter(spectra.blocks(ROWS, array="noisy")))
    pick = np.arange(n) % len(block)
    return spectra.wave, block.flux[pick], block.error[pick]


def write_coadd(path: Path, n: int) -> None:
    """A DESI coadd of R and Z arms with `n` rows."""
    wave, flux, error = _stars(min(n, ROWS))
    pick = np.arange(n) % len(flux)
    target = fits.BinTableHDU.from_columns(
        [
            fits.Column("TARGETID", "K", array=39_633_345_008_634_465 + np.arange(n)),
            fits.Column("TARGET_RA", "D", array=np.full(n, 105.5)),
            fits.Column("TARGET_DEC", "D", array=np.full(n, 56.7)),
            fits.Column("OBJTYPE", "3A", array=["TGT"] * n),
            fits.Column("COADD_FIBERSTATUS", "J", array=np.zeros(n, int)),
        ],
        name="FIBERMAP",
    )
    fits.HDUList([fits.PrimaryHDU(), target]).writeto(path)
    for arm, grid in (("R", WAVE_R), ("Z", WAVE_Z)):
        there = (grid >= wave[0]) & (grid <= wave[-1])
        on_grid = np.ones((len(flux), len(grid)), np.float32)
        ivar = np.full_like(on_grid, 25)
        for i in range(len(flux)):
            on_grid[i, there] = np.interp(grid[there], wave, flux[i])
            ivar[i, there] = np.interp(grid[there], wave, error[i]) ** -2
        fits.append(path, grid, fits.Header({"EXTNAME": f"{arm}_WAVELENGTH"}))
        _append(path, f"{arm}_FLUX", on_grid, pick)
        _append(path, f"{arm}_IVAR", ivar, pick)
        _append(path, f"{arm}_MASK", np.zeros(on_grid.shape, "i4"), pick)


def _append(path: Path, name: str, rows: NDArray, pick: NDArray[np.integer]) -> None:
    """An image of the rows `pick`, which need not fit into memory."""
    header = fits.ImageHDU(rows, name=name).header
    header["NAXIS2"] = len(pick)
    stored = rows.astype(rows.dtype.newbyteorder(">"))
    with open(path, "ab") as file:
        file.write(header.tostring().encode())
        for start in range(0, len(pick), ROWS):
            file.write(stored[pick[start : start + ROWS]].tobytes())
        file.write(bytes(-len(pick) * rows[0].nbytes % 2880))


def write_objects(folder: Path, n: int) -> None:
    """`n` pfsObject files of one star each: one is written by astropy, the others are it with other numbers."""
    wave, flux, error = _stars(min(n, 64))
    nu = flux * 1e-17 * wave**2 / C / 1e-32
    nu_error = error * 1e-17 * wave**2 / C / 1e-32
    template = folder / "template.fits"
    target = fits.BinTableHDU.from_columns([fits.Column("filterName", "5A", array=["i_hsc"])], name="TARGET")
    target.header.update(
        {"CATID": 10092, "TRACT": 1, "PATCH": "1,1", "OBJID": 1_000_000_000, "RA": 229.6, "DEC": 67.2}
    )
    target.header["HIERARCH TARGETTYPE"] = 1
    observations = fits.BinTableHDU.from_columns(
        [
            fits.Column("visit", "J", array=123064 + np.arange(11)),
            fits.Column("arm", "3A", array=["bmn"] * 11),
            fits.Column("fiberId", "J", array=np.full(11, 116)),
        ],
        name="OBSERVATIONS",
    )
    merged = np.zeros(GRID_PIXELS, "f4")
    mask = fits.CompImageHDU(np.zeros(GRID_PIXELS, "i4"), name="MASK")
    for name, bit in BITS.items():
        mask.header[f"HIERARCH MP_{name}"] = bit
    rows = fits.BinTableHDU.from_columns(
        [
            fits.Column("wavelength", "D", unit="nm", array=wave / 10),
            fits.Column("flux", "E", unit="nJy", array=nu[0].astype("f4")),
            fits.Column("error", "E", unit="nJy", array=nu_error[0].astype("f4")),
            fits.Column("mask", "K", array=np.zeros(len(wave), int)),
        ],
        name="FLUX_TABLE",
    )
    fits.HDUList(
        [
            fits.PrimaryHDU(), fits.ImageHDU(merged, name="FLUX"), mask,
            fits.ImageHDU(np.linspace(380, 1260, GRID_PIXELS), name="WAVELENGTH"), target,
            fits.ImageHDU(merged, name="SKY"), fits.ImageHDU(np.zeros((3, GRID_PIXELS), "f4"), name="COVAR"),
            observations, rows,
        ]
    ).writeto(template)  # fmt: skip
    whole = bytearray(template.read_bytes())
    template.unlink()
    with fits.open(_as_file(bytes(whole))) as file:
        begin = file["FLUX_TABLE"].fileinfo()["datLoc"]
    layout = np.dtype([("wavelength", ">f8"), ("flux", ">f4"), ("error", ">f4"), ("mask", ">i8")])
    table_rows = np.frombuffer(whole, layout, len(wave), begin)
    at = whole.index(b"OBJID")
    for i in range(n):
        table_rows["flux"], table_rows["error"] = nu[i % len(nu)], nu_error[i % len(nu)]
        whole[at + 10 : at + 30] = f"{1_000_000_000 + i:>20d}".encode()
        (folder / f"pfsObject-{i:06d}.fits").write_bytes(whole)


def _as_file(data: bytes) -> Any:
    import io

    return io.BytesIO(data)


def _read_coadd(path: Path) -> int:
    with fits.open(path, memmap=True) as file:
        n = len(file["FIBERMAP"].data["TARGETID"])
        total = 0.0
        for name in ("FLUX", "IVAR", "MASK"):
            for arm in "RZ":
                data = file[f"{arm}_{name}"].data
                for start in range(0, n, ROWS):
                    # In native byte order: what any use of it needs.
                    total += float(np.asarray(data[start : start + ROWS], "f4")[:, 0].sum())
    return n


def _read_objects(folder: Path) -> int:
    n = 0
    for path in sorted(folder.glob("*.fits")):
        with fits.open(path) as file:
            _ = file["TARGET"].header["OBJID"], file["OBSERVATIONS"].data["visit"]
            rows = file["FLUX_TABLE"].data
            for name in ("wavelength", "flux", "error", "mask"):
                np.asarray(rows[name]).sum()
        n += 1
    return n


def _read_bytes(paths: list[Path]) -> int:
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            memory = bytearray(1 << 22)
            while file.readinto(memory):
                pass
    return len(paths)


def _prepare(paths: str, model: Model) -> int:
    spectra = open_prepared(paths, Preparation(model.mixture.wave))
    n = sum(len(block) for block in spectra.blocks(ROWS))
    spectra.close()
    return n


def _timed(work: Callable[[], int], n: int) -> tuple[float, float]:
    """Spectra per second of the clock, and per second that all threads together worked."""
    begin = time.perf_counter(), time.process_time()
    found = work()
    seconds = time.perf_counter() - begin[0], time.process_time() - begin[1]
    if found != n:
        raise BenchmarkError(f"{counted(found, 'spectrum')} read or predicted, {n} expected")
    return n / seconds[0], n / seconds[1]


def run(folder: Path, kind: str, n: int, model: Model, repeats: int = 3) -> dict[str, Any]:
    """Rates of each way to read `n` spectra of a kind, "coadd" or "objects": by the clock and by the work of a core."""
    place = folder / kind
    if not place.exists():
        place.mkdir(parents=True)
        if kind == "coadd":
            write_coadd(place / "coadd.fits", n)
        else:
            write_objects(place, n)
    paths = sorted(place.glob("*.fits"))
    ways: dict[str, Callable[[], int]] = {
        "bytes": lambda: _read_bytes(paths) and n,
        "astropy": (lambda: _read_coadd(paths[0])) if kind == "coadd" else (lambda: _read_objects(place)),
        "moefast reads": lambda: _prepare(str(place), model),
        "moefast predicts": lambda: (
            predict(place, model, place / "table.h5", overwrite=True, velocity=0.0).n_rows
        ),
        "velocities fitted": lambda: (
            predict(place, model, place / "table.h5", overwrite=True, limit=min(n, FITTED)).n_rows
        ),
    }
    # Compiled code, and files in the cache of the system.
    predict(paths[0], model, limit=1)
    predict(paths[0], model, limit=1, velocity=0.0)
    _read_bytes(paths)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            rates[name].append(_timed(work, min(n, FITTED) if name == "velocities fitted" else n))
    return {"kind": kind, "spectra": n, "bytes": sum(path.stat().st_size for path in paths), "rates": rates}


@click.command()
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--rows", type=click.IntRange(1), default=20_000, show_default=True, help="Of the DESI coadd.")
@click.option("--files", type=click.IntRange(2), default=5_000, show_default=True, help="Of one star each.")
@click.option("-m", "--model", default="z0", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--remove", is_flag=True, help="Remove the files that were written, at the end.")
@click.option("--out", type=click.Path(dir_okay=False), help="JSON to write.")
def main(folder: str, rows: int, files: int, model: str, repeats: int, remove: bool, out: str | None) -> None:
    """Measure and print."""
    chosen = Model.load(model)
    results = []
    for kind, n in (("coadd", rows), ("objects", files)):
        result = run(Path(folder), kind, n, chosen, repeats)
        results.append(result)
        if remove:
            shutil.rmtree(Path(folder) / kind)
        best = {name: np.max(samples, axis=0) for name, samples in result["rates"].items()}
        click.echo(f"{result['kind']}: {result['spectra']:,} spectra, {result['bytes'] / 1e6:,.0f} MB")
        lines = [
            [name, *(f"{each:,.0f}" for each in rate), *(f"{each:.2f}" for each in rate / best["astropy"])]
            for name, rate in best.items()
        ]
        header = [
            "",
            "spectra/s",
            "per second of a core",
            "of astropy's",
            "of astropy's per second of a core",
        ]
        click.echo("\n".join(table(header, lines)))
    if out is not None:
        Path(out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
