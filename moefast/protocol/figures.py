"""The report as one picture: predictions against truth, R² against SNR, R² over the grid of bins.

Design: drawn with matplotlib's Agg canvas directly, so that no global backend or pyplot state of the caller
is touched and no display is needed. Legends stand beside the data, never over it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from moefast.protocol.report import write_atomically

__all__ = ["PUBLISHED_RIDGE_OCTILES", "PUBLISHED_VIT_OCTILES", "figure"]

PUBLISHED_RIDGE_OCTILES = (
    (3.8, 0.195),
    (4.8, 0.386),
    (5.9, 0.466),
    (7.4, 0.518),
    (9.1, 0.556),
    (11.3, 0.592),
    (13.9, 0.611),
    (16.8, 0.647),
)
"""(snr_median, R²) of one ridge per octile, as published for a test set that is not public."""

PUBLISHED_VIT_OCTILES = tuple(
    zip(
        np.geomspace(3.2, 14.6, 8).round(1).tolist(),
        (0.46, 0.52, 0.60, 0.68, 0.75, 0.82, 0.87, 0.90),
        strict=True,
    )
)
"""(snr_median, R²) of a vision transformer per octile, as published; the SNRs between the first and the last, which
alone are given, are spaced evenly in the logarithm."""

_OURS = "#0b4f8a"
_REFERENCES = ("#d1701e", "#3c8d5a", "#8f5aa8", "#a8323c", "#6b6b6b", "#b39420")


def figure(
    report: Mapping[str, Any], y: ArrayLike, yhat: ArrayLike, path_png: str | os.PathLike[str]
) -> None:
    """Draw the report into a PNG file.

    Parameters
    ----------
    report : mapping
        From `moefast.protocol.report.evaluate_predictions`.
    y, yhat : array of shape (n,)
        The labels and predictions that it was made from, log g [dex]; predictions that are not finite are
        left out of the first panel (their number is in its title) and count everywhere else.
    path_png : path
        Output; absent or complete.

    Raises
    ------
    OutputError
        The file could not be written.
    """
    canvas = Figure(figsize=(16.5, 6.2), dpi=110, layout=ConstrainedLayoutEngine(wspace=0.04))
    FigureCanvasAgg(canvas)
    panels = canvas.subplots(1, 3, gridspec_kw={"width_ratios": [1.1, 1.1, 1.0]})
    _predictions(panels[0], report, np.asarray(y, np.float64), np.asarray(yhat, np.float64))
    _against_snr(panels[1], report)
    _over_grid(panels[2], report)
    data = report["data_set"]
    model = report["model"].get("recipe") or report["model"].get("name") or "model"
    fingerprint = data["fingerprint"].rpartition(":")[2][:12]
    canvas.suptitle(f"{model} on {data['name']} (fingerprint {fingerprint}, {data['n']} stars)")
    stream = io.BytesIO()
    canvas.savefig(stream, format="png", metadata={"Software": None})
    write_atomically(path_png, stream.getvalue())


def _predictions(axes: Axes, report: Mapping[str, Any], y: Any, yhat: Any) -> None:
    shown = np.isfinite(y) & np.isfinite(yhat)
    truth, predicted = y[shown], yhat[shown]
    overall = report["overall"]
    limits = (0.0, 6.0)
    if truth.size:
        low, high = float(truth.min()), float(truth.max())
        margin = max(0.25, 0.08 * (high - low))
        limits = (low - margin, high + margin)
        # Predictions beyond the frame are drawn at its edge, not lost.
        image = axes.hist2d(
            truth,
            np.clip(predicted, limits[0] + 1e-6, limits[1] - 1e-6),
            bins=60,
            range=[limits, limits],
            norm=LogNorm(vmin=1),
            cmap="viridis",
            cmin=1,
        )[3]
        axes.figure.colorbar(image, ax=axes, label="stars per cell", pad=0.02, format="%g")
    axes.plot(limits, limits, color="black", linewidth=1.2, linestyle="--", label="1:1")
    axes.set(xlim=limits, ylim=limits, xlabel="true log g [dex]", ylabel="predicted log g [dex]")
    interval = overall["r2_interval"]
    bracket = "" if None in interval else f"  [{interval[0]:.3f}, {interval[1]:.3f}]"
    axes.set_title(f"R² = {_text(overall['r2'])}{bracket}", fontsize=11)
    note = [f"{name.upper()} {_text(overall[name])} dex" for name in ("mae", "rmse")]
    note.append(f"bias {_text(overall['bias'])} dex")
    if overall["n_nan"]:
        note.append(f"{overall['n_nan']} without prediction")
    box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 3}
    axes.text(0.03, 0.97, "\n".join(note), transform=axes.transAxes, va="top", fontsize=9, bbox=box)
    axes.legend(loc="lower right", fontsize=9)


def _against_snr(axes: Axes, report: Mapping[str, Any]) -> None:
    groups = report["snr_median"]["groups"]
    centres = _floats(group["centre"] for group in groups)
    own = _floats(group["r2"] for group in groups)
    low = _floats(group["r2_interval"][0] for group in groups)
    high = _floats(group["r2_interval"][1] for group in groups)
    level = 100 * report["protocol"]["level"]
    axes.fill_between(centres, low, high, color=_OURS, alpha=0.18, linewidth=0)
    own_label = f"this model ({level:g} % interval)"
    axes.plot(centres, own, "o-", color=_OURS, markersize=5, linewidth=2.4, label=own_label, zorder=3)
    lowest = [*own, *np.array(PUBLISHED_RIDGE_OCTILES)[:, 1]]
    for i, (name, reference) in enumerate(report["references"].items()):
        values = _floats(reference["r2_snr_median"])
        colour = _REFERENCES[i % len(_REFERENCES)]
        axes.plot(centres, values, "o-", label=name, color=colour, markersize=3.5, linewidth=1.2)
        lowest += [*values]
    published_label = "published ridge (other data)"
    axes.plot(*np.array(PUBLISHED_RIDGE_OCTILES).T, "x", color="black", markersize=6, label=published_label)
    for i, (name, ceiling) in enumerate(report["ceilings"].items()):
        if ceiling["r2"] is not None:
            label = f"{name} ceiling, all stars: {ceiling['r2']:.3f}"
            axes.axhline(ceiling["r2"], color="grey", linestyle=(":", "--", "-.")[i % 3], label=label)
    axes.set(xlabel="snr_median (median of the octile)", ylabel="R² within the octile")
    # One hopeless octile (R² far below zero) must not flatten all the others.
    axes.set_ylim(max(-1.0, min(0.0, np.floor(10 * np.nanmin(lowest)) / 10)), 1.0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=8.5, frameon=False)
    axes.set_title("R² against signal-to-noise", fontsize=11)


def _over_grid(axes: Axes, report: Mapping[str, Any]) -> None:
    grid = report["protocol"]["grid"]
    t_eff, m_h = grid["t_eff_edges"], grid["m_h_edges"]
    shape = (len(t_eff) - 1, len(m_h) - 1)
    groups = report["grid"]["groups"]
    table = _floats(group["r2"] for group in groups).reshape(shape)
    counts = np.array([group["n"] for group in groups]).reshape(shape)
    defined = table[np.isfinite(table)]
    bottom = float(np.clip(np.floor(10 * defined.min()) / 10, 0, 0.9)) if defined.size else 0.0
    top = float(np.clip(np.ceil(10 * defined.max()) / 10, bottom + 0.1, 1)) if defined.size else 1.0
    image = axes.imshow(table.T, origin="lower", cmap="cividis", vmin=bottom, vmax=top, aspect="auto")
    for i in range(shape[0]):
        for k in range(shape[1]):
            value = table[i, k]
            red, green, blue = image.cmap(image.norm(value))[:3] if np.isfinite(value) else (1, 1, 1)
            colour = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            label = f"{_text(value if np.isfinite(value) else None)}\nn = {counts[i, k]}"
            axes.text(i, k, label, ha="center", va="center", color=colour, fontsize=10.5)
    axes.set_xticks(np.arange(len(t_eff)) - 0.5, [f"{edge:.0f}" for edge in t_eff])
    axes.set_yticks(np.arange(len(m_h)) - 0.5, [f"{edge:g}".replace("-", "−") for edge in m_h])
    axes.set(xlabel=r"$T_\mathrm{eff}$ [K]", ylabel="[M/H] [dex]")
    axes.set_title("R² per bin (outer bins include the stars beyond)", fontsize=11)
    axes.figure.colorbar(image, ax=axes, label="R² within the bin", pad=0.02)


def _floats(items: Iterable[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if item is None else item for item in items], dtype=np.float64)


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")
