"""What is odd about spectra as a whole, known before the first is scored.

Design: a sample of up to 256 rows, spread over the set, is read once (`sampling.py`); everything else is a function of
it. No number is ever changed: each oddity is told in one line, with what to do. Limits lie well outside of what
populations of stars, reddening up to E(B-V) = 0.3, calibration errors of 5 %, gaps and chance reach, so that a line
means something.

Scatter is measured by second differences of neighbouring pixels, in which stars are smooth and noise is not: of noisy
simulated spectra their robust spread is 1.00 of what the errors say, of clean ones 0.02 at an SNR of 10.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moefast.core.text import counted
from moefast.spectra.quality import LARGEST_ERROR
from moefast.spectra.sampling import SampledRows
from moefast.spectra.units import LIGHT_SPEED

__all__ = ["Oddity", "find_oddities", "noisy_already"]

F64 = NDArray[np.float64]

STRETCHES = 8
"""Stretches of the spectrum whose levels are compared."""
LEAST_PIXELS = 50
"""Good pixels, or second differences, that a number is made of."""
LEVEL, LEVEL_SCATTER = 0.035, 0.1
"""How far, in parts of itself, the level may be from the reference; and what is added for one star, by 1/√n for n."""
SLOPE, SLOPE_SCATTER = 0.27, 0.6
"""The same for ln of red over blue, end to end: E(B-V) = 0.3 with 5 % of calibration make 0.23, F_nu 0.39."""
BEND, BEND_SCATTER = 0.12, 0.3
"""The same for ln of the ends over the middle."""
FLAT, FLAT_SCATTER, LEAST_FLAT = 0.05, 0.07, 8
"""Slope of flux, its scatter over stars of the brighter half (0.17 where there is a continuum; fits to a continuum
are as noisy as the spectra), and stars, that tell a division."""
TOO_SMALL, TOO_LARGE, NOISE_FREE = 1.25, 0.8, 0.2
"""Scatter over error beyond which errors are odd; of pixels that were rebinned only the first tells anything."""
NOISY = 0.7
"""Scatter over error above which flux is not clean."""
LINES = 0.015
"""Scatter over error that sharp lines give at a signal-to-noise of one; it grows in proportion."""
SHIFT, SHIFT_SCATTER = 25.0, 200.0
"""How far, in km/s, lines may lie from those of the reference; and what is added for one star, by 1/√n for n."""
SHIFT_GAIN, SHIFT_FACTOR = 60.0, 1.3
"""How much more of χ² lines must explain there than at rest: by so much, and by this factor."""
FASTEST, SHIFT_STEP, SHIFT_EDGE = 600.0, 4.0, 45
"""Velocities that are looked at and their step, km/s; pixels at the ends that they may move out of sight."""
CONTINUUM_DEGREE = 5
AIR = -82.4
"""km/s by which wavelengths in air that are taken for vacuum move lines."""
NEAR_AIR = 40.0
"""How far from it, in km/s, lines may lie for air to be a cause."""
MOST_LOST = 0.05
"""Share of lost pixels from which on models that take spectra to be whole are wrong."""
MOST_MASKED = 0.55
"""Share of masked pixels; those where the Earth's atmosphere absorbs are 0.37."""
TOO_SMALL_A_NUMBER = 1e-22
"""Error whose inverse square single precision hardly holds."""
BEYOND_LIMIT = 0.02
"""Share of pixels whose errors are too large to count."""
ODD_SHARE = 0.5
"""Share of the rows that makes a remark about errors of one value."""
_TO_SIGMA = 1 / 0.6745
_NAMED_ROWS = 5


@dataclass(frozen=True)
class Oddity:
    """Something that is odd about spectra as a whole.

    Attributes
    ----------
    name : str
        What kind it is.
    words : str
        What was found and what to do, in one line.
    """

    name: str
    words: str


def find_oddities(
    sample: SampledRows,
    reference: NDArray | None,
    *,
    free_scale: bool = True,
    array: str = "flux",
    at_rest: bool = True,
    with_gaps: bool = True,
) -> list[Oddity]:
    """Everything that is odd about a sample.

    Parameters
    ----------
    sample : SampledRows
    reference : array of shape (p,) or None
        Typical spectrum of what the model was fitted on, on the sample's grid; without it level and slope are not
        looked at.
    free_scale : bool
        Whether the model takes flux on any scale; if not, its level counts.
    array : str
        Name of the array, for the words.
    at_rest : bool
        Whether spectra are taken to be at rest as they are; if velocities will be fitted, lines may lie anywhere.
    with_gaps : bool
        Whether the model weighs pixels by each star's own noise; if not, lost pixels count.
    """
    usable = sample.good.sum(1) >= LEAST_PIXELS
    found = [*_mask(sample), *_numbers(sample), *_dead(sample, usable), *_twins(sample, usable)]
    alive = usable & ~_constant(sample)
    if not alive.any():
        return found
    found += [] if with_gaps else _gaps(sample, alive)
    found += _one_error(sample, alive)
    found += _scatter(sample, alive, array)
    if reference is not None:
        found += _shape(sample, alive, np.asarray(reference, np.float64), free_scale)
        found += _shift(sample, alive, np.asarray(reference, np.float64)) if at_rest else []
    return found


def noisy_already(sample: SampledRows, remedy: str) -> list[Oddity]:
    """Whether flux that noise would be added to has its noise already.

    Parameters
    ----------
    sample : SampledRows
        Of the array that is said to be clean.
    remedy : str
        What to do.
    """
    alive = (sample.good.sum(1) >= LEAST_PIXELS) & ~_constant(sample)
    ratio, lines = _ratios(sample, alive)
    if not ratio.size or np.sqrt(max(float(np.median(ratio**2 - lines**2)), 0.0)) < NOISY:
        return []
    return [
        Oddity(
            "noisy already",
            f"flux scatters as its errors say ({np.median(ratio):.2f} times): it is noisy already, and noise would be "
            f"added twice; {remedy}",
        )
    ]


def _mask(sample: SampledRows) -> list[Oddity]:
    """Whether a mask says of most pixels that they are bad which have numbers like any other."""
    if sample.masked is None or sample.resampled:
        return []
    usual = np.isfinite(sample.flux) & np.isfinite(sample.error) & (sample.error > 0)
    shares = (sample.masked & usual).mean(1)
    if not shares.size or float(np.median(shares)) < MOST_MASKED:
        return []
    return [
        Oddity(
            "mask",
            f"the mask takes {np.median(shares):.0%} of the pixels away, though their flux and error are numbers like "
            "those of others: is it 1 where a pixel is good? Here a pixel is good where the mask is 0",
        )
    ]


def _gaps(sample: SampledRows, alive: NDArray[np.bool_]) -> list[Oddity]:
    lost = float(np.median(1 - sample.good[alive].mean(1)))
    if lost < MOST_LOST:
        return []
    return [
        Oddity(
            "gaps",
            f"{lost:.0%} of the pixels are lost, and this model weighs pixels as if there were no gaps: unless it was "
            "fitted on spectra with the same gaps, log g is worse than log_g_err says, and few flags tell; take a "
            "posterior (-m observed)",
        )
    ]


def _numbers(sample: SampledRows) -> list[Oddity]:
    """Whether flux is on a scale on which errors are too large to count, or too small for single precision."""
    usual = np.isfinite(sample.flux) & np.isfinite(sample.error) & (sample.error > 0)
    if sample.masked is not None:
        usual &= ~sample.masked
    if not usual.any():
        return []
    share = float((sample.error[usual] > LARGEST_ERROR).mean())
    typical = float(np.median(sample.error[usual]))
    level = float(np.median(np.abs(sample.flux[usual])))
    # An error that marks a bad pixel lies far above the flux; errors of a large unit do not.
    if share > BEYOND_LIMIT and level > LARGEST_ERROR / 100:
        what = f"{share:.0%} of the errors are above {LARGEST_ERROR:g}, and count as marks of bad pixels"
    elif typical < TOO_SMALL_A_NUMBER:
        what = f"errors of {typical:.1g} are too small to be weighed in single precision"
    else:
        return []
    return [Oddity("scale", f"{what}: divide flux and error by the median flux, or by any number near it")]


def _named(rows: NDArray) -> str:
    words = ", ".join(str(row) for row in rows[:_NAMED_ROWS])
    return f"row{'s' if len(rows) > 1 else ''} {words}{', …' if len(rows) > _NAMED_ROWS else ''}"


def _constant(sample: SampledRows) -> NDArray[np.bool_]:
    """Rows whose good pixels all hold one value."""
    low = np.where(sample.good, sample.flux, np.inf).min(1, initial=np.inf)
    high = np.where(sample.good, sample.flux, -np.inf).max(1, initial=-np.inf)
    return high <= low


def _dead(sample: SampledRows, usable: NDArray[np.bool_]) -> list[Oddity]:
    dead = sample.rows[usable & _constant(sample)]
    if not dead.size:
        return []
    return [
        Oddity(
            "dead",
            f"{dead.size} of {counted(len(sample.rows), 'spectrum')} looked at {'has' if dead.size == 1 else 'have'} "
            f"the same flux in every pixel ({_named(dead)}): "
            "dead fibres? Their log g means nothing; leave them out (--select)",
        )
    ]


def _twins(sample: SampledRows, usable: NDArray[np.bool_]) -> list[Oddity]:
    """Rows whose flux is that of another, bit by bit."""
    first: dict[bytes, int] = {}
    twins: list[tuple[int, int]] = []
    for i in np.flatnonzero(usable & ~_constant(sample)):
        other = first.setdefault(sample.flux[i].tobytes(), int(i))
        if other != i:
            twins.append((other, int(i)))
    if not twins:
        return []
    a, b = twins[0]
    return [
        Oddity(
            "identical",
            f"{len(twins)} of {counted(len(sample.rows), 'spectrum')} looked at "
            f"{'has' if len(twins) == 1 else 'have'} the flux of another, to the last bit (row "
            f"{sample.rows[b]} that of row {sample.rows[a]}): was one written several times?",
        )
    ]


def _one_error(sample: SampledRows, alive: NDArray[np.bool_]) -> list[Oddity]:
    low = np.where(sample.good, sample.error, np.inf).min(1, initial=np.inf)
    high = np.where(sample.good, sample.error, 0).max(1, initial=0)
    n = int((alive & (high <= low * (1 + 1e-6))).sum())
    if n <= ODD_SHARE * alive.sum():
        return []
    return [
        Oddity(
            "one error",
            f"in {n} of {counted(int(alive.sum()), 'spectrum')} looked at the error is one value in all pixels, which "
            "the noise of "
            "sky and detector never is: give the errors of the reduction",
        )
    ]


def _ratios(sample: SampledRows, alive: NDArray[np.bool_]) -> tuple[F64, F64]:
    """Scatter of second differences over what errors say, and what sharp lines make of it, of the fainter half."""
    ratio, snr = [], []
    for i in np.flatnonzero(alive):
        x, e, good = sample.flux[i].astype(np.float64), sample.error[i].astype(np.float64), sample.good[i]
        three = good[:-2] & good[1:-1] & good[2:]
        if three.sum() < LEAST_PIXELS:
            continue
        with np.errstate(all="ignore"):
            bend = x[:-2] - 2 * x[1:-1] + x[2:]
            noise = np.sqrt(e[:-2] ** 2 + 4 * e[1:-1] ** 2 + e[2:] ** 2)
            ratio.append(_TO_SIGMA * np.median(np.abs(bend[three] / noise[three])))
            snr.append(max(np.median(x[good] / e[good]), 0.0))
    ratios, levels = np.array(ratio, np.float64), np.array(snr, np.float64)
    fainter = levels <= (np.median(levels) if levels.size else 0)
    return ratios[fainter], LINES * levels[fainter]


def _scatter(sample: SampledRows, alive: NDArray[np.bool_], array: str) -> list[Oddity]:
    ratio, lines = _ratios(sample, alive)
    if not ratio.size:
        return []
    typical = float(np.median(ratio))
    # Rebinned pixels share their noise, those of a coarser grid most of it: that they scatter less says nothing.
    if typical < NOISE_FREE and not sample.resampled:
        return [
            Oddity(
                "noise-free",
                f"the array {array!r} looks noise-free (neighbouring pixels scatter {typical:.2g} times what the "
                "errors say): R² and scatter are better here than observed spectra with these errors will give; "
                "`moefast evaluate` adds the noise",
            )
        ]
    if typical < TOO_LARGE and not sample.resampled:
        return [
            Oddity(
                "errors too large",
                f"neighbouring pixels scatter {typical:.2g} times what the errors say: errors are too large, or flux "
                "was smoothed; log_g_err will be wrong: give the errors of these pixels",
            )
        ]
    if float(np.median(ratio / np.sqrt(1 + lines**2))) > TOO_SMALL:
        return [
            Oddity(
                "errors too small",
                f"neighbouring pixels scatter {typical:.2g} times what the errors say: errors are too small, are not "
                "1σ (variances?), or cosmic rays are not masked; log_g_err will be too small: give errors that hold",
            )
        ]
    return []


def _levels(sample: SampledRows, alive: NDArray[np.bool_], divisor: F64) -> F64:
    """Median of flux over a divisor in each stretch of each star (n, STRETCHES); NaN where too few pixels are good."""
    edges = np.linspace(0, len(sample.wave), STRETCHES + 1).astype(int)
    levels = np.full((int(alive.sum()), STRETCHES), np.nan)
    for i, row in enumerate(np.flatnonzero(alive)):
        for k, (a, b) in enumerate(pairwise(edges)):
            good = sample.good[row, a:b] & (divisor[a:b] > 0)
            if good.sum() >= min(LEAST_PIXELS, (b - a) // 2):
                levels[i, k] = np.median(sample.flux[row, a:b][good] / divisor[a:b][good])
    return levels


def _slopes_and_bends(levels: F64) -> tuple[F64, F64]:
    """Ln of red over blue, from end to end, and of ends over middle, of stars whose stretches reach far enough."""
    place = (np.arange(STRETCHES) + 0.5) / STRETCHES - 0.5
    slopes, bends = [], []
    for level in levels:
        there = np.flatnonzero(level > 0)
        if len(there) < 4 or there[-1] - there[0] < 5:
            continue
        logs = np.log(level[there])
        slopes.append(np.polyfit(place[there], logs, 1)[0])
        if there[0] == 0 and there[-1] == STRETCHES - 1:
            # Stretches next to the middle may be lost; what is left of the inner half stands for it.
            inner = logs[np.abs(place[there]) < 0.25]
            if inner.size:
                bends.append(0.5 * (logs[0] + logs[-1]) - inner.mean())
    return np.array(slopes, np.float64), np.array(bends, np.float64)


def _shape(sample: SampledRows, alive: NDArray[np.bool_], reference: F64, free_scale: bool) -> list[Oddity]:
    levels = _levels(sample, alive, reference)
    found = []
    stars = np.array([np.median(level[np.isfinite(level)]) for level in levels if np.isfinite(level).any()])
    if stars.size and not free_scale:
        level = float(np.median(stars))
        if abs(level - 1) > LEVEL + LEVEL_SCATTER / np.sqrt(stars.size):
            found.append(
                Oddity(
                    "level",
                    f"flux lies at {level:.3g} times the level of the spectra that the model was fitted on, and this "
                    "model takes the level for real: divide flux and error of each spectrum by its median flux, or "
                    "take a posterior (-m observed), whose scale is free",
                )
            )
    if (flat := _flat(sample, alive)) is not None:
        return [*found, flat]
    slopes, bends = _slopes_and_bends(levels)
    if slopes.size:
        slope = float(np.median(slopes))
        if abs(slope) > SLOPE + SLOPE_SCATTER / np.sqrt(slopes.size):
            what = "redder" if slope > 0 else "bluer"
            cause = (
                "F_nu where F_lambda is expected, strong reddening, or a wrong flux calibration"
                if slope > 0
                else "light of another unit than F_lambda, hot stars, or a wrong flux calibration"
            )
            found.append(
                Oddity(
                    "slope",
                    f"from blue to red end the spectra rise {np.exp(slope):.2f} times as much as those that the model "
                    f"was fitted on, {what} than reddening and calibration make them: {cause}; check the unit of flux",
                )
            )
    if bends.size:
        bend = float(np.median(bends))
        if abs(bend) > BEND + BEND_SCATTER / np.sqrt(bends.size):
            found.append(
                Oddity(
                    "bend",
                    f"against their middle the ends of the spectra are {np.exp(bend):.2f} times as bright as in those "
                    "that the model was fitted on: check flux calibration and sky subtraction",
                )
            )
    return found


def _shift(sample: SampledRows, alive: NDArray[np.bool_], reference: F64) -> list[Oddity]:
    """Whether the mean spectrum has the lines of the reference at another velocity.

    The mean of the normalised spectra, weighed by their noise, is compared with the lines of the reference, moved: of
    lines L(v) of free strength, χ² explained is (Σ w d L)² / Σ w L².
    """
    wave, n = sample.wave, int(alive.sum())
    if len(wave) < 4 * SHIFT_EDGE:
        return []
    x = 2 * (wave - wave[0]) / (wave[-1] - wave[0]) - 1
    smooth = np.polynomial.Legendre.fit(x, reference, CONTINUUM_DEGREE)(x)
    if not (smooth > 0).all():
        return []
    polynomials = np.polynomial.legendre.legvander(x, CONTINUUM_DEGREE)
    total, weight = np.zeros(len(wave)), np.zeros(len(wave))
    for row in np.flatnonzero(alive):
        good = sample.good[row]
        flux, error = (np.where(good, each[row] / smooth, 1) for each in (sample.flux, sample.error))
        w = np.where(good, 1 / error.astype(np.float64) ** 2, 0)
        level = polynomials @ np.linalg.lstsq(polynomials * np.sqrt(w)[:, None], flux * np.sqrt(w))[0]
        if not (level[good] > 0).all():
            continue
        total += np.where(good, w * level * (flux - level), 0)
        weight += w * level**2
    weight[:SHIFT_EDGE] = weight[-SHIFT_EDGE:] = 0
    seen = weight > 0
    if seen.sum() < LEAST_PIXELS:
        return []
    weight, mean = weight[seen], total[seen] / weight[seen]
    mean -= np.average(mean, weights=weight)
    velocities = np.arange(-FASTEST, FASTEST + SHIFT_STEP / 2, SHIFT_STEP)
    explained = np.zeros(len(velocities))
    for k, velocity in enumerate(velocities):
        lines = np.interp(wave[seen] / (1 + velocity / LIGHT_SPEED), wave, reference / smooth - 1)
        lines -= np.average(lines, weights=weight)
        explained[k] = max(float(np.sum(weight * mean * lines)), 0) ** 2 / float(np.sum(weight * lines**2))
    best = int(explained.argmax())
    at_rest, velocity = explained[len(velocities) // 2], float(velocities[best])
    if abs(velocity) < SHIFT + SHIFT_SCATTER / np.sqrt(n) or explained[best] < max(
        at_rest + SHIFT_GAIN, at_rest * SHIFT_FACTOR
    ):
        return []
    air = (
        f"wavelengths in air, which are {AIR:.0f} km/s off (--wave-medium air)? "
        if abs(velocity - AIR) < NEAR_AIR
        else ""
    )
    return [
        Oddity(
            "shift",
            f"lines lie {velocity:+.0f} km/s from those of the spectra that the model was fitted on: {air}Stars that "
            "move (--velocity)? log g is right only of spectra at rest in vacuum",
        )
    ]


def _flat(sample: SampledRows, alive: NDArray[np.bool_]) -> Oddity | None:
    """Whether spectra of all stars are flat alike, as division by a continuum makes them."""
    with np.errstate(all="ignore"):
        ratio = np.where(sample.good[alive], sample.flux[alive] / sample.error[alive], np.nan)
        snr = np.full(len(alive), -np.inf)
        snr[alive] = np.nanmedian(ratio, axis=1)
    brighter = alive & (snr >= np.median(snr[alive]))
    if brighter.sum() < LEAST_FLAT:
        brighter = alive
    slopes, _ = _slopes_and_bends(_levels(sample, brighter, np.ones(len(sample.wave))))
    if slopes.size < LEAST_FLAT:
        return None
    slope = float(np.median(slopes))
    scatter = 1.4826 * float(np.median(np.abs(slopes - slope)))
    if abs(slope) > FLAT or scatter > FLAT_SCATTER:
        return None
    return Oddity(
        "continuum",
        f"the spectra are flat, all alike (slope {slope:+.3f} ± {scatter:.3f} end to end): they look divided by a "
        "continuum, which takes away what the model knows stars by; give F_lambda as it was measured",
    )
