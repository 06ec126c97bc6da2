"""What the predictions of the study C1 say: intervals, choices per bin, other ways to compare, tables and figures."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.benchmarks.c0_report import markdown
from moefast.benchmarks.c1_experts import BASE, GRID, SAMPLED, Data
from moefast.core.grids import METAL_POOR, SNR_NORM_NAMES, assign_snr_bins
from moefast.core.metrics import bootstrap, bootstrap_difference, r2
from moefast.core.random import fold_of_rows
from moefast.experts.choice import choose, hybrid

__all__ = ["conventions", "pictures", "summarise", "tables"]

F64 = NDArray[np.float64]
Ints = NDArray[np.int64]

CANDIDATES = (
    BASE, "linear, whitened, all", "ridge, stacked, all", "trees, flux", "trees, stacked, all", "trees, on linear, all",
    "cnn", "template, all",
)  # fmt: skip
"""Families that a hybrid on the 3 × 3 grid may choose from; the base first."""
HYBRIDS = {
    "hybrid": CANDIDATES,
    "hybrid, as published": (SAMPLED, "linear, whitened, all", "trees, flux", "cnn"),
    "hybrid with trees": (BASE, "trees, stacked, all"),
}
"""What is chosen from, the base first. The families of the published hybrid had no noise in closed form; with trees
alone the gain is as small as the published one.
"""
ORDER = (
    "linear, sampled, few", SAMPLED, "linear, over own error, few", "linear, whitened, few", "linear, whitened, all",
    "linear, average, few", "linear, average, all", "linear, levels, few", BASE,
    "linear, 5 x 5, few", "linear, 5 x 5, all", "linear, 7 x 7, few", "linear, 7 x 7, all",
    "linear, adaptive, few", "linear, adaptive, all", "gate, linear, all", "ridge, stacked, few", "ridge, stacked, all",
    "trees, flux", "trees, stacked, few", "trees, stacked, all", "trees, on linear, all", "cnn",
    "template, few", "template, all", "template, no bins, few", "template, no bins, all",
)  # fmt: skip
"""Of the experts in tables and figures."""
METAL_POOR_EXPERTS = (
    SAMPLED, "linear, average, all", BASE, "linear, 5 x 5, all", "linear, 7 x 7, all", "linear, adaptive, all",
    "ridge, stacked, all", "trees, flux", "trees, stacked, all", "trees, on linear, all", "cnn", "template, few",
    "template, all", "template, no bins, all",
)  # fmt: skip


# --- what the numbers say ------------------------------------------------------------------------------------


def ceilings(name: str) -> dict[str, Any] | None:
    """Bayes ceiling of the test stars of a set as frozen, of all and per bin, and R² of the posterior means themselves.

    The ceiling is 1 − E[Var(log g | x)]/Var(log g), from the variances of the posteriors; their means reach it within
    the scatter of the stars where the posteriors are right.
    """
    file = resources.files("moefast.ceilings") / "data" / f"{name}-test_10k.json.gz"
    if not file.is_file():
        return None
    content = json.loads(gzip.decompress(file.read_bytes()))
    bayes, groups = content["bayes"], content["groups"]["grid"]
    return {
        "overall": bayes["r2"],
        "bins": [group["bayes"] for group in groups],
        "means": [bayes["r2_of_posterior_means"], *bayes["r2_of_posterior_means_interval"]],
        "bins, means": [[group["bayes_means"], *group["bayes_means_interval"]] for group in groups],
    }


def summarise(
    name: str, data: Data, predictions: Mapping[str, F64], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Everything that the document shows of one set, JSON-ready."""
    y, bins, n_bins = data.v_log_g, data.v_bins, GRID.n_bins
    covered = GRID.covered(data.v_t_eff, data.v_m_h)
    inside = [bins == k for k in range(n_bins)]
    experts = {}
    for family, values in predictions.items():
        entry: dict[str, Any] = {"overall": list(bootstrap(y, values)[:4])}
        entry["bins"] = [list(bootstrap(y[here], values[here])[:4]) for here in inside]
        for base in (BASE, SAMPLED):
            if base in predictions:
                against = predictions[base]
                entry[f"over {base}"] = {
                    "overall": list(bootstrap_difference(y, values, against)[:4]),
                    "bins": [
                        list(bootstrap_difference(y[here], values[here], against[here])[:4])
                        for here in inside
                    ],
                }
        experts[family] = entry
    chosen = {}
    for what, candidates in HYBRIDS.items():
        there = {family: predictions[family] for family in candidates if family in predictions}
        if candidates[0] in there:
            chosen[what] = decision(data, there, candidates[0], covered)
    poor = {}
    snr = np.minimum(assign_snr_bins(data.v_snr), 2)
    for k in range(n_bins):
        if GRID.m_h_edges[k % GRID.shape[1] + 1] <= METAL_POOR:
            poor[GRID.names[k]] = {
                family: [r2(y[inside[k]], values[inside[k]])]
                + [r2(y[inside[k] & (snr == s)], values[inside[k] & (snr == s)]) for s in range(3)]
                for family, values in predictions.items()
            }
    return {
        "n": [int(here.sum()) for here in inside],
        "covered": [float(covered[here].mean()) for here in inside],
        "components": data.z.shape[1],
        "seconds": dict(seconds),
        "experts": experts,
        "choices": chosen,
        "metal_poor": poor,
        "ceiling": ceilings(name),
    }


def decision(
    data: Data, predictions: Mapping[str, F64], base: str, covered: NDArray[np.bool_]
) -> dict[str, Any]:
    """Choice per bin, its worth, half of the stars choosing for the other half, and other ways to compare."""
    y, bins = data.v_log_g, data.v_bins
    found = choose(y, predictions, bins, base, n_bins=GRID.n_bins)
    chosen, ridge_ = hybrid(predictions, bins, found.families), predictions[base]
    # What was chosen by one half is worth what the other half says.
    half = fold_of_rows(np.arange(len(y)), 2, 7)
    honest = np.empty(len(y))
    for part in range(2):
        judge = half == part
        families = choose(
            y[judge], {name: values[judge] for name, values in predictions.items()}, bins[judge], base,
            n_bins=GRID.n_bins,
        ).families  # fmt: skip
        honest[~judge] = hybrid(
            {name: values[~judge] for name, values in predictions.items()}, bins[~judge], families
        )
    return {
        "base": base,
        "families": list(found.families),
        "gain_mse": {name: found.gain[:, f].tolist() for f, name in enumerate(found.names)},
        "gain_mse_error": {name: found.standard_error[:, f].tolist() for f, name in enumerate(found.names)},
        "overall": list(bootstrap(y, chosen)[:4]),
        "base overall": list(bootstrap(y, ridge_)[:4]),
        "gain": list(bootstrap_difference(y, chosen, ridge_)[:4]),
        "gain, chosen by the other half": list(bootstrap_difference(y, honest, ridge_)[:4]),
        "bins": [list(bootstrap(y[bins == k], chosen[bins == k])[:4]) for k in range(GRID.n_bins)],
        "conventions": conventions(y, bins, covered, {"hybrid": chosen, "base": ridge_}),
    }


def conventions(
    y: F64, bins: Ints, covered: NDArray[np.bool_], predictions: Mapping[str, F64]
) -> dict[str, dict[str, float]]:
    """R² of the same predictions by four conventions: pooled or the mean of bins, all stars or covered ones."""
    everyone = np.ones(len(y), bool)
    out = {}
    for stars, rows in (("all", everyone), ("covered", covered)):
        present = [k for k in np.unique(bins) if (rows & (bins == k)).sum() > 1]
        out[f"pooled, {stars}"] = {name: r2(y[rows], values[rows]) for name, values in predictions.items()}
        out[f"mean of bins, {stars}"] = {
            name: float(np.mean([r2(y[rows & (bins == k)], values[rows & (bins == k)]) for k in present]))
            for name, values in predictions.items()
        }
    return out


# --- what people read ----------------------------------------------------------------------------------------


def _r(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _within(interval: Sequence[float]) -> str:
    """R² ± half of its 95 % interval."""
    return f"{_r(interval[0])} ± {(interval[2] - interval[1]) / 2:.3f}"


def _gain(interval: Sequence[float]) -> str:
    """Difference ± one standard error."""
    return f"{interval[0]:+.3f} ± {interval[3]:.3f}".replace("-", "−")


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Markdown tables of a result, by what they show."""
    out = {}
    for name, found in result["sets"].items():
        experts = found["experts"]
        rows = [
            [family, *map(_within, [experts[family]["overall"], *experts[family]["bins"]])]
            for family in ORDER
            if family in experts
        ]
        if found["ceiling"]:
            top = [found["ceiling"]["overall"], *found["ceiling"]["bins"]]
            rows.append(["Bayes ceiling of test_10k, bins unknown", *map(_r, top)])
        out[f"{name}: R² per bin"] = markdown(["expert", "all", *GRID.names], rows)
        for what, choice in found["choices"].items():
            out[f"{name}: {what}"] = markdown(
                ["bin", "n", choice["base"], "chosen", "R²", "gain"], _choice_rows(found, choice)
            )
        rows = [
            [
                what, convention, _r(both["hybrid"]), _r(both["base"]), f"{both['hybrid'] - both['base']:+.3f}",
                f"{choice['overall'][0] - both['base']:+.3f}".replace("-", "−"),
            ]
            for what, choice in found["choices"].items()
            for convention, both in choice["conventions"].items()
        ]  # fmt: skip
        out[f"{name}: conventions"] = markdown(
            ["", "R² is", "hybrid", "its base", "like with like", "hybrid pooled over all, less this base"],
            rows,
        )
        rows = [
            [bin_, family, *map(_r, by_family[family])]
            for bin_, by_family in found["metal_poor"].items()
            for family in METAL_POOR_EXPERTS
            if family in by_family
        ]
        out[f"{name}: metal-poor"] = markdown(["bin", "expert", "all", *SNR_NORM_NAMES[:2], "M and H"], rows)
        header = [
            "bin", "Bayes ceiling", "posterior means", "template, bin unknown", "template", "linear", "linear, gate",
            "information", "expert", "knowing the bin", "routing",
        ]  # fmt: skip
        out[f"{name}: limits"] = markdown(header, limits(found))
    names = list(result["sets"])
    families = {family: None for name in names for family in result["sets"][name]["seconds"]}
    rows = [
        [family, *(f"{result['sets'][name]['seconds'].get(family, math.nan):.0f}" for name in names)]
        for family in families
    ]
    out["CPU seconds"] = markdown(["family", *names], rows)
    return out


def _choice_rows(found: Mapping[str, Any], choice: Mapping[str, Any]) -> list[list[str]]:
    base, against = found["experts"][choice["base"]], f"over {choice['base']}"
    rows = []
    for k, family in enumerate(choice["families"]):
        gain = "" if family == choice["base"] else _gain(found["experts"][family][against]["bins"][k])
        rows.append(
            [
                GRID.names[k],
                str(found["n"][k]),
                _r(base["bins"][k][0]),
                family,
                _r(choice["bins"][k][0]),
                gain,
            ]
        )
    overall = choice["base overall"][0], choice["overall"][0]
    rows.append(["all", str(sum(found["n"])), _r(overall[0]), "", _r(overall[1]), _gain(choice["gain"])])
    rows.append(["chosen by the other half", *4 * [""], _gain(choice["gain, chosen by the other half"])])
    return rows


def limits(found: Mapping[str, Any]) -> list[list[str]]:
    """R² of each bin that is lost to the noise, to the expert, and to a gate that does not know the bin."""
    experts = found["experts"]
    wanted = ("template, no bins, all", "template, all", BASE, "gate, linear, all")
    if not found["ceiling"] or any(name not in experts for name in wanted):
        return []
    top, rows = found["ceiling"], []
    for k, bin_ in enumerate((*GRID.names, "all")):
        bound = (*top["bins"], top["overall"])[k]
        means = (*top["bins, means"], top["means"])[k]
        whole, own, base, gate = (
            (*(value[0] for value in experts[name]["bins"]), experts[name]["overall"][0])[k]
            for name in wanted
        )
        lost = (1 - bound, bound - whole, own - whole, base - gate)
        rows.append([bin_, _r(bound), _within([*means, 0]), *map(_r, (whole, own, base, gate, *lost))])
    return rows


SHOWN = {
    SAMPLED: ("ridge, noise drawn", "#9a9a9a"),
    BASE: ("ridge, per noise level", "#4477aa"),
    "trees, flux": ("trees on flux", "#ccbb44"),
    "trees, stacked, all": ("trees, stacked", "#228833"),
    "cnn": ("1D-CNN", "#aa3377"),
    "template, all": ("template posterior", "#ee6677"),
}
"""What the figures show, with names and colours."""


def pictures(result: Mapping[str, Any], folder: Path) -> None:
    """c1.png: R² per bin; c1-map.png: gain over the linear expert; c1-gain.png: gain over drawn noise by difficulty."""
    from matplotlib.figure import Figure

    sets = result["sets"]
    x = np.arange(GRID.n_bins)

    figure = Figure(figsize=(11, 3.6 * len(sets)), layout="constrained")
    for axes, (name, found) in zip(
        np.ravel(figure.subplots(len(sets), 1, squeeze=False)), sets.items(), strict=True
    ):
        shown = [family for family in SHOWN if family in found["experts"]]
        width = 0.84 / max(1, len(shown))
        for i, family in enumerate(shown):
            values = np.array(found["experts"][family]["bins"])
            label, colour = SHOWN[family]
            axes.bar(
                x - 0.42 + (i + 0.5) * width, values[:, 0], width, color=colour, label=label,
                yerr=np.abs(values[:, 1:3].T - values[:, 0]), error_kw={"linewidth": 0.7, "ecolor": "#333333"},
            )  # fmt: skip
        if found["ceiling"]:
            axes.hlines(
                found["ceiling"]["bins"],
                x - 0.45,
                x + 0.45,
                color="black",
                label="Bayes ceiling, bin unknown",
            )
        axes.set(xticks=x, ylabel="R² in the bin", title=f"{name}, true bins", ylim=(0, 1), xlim=(-0.6, 8.6))
        axes.set_xticklabels(GRID.names)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, frameon=False)
    figure.savefig(folder / "c1.png", dpi=100)

    shown = [family for family in ORDER if "few" not in family.split(", ")]
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    panels = np.ravel(figure.subplots(1, len(sets), sharey=True, squeeze=False))
    for axes, (name, found) in zip(panels, sets.items(), strict=True):
        key, experts = f"over {BASE}", found["experts"]
        values = np.array(
            [
                [cell[0] for cell in experts[family][key]["bins"]]
                if key in experts.get(family, {})
                else [np.nan] * GRID.n_bins
                for family in shown
            ]
        )
        axes.imshow(values, cmap="RdBu", vmin=-0.25, vmax=0.25, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                axes.text(
                    j, i, f"{value:+.2f}".replace("-", "−"), ha="center", va="center", fontsize=7.5,
                    color="white" if abs(value) > 0.17 else "black",
                )  # fmt: skip
        axes.set(xticks=x, yticks=np.arange(len(shown)), title=name)
        axes.set_xticklabels(GRID.names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticklabels(shown, fontsize=8)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
    figure.suptitle(f"R² less that of {BASE}", fontsize=11)
    figure.savefig(folder / "c1-map.png", dpi=90)

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (name, found) in zip(
        np.ravel(figure.subplots(1, len(sets), sharey=True, squeeze=False)), sets.items(), strict=True
    ):
        if SAMPLED not in found["experts"]:
            continue
        level = np.array([value[0] for value in found["experts"][SAMPLED]["bins"]])
        order = np.argsort(level)
        for i, family in enumerate(
            family for family in SHOWN if family in found["experts"] and family != SAMPLED
        ):
            values = np.array(found["experts"][family][f"over {SAMPLED}"]["bins"])[order]
            label, colour = SHOWN[family]
            axes.errorbar(
                x + 0.06 * (i - 2), values[:, 0], np.abs(values[:, 1:3].T - values[:, 0]), fmt="o-", color=colour,
                markersize=4, linewidth=1, label=label,
            )  # fmt: skip
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xticks=x, title=name)
        axes.set_xticklabels(
            [f"{GRID.names[k]}\n{level[k]:.2f}" for k in order], rotation=45, ha="right", fontsize=8
        )
    figure.axes[0].set_ylabel("R² less that of a ridge on drawn noise")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(folder / "c1-gain.png", dpi=100)
