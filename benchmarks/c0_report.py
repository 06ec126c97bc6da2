"""Tables and the picture of C0, from what `c0.py` found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moefast.fitting import PUBLISHED_ALPHA

__all__ = ["PUBLISHED_R2", "TESTS", "markdown", "picture", "tables"]

TESTS = ("test_10k", "test_1k")
PUBLISHED_R2 = 0.4957
PUBLISHED_OCTILES = (0.195, 0.386, 0.466, 0.518, 0.556, 0.592, 0.611, 0.647)
"""R² of the published ridge, whole and per octile of snr_median, on a test set that is not public."""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _power(value: float) -> str:
    return "0" if value == 0 else f"10^{math.log10(value):g}"


def _where(path_: Mapping[str, Any], mark: float) -> str:
    """α/n at which the mean R² of the path on the test set crosses the mark."""
    x, y = np.log10(path_["penalties"]), np.mean(path_[TESTS[0]], axis=(0, 1)) - mark
    crossed = [
        x[i] + (x[i + 1] - x[i]) * y[i] / (y[i] - y[i + 1]) for i in range(len(x) - 1) if y[i] * y[i + 1] < 0
    ]
    return " and ".join(f"10^{value:.2f}" for value in crossed) or "none"


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Markdown tables of a result, by what they show."""
    sets = result["sets"]
    stability = [
        [name, recipe, part, f"{one['mean']:.4f}", f"{one['half_spread']:.4f}",
         f"{one['deviation_of_training_seeds']:.4f}", f"{one['deviation_of_noise_seeds']:.4f}",
         "yes" if one["stable"] else "no"]
        for name, found in sets.items()
        for recipe, by_part in found["recipes"].items()
        for part, one in by_part.items()
    ]  # fmt: skip
    some = list(sets.values())
    penalties = some[0]["paths"]["published-ridge"]["penalties"]
    noise_penalties = some[0]["paths"]["global-ridge"]["penalties"]

    def paths(recipe: str, values: Sequence[float]) -> str:
        rows = [
            [_power(alpha)]
            + [
                f"{np.mean(np.array(found['paths'][recipe][part])[..., i]):.3f}"
                for found in some
                for part in ("validation", *TESTS)
            ]
            for i, alpha in enumerate(values)
        ]
        return markdown(
            ["α/n", *(f"{name} {part}" for name in sets for part in ("validation", *TESTS))], rows
        )

    changed = []
    for i, first in enumerate(some[0]["choices"]):
        row = [first["what"]]
        for found in some:
            one, base = found["choices"][i], found["choices"][0]
            value = np.array(one["r2_published_penalty"])
            gain = value - base["r2_published_penalty"]
            row += [f"{value.mean():.3f}", f"{gain.mean():+.3f}" if i else ""]
            row += [f"{np.mean(one['r2_penalty_chosen']):.3f} ({_power(one['penalty_chosen'])})"]
        changed.append(row)
    header = ["changed"]
    for name in sets:
        header += [f"{name}, α = 0.1 n", "gain", f"{name}, α chosen (α/n)"]
    octiles = [["published, other data", *(f"{value:.3f}" for value in PUBLISHED_OCTILES)]]
    for name, found in sets.items():
        octiles += [[f"{name}: snr_median", *(f"{value:.1f}" for value in found["octiles"]["snr_median"])]]
        words = {
            "published": "published-ridge",
            "chosen": "the same, α chosen",
            "global-ridge": "global-ridge",
        }
        octiles += [
            [f"{name}: {words[what]}", *(f"{value:.3f}" for value in found["octiles"][what])]
            for what in words
        ]
    crossing = [
        [name, _where(found["paths"]["published-ridge"], PUBLISHED_R2)] for name, found in sets.items()
    ]
    return {
        "stability": markdown(
            ["set", "recipe", "test set", "R², mean", "half spread", "σ training", "σ noise", "within ±0.01"],
            stability,
        ),
        "path of published-ridge": paths("published-ridge", penalties),
        "path of global-ridge": paths("global-ridge", noise_penalties),
        "choices": markdown(header, changed),
        "octiles": markdown(["R² per octile of snr_median", *"12345678"], octiles),
        "crossing": markdown(["set", f"α/n at which R² on test_10k is {PUBLISHED_R2}"], crossing),
    }


def picture(result: Mapping[str, Any], target: Path) -> None:
    """R² on test_10k along both paths, bands over training and noise seeds, one panel per set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, len(result["sets"]), sharey=True, squeeze=False)[0]
    for axes, (name, found) in zip(panels, result["sets"].items(), strict=True):
        for part, colour in zip(TESTS[::-1], ("tab:orange", "tab:blue"), strict=True):
            one = found["paths"]["published-ridge"]
            values = np.array(one[part]).reshape(-1, len(one["penalties"]))
            axes.fill_between(one["penalties"], values.min(0), values.max(0), color=colour, alpha=0.35)
            axes.plot(one["penalties"], values.mean(0), color=colour, label=f"published-ridge, {part}")
        best = found["recipes"]["global-ridge"][TESTS[0]]["mean"]
        axes.axhline(best, color="tab:green", label="global-ridge, test_10k")
        axes.axhline(PUBLISHED_R2, color="black", linestyle=":", label="published, other data")
        axes.axvline(PUBLISHED_ALPHA, color="grey", linestyle="--", label="published α/n")
        for chosen in set(one["chosen"]):
            axes.axvline(chosen, color="tab:red", linewidth=1, label="chosen on held-out stars")
        axes.set(xscale="log", xlabel="α/n  [flux²]", title=name, ylim=(0, None))
    panels[0].set_ylabel("R² of log g")
    panels[0].legend(fontsize=8, loc="lower left")
    figure.savefig(target, dpi=110)
