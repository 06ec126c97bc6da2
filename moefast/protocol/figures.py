"""The report as one picture: predictions against truth, R² against SNR, R² over the grid of bins.

Design: drawn with matplotlib's Agg canvas directly, so that no global backend or pyplot state of the caller is
touched and no display is needed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from moefast.protocol.report import write_atomically

__all__ = ["PUBLISHED_RIDGE_OCTILES", "figure"]

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

_OURS = "#0b4f8a"
_REFERENCES = ("#d1701e", "#3c8d5a", "#8f5aa8", "#a8323c", "#6b6b6b", "#b39420")
_PUBLISHED = "#222222"


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
    canvas = Figure(figsize=(16.5, 5.6), dpi=110, layout="constrained")
    FigureCanvasAgg(canvas)
    panels = canvas.subplots(1, 3, gridspec_kw={"width_ratios": [1.05, 1.2, 1.0]})
    _predictions(panels[0], report, np.asarray(y, np.float64), np.asarray(yhat, np.float64))
    _against_snr(panels[1], report)
    _over_grid(panels[2], report)
    data = report["data_set"]
    model = report["model"].get("recipe") or report["model"].get("name") or "model"
    canvas.suptitle(f"{model} on {data['name']} (fingerprint {data['fingerprint'][:12]}, {data['n']} stars)")
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
            bins=70,
            range=[limits, limits],
            norm=LogNorm(vmin=1),
            cmap="viridis",
            cmin=1,
        )[3]
        axes.figure.colorbar(image, ax=axes, label="stars per cell", pad=0.02)
    axes.plot(limits, limits, color="black", linewidth=1, linestyle="--", label="1:1")
    axes.set(
        xlim=limits, ylim=limits, aspect="equal", xlabel="true log g [dex]", ylabel="predicted log g [dex]"
    )
    interval = overall["r2_interval"]
    range_ = "" if None in interval else f"  [{interval[0]:.3f}, {interval[1]:.3f}]"
    axes.set_title(f"R² = {_text(overall['r2'], 3)}{range_}", fontsize=11)
    note = f"MAE {_text(overall['mae'], 3)} dex\nRMSE {_text(overall['rmse'], 3)} dex\nbias {_text(overall['bias'], 3)} dex"
    if overall["n_nan"]:
        note += f"\n{overall['n_nan']} without prediction"
    box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 3}
    axes.text(0.03, 0.97, note, transform=axes.transAxes, va="top", ha="left", fontsize=9, bbox=box)
    axes.legend(loc="lower right", fontsize=9)


def _against_snr(axes: Axes, report: Mapping[str, Any]) -> None:
    groups = report["snr_median"]["groups"]
    centres = np.array([np.nan if group["centre"] is None else group["centre"] for group in groups])

    def values(items: Any) -> Any:
        return np.array([np.nan if item is None else item for item in items], dtype=np.float64)

    for i, (name, reference) in enumerate(report["references"].items()):
        colour = _REFERENCES[i % len(_REFERENCES)]
        axes.plot(
            centres,
            values(reference["r2_snr_median"]),
            "o-",
            color=colour,
            markersize=3.5,
            linewidth=1.2,
            label=name,
        )
    own = values(group["r2"] for group in groups)
    low = values(group["r2_interval"][0] for group in groups)
    high = values(group["r2_interval"][1] for group in groups)
    axes.fill_between(centres, low, high, color=_OURS, alpha=0.18, linewidth=0)
    axes.plot(
        centres, own, "o-", color=_OURS, markersize=5, linewidth=2.2, label="this model (95 % interval)"
    )
    published = np.array(PUBLISHED_RIDGE_OCTILES)
    axes.plot(*published.T, "x", color=_PUBLISHED, markersize=6, label="published ridge (other data)")
    for name, ceiling in report["ceilings"].items():
        if ceiling["r2"] is not None:
            axes.axhline(ceiling["r2"], color="grey", linewidth=1, linestyle=":")
            axes.annotate(
                f"{name} ceiling, all stars",
                (1, ceiling["r2"]),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 3),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color="dimgrey",
            )
    axes.set(xlabel="snr_median, median of the octile", ylabel="R² within the octile")
    shown = np.concatenate([own[np.isfinite(own)], published[:, 1]])
    axes.set_ylim(min(0.0, float(np.floor(10 * shown.min()) / 10)), 1.0)
    axes.set_xscale("log")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=8, framealpha=0.9)
    axes.set_title("R² against signal-to-noise", fontsize=11)


def _over_grid(axes: Axes, report: Mapping[str, Any]) -> None:
    grid = report["protocol"]["grid"]
    t_eff, m_h = grid["t_eff_edges"], grid["m_h_edges"]
    shape = (len(t_eff) - 1, len(m_h) - 1)
    groups = report["grid"]["groups"]
    table = np.array([np.nan if group["r2"] is None else group["r2"] for group in groups]).reshape(shape)
    counts = np.array([group["n"] for group in groups]).reshape(shape)
    image = axes.imshow(table.T, origin="lower", cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for i in range(shape[0]):
        for k in range(shape[1]):
            value = table[i, k]
            colour = "white" if not value > 0.55 else "black"
            if not np.isfinite(value):
                colour = "black"
            label = f"{_text(value if np.isfinite(value) else None, 3)}\nn = {counts[i, k]}"
            axes.text(i, k, label, ha="center", va="center", color=colour, fontsize=10)
    axes.set_xticks(np.arange(len(t_eff)) - 0.5, [f"{edge:.0f}" for edge in t_eff])
    axes.set_yticks(np.arange(len(m_h)) - 0.5, [f"{edge:g}" for edge in m_h])
    axes.set(xlabel="T_eff [K]", ylabel="[M/H] [dex]")
    axes.set_title("R² per bin (outer bins include the stars beyond)", fontsize=11)
    axes.figure.colorbar(image, ax=axes, label="R² within the bin", pad=0.02)


def _text(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
