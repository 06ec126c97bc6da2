"""Simulated stars as a user's own spectra show them: wave grid, resolution, noise, gaps and brightness of files.

    flux  = median-normalised emulated flux on the files' pixels, at their resolution
    error = e_r snr_r / snr,      lost = lost_r,      ln snr = ln snr_r + h z

with r a row of the files, drawn for every star alike, e_r its errors over its median flux, snr_r its median
signal-to-noise ratio, z a standard normal number, and h the width that a kernel estimate of so many rows needs
(Silverman 1986, equation 3.31), between `LEAST_SCATTER` and `LARGEST_SCATTER`.

*The star's own photons.* The errors of a spectrum hold the photons of the star that it was taken of, and files do not
say how large their share is. It is left in: a simulated star has the noise of an observed one of the same brightness,
pixel by pixel. That is right in level and, for faint stars, where the sky rules, in shape. For bright stars it is wrong
inside of lines: if photons make the share q of the variance, errors in a line of relative depth d of the simulated star
are too large by up to q d / 2, and where only the observed star has a line, too small by as much. What cannot happen is
that errors betray labels: they do not depend on the simulated star at all.

Design: every quantity of a star depends on the seed and its row alone, as everywhere in the simulator, and stars keep
their labels, velocity and reddening whatever files they are to look like.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from moefast.core.errors import InputError, WaveGridError
from moefast.core.random import NOISE_STREAM, add_noise, uniforms_of_rows
from moefast.core.text import counted
from moefast.spectra.grids import measured_grid
from moefast.spectra.opening import open_prepared
from moefast.spectra.prepared import Preparation
from moefast.spectra.quality import good_pixels
from moefast.spectra.source import Block, Failure
from moefast.spectra.spectrum_set import SpectrumSet
from moefast.spectra.telluric import Telluric

from .emulator import LABELS, Emulator
from .gaps import GAPS, GapKind
from .nuisance import redden
from .rows import (
    PARAMS,
    Settings,
    SimulatedBlock,
    calibrate_and_tilt,
    check_velocity,
    shifted,
    simulate_params,
    velocity_of,
)
from .spectrograph import BEYOND, LEAST_PIXELS, Spectrograph, emulated_fwhm, reachable, read_resolution
from .visit import RESOLVING_POWER, median_of_good

__all__ = ["OBSERVED_PARAMS", "Observed", "simulate_observed"]

MOST_ROWS, RUN = 4096, 64
"""Rows of the files that are kept, and rows that are read together."""
LEAST_SNR, LEAST_GOOD = 0.2, 0.1
"""Median signal-to-noise ratio and share of good pixels below which a row says nothing of how stars are observed."""
LEAST_SCATTER, LARGEST_SCATTER = 0.02, 0.3
"""Of ln snr about that of the row."""
SKY = 2
"""`targetType` of fibres on the sky."""
OBSERVED_PARAMS = {name: kind for name, kind in PARAMS.items() if name not in {"mag", "seeing"}} | {
    "line_spread": "float64",
    "observed_row": "int64",
}
"""Columns of the params table: no magnitude, as only the signal-to-noise ratio decides; observed_row counts the rows
that were kept."""
OTHER_GAPS = ("none", "random", "block", "edges")
"""Kinds of gaps that errors are calibrated over besides those of the files."""
_STREAM = 15


@dataclass(frozen=True, eq=False, repr=False)
class Observed:
    """How stars are observed, told by files.

    Attributes
    ----------
    spectrograph : Spectrograph
        Pixels and resolution.
    error : array of shape (m, p), float32
        Errors of the rows kept, over their median flux.
    lost : array of shape (m, p), bool
        True where a pixel of a row is bad.
    snr : array of shape (m,), float64
        Median of flux / error over good pixels.
    name : str
        Files and resolution in words.
    fingerprint : str
        SHA-256, as hex digits, of the files and the choices that were made.
    notes : list of str
        What users should know.
    failures : list of Failure
        Files and rows that could not be read.
    """

    spectrograph: Spectrograph
    error: NDArray[np.float32]
    lost: NDArray[np.bool_]
    snr: NDArray[np.float64]
    name: str
    fingerprint: str
    notes: list[str]
    failures: list[Failure]

    @classmethod
    def of_files(
        cls,
        paths: str | Path | Iterable[str | Path],
        *,
        resolution: str | None = None,
        medium: Literal["auto", "vacuum", "air"] = "auto",
        telluric: Telluric = "auto",
        emulator: Emulator | None = None,
    ) -> Observed:
        """What files of any layout say of grid, resolution, noise and gaps.

        Parameters
        ----------
        paths : path, folder, pattern, or several
            The first file that can be read gives the grid; the spectra of all are put on it.
        resolution : str, optional
            Resolving power ("4500") or FWHM in Å ("1.8A"). If absent, what the files say (DESI does), at most the
            emulator's; that of the emulator if they do not.
        medium, telluric
            As for `moefast.predict`.
        emulator : Emulator, optional
            To be used instead of the shipped one.

        Raises
        ------
        WaveGridError
            The files have no pixels where the emulator has spectra.
        InputError
            No file can be read, or no row has a star in it.
        MoefastError
            The resolution cannot be understood, or is sharper than the emulator's.
        """
        emulator = emulator or Emulator.load()
        paths = [paths] if isinstance(paths, str | Path) else list(paths)
        notes: list[str] = []
        spectrograph, power = _spectrograph(paths, emulator, resolution, medium, notes)
        spectra = open_prepared(
            paths, Preparation(spectrograph.wave, medium, telluric=telluric), on_error="skip"
        )
        try:
            blocks = list(_spread(spectra))
            fingerprint = spectra.fingerprint()
        finally:
            spectra.close()
        if not blocks:
            raise spectra.failures[0].error
        error, lost, snr, sky = (np.concatenate(each) for each in zip(*map(_of_block, blocks), strict=True))
        usable = (snr >= LEAST_SNR) & ((~lost).mean(1) >= LEAST_GOOD) & ~sky
        if not usable.any():
            raise InputError(
                f"{spectra.shards[0].path}: none of {counted(len(usable), 'row')} looked at is a star with a median "
                f"signal-to-noise ratio of at least {LEAST_SNR:g} and {LEAST_GOOD:.0%} of its pixels good between "
                f"{spectrograph.wave[0]:.0f} and {spectrograph.wave[-1]:.0f} Å; name files with stars"
            )
        if not usable.all():
            notes.append(
                f"left out: {np.count_nonzero(~usable)} of {counted(len(usable), 'row')} looked at: sky, or no star "
                "to be seen"
            )
        names = ", ".join(dict.fromkeys(shard.path.name for shard in spectra.shards[:3]))
        names += ", …" if len(spectra.shards) > 3 else ""
        digest = hashlib.sha256(f"{fingerprint} {resolution} {medium} {telluric}".encode())
        return cls(
            spectrograph, _filled(error[usable], lost[usable]), lost[usable], snr[usable], f"{names}, {power}",
            digest.hexdigest(), notes, list(spectra.failures),
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"Observed({str(self)!r})"

    def __str__(self) -> str:
        low, middle, high = np.quantile(self.snr, [0, 0.5, 1])
        return (
            f"like {self.name}: {len(self.wave)} pixels, {self.wave[0]:.1f} to {self.wave[-1]:.1f} Å, "
            f"{self.lost.mean():.0%} of them lost, {counted(len(self.snr), 'row')}, SNR {low:.1f} to {high:.1f} "
            "(median "
            f"{middle:.1f})"
        )

    @property
    def wave(self) -> NDArray[np.float64]:
        """Pixel centres, Å in vacuum."""
        return self.spectrograph.wave

    @property
    def scatter(self) -> float:
        """Width h of ln snr about that of a row."""
        width = 1.06 * float(np.std(np.log(self.snr))) * len(self.snr) ** -0.2
        return (
            LARGEST_SCATTER if len(self.snr) == 1 else float(np.clip(width, LEAST_SCATTER, LARGEST_SCATTER))
        )

    def draw(self, rows: NDArray[np.integer], *, seed: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Which row of the files each star is observed like, and its signal-to-noise ratio.

        Parameters
        ----------
        rows : array of shape (n,), integer ≥ 0
            Row of each star in its set.
        seed : int
        """
        uniform = uniforms_of_rows(rows, 2, seed=seed, stream=_STREAM)
        chosen = (uniform[:, 0] * len(self.snr)).astype(np.intp)
        return chosen, self.snr[chosen] * np.exp(self.scatter * ndtri(uniform[:, 1]))

    def gaps(self, first_row: int, *, seed: int) -> dict[str, GapKind]:
        """Kinds of gaps that errors should be calibrated over, the files' own first: see `moefast.simulate.gaps.GAPS`.

        Parameters
        ----------
        first_row : int
            Row of the survey that is row 0 of a set.
        seed : int
            Of the survey; stars have the gaps of the row that their noise is like.
        """

        def own(wave: NDArray, rows: NDArray, _: int) -> NDArray[np.bool_]:
            return self.lost[self.draw(np.asarray(rows) + first_row, seed=seed)[0]]

        return {"as observed": own} | {name: GAPS[name] for name in OTHER_GAPS}


def _spectrograph(
    paths: Sequence[str | Path],
    emulator: Emulator,
    resolution: str | None,
    medium: Literal["auto", "vacuum", "air"],
    notes: list[str],
) -> tuple[Spectrograph, str]:
    """Pixels and resolution of files as far as the emulator reaches, and the resolution in words."""
    low, high = emulator.wave_edges[[0, -1]]
    step = (high - low) / len(emulator.wave)
    grid = measured_grid(paths, low - BEYOND * step, high + BEYOND * step, medium=medium)
    wave = grid.wave
    sharpest = emulated_fwhm(wave)
    if resolution is not None:
        fwhm, power = read_resolution(resolution, wave), f"resolution {resolution}"
    elif grid.fwhm is not None:
        fwhm = np.maximum(grid.fwhm, sharpest)
        typical = float(np.median(wave / fwhm))
        power = f"resolving power {typical:.0f} as the file has it"
        sharper = float(np.mean(grid.fwhm < sharpest))
        if sharper:
            notes.append(
                f"{grid.path.name}: in {sharper:.0%} of the pixels the line-spread function is sharper than the "
                "emulator's, which is taken there"
            )
    else:
        fwhm, power = sharpest, f"resolving power {RESOLVING_POWER:.0f}"
        notes.append(
            f"{grid.path.name}: does not tell its resolution; that of the emulator is taken ({power}). Say "
            "--resolution if lines are wider"
        )
    covered = np.zeros(len(wave), bool)
    if len(wave) > 1:
        covered = reachable(emulator, wave, fwhm)
    if covered.sum() < LEAST_PIXELS:
        raise WaveGridError(
            f"{grid.path}: {covered.sum()} pixels lie where the emulator has spectra, {low:.1f} to {high:.1f} Å; at "
            f"least {LEAST_PIXELS} are needed"
        )
    return Spectrograph(emulator, wave[covered], fwhm[covered]), power


def _spread(spectra: SpectrumSet) -> Iterator[Block]:
    """Blocks of `RUN` rows, spread over a set."""
    names = ("targetType",) if "targetType" in spectra.columns else ()
    starts = np.arange(0, spectra.n_rows, RUN)
    for start in starts[np.unique(np.linspace(0, len(starts) - 1, MOST_ROWS // RUN).astype(int))].tolist():
        stop = min(start + RUN, spectra.n_rows)
        yield from spectra.blocks(RUN, rows=(start, stop), params=names, prefetch=False, on_error="skip")


def _of_block(block: Block) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Errors over the median flux, lost pixels, signal-to-noise ratio, and whether a row is sky."""
    good = good_pixels(block.flux, block.error, block.mask)
    lost = np.zeros(block.flux.shape, bool) if good is None else ~good
    level, snr = np.zeros((2, len(block)))
    for i, (flux, error, bad) in enumerate(zip(block.flux, block.error, lost, strict=True)):
        if not bad.all():
            level[i], snr[i] = np.median(flux[~bad]), np.median(flux[~bad] / error[~bad])
    dark = level <= 0
    snr[dark], level[dark] = 0.0, 1.0
    sky = np.zeros(len(block), bool)
    if "targetType" in block.params:
        sky = block.params["targetType"] == SKY
    return (block.error / level[:, None]).astype(np.float32), lost, snr, sky


def _filled(error: NDArray[np.float32], lost: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Errors whose bad pixels have those of the good ones beside them."""
    pixel = np.arange(error.shape[1])
    for row, bad in zip(error, lost, strict=True):
        if bad.any():
            row[bad] = np.exp(np.interp(pixel[bad], pixel[~bad], np.log(row[~bad])))
    return error


def simulate_observed(
    first: int,
    stop: int,
    *,
    seed: int,
    observed: Observed,
    settings: Settings | None = None,
    noisy: bool = True,
) -> SimulatedBlock:
    """Rows `first` to `stop` - 1 of the survey with this seed, observed like the spectra of files.

    Of a row only `observed_row`, the noise and the gaps depend on the files.

    Parameters
    ----------
    first, stop : int
        Row numbers, 0 <= first <= stop.
    seed : int
        0 to 2^64 - 1.
    observed : Observed
    settings : Settings, optional
        Labels, velocities, reddening, calibration errors, noise level, and of visits the width of the line-spread
        function and the tilt. Magnitude, seeing and sky are not those of these spectra, and are ignored.
    noisy : bool
        Whether to draw the noise.

    Returns
    -------
    SimulatedBlock
        With `OBSERVED_PARAMS` and a mask. Flux and error are divided by the median flux of the good pixels.

    Raises
    ------
    MoefastError
        If rows or seed are out of range, labels outside the emulator's, or velocities beyond its margin.
    """
    settings = settings or Settings()
    spectrograph = observed.spectrograph
    emulator, wave = spectrograph.emulator, spectrograph.wave
    check_velocity(settings, emulator, BEYOND)
    params = simulate_params(first, stop, seed=seed, settings=settings)
    params.setdefault("line_spread", np.ones(stop - first))
    labels = np.stack([params[name] for name in LABELS], axis=1)
    fine = shifted(
        emulator, labels, velocity_of(params), first, width=params["line_spread"], wave=spectrograph.fine_wave
    )
    flux = spectrograph.observe(fine)
    if any(settings.reddening):
        redden(flux, params["ebv"], wave, out=flux)
    if settings.calibration or "tilt" in params:
        calibrate_and_tilt(flux, params, settings, wave)
    chosen, snr = observed.draw(params["id"], seed=seed)
    lost = observed.lost[chosen]
    flux /= median_of_good(flux, lost)[:, None].astype(np.float32)
    factor = settings.noise_level * observed.snr[chosen] / snr
    error = observed.error[chosen] * factor[:, None].astype(np.float32)
    draws = add_noise(flux, error, seed, params["id"], stream=NOISE_STREAM) if noisy else None
    columns = params | {"observed_row": chosen, "snr": median_of_good(flux / error, lost)}
    return SimulatedBlock(first, {name: columns[name] for name in OBSERVED_PARAMS}, flux, error, draws, lost)
