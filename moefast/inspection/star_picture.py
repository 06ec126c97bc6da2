"""The picture of a star: spectrum and model, residuals, the calcium triplet, the posterior of log g, and the numbers.

Design: the frame of the spectrum is set by the model and the smoothed flux, so that sky spikes and the noise of bad
pixels do not set it; pixels beyond it are counted, not hidden. What a pixel says of the star is its flux over its
error: residuals are in units of the error, and those of several pixels together show what a single one cannot.
"""

from __future__ import annotations

from moefast.pages.drawing import (
    AXES,
    LIGHT,
    Palette,
    check_suffix,
    legend_below,
    literal,
    single,
    styled,
    write,
)

# isort: split
import os
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moefast.inspection.lines import CALCIUM, lines_within
from moefast.inspection.smoothing import FRAME, frame, smoothed
from moefast.inspection.star import Star, describe

__all__ = ["draw_star", "figure", "small_picture"]

F64 = NDArray[np.float64]

SMOOTHING, SMOOTHING_CLOSE = 9, 5
"""Pixels, odd, that the smoothed flux is a mean of: over the whole range, and around the calcium triplet."""
SMALL_SMOOTHING, SMALL_STEP = 15, 5
"""Pixels, odd, that the flux of a small picture is a mean of; it shows every fifth."""
TOGETHER = 15
"""Pixels, odd, whose residuals are taken together."""
LARGEST_PULL = 6.0
"""Errors beyond which residuals are drawn at the edge."""
LEVELS = (0.683, 0.954)
"""Probability within the contours."""
_LINE_ROLES = {
    "Ca II": "third",
    "Na I": "first",
    "Mg I": "second",
    "K I": "first",
    "Fe I": "muted",
    "Paschen": "own",
}


def draw_star(star: Star, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Draw a star into a PNG, SVG or PDF file, by the end of its name.

    Raises
    ------
    OutputError
        The name has another end, or the file cannot be written.

    Examples
    --------
    ::

        moefast.draw_star(moefast.look_at("spectra.h5", row=12), "star.png")
    """
    check_suffix(path)
    with styled(LIGHT):
        write(figure(star, LIGHT), path, dpi=130, overwrite=overwrite)


def figure(star: Star, palette: Palette = LIGHT) -> Figure:
    """The picture of a star; call it within `moefast.pages.drawing.styled`.

    Parameters
    ----------
    star : Star
    palette : mapping
        Colours by their roles.
    """
    canvas = Figure(figsize=(15, 9), facecolor=palette["surface"])
    upper = canvas.add_gridspec(
        2, 1, left=0.05, right=0.7, top=0.885, bottom=0.45, height_ratios=(2.5, 1), hspace=0.06
    )
    lower = canvas.add_gridspec(1, 1, left=0.05, right=0.7, top=0.345, bottom=0.065)
    side = canvas.add_gridspec(
        3, 1, left=0.755, right=0.985, top=0.885, bottom=0.04, height_ratios=(1.2, 1.35, 1.15), hspace=0.42
    )
    spectrum, residual = (canvas.add_subplot(upper[k]) for k in range(2))
    triplet = canvas.add_subplot(lower[0])
    residual.sharex(spectrum)
    log_g, kiel, words = (canvas.add_subplot(side[k]) for k in range(3))
    canvas.text(0.05, 0.978, literal(_result(star)), fontsize=12.5, fontweight="bold", va="center")
    name = textwrap.shorten(f"{star.name}; {star.model}", 200, placeholder=" …")
    canvas.text(0.05, 0.951, literal(name), fontsize=8.5, va="center", color=palette["muted"])
    whole = (float(star.wave[0]), float(star.wave[-1]))
    _spectrum(spectrum, star, palette, whole, SMOOTHING)
    _name_lines(spectrum, palette, whole, names=True)
    spectrum.tick_params(labelbottom=False)
    _residuals(residual, star, palette)
    _name_lines(residual, palette, whole, names=False)
    residual.set_xlabel("wavelength in vacuum, at rest [Å]")
    closer = (max(CALCIUM[0], whole[0]), min(CALCIUM[1], whole[1]))
    if closer[0] < closer[1]:
        _spectrum(triplet, star, palette, closer, SMOOTHING_CLOSE, legend=False)
        _name_lines(triplet, palette, closer, names=True)
        triplet.set_xlabel(f"the calcium triplet, wavelength in vacuum [Å]; mean of {SMOOTHING_CLOSE} pixels")
    else:
        _say(triplet, "the model's grid does not hold the Ca II triplet", palette)
    _density(log_g, star, palette)
    _kiel(kiel, star, palette)
    _numbers(words, star, palette)
    return canvas


def small_picture(star: Star, palette: Palette) -> Figure:
    """The spectrum of a star and its model in a few inches, for a page; call it as `figure`."""

    def draw(axes: Axes) -> None:
        _spectrum(
            axes,
            star,
            palette,
            (float(star.wave[0]), float(star.wave[-1])),
            SMALL_SMOOTHING,
            legend=False,
            small=True,
        )
        axes.set_xlabel("wavelength in vacuum, at rest [Å]")
        legend_below(axes)

    return single(draw, palette, lines=2)


def _result(star: Star) -> str:
    value, error = star.values["log_g"], star.values["log_g_err"]
    flags = ", ".join(name for name, _ in star.flags) or "no flag"
    known = "no log g" if np.isnan(value) else f"log g = {value:.2f} ± {error:.2f} dex"
    return f"{known}, {flags}"


def _weights(star: Star) -> F64:
    return np.where(star.good, 1 / np.where(star.good, star.error, 1.0) ** 2, 0.0)


# --- spectrum ------------------------------------------------------------------------------------------


def _spectrum(
    axes: Axes,
    star: Star,
    palette: Palette,
    span: tuple[float, float],
    width: int,
    *,
    legend: bool = True,
    small: bool = False,
) -> None:
    """Flux, smoothed flux, the star by the model; small ones leave single pixels out."""
    wave, here = star.wave, (star.wave >= span[0]) & (star.wave <= span[1])
    mean = smoothed(star.flux, _weights(star), width)
    if small:
        here &= np.arange(len(wave)) % SMALL_STEP == 0
    else:
        flux = np.where(star.good, star.flux, np.nan)
        axes.plot(
            wave[here],
            flux[here],
            color=palette["muted"],
            linewidth=0.5,
            alpha=0.55,
            label="flux, good pixels",
        )
    axes.plot(
        wave[here], mean[here], color=palette["ink"], linewidth=1.0, label=f"flux, mean of {width} pixels"
    )
    limits = list(np.nanpercentile(mean[here], FRAME)) if np.isfinite(mean[here]).any() else []
    if star.posterior is not None:
        model, sd = star.posterior.star, star.posterior.star_sd
        if small:
            # Smoothed as the flux is, so that the two can be compared.
            model = smoothed(model, np.ones_like(model), width)
        axes.fill_between(
            wave[here], (model - sd)[here], (model + sd)[here], color=palette["first"], alpha=0.3, linewidth=0,
            label="its 1σ",
        )  # fmt: skip
        axes.plot(
            wave[here], model[here], color=palette["first"], linewidth=1.3, label="the star, by the model"
        )
        limits += [model[here].min(), model[here].max()]
    _shade(axes, star, palette, step=SMALL_STEP if small else 1)
    if limits:
        # More below, where the legend stands.
        low, high = frame(limits, below=2 if legend else 1)
        axes.set_ylim(low, high)
        n_beyond = int(np.sum((star.flux < low) | (star.flux > high), where=star.good & here))
        if n_beyond and not small:
            axes.annotate(
                f"{n_beyond:,} pixels beyond the frame (sky lines)", (1, 1), (-5, -5), xycoords="axes fraction",
                textcoords="offset points", ha="right", va="top", fontsize=7.5, color=palette["muted"],
            )  # fmt: skip
    axes.set_xlim(*span)
    axes.set_ylabel("flux")
    if legend:
        axes.legend(loc="lower left", ncols=5, frameon=False, fontsize=8, borderaxespad=0.2)


def _shade(axes: Axes, star: Star, palette: Palette, *, named: bool = True, step: int = 1) -> None:
    """Pixels that do not count; with a step, where most of as many pixels do not."""
    if star.good.all():
        return
    bad = np.convolve(~star.good, np.full(step, 1 / step), "same")[::step] > 0.5
    axes.fill_between(
        star.wave[::step], 0, 1, where=bad, step="mid", transform=axes.get_xaxis_transform(), color=palette["grid"],
        alpha=0.75, linewidth=0.4, label="pixels that do not count" if named else None, zorder=0,
    )  # fmt: skip


def _name_lines(axes: Axes, palette: Palette, span: tuple[float, float], names: bool) -> None:
    """Marks of the lines: names above the frame, on as many levels as they need."""
    reach = 0.027 * (span[1] - span[0])
    found = sorted((float(w), name) for name, waves in lines_within(*span) for w in waves)
    levels: list[float] = [-np.inf] * 3
    for wave, name in found:
        role = _LINE_ROLES.get(name, "own")
        axes.axvline(wave, color=palette[role], linewidth=0.8, linestyle=(0, (2, 3)), alpha=0.6, zorder=1)
        if not names:
            continue
        level = next((k for k, last in enumerate(levels) if wave - last >= reach), None)
        if level is None:
            continue
        levels[level] = wave
        axes.annotate(
            name, (wave, 1), (0, 1.5 + 9.0 * level), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="center", va="bottom", fontsize=7, color=palette[role], annotation_clip=False,
        )  # fmt: skip


def _residuals(axes: Axes, star: Star, palette: Palette) -> None:
    _shade(axes, star, palette, named=False)
    axes.set_ylabel("(flux − model) / σ")
    axes.set_ylim(-LARGEST_PULL - 0.4, LARGEST_PULL + 0.4)
    if star.posterior is None:
        _say(axes, "no model spectrum, so no residuals", palette)
        return
    pull = np.where(
        star.good, (star.flux - star.posterior.model) / np.where(star.good, star.error, 1.0), np.nan
    )
    axes.axhspan(-1, 1, color=palette["grid"], alpha=0.5, linewidth=0, zorder=0)
    axes.plot(
        star.wave,
        np.clip(pull, -LARGEST_PULL, LARGEST_PULL),
        ".",
        color=palette["muted"],
        markersize=1.5,
        alpha=0.6,
        label="each pixel",
    )
    weights = star.good.astype(float)
    n = np.convolve(weights, np.ones(TOGETHER), "same")
    together = smoothed(np.nan_to_num(pull), weights, TOGETHER) * np.sqrt(n)
    axes.plot(
        star.wave, np.clip(together, -LARGEST_PULL, LARGEST_PULL), color=palette["own"], linewidth=0.9,
        label=f"{TOGETHER} pixels together, in their own σ",
    )  # fmt: skip
    axes.legend(loc="lower left", ncols=3, frameon=False, fontsize=8, borderaxespad=0.2)


# --- labels --------------------------------------------------------------------------------------------


def _density(axes: Axes, star: Star, palette: Palette) -> None:
    """What the star says of log g: the density of a posterior, or the experts' values by their weights."""
    value, error = star.values["log_g"], star.values["log_g_err"]
    if np.isnan(value):
        _say(axes, "no log g: there is no data", palette)
        return
    axes.axvspan(value - error, value + error, color=palette["own"], alpha=0.15, linewidth=0)
    axes.axvline(value, color=palette["own"], linewidth=1.6, label="value, calibrated 1σ")
    if star.posterior is not None:
        library = star.posterior.library[: star.posterior.n_stars, 0]
        reach = 4 * max(error, star.posterior.moments("log_g")[1])
        low, high = min(value - reach, library.min() - 0.3), max(value + reach, library.max() + 0.3)
        at = np.linspace(low, high, 600)
        density = star.posterior.density("log_g", at)
        axes.fill_between(at, density, color=palette["first"], alpha=0.25, linewidth=0)
        axes.plot(at, density, color=palette["first"], linewidth=1.5, label="posterior")
        axes.set_ylabel("density [dex⁻¹]")
        axes.set_xlim(low, high)
    else:
        weights, values = star.experts.T
        axes.vlines(values, 0, weights, color=palette["first"], linewidth=2, label="experts, by weight")
        axes.plot(values, weights, "o", color=palette["first"], markersize=3.5)
        axes.set_ylabel("weight of the expert")
    axes.set_ylim(bottom=0)
    known = star.labels.get("log_g", np.nan)
    if np.isfinite(known):
        axes.axvline(known, color=palette["ink"], linewidth=1.2, linestyle=":", label="in the file")
    axes.set_xlabel(AXES["log_g"])
    _legend_above(axes)


def _kiel(axes: Axes, star: Star, palette: Palette) -> None:
    posterior = star.posterior
    if posterior is None or "T_eff" not in posterior.label_names:
        axes.set_axis_off()
        _say(axes, "no T_eff: only posteriors have a place\nin the Kiel diagram", palette)
        return
    i = posterior.label_names.index("T_eff")
    library = posterior.library[: posterior.n_stars]
    axes.plot(
        library[:, i], library[:, 0], ".", color=palette["muted"], markersize=2.5, alpha=0.6,
        label="library",
    )  # fmt: skip
    t_eff, log_g = (
        np.linspace(*_span(library[:, posterior.label_names.index(name)], star, name), 160)
        for name in ("T_eff", "log_g")
    )
    density = posterior.joint_density("T_eff", "log_g", t_eff, log_g)
    levels = _contour_levels(density)
    if levels is not None:
        axes.contourf(
            t_eff, log_g, density, levels=[*levels, density.max() * 1.0001],
            colors=[(*_rgb(palette["first"]), 0.25), (*_rgb(palette["first"]), 0.5)],
        )  # fmt: skip
        axes.contour(t_eff, log_g, density, levels=levels, colors=[palette["first"]], linewidths=1.0)
    axes.plot(
        star.values["T_eff"], star.values["log_g"], "o", color=palette["own"], markersize=5,
        label="the star, 68 and 95 %",
    )  # fmt: skip
    if np.isfinite(star.labels.get("T_eff", np.nan)) and np.isfinite(star.labels.get("log_g", np.nan)):
        axes.plot(
            star.labels["T_eff"],
            star.labels["log_g"],
            "X",
            color=palette["ink"],
            markersize=6,
            label="in the file",
        )
    axes.set(xlabel=AXES["T_eff"], ylabel=AXES["log_g"])
    axes.set_xlim(t_eff[-1], t_eff[0])
    axes.set_ylim(log_g[-1], log_g[0])
    _legend_above(axes)


def _legend_above(axes: Axes) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=7.5, borderaxespad=0.1,
        handletextpad=0.4, columnspacing=1.0, handlelength=1.3,
    )  # fmt: skip


def _span(library: F64, star: Star, label: str) -> tuple[float, float]:
    """The library's labels and the star's own within 2.5 of its errors, and a margin."""
    reach = 2.5 * star.values[f"{label}_err"]
    value = star.values[label]
    low, high = min(library.min(), value - reach), max(library.max(), value + reach)
    margin = 0.04 * (high - low)
    return float(low - margin), float(high + margin)


def _contour_levels(density: F64) -> list[float] | None:
    """Densities above which 95 and 68 % of the probability lie."""
    ordered = np.sort(density, axis=None)[::-1]
    total = ordered.sum()
    if not total > 0:
        return None
    within = np.cumsum(ordered) / total
    levels = [float(ordered[np.searchsorted(within, level)]) for level in reversed(LEVELS)]
    return levels if levels[0] < levels[1] else None


def _rgb(colour: str) -> tuple[float, float, float]:
    r, g, b = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return r, g, b


def _numbers(axes: Axes, star: Star, palette: Palette) -> None:
    axes.set_axis_off()
    text = "\n".join(_wrapped(describe(star).split("\n")[2:]))
    axes.text(
        0, 1, literal(text), transform=axes.transAxes, va="top", ha="left", fontsize=7.2, family="DejaVu Sans Mono",
        color=palette["ink"], linespacing=1.25,
    )  # fmt: skip


def _wrapped(lines: list[str], width: int = 58) -> list[str]:
    out: list[str] = []
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        out += textwrap.wrap(line[2:], width, subsequent_indent=indent, drop_whitespace=True) or [""]
    return out


def _say(axes: Axes, words: str, palette: Palette) -> None:
    axes.text(
        0.5,
        0.5,
        words,
        transform=axes.transAxes,
        ha="center",
        va="center",
        fontsize=9,
        color=palette["muted"],
    )
    axes.set_yticks([])
