"""The report of an evaluation as plain text, for a terminal and for report.txt."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moefast.core import metrics
from moefast.core.text import bracket, counted, number, percent, table
from moefast.protocol.comparisons import MEANS
from moefast.protocol.milestones.text import format_section
from moefast.protocol.milestones.verdicts import Judgement
from moefast.protocol.report_parts import (
    CeilingComparison,
    GroupScores,
    NormBinScores,
    OctileScores,
    PosteriorMeans,
    Report,
    SnrOracle,
    WorstMetalPoor,
)

__all__ = [
    "BAYES",
    "EFFICIENCIES",
    "PUBLISHED_SNR_GAIN",
    "efficiency_words",
    "format_text",
    "group_efficiency",
    "in_no_group",
    "norm_label",
    "not_finite",
    "octile_label",
    "posterior_means_words",
    "snr_oracle_words",
    "worst_metal_poor_words",
]

BAYES = "bayes"
"""Ceiling that the efficiency within a group refers to."""

COLUMNS = 100
"""Of a terminal."""

EFFICIENCIES = {BAYES: "efficiency", MEANS: "of means"}
"""Titles of R² within a group over the Bayes ceiling, and over what exact posterior means have there."""

PUBLISHED_SNR_GAIN = 0.05
"""What four bins of SNR brought over one ridge on the published data, which are not public."""

NO_LIMIT = "fisher mean"
"""Mean Fisher bound without prior: single stars without information drag it below what models reach."""


def format_text(
    report: Report,
    throughput: Mapping[str, Any] | None = None,
    judged: Judgement | None = None,
) -> str:
    """Plain-text report for a terminal, headline first, within 100 columns unless names are long.

    Parameters
    ----------
    report : Report
        From `evaluate_predictions`, or read back from its JSON.
    throughput : mapping, optional
        "spectra_per_second" and "device" or "backend", for the headline.
    judged : Judgement, optional
        What the evaluation says about the milestones, from `moefast.protocol.milestones.judge.judge_alone`.

    Returns
    -------
    str
        Without a final newline.
    """
    lines = _headline(report, throughput or {})
    if report.references:
        lines += ["", *_what_helped(report)]
    if report.ceilings:
        lines += ["", *_ceilings(report)]
    lines += ["", *_groups(report)]
    if report.worst_metal_poor is not None:
        lines += ["", f"Worst metal-poor bin: {worst_metal_poor_words(report.worst_metal_poor)}"]
    if report.snr_oracle is not None:
        lines += ["", *_wrapped(f"SNR oracle: {snr_oracle_words(report.snr_oracle)}")]
    section = format_section(judged) if judged else []
    if section:
        lines += ["", *section]
    return "\n".join(line.rstrip() for line in lines)


def _headline(report: Report, throughput: Mapping[str, Any]) -> list[str]:
    rows = _scores(report)
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    level = f"{100 * report.protocol.level:g} %"
    lines = [
        *_what_was_measured(report),
        *(f"note: {note}" for note in throughput.get("notes", ())),
        "",
        *(
            f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {interval:<{widths[2]}}  {remark}"
            for name, value, interval, remark in rows
        ),
        *(f"  {name:<{widths[0]}}  {words}" for name, words in _remarks(report, throughput)),
    ]
    if report.overall.n_nan:
        lines.append(f"  {not_finite(report.overall.n_nan)}: each counts as the mean label")
    lines.append(
        f"  (brackets: {level} bootstrap intervals over stars, {report.protocol.n_resamples} resamples)"
    )
    return lines


def _what_was_measured(report: Report) -> list[str]:
    data = report.data_set
    noise = "" if data.noise_level is None else f", noise level {data.noise_level:g}"
    if data.noise_seed is not None:
        noise += f" (seed {data.noise_seed})"
    model = report.model.get("recipe") or report.model.get("name")
    lines = [f"log g on {data.name}: {counted(data.n, 'star')}{noise}"]
    if (known := data.reference_set) is not None:
        # What `moefast simulate` prints: the set by what decides its content, not by the bytes of a file.
        lines.append(f"set {known['reference_set']} {known['part']}, fingerprint {known['fingerprint']}")
    lines.append(f"file fingerprint {data.fingerprint}" + (f", model {model}" if model else ""))
    if report.model.get("share_seen"):
        lines.append(
            f"WARNING: {percent(report.model['share_seen'])} of these stars are in the training set of the model: "
            "no measure of what it does elsewhere"
        )
    if data.n_unlabelled:
        lines.append(f"{counted(data.n_unlabelled, 'star')} of the set without labels: not measured")
    return lines


def _scores(report: Report) -> list[tuple[str, str, str, str]]:
    """Name, value, interval and remark of each number of the headline."""
    overall, covered = report.overall, report.covered
    rows = [
        ("R²", number(overall.r2, 4), bracket(overall.r2_interval, 4), "full coverage"),
        ("MAE", number(overall.mae, 4), bracket(overall.mae_interval, 4), "dex"),
        ("RMSE", number(overall.rmse, 4), bracket(overall.rmse_interval, 4), "dex"),
        ("bias", number(overall.bias, 4, True), bracket(overall.bias_interval, 4, True), "dex"),
        (
            "R², covered only",
            number(covered.r2, 4),
            bracket(covered.r2_interval, 4),
            f"{counted(covered.n, 'star')} on the grid",
        ),
    ]
    rho = report.rho
    if rho is not None:
        remark = rho.reason or f"from {rho.global_reference} to {rho.oracle}"
        rows.append(("ρ", number(rho.value), bracket(rho.interval), remark))
    if report.rho_bayes is not None:
        other = report.rho_bayes
        remark = other.reason or "the same experts mixed by Bayes' rule alone"
        rows.append(("ρ by Bayes' rule", number(other.value), bracket(other.interval), remark))
    return rows


def _remarks(report: Report, throughput: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and words of what stands below the numbers."""
    remarks = []
    if report.overall.error_coverage is not None:
        shares = ", ".join(
            f"{percent(row.fraction)} within {row.z:.2f} σ (expected {percent(row.expected)})"
            for row in report.overall.error_coverage.levels
        )
        remarks.append(("errors", shares))
        if report.calibration is not None:
            remarks.append(("", f"multiplied by {report.calibration.scale:.2f} they would cover 68.3 %"))
    rate = throughput.get("spectra_per_second")
    if rate is not None:
        where = throughput.get("device") or throughput.get("backend")
        remarks.append(("throughput", f"{rate:,.0f} spectra/s" + (f" on {where}" if where else "")))
    routing = report.routing
    if routing is not None:
        accuracy = "" if routing.accuracy is None else f", true bin in {percent(routing.accuracy)}"
        largest = number(routing.mean_largest_weight, 2)
        remarks.append(("gate", f"{routing.n_experts} experts, mean largest weight {largest}{accuracy}"))
    return remarks


def _what_helped(report: Report) -> list[str]:
    rows = [
        (
            name,
            number(reference.r2),
            bracket(reference.r2_interval),
            number(reference.r2_gain, 3, True),
            bracket(reference.r2_gain_interval, 3, True),
        )
        for name, reference in report.references.items()
    ]
    rows.append(("this model", number(report.overall.r2), bracket(report.overall.r2_interval), "", ""))
    return [
        "What helped: references on the same stars, and how much this model is above each (paired)",
        *table(("reference", "R²", "interval", "gain", "interval"), rows),
    ]


def efficiency_words(name: str, ceiling: CeilingComparison) -> str:
    """Efficiency against a ceiling; a dash where it is none, or where the ceiling is no limit of the set."""
    return "–" if name == NO_LIMIT or ceiling.efficiency_reason else number(ceiling.efficiency)


def _ceilings(report: Report) -> list[str]:
    rows = [
        (
            name,
            number(ceiling.r2),
            efficiency_words(name, ceiling),
            number(ceiling.gap_closed),
            bracket(ceiling.gap_closed_interval),
        )
        for name, ceiling in report.ceilings.items()
    ]
    reasons = [
        f"  {name}: {reason}"
        for name, ceiling in report.ceilings.items()
        for reason in (ceiling.efficiency_reason, ceiling.gap_closed_reason)
        if reason
    ]
    lines = ["Ceilings", *table(("ceiling", "R²", "efficiency", "gap closed", "interval"), rows), *reasons]
    if report.posterior_means is not None:
        lines += _wrapped(f"  exact posterior means: {posterior_means_words(report.posterior_means)}")
    return lines


def _groups(report: Report) -> list[str]:
    sections: list[tuple[str, Sequence[Any], Callable[[Any], str]]] = [
        ("By snr_norm", report.snr_norm.groups, norm_label),
        ("By snr_median", report.snr_median.groups, octile_label),
        ("By T_eff × [M/H]", report.grid.groups, lambda group: group.name),
        ("By metallicity", report.metallicity.groups, lambda group: group.name),
    ]
    known = {name for _, groups, _ in sections for group in groups for name in group.ceilings}
    efficient = {name: title for name, title in EFFICIENCIES.items() if name in known}
    header = ("", "n", "R²", "interval", "MAE", "RMSE", "bias", *efficient.values())
    # One table, so that the columns of all sections stand under each other.
    rows: list[tuple[str, ...]] = []
    titles: dict[int, str] = {}
    for title, groups, label in sections:
        titles[len(rows)] = title
        rows += [
            (
                label(group),
                str(group.n),
                number(group.r2),
                bracket(group.r2_interval),
                number(group.mae),
                number(group.rmse),
                number(group.bias, 3, True),
                *(group_efficiency(group, name) for name in efficient),
            )
            for group in groups
        ]
    head, *body = table(header, rows)
    lines = []
    for i, line in enumerate(body):
        if i in titles:
            title = titles[i]
            lines += [*([""] if i else []), title + head[len(title) :]]
        lines.append(line)
    for name, n in (
        ("snr_norm", report.snr_norm.n_unassigned),
        ("snr_median", report.snr_median.n_unassigned),
    ):
        if n:
            lines.append(f"  {in_no_group(n, name)}")
    return lines


def not_finite(n: int, of: int | None = None) -> str:
    """How many predictions are not finite, if need be of how many."""
    what = counted(n, "prediction") if of is None else f"{n:,} of {counted(of, 'prediction')}"
    return f"{what} {'is' if n == 1 else 'are'} not finite"


def in_no_group(n: int, name: str) -> str:
    """How many stars are in no group of a quantity."""
    return (
        f"{counted(n, 'star')} {'has' if n == 1 else 'have'} no finite {name} and {'is' if n == 1 else 'are'} in no "
        "group of it"
    )


def group_efficiency(group: GroupScores, ceiling: str = BAYES) -> str:
    """R² over a ceiling within a group; a dash where there is none, or the ceiling is not positive."""
    limit = group.ceilings.get(ceiling)
    if limit is None or group.r2 is None:
        return number(None)
    return number(metrics.efficiency(group.r2, limit).value)


def worst_metal_poor_words(worst: WorstMetalPoor) -> str:
    """What was made of the metal-poor bin in which linear experts of one noise draw do worst."""
    return (
        f"{worst.name} ({counted(worst.n, 'star')}), R² {number(worst.r2_sampled)} by the ridge of that bin fitted to "
        "one noise "
        f"draw, {number(worst.r2_oracle)} by the expert of that bin ({number(worst.gain, 3, True)} "
        f"{bracket(worst.gain_interval, 3, True)}), {number(worst.r2)} by this model, which does not know the bin"
    )


def _wrapped(sentence: str) -> list[str]:
    """A sentence in lines of a terminal."""
    return textwrap.wrap(sentence, COLUMNS, subsequent_indent="  ")


def posterior_means_words(means: PosteriorMeans) -> str:
    """What the exact posterior means have on the same stars, and the model's share of it."""
    share = means.efficiency_reason or (
        f"this model has {number(means.efficiency)} {bracket(means.efficiency_interval)} of it (paired)"
    )
    return f"R² {number(means.r2)} {bracket(means.r2_interval)} on these stars; {share}"


def snr_oracle_words(oracle: SnrOracle) -> str:
    """What experts by signal-to-noise alone bring, and the published number beside it."""
    return (
        f"one ridge for each of the four bins of snr_norm has R² {number(oracle.r2)}, one for all "
        f"{number(oracle.r2_one)}, all at the average noise of their stars: {number(oracle.gain, 3, True)} "
        f"{bracket(oracle.gain_interval, 3, True)} (published: {PUBLISHED_SNR_GAIN:+.2f})"
    )


def norm_label(group: NormBinScores) -> str:
    """Name of an snr_norm bin with its range."""
    low, high = group.range
    if low is None:
        return f"{group.name}  ≤ {high:g}"
    return f"{group.name}  > {low:g}" if high is None else f"{group.name}  ({low:g}, {high:g}]"


def octile_label(group: OctileScores) -> str:
    """Range of an snr_median octile."""
    low, high = group.range
    return group.name if low is None else f"{low:.2f} – {high:.2f}"
