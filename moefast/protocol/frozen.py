"""All that is frozen, in one place: collected from where it lives, hashed, and written as a document.

    python -m moefast.protocol.frozen docs/eval_protocol_frozen.md

Design: constants alone do not freeze a ruler, the code that uses them could still change. So a few hundred made-up
stars, given by closed formulas, go through the same door as every model, and what comes out (`gauge`) is hashed with
the constants: like a gauge block, it shows that a ruler still is the ruler, also one that somebody else wrote. Numbers
that pass through sums are rounded to `DIGITS` significant digits first, so that the hash is the same on every machine.
The version must rise when the hash changes: results of different versions cannot be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moefast.ceilings import bayes, summary
from moefast.core import grids, groups, metrics
from moefast.core.atomic import write_atomically
from moefast.core.random import DRAW_STREAM, NOISE_SEED, NOISE_STREAM, standard_normals
from moefast.core.records import as_entries
from moefast.fitting import PUBLISHED_ALPHA
from moefast.protocol import comparisons, group_scores, scenarios
from moefast.protocol.comparisons import Comparisons
from moefast.protocol.milestones.marks import ADDED_MILESTONES, MILESTONES
from moefast.protocol.milestones.quantities import N_SEEDS, TEST_PART, TEST_SIZE
from moefast.protocol.milestones.rules import Milestone, Rule
from moefast.protocol.report import DataSet, Predictions, Stars, evaluate_predictions
from moefast.protocol.report_parts import Report
from moefast.simulate.emulator import LABELS
from moefast.simulate.sets import FINGERPRINTS, REFERENCE_SETS
from moefast.spectra.quality import LARGEST_ERROR
from moefast.spectra.telluric import TELLURIC

__all__ = [
    "VERSION",
    "canonical",
    "collect",
    "collect_additions",
    "document",
    "gauge",
    "gauge_stars",
    "sha256",
]

VERSION = 1
"""Of the protocol; to be raised with every change of the hash."""

FIRST_SETS = ("z0", "survey")
"""Reference sets of the first version; what was added since has a hash of its own, so that theirs stays what it is."""

DIGITS = 6
"""Significant digits of numbers that pass through sums; a last bit that differs elsewhere does not change them."""

GAUGE_SIZE = 400
GAUGE_CEILING = 0.95

F64 = NDArray[np.float64]

RULES = {
    "outside_grid": "A star outside the grid belongs to the nearest bin (edge-clamped), in training, routing and "
    "scores. Full coverage, all stars, is the headline; the stars on the grid alone (covered only) stand beside it, "
    "never instead.",
    "clipping": "The ruler scores predictions as they are given. Models of moefast clip their own to the range of "
    "log g that they were fitted on, the simpler fits beside them to the same range; whoever brings a table may clip "
    "it or not.",
    "not_finite": "A prediction that is not finite counts as the mean label of the whole set, in every group, and is "
    "counted; no star is left out. Without a finite prediction and a finite error above zero, a star counts as "
    "outside its error.",
    "pooled": "R² of a group is pooled over its stars, with the group's own mean; it is never a mean over bins.",
    "one_noise": "Test spectra carry noise exactly once: the array noisy where a file has it, else flux plus a draw "
    "that belongs to seed and row, so that all models meet the same noisy stars.",
    "snr_of_what": "Both signal-to-noise ratios are measured on the spectrum that is scored, noise included, over its "
    "good pixels; a star without a finite ratio is in no group by that ratio, and is counted.",
    "choosing": "Test spectra never choose anything: no penalty, no threshold, no epoch.",
    "naming": "A number is quoted with its test set and the set's fingerprint.",
}


def collect() -> dict[str, Any]:
    """All that is frozen, JSON-ready, in the order of the document."""
    grid = grids.PHYSICAL_GRID
    return {
        "protocol_version": VERSION,
        "quantity": {"name": "log_g", "unit": "dex"},
        "largest_error_of_a_good_pixel": LARGEST_ERROR,
        "reference_sets": {name: _set(name) for name in FIRST_SETS if name in REFERENCE_SETS},
        "noise": {
            "level": 1.0,
            "stored_stream": NOISE_STREAM,
            "drawn_seed": NOISE_SEED,
            "drawn_stream": DRAW_STREAM,
            "drawn_first_pixels": [
                [round(float(value), 3) for value in row]
                for row in standard_normals(NOISE_SEED, np.arange(2), 4)
            ],
        },
        "grid": {
            "t_eff_edges": list(grid.t_eff_edges),
            "m_h_edges": list(grid.m_h_edges),
            "names": list(grid.names),
        },
        "snr_norm": {"edges": list(grids.SNR_NORM_EDGES), "names": list(grids.SNR_NORM_NAMES)},
        "snr_median": {"n_quantiles": groups.N_OCTILES},
        "metal_poor_below": grids.METAL_POOR,
        "low_snr_norm_up_to": group_scores.LOW_SNR_NORM,
        "statistics": list(metrics.STATISTICS),
        "bootstrap": {
            "n_resamples": metrics.N_RESAMPLES,
            "seed": metrics.SEED,
            "level": metrics.LEVEL,
            "coverage_levels": list(metrics.COVERAGE_LEVELS),
        },
        "references": {
            "published": comparisons.PUBLISHED,
            "published_penalty_per_star": PUBLISHED_ALPHA,
            "global": comparisons.GLOBAL,
            "oracle": comparisons.ORACLE,
        },
        "ceilings": {
            "fisher_parameters": list(LABELS),
            "bayes_target_effective_sample_size": bayes.TARGET_ESS,
            "bayes_least_effective_sample_size": summary.LEAST_ESS,
            "published_crlb": [list(pair) for pair in summary.PUBLISHED_CRLB],
        },
        "rules": RULES,
        "milestones": {
            "test_part": TEST_PART,
            "test_size": TEST_SIZE,
            "n_seeds": N_SEEDS,
            "marks": _all_marks(MILESTONES),
        },
        "gauge": gauge(),
    }


def collect_additions() -> dict[str, Any]:
    """What was frozen later than the rest, JSON-ready: further reference sets, scenarios and milestones."""
    return {
        "protocol_version": VERSION,
        "reference_sets": {name: _set(name) for name in REFERENCE_SETS if name not in FIRST_SETS},
        "telluric": [list(ends) for ends in TELLURIC],
        "scenarios": scenarios.scenario_table() | {"gauge": scenarios.gauge()},
        "milestones": _all_marks(ADDED_MILESTONES),
    }


def _set(name: str) -> dict[str, Any]:
    one = REFERENCE_SETS[name]
    return {
        "what": one.what,
        "settings": json.loads(one.settings.to_json()),
        "parts": {
            part: {"seed": its.seed, "n": its.n_rows, "fingerprint": FINGERPRINTS.get((name, part))}
            for part, its in one.parts.items()
        },
    }


def _all_marks(milestones: Sequence[Milestone]) -> dict[str, Any]:
    return {
        one.id: {
            "what": one.what,
            "published": one.published,
            "absolute": _marks(one.absolute),
            "reference": _marks(one.reference),
        }
        for one in milestones
    }


def _marks(rule: Rule) -> dict[str, Any]:
    return {
        "combine": rule.combine,
        "checks": [[check.quantity.what, check.relation, check.mark] for check in rule.checks],
    }


def canonical(frozen: Mapping[str, Any] | None = None) -> str:
    """JSON with sorted keys, without blanks, numbers as their shortest decimal form."""
    content = collect() if frozen is None else frozen
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha256(frozen: Mapping[str, Any] | None = None) -> str:
    """Hash of the canonical JSON, hex digits."""
    return hashlib.sha256(canonical(frozen).encode()).hexdigest()


# --- the gauge -------------------------------------------------------------------------------------------

# Multiples of these, modulo one, fill the unit interval evenly; products and remainders are exact on every machine.
_STEPS = {
    "log_g": 0.8191725133961645,
    "t_eff": 0.6710436067037893,
    "m_h": 0.5497004779019703,
    "snr_norm": 0.4503172,
    "model": 0.7548776662466927,
    "published": 0.5698402909980532,
    "global": 0.3819660112501051,
    "oracle": 0.2360679774997898,
}


def gauge_stars() -> dict[str, F64]:
    """The made-up stars of the gauge: labels, SNRs and four predictions, each of shape (n,), float64.

    Star i = 1 … n has u = (i · step) mod 1 for each column; see the document for the formulas.
    """
    i = np.arange(1, GAUGE_SIZE + 1)
    u = {name: np.mod(i * step, 1.0) for name, step in _STEPS.items()}
    log_g = 1 + 4 * u["log_g"]
    snr_norm = 1 + 8 * u["snr_norm"]
    snr_median = 3 * snr_norm
    model = log_g + 6 / snr_median * (2 * u["model"] - 1)
    # One prediction that does not exist, and one beyond every label: neither may vanish.
    model[0], model[1] = np.nan, 7.0
    return {
        "log_g": log_g,
        "t_eff": 3700 + 2400 * u["t_eff"],
        "m_h": -2.5 + 3.25 * u["m_h"],
        "snr_norm": snr_norm,
        "snr_median": snr_median,
        "model": model,
        "error": 3.5 / snr_median,
        "published-ridge": log_g + 1.6 * (2 * u["published"] - 1),
        "global-ridge": log_g + 1.4 * (2 * u["global"] - 1),
        "oracle-ridge": log_g + 4 / snr_median * (2 * u["oracle"] - 1),
    }


def _gauge_report() -> Report:
    stars = gauge_stars()
    return evaluate_predictions(
        Stars(stars["log_g"], stars["t_eff"], stars["m_h"], stars["snr_norm"], stars["snr_median"]),
        Predictions(stars["model"], stars["error"]),
        DataSet("gauge", ""),
        comparisons=Comparisons(
            references={name: stars[name] for name in ("published-ridge", "global-ridge", "oracle-ridge")},
            ceilings={"bayes": GAUGE_CEILING},
        ),
    )


def gauge() -> dict[str, Any]:
    """What the ruler says about the made-up stars."""
    found = as_entries(_gauge_report())
    overall, rho, against = found["overall"], found["rho"], found["ceilings"]["bayes"]
    numbers: dict[str, Any] = {"n": found["data_set"]["n"], "n_nan": overall["n_nan"]}
    for name in metrics.STATISTICS:
        numbers[name] = _rounded([overall[name], *overall[f"{name}_interval"]])
    numbers["covered"] = [found["covered"]["n"], _rounded(found["covered"]["r2"])]
    numbers["within_error"] = _rounded([row["fraction"] for row in overall["error_coverage"]["levels"]])
    for name, one in found["references"].items():
        numbers[name] = _rounded([one["r2"], *one["r2_interval"]])
        numbers[f"gain over {name}"] = _rounded([one["r2_gain"], *one["r2_gain_interval"]])
    numbers["rho"] = _rounded([rho["value"], *rho["interval"]])
    numbers["gap_closed"] = _rounded([against["gap_closed"], *against["gap_closed_interval"]])
    numbers["efficiency"] = _rounded(against["efficiency"])
    numbers["groups"] = {
        group["name"]: [group["n"], _rounded(group["r2"])]
        for kind in ("snr_norm", "snr_median", "grid", "metallicity")
        for group in found[kind]["groups"]
    }
    numbers["groups"]["low SNR"] = [
        found["low_snr"]["overall"]["n"],
        _rounded(found["low_snr"]["overall"]["r2"]),
    ]
    return numbers


def _rounded(values: ArrayLike) -> Any:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"the gauge must be finite; found {array}")
    rounded = [float(f"{value:.{DIGITS}g}") for value in array.ravel()]
    return rounded if array.ndim else rounded[0]


# --- the document ----------------------------------------------------------------------------------------


def document(frozen: Mapping[str, Any] | None = None, additions: Mapping[str, Any] | None = None) -> str:
    """The protocol for people, as Markdown; every number in it is taken from `collect` and `collect_additions`."""
    found = collect() if frozen is None else frozen
    added = collect_additions() if additions is None else additions
    parts = [
        _head(found),
        _sets(found["reference_sets"]),
        _noise(found),
        _groups(found),
        _statistics(found),
        _comparisons(found),
        _ceilings(found["ceilings"]),
        _rules(found["rules"]),
        _milestones(found["milestones"]),
        _gauge(found["gauge"]),
        _additions(added),
    ]
    return (
        "\n\n".join(_reflowed(paragraph) for part in parts for paragraph in part.strip().split("\n\n")) + "\n"
    )


def _reflowed(paragraph: str) -> str:
    """A paragraph of prose in lines of at most 120 characters; code, tables, lists and headings as they are."""
    if paragraph.startswith(("    ", "|", "#", "- ")):
        return paragraph
    return textwrap.fill(" ".join(paragraph.split()), 120, break_long_words=False, break_on_hyphens=False)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in lines)


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values).replace("-", "−")


def _head(found: Mapping[str, Any]) -> str:
    return f"""
# The frozen evaluation protocol

Version {found["protocol_version"]}, SHA-256 `{sha256(found)}`.

One ruler for every model: `moefast evaluate TEST… -m MODEL`. This page is written by
`python -m moefast.protocol.frozen docs/eval_protocol_frozen.md` from the constants that the code uses; it is not edited
by hand. The hash covers all of them, the rules below, the marks of the milestones, and what the code makes of a gauge
of {found["gauge"]["n"]} made-up stars. A test holds the hash. If it changes, results before and after cannot be
compared: the version must rise, and tables of results must say which version they are of.

What is measured is the surface gravity log g in dex, label *y* against prediction *ŷ*."""


def _parts(sets: Mapping[str, Any]) -> str:
    rows = [
        [name, part, "any" if its["n"] is None else its["n"], its["seed"],
         "each range of rows its own" if its["fingerprint"] is None else f"`{its['fingerprint']}`"]
        for name, one in sets.items()
        for part, its in one["parts"].items()
    ]  # fmt: skip
    return _table(["set", "part", "stars", "seed", "fingerprint"], rows)


def _sets(sets: Mapping[str, Any]) -> str:
    names = {
        "t_eff": "T_eff [K]", "log_g": "log g", "m_h": "[M/H]", "a_m": "[a/M]", "c_m": "[C/M]", "mag": "HSC i [mag]",
        "reddening": "E(B−V) [mag]", "velocity_scatter": "velocity, σ [km/s]", "calibration": "flux calibration, rms",
    }  # fmt: skip

    def cell(value: Any) -> str:
        if isinstance(value, list):
            return f"{value[0]:g} … {value[1]:g}".replace("-", "−") if any(value) else "off"
        return f"{value:g}" if value else "off"

    settings = [
        [label, *(cell(one["settings"][key]) for one in sets.values())] for key, label in names.items()
    ]
    about = "\n".join(f"- `{name}`: {one['what']}." for name, one in sets.items())
    return f"""
## Test sets

Results are quoted on a reference set, made on any machine from stored seeds by `moefast simulate --set`:

{about}

Ranges are of uniform distributions.

{_table(["", *sets], settings)}

Parts are known by a fingerprint of all that decides their content (settings, seed, emulator, noise model, the
parameters of every row); a file is recognised by computing it again, not by its name. Row *i* of a part is the same
in whatever file or shard it stands.

{_parts(sets)}"""


def _noise(found: Mapping[str, Any]) -> str:
    noise = found["noise"]
    first = "; ".join(", ".join(f"{value:.3f}" for value in row) for row in noise["drawn_first_pixels"])
    return f"""
## Noise

Results are for noise level {noise["level"]:g}, the physical errors of the files. {found["rules"]["one_noise"]}
Noise stored with simulated spectra is of stream {noise["stored_stream"]} of the part's seed. Noise that is drawn is of
stream {noise["drawn_stream"]} of seed {noise["drawn_seed"]}; its first pixels are, in units of the error, in row 0 and
row 1: {first}."""


def _groups(found: Mapping[str, Any]) -> str:
    grid, norm = found["grid"], found["snr_norm"]
    edges = norm["edges"]
    ranges = [
        f"≤ {edges[0]:g}",
        *(f"({a:g}, {b:g}]" for a, b in pairwise(edges)),
        f"> {edges[-1]:g}",
    ]
    t_eff = [f"{a:g} … {b:g}" for a, b in pairwise(grid["t_eff_edges"])]
    m_h = [f"{a:g} … {b:g}".replace("-", "−") for a, b in pairwise(grid["m_h_edges"])]
    rows = [
        [f"T_eff {t} K", *(f"{k} {grid['names'][k]}" for k in range(i * len(m_h), (i + 1) * len(m_h)))]
        for i, t in enumerate(t_eff)
    ]
    return f"""
## Two signal-to-noise ratios

    snr_norm   = ‖flux‖₂ / ‖error‖₂
    snr_median = median(flux / error)

They are different numbers for the same spectrum: sky lines rule snr_norm. snr_norm defines the bins
{", ".join(f"{name}: {limits}" for name, limits in zip(norm["names"], ranges, strict=True))}; stars with snr_norm
≤ {found["low_snr_norm_up_to"]:g} are also looked at by themselves. snr_median, in
{found["snr_median"]["n_quantiles"]}
quantiles of the test set at hand (intervals [a, b), the last one closed; equal values stay together), is the axis of
the figures.
{found["rules"]["snr_of_what"]}
A pixel is good if its flux is finite, its error above zero and at most
{found["largest_error_of_a_good_pixel"]:,.0f}, and it is not masked.

## Bins

{_table(["", *(f"[M/H] {m}" for m in m_h)], rows)}

Intervals are half-open, [a, b); the last edge belongs to the last interval. {found["rules"]["outside_grid"]}
A star is metal-poor where [M/H] < {_list([found["metal_poor_below"]])}."""


def _statistics(found: Mapping[str, Any]) -> str:
    boot = found["bootstrap"]
    tail = 50 * (1 - boot["level"])
    return f"""
## Statistics

    R²   = 1 − SS_res/SS_tot = 1 − Σ(y − ŷ)² / Σ(y − ȳ)²
    MAE  = mean |ŷ − y|
    RMSE = √ mean (ŷ − y)²
    bias = mean (ŷ − y)

They are reported overall (full coverage and covered only), per bin of snr_norm, per quantile of snr_median, per bin of
the grid, and for metal-poor stars and the rest. {found["rules"]["pooled"]} {found["rules"]["not_finite"]}

Where a model claims errors, the share of stars with |y − ŷ| ≤ z · error is reported for the levels
{_list(boot["coverage_levels"])}: the first stands for one sigma (z = 1, expected {math.erf(1 / math.sqrt(2)):.6f}),
the others are exact normal quantiles.

**Intervals** are {100 * boot["level"]:g} % percentile intervals ({tail:g} % and {100 - tail:g} %) of the bootstrap over
stars, {boot["n_resamples"]} resamples, seed {boot["seed"]}: resample *b* takes the rows
`numpy.random.default_rng({boot["seed"]}).integers(0, n, ({boot["n_resamples"]}, n))[b]`. Within a group, *n* counts its
stars.
Comparisons are paired: both models on the same resampled stars. Resamples in which a number does not exist are
counted, and the interval is over the others."""


def _comparisons(found: Mapping[str, Any]) -> str:
    names = found["references"]
    return f"""
## Against other models and ceilings

    ρ          = (R² − R²_global) / (R²_oracle − R²_global)
    gap closed = (R² − R²_published) / (R²_ceiling − R²_published)
    efficiency = R² / R²_ceiling

*Published* is `{names["published"]}`: one ridge fitted to sampled noise, flux clipped at zero, penalty
{names["published_penalty_per_star"]:g} per training star. *Global* is `{names["global"]}`, one linear model per noise
level. *Oracle* is the reference whose name begins with `{names["oracle"]}`: the model's own experts, each star sent to
the expert of its true bin (it uses labels). All are scored on the same noisy stars. A ratio whose denominator is not
above zero does not exist, and the report says why. In the intervals of ρ and of the closed gap all R² are resampled
together, the ceiling is held fixed. Efficiency and closed gap are given for every ceiling of the set; a closed gap that
is quoted by itself refers to the Bayes ceiling."""


def _ceilings(found: Mapping[str, Any]) -> str:
    parameters = ", ".join(found["fisher_parameters"])
    return f"""
## Ceilings

**Fisher.** I = J V⁻¹ Jᵀ over the parameters {parameters} and the nuisances that vary; CRLB = [I⁻¹] for log g, by the
Schur complement; R²max = 1 − CRLB/Var(log g), median and mean over stars. It bounds unbiased estimators only:
regression towards the prior can beat it at low SNR. Beside it stands the bound with the prior's information,
12/range² for each label.

**Bayes.** R²max = 1 − E[Var(log g | x)] / Var(log g), the R² of the exact posterior mean under the prior and the noise
that made the set, by adaptive importance sampling to an effective sample size of
{found["bayes_target_effective_sample_size"]:g} per star, given with its Monte Carlo error and the share of stars
that reach at least {found["bayes_least_effective_sample_size"]:g}. No method does better on stars drawn from
that prior.

The published curve of the five-parameter bound, on a set that is not public (magnitude: R²max):
{", ".join(f"{mag:g}: {value:g}" for mag, value in found["published_crlb"])}."""


def _rules(rules: Mapping[str, str]) -> str:
    return f"""
## Rules

{rules["clipping"]}

{rules["choosing"]} {rules["naming"]}"""


def _marks_table(marks: Mapping[str, Any]) -> str:
    def words(rule: Mapping[str, Any]) -> str:
        joined = "<br>*or* " if rule["combine"] == "any" else "<br>"
        return joined.join(f"{what} {relation} {mark:g}" for what, relation, mark in rule["checks"])

    rows = [
        [name, one["what"], one["published"], words(one["absolute"]), words(one["reference"])]
        for name, one in marks.items()
    ]
    return _table(
        ["", "what", "published", "mark set on the published data", "mark on any reference set"], rows
    )


def _milestones(found: Mapping[str, Any]) -> str:
    return f"""
## Milestones

`moefast milestones REPORT…` judges them by evaluations. The published numbers belong to a test set that is not public;
the last column holds on any reference set. Marks are never edited to pass, and the point decides, its interval stands
beside. What no evaluation holds is *not run*. Of several evaluations of a model, the weakest counts.

{_marks_table(found["marks"])}

C0 is measured on the test set of {found["test_size"]} stars over at least {found["n_seeds"]} training sets of one size
and at least {found["n_seeds"]} draws of noise; half the spread is (max − min)/2 over all runs given. The sampled ridge
of C1 is the ridge oracle fitted to sampled noise; its worst metal-poor bin is the one in which it has the lowest R²."""


def _gauge(found: Mapping[str, Any]) -> str:
    def cell(value: Any) -> str:
        return f"{value:.{DIGITS}g}".replace("-", "−")

    rows = []
    for name, value in found.items():
        if name in {"n", "n_nan", "groups", "covered", "within_error"}:
            continue
        point, *interval = value if isinstance(value, list) else [value]
        rows.append(
            [
                f"R² of {name}" if name.endswith("-ridge") and " " not in name else name,
                cell(point),
                ", ".join(cell(end) for end in interval),
            ]
        )
    groups = [[name, n, cell(r2)] for name, (n, r2) in found["groups"].items()]
    n, r2 = found["covered"]
    groups.append(["covered only", n, cell(r2)])
    inside = " and ".join(cell(value) for value in found["within_error"])
    steps = "\n".join(f"    {name:<10} {step!r}" for name, step in _STEPS.items())
    return f"""
## The gauge

A ruler of somebody else's follows this protocol if it gives these numbers. Stars *i* = 1 … {found["n"]} have, with
u = (i · step) mod 1 and one step per column,

{steps}

    log g      = 1 + 4 u_log_g             T_eff = 3700 + 2400 u_t_eff       [M/H] = −2.5 + 3.25 u_m_h
    snr_norm   = 1 + 8 u_snr_norm          snr_median = 3 snr_norm
    model      = log g + 6/snr_median · (2 u_model − 1)                      error = 3.5/snr_median
    published  = log g + 1.6 (2 u_published − 1)
    global     = log g + 1.4 (2 u_global − 1)
    oracle     = log g + 4/snr_median · (2 u_oracle − 1)

except that the model predicts nothing (NaN) for the first star and 7 for the second. With a ceiling of
{GAUGE_CEILING:g}, {found["n_nan"]} prediction counts as the mean label, the shares of stars within their
errors are {inside}, and

{_table(["overall", "value", "interval"], rows)}

{_table(["group", "stars", "R²"], groups)}"""


def _additions(found: Mapping[str, Any]) -> str:
    sets = found["reference_sets"]
    about = "\n".join(f"- `{name}`: {one['what']}." for name, one in sets.items())
    wild = sets["wild"]["settings"]
    visit, gaps = wild["visit"], wild["visit"]["gaps"]

    def percent(value: float) -> str:
        return f"{100 * value:.3g} %"

    def span(pair: Sequence[float]) -> str:
        return f"{100 * pair[0]:.3g} to {percent(pair[1])}"

    table = found["scenarios"]
    marks = table["marks"]
    rows = [
        [name, one["what"], one["kind"], *(f"{value:g}".replace("-", "−") for value in table["gauge"][name])]
        for name, one in table["scenarios"].items()
    ]
    telluric = ", ".join(f"{first:g}-{last:g}" for first, last in found["telluric"])
    return f"""
## Added since

SHA-256 `{sha256(found)}`. What is added has a hash of its own, so that the one above stays what it is; all rules above
hold for it.

{about}

The Bayes ceiling of `wild` knows the magnitude, the seeing, the sky and the lost pixels of each star. It marginalises
labels, velocity, reddening, line-spread function, calibration error, tilt and sky residuals over what the stars were
drawn from, and the scale of the flux, of which the median of the noisy flux is taken to say nothing.

In `wild`, star *i* of a part is star *i* of `survey`, with a velocity of σ = {wild["velocity_scatter"]:g} km/s. Each
star has a sky of its own: its continuum is brighter by a log-normal factor of scatter
{visit["sky_continuum"]:g}, each of eight groups of airglow lines (six bands of OH, all of O2, the rest) by one of
scatter {visit["sky_lines"]:g}, in errors and noise alike. Of each group a share of
σ = {percent(visit["sky_residual"])} is left in the flux, which the errors do not tell. The line-spread function is up
to {percent(visit["line_spread"])} wider or narrower, uniformly. The continuum is multiplied by 1 + calibration error +
tilt, with a calibration error of rms {percent(wild["calibration"])} and a tilt of σ = {percent(visit["tilt"])} from end
to end. Flux and error are divided by the median of the noisy flux over the pixels that are left. Lost are
{span(gaps["random"])} of the pixels at random in every star; {telluric} Å with a probability of
{gaps["telluric"]:.3g}; a block of {span(gaps["block_share"])} of the pixels with a probability of {gaps["block"]:g};
{span(gaps["edge_share"])} of the pixels at one end with a probability of {gaps["edges"]:g}.

{_parts(sets)}

### Scenarios

`moefast scenarios MODEL` shows a model the first stars of {" ".join(table["base"])}, changed in one way after the
other. A flag is any of {", ".join(table["flags"])}. A failure is silent if a star carries none of them and its log g is
more than {table["sigmas"]:g} claimed errors away, or does not exist; where there is no star, every spectrum without a
flag is one. Marks: silent failures in at most {percent(marks["silent"])} of the stars, no flag on at most
{percent(marks["unflagged where there is no star"])} of what is no star, {table["false_flag"]} on at most
{percent(marks["false flags"])} of the stars of a reference set. What is drawn is of seed {table["seed"]}. The last
columns hold what the first four stars of each scenario have: mean flux in the blue and the red quarter and in the core
of Ca II 8544, rms of flux / error, mean error, lost pixels.

{_table(["scenario", "what", "kind", "blue", "red", "Ca II", "flux / error", "error", "lost"], rows)}

### Milestones of single steps

Judged as the others are, with the same marks where these have them.

{_marks_table(found["milestones"])}"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the document and print version and hash."""
    parser = argparse.ArgumentParser(
        prog="python -m moefast.protocol.frozen",
        description="Write the frozen evaluation protocol as Markdown, from the constants of the code.",
    )
    parser.add_argument(
        "path", type=Path, nargs="?", help="file to write; without it, only the hash is shown"
    )
    path = parser.parse_args(arguments).path
    found = collect()
    if path is not None:
        write_atomically(path, document(found).encode())
    print(f"protocol version {VERSION}, SHA-256 {sha256(found)}; additions {sha256(collect_additions())}")


if __name__ == "__main__":
    main()
