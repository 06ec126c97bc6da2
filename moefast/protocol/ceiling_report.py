"""Ceilings as text for a terminal and as one picture."""

from __future__ import annotations

from moefast.pages.drawing import LIGHT, literal, styled, write

# isort: split
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from moefast.core.text import bracket, counted, number, percent, table
from moefast.protocol.drawings import PUBLISHED_RIDGE_OCTILES, PUBLISHED_VIT_OCTILES

__all__ = ["figure", "format_text"]

_BAYES, _MEDIAN, _MEAN, _PRIOR = (LIGHT[role] for role in ("own", "first", "third", "second"))
_OTHERS: dict[str, Any] = {
    "color": LIGHT["muted"],
    "markerfacecolor": "none",
    "linestyle": "none",
    "markersize": 5,
}
"""How published numbers of other data are drawn: open and grey, never joined by a line."""
_TITLES = {
    "snr_norm": "By snr_norm",
    "snr_median": "By snr_median",
    "grid": "By T_eff × [M/H]",
    "metallicity": "By metallicity",
}
"""Kinds of groups, in the order in which they are shown."""


def format_text(summary: Mapping[str, Any]) -> str:
    """Plain text within 100 columns, headline first.

    Parameters
    ----------
    summary : mapping
        `Ceiling.summary`.

    Returns
    -------
    str
        Without a final newline.
    """
    data, fisher, bayes = summary["data_set"], summary["fisher"], summary["bayes"]
    stars = counted(data["n"], "star")
    if data["n"] < data["n_rows"]:
        stars = f"first {data['n']:,} of {data['n_rows']:,} stars"
    lines = [f"Ceilings of log g on {data['name']}: {stars}", f"file fingerprint {data['fingerprint']}", ""]
    lines += _bayes_lines(bayes) if bayes else []
    lines += _fisher_lines(fisher) if fisher else []
    for kind, title in _TITLES.items():
        lines += ["", title, *_group_lines(summary["groups"][kind], with_snr=kind == "snr_median")]
    return "\n".join(line.rstrip() for line in lines)


def _bayes_lines(bayes: Mapping[str, Any]) -> list[str]:
    sample, error = bayes["effective_sample_size"], bayes["monte_carlo_error"]
    levels = [
        f"{percent(row['fraction'])} within {row['z']:.2f} σ (expected {percent(row['expected'])})"
        for row in bayes["error_coverage"]["levels"]
    ]
    ranks = [f"{rank['chi2_p']:.2f} {name}" for name, rank in bayes["ranks"].items()]
    return [
        f"  Bayes   R² {number(bayes['r2'], 4)} {bracket(bayes['r2_interval'], 4)}   "
        "1 − E[Var(log g | x)]/Var(log g)",
        f"          R² {number(bayes['r2_of_posterior_means'], 4)} "
        f"{bracket(bayes['r2_of_posterior_means_interval'], 4)}   of the posterior means, "
        f"RMSE {bayes['rmse']:.3f} dex",
        f"          errors: {', '.join(levels)}",
        f"          effective sample size ≥ 200 for {percent(sample['share_of_stars_at_least_200'])} of the "
        f"stars; smallest {sample['smallest']:.0f}, median {sample['median']:.0f}",
        f"          Monte Carlo error of a mean {error['median']:.3f} dex (median), "
        f"costs {error['r2_lost']:.4f} of R²",
        f"          ranks of the truth uniform: p = {', '.join(ranks)}",
        f"          {bayes['seconds']:.0f} s, {bayes['likelihoods_per_star']:.0f} likelihoods per star",
    ]


def _fisher_lines(fisher: Mapping[str, Any]) -> list[str]:
    r2, schur = fisher["r2"], fisher["schur"]
    steps = [
        f"{name} {100 * share:.0f} %".replace(" ", "\N{NO-BREAK SPACE}")
        for name, share in zip(schur["free"][1:], schur["median_share"][1:], strict=True)
    ]
    return [
        f"  Fisher  R² {number(r2['median'], 4)} median, {number(r2['mean'], 4)} mean over stars; "
        "no prior on the labels",
        f"          R² {number(r2['median, with prior'], 4)} median, "
        f"{number(r2['mean, with prior'], 4)} mean; with the prior's information",
        "",
        "Information on log g that is left as other parameters become free (median over stars)",
        *textwrap.wrap(" → ".join(["100 %", *steps]), 96, initial_indent="  ", subsequent_indent="  "),
        "",
        "Fisher bound by magnitude, the same stars, median seeing, no prior",
        *table(
            ("HSC i", "median", "mean", "published"),
            [
                (f"{row['mag']:g}", number(row["median"], 4), number(row["mean"], 4), f"{row['published']:g}")
                for row in fisher["by_magnitude"]
            ],
        ),
    ]


def _group_lines(groups: Sequence[Mapping[str, Any]], *, with_snr: bool) -> list[str]:
    rows = []
    for group in groups:
        fisher = group.get("fisher", {})
        snr = f" ({group['snr_median']:.1f})" if with_snr and "snr_median" in group else ""
        rows.append(
            (
                group["name"] + snr,
                str(group["n"]),
                number(group.get("bayes")),
                number(group.get("bayes_means")),
                bracket(group.get("bayes_means_interval")),
                number(fisher.get("median")),
                number(fisher.get("mean, with prior")),
            )
        )
    return table(("group", "n", "Bayes", "its means", "interval", "CRLB median", "+ prior, mean"), rows)


def figure(summary: Mapping[str, Any], path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Draw R² ceilings against SNR, the bound against magnitude, and the ranks of the truth, as PNG, SVG or PDF.

    Raises
    ------
    OutputError
        The file could not be written.
    """
    panels = 1 + bool(summary["fisher"]) + bool(summary["bayes"])
    with styled(LIGHT):
        canvas = Figure(figsize=(5.6 * panels, 5.4), layout=ConstrainedLayoutEngine(wspace=0.05))
        axes = np.atleast_1d(canvas.subplots(1, panels))
        _against_snr(axes[0], summary)
        if summary["fisher"]:
            _against_magnitude(axes[1], summary["fisher"])
        if summary["bayes"]:
            _ranks(axes[-1], summary["bayes"])
        data = summary["data_set"]
        canvas.suptitle(f"Ceilings of log g on {literal(data['name'])} ({counted(data['n'], 'star')})")
        write(canvas, path, dpi=110, overwrite=overwrite)


def _against_snr(axes: Axes, summary: Mapping[str, Any]) -> None:
    groups = [group for group in summary["groups"]["snr_median"] if "snr_median" in group]
    snr = np.array([group["snr_median"] for group in groups])
    if summary["fisher"]:
        for key, colour, label in (
            ("median", _MEDIAN, "Fisher, median star"),
            ("mean", _MEAN, "Fisher, mean"),
            ("mean, with prior", _PRIOR, "Fisher with prior, mean"),
        ):
            values = [group["fisher"][key] for group in groups]
            axes.plot(snr, values, "o--", color=colour, markersize=4, linewidth=1.4, label=label)
    if summary["bayes"]:
        bounds = np.array([group["bayes_means_interval"] for group in groups], dtype=float).reshape(-1, 2)
        axes.fill_between(snr, bounds[:, 0], bounds[:, 1], color=_BAYES, alpha=0.18, linewidth=0)
        values = [group["bayes"] for group in groups]
        axes.plot(snr, values, "o-", color=_BAYES, linewidth=2.4, label="Bayes (band: its means, 95 %)")
    axes.plot(
        *np.array(PUBLISHED_VIT_OCTILES).T,
        "^",
        label="ViT, published for other data",
        **_OTHERS,
    )
    axes.plot(
        *np.array(PUBLISHED_RIDGE_OCTILES).T,
        "s",
        label="ridge, published for other data",
        **_OTHERS,
    )
    axes.set(xlabel="snr_median (median of the octile)", ylabel="R² within the octile", ylim=(0, 1))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=8.5)
    axes.set_title("R² ceilings against signal-to-noise", fontsize=11)


def _against_magnitude(axes: Axes, fisher: Mapping[str, Any]) -> None:
    rows = fisher["by_magnitude"]
    mag = [row["mag"] for row in rows]
    axes.plot(mag, [row["median"] for row in rows], "o--", color=_MEDIAN, label="median star")
    axes.plot(mag, [row["mean"] for row in rows], "o--", color=_MEAN, label="mean")
    axes.plot(
        mag,
        [row["published"] for row in rows],
        "s",
        label="published for other data",
        **_OTHERS,
    )
    axes.set(xlabel="magnitude (HSC i)", ylabel="1 − CRLB / Var(log g)", ylim=(-0.05, 1.03))
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", fontsize=8.5)
    axes.set_title("Fisher bound against magnitude", fontsize=11)


def _ranks(axes: Axes, bayes: Mapping[str, Any]) -> None:
    rank = bayes["ranks"]["log_g"]
    counts = np.array(rank["histogram"])
    n, bins = counts.sum(), len(counts)
    edges = np.linspace(0, 1, bins + 1)
    expected, scatter = n / bins, np.sqrt(n / bins * (1 - 1 / bins))
    axes.axhspan(expected - 2 * scatter, expected + 2 * scatter, color="0.88", label="uniform ± 2σ")
    axes.axhline(expected, color="0.5", linewidth=1)
    axes.stairs(counts, edges, color=_BAYES, fill=False, linewidth=1.8, label="true log g")
    axes.set(xlabel="posterior probability below the truth", ylabel="stars", xlim=(0, 1))
    axes.set_ylim(0, max(counts.max(), expected + 3 * scatter) * 1.15)
    axes.legend(loc="lower right", fontsize=8.5)
    axes.set_title(f"Ranks of the truth (χ² test p = {rank['chi2_p']:.2f})", fontsize=11)
