"""The report as one HTML page: every figure and table, nothing from anywhere else.

Design: a function of the report, the facts of its run and what was judged, so the same inputs give the same bytes. The
words stand in templates (`moefast/pages/templates/report`); what is put together here are tables and tiles.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from moefast.core.atomic import write_atomically
from moefast.pages.page import Cell, Figure, Table, Words, bracket, number, percent, render, signs, tile
from moefast.protocol.comparisons import MEANS
from moefast.protocol.figures import FIGURES, svg
from moefast.protocol.milestones.verdicts import Judgement
from moefast.protocol.report_parts import GroupKind, MeasuredSet, Report
from moefast.protocol.report_text import (
    BAYES,
    EFFICIENCIES,
    efficiency_words,
    group_efficiency,
    in_no_group,
    norm_label,
    not_finite,
    octile_label,
    posterior_means_words,
    snr_oracle_words,
    worst_metal_poor_words,
)

__all__ = ["page", "write_page"]

_SECTIONS = (
    ("standing", "Where it stands"),
    ("bins", "Where it is good and where it is not"),
    ("residuals", "Predictions and residuals"),
    ("errors", "Are the claimed errors right?"),
    ("gate", "The gate"),
    ("numbers", "All numbers"),
    ("method", "How it was measured"),
    ("again", "Reproduce it"),
)
_FIGURES = {
    "standing": ("r2-against-snr", "what-helped"),
    "bins": ("r2-by-bin", "low-snr", "metal-poor", "giants-and-dwarfs"),
    "residuals": (
        "predicted-against-true", "kiel-bias", "residuals-log_g", "residuals-T_eff", "residuals-M_H", "residuals-snr",
    ),
    "errors": ("error-calibration", "error-by-snr", "error-size"),
    "gate": ("gate-by-bin", "gate-by-snr"),
}  # fmt: skip
"""Figures of each section."""
_KINDS: tuple[tuple[GroupKind, str, Callable[[Any], str]], ...] = (
    ("snr_norm", "By snr_norm", norm_label),
    ("snr_median", "By octile of snr_median", octile_label),
    ("grid", "By bin of T_eff and [M/H]", lambda group: group.name),
    ("metallicity", "By metallicity", lambda group: signs(group.name)),
)
_SUBJECTS = {
    "model": "model of moefast",
    "onnx": "ONNX file",
    "table": "table of predictions made elsewhere",
    "peer": "what others fit labels with",
}


def page(report: Report, run: Mapping[str, Any] | None = None, judged: Judgement | None = None) -> str:
    """The report as an HTML document.

    Parameters
    ----------
    report : Report
        From `moefast.protocol.report.evaluate_predictions`, or read back from its JSON.
    run : mapping, optional
        `Evaluation.run`: throughput, device and command.
    judged : Judgement, optional
        What the evaluation says about the milestones, from `moefast.protocol.milestones.judge.judge_alone`.

    Returns
    -------
    str
        The same for the same arguments.
    """
    facts = dict(run or {})
    data, model = report.data_set, report.model
    return render(
        "report.html.j2",
        parts="report",
        sections=[each for each in _SECTIONS if each[0] != "gate" or report.routing is not None],
        title=f"{model.get('name') or model.get('recipe') or 'a model'} on {data.name}",
        kind=_SUBJECTS.get(model.get("kind", ""), "model"),
        noise=_noise(data),
        report=report,
        run={"command": None, "moefast_version": None} | facts,
        tiles=_tiles(report, facts),
        notes=_notes(report),
        figures={name: _drawn(report, figures) for name, figures in _FIGURES.items()},
        tables={
            "references": _references(report),
            "ceilings": _ceilings(report),
            "milestones": _milestones(judged),
            "errors": _errors(report),
            "gate": _gate(report),
            "numbers": _numbers(report),
        },
        means=report.posterior_means and posterior_means_words(report.posterior_means),
        worst=report.worst_metal_poor and worst_metal_poor_words(report.worst_metal_poor),
        snr_oracle=report.snr_oracle and snr_oracle_words(report.snr_oracle),
        terms=_terms(report),
    )


def write_page(
    report: Report,
    run: Mapping[str, Any] | None,
    path: str | os.PathLike[str],
    judged: Judgement | None = None,
) -> None:
    """Write `page` to a file.

    Raises
    ------
    OutputError
    """
    write_atomically(path, page(report, run, judged).encode())


def _drawn(report: Report, names: Sequence[str]) -> list[Figure]:
    return [
        Figure(name, FIGURES[name].title, FIGURES[name].caption, Markup(svg(report, name)))
        for name in names
        if FIGURES[name].exists(report)
    ]


# --- head ----------------------------------------------------------------------------------------------


def _noise(data: MeasuredSet) -> str:
    level = "" if data.noise_level is None else f", noise level {data.noise_level:g}"
    where = {
        "stored": "noise as stored with the spectra",
        "drawn": f"noise drawn from seed {data.noise_seed}",
        "none": "flux as it is, no noise added",
    }
    return where.get(data.noise or "", "noise not recorded") + level


def _tiles(report: Report, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    overall = report.overall
    level = f"{100 * report.protocol.level:g} % interval"
    tiles = [tile("R², all stars", number(overall.r2), f"{level} {bracket(overall.r2_interval)}", main=True)]
    for label, value, interval in (
        ("RMSE", overall.rmse, overall.rmse_interval),
        ("MAE", overall.mae, overall.mae_interval),
        ("Bias", overall.bias, overall.bias_interval),
    ):
        sign = label == "Bias"
        tiles.append(tile(f"{label} [dex]", number(value, sign=sign), bracket(interval, sign=sign)))
    known = next((name for name in ("bayes", "fisher median") if name in report.ceilings), None)
    if known is not None:
        ceiling = report.ceilings[known]
        detail = f"ceiling {number(ceiling.r2)}"
        if ceiling.gap_closed is not None:
            closed = f"{number(ceiling.gap_closed, 2)} {bracket(ceiling.gap_closed_interval, 2)}"
            detail += f"; gap closed {closed}"
        if report.posterior_means is not None:
            detail += f"; {number(report.posterior_means.efficiency)} of R² of the exact posterior means"
        word = "Bayes" if known == "bayes" else "median Fisher"
        tiles.append(tile(f"R² over the {word} ceiling", number(ceiling.efficiency), detail))
    if report.rho is not None:
        rho = report.rho
        detail = rho.reason or f"{bracket(rho.interval, 2)}, {rho.global_reference} to {rho.oracle}"
        tiles.append(tile("ρ, share of the oracle's gain", number(rho.value, 2), detail))
    if overall.error_coverage is not None:
        one = overall.error_coverage.levels[0]
        tiles.append(tile("Within 1σ", percent(one.fraction), f"{percent(one.expected)} expected"))
    rate = run.get("spectra_per_second")
    if rate is not None:
        where = run.get("device") or run.get("backend") or ""
        tiles.append(tile("Spectra per second", f"{rate:,.0f}", f"{where}; {run.get('what', '')}"))
    return tiles


def _notes(report: Report) -> list[str]:
    overall, model, notes = report.overall, report.model, []
    if seen := model.get("share_seen"):
        notes.append(
            f"Warning: {100 * seen:.1f} % of these stars are in the training set of the model. This is no measure of "
            "what it does elsewhere."
        )
    if overall.n_nan:
        notes.append(
            f"{not_finite(overall.n_nan, overall.n)}: each counts as the mean label, in every number here."
        )
    if report.data_set.noise == "none":
        notes.append(
            "No noise was added: right for observed spectra, far too good for simulated ones without noise."
        )
    if model.get("wave_checked") is False:
        notes.append(
            "The ONNX file does not say on which wave grid it was made; only the number of pixels was checked."
        )
    if model.get("kind") == "table" and report.data_set.noise == "stored":
        notes.append(
            "That these predictions were made of the noisy spectra is taken on trust where the table does not say so."
        )
    for name, n in (
        ("snr_norm", report.snr_norm.n_unassigned),
        ("snr_median", report.snr_median.n_unassigned),
    ):
        if n:
            notes.append(f"{in_no_group(n, name)}.")
    return notes


# --- tables --------------------------------------------------------------------------------------------


def _references(report: Report) -> Table | None:
    if not report.references:
        return None
    overall = report.overall
    rows = [
        (
            name,
            [
                number(entry.r2),
                bracket(entry.r2_interval),
                number(entry.r2_gain, sign=True),
                bracket(entry.r2_gain_interval, sign=True),
            ],
        )
        for name, entry in report.references.items()
    ]
    rows.append(("this model", [number(overall.r2), bracket(overall.r2_interval), "", ""]))
    return Table(
        "Simpler fits on the same stars and how far this model is above each, paired over the stars; fitted with the "
        f"model {report.model.get('references_of') or 'itself'}",
        ("reference", "R²", "interval", "gain", "interval"),
        rows,
        own="this model",
    )


def _ceilings(report: Report) -> Table | None:
    if not report.ceilings:
        return None
    rows = [
        (
            name,
            [
                number(entry.r2),
                efficiency_words(name, entry),
                number(entry.gap_closed),
                bracket(entry.gap_closed_interval),
            ],
        )
        for name, entry in report.ceilings.items()
    ]
    return Table(
        "What the physics allows: efficiency is R² over the ceiling, gap closed the share of the way from the "
        "published-style ridge to it. The mean Fisher bound without prior is no limit of the set: single stars without "
        "information drag it down",
        ("ceiling", "R²", "efficiency", "gap closed", "interval"),
        rows,
    )


def _milestones(judged: Judgement | None) -> Table | None:
    rows = [
        (
            row.id,
            [
                Words(row.what),
                Words(row.published),
                number(row.ours.value),
                bracket(row.ours.interval),
                row.absolute.verdict,
                row.reference.verdict,
            ],
        )
        for row in (judged.sections[0].milestones if judged else ())
        if row.ours.value is not None
    ]
    if not rows:
        return None
    return Table(
        "Milestones that this evaluation bears on; the published numbers belong to data that are not public. "
        "moefast milestones shows every check",
        ("", Words("what"), Words("published R²"), "our R²", "interval", "their mark", "any set"),
        rows,
    )


def _errors(report: Report) -> Table | None:
    coverage = report.overall.error_coverage
    if report.calibration is None or coverage is None:
        return None
    head = [f"within {row.z:.2f}σ ({percent(row.expected)})" for row in coverage.levels]
    groups = [("all stars", report.overall.n, coverage)]
    groups += [
        (norm_label(group), group.n, group.error_coverage)
        for group in report.snr_norm.groups
        if group.error_coverage is not None
    ]
    rows = [
        (name, [f"{n:,}", *(percent(row.fraction) for row in covered.levels)]) for name, n, covered in groups
    ]
    caption = "Share of stars within the claimed error, by snr_norm (expected in brackets)"
    return Table(caption, ("", "n", *head), rows)


def _gate(report: Report) -> Table | None:
    routing = report.routing
    if routing is None:
        return None
    names = {
        "snr_norm": [norm_label(group) for group in report.snr_norm.groups],
        "snr_median": [octile_label(group) for group in report.snr_median.groups],
    }
    rows = [
        (
            f"{kind} {name}",
            [f"{group.n:,}", number(group.mean_largest_weight, 2), percent(group.accuracy)],
        )
        for kind, of_kind in names.items()
        for name, group in zip(of_kind, routing.by_group[kind], strict=True)
    ]
    return Table(
        "How sure the gate is, by signal-to-noise", ("", "n", "mean largest weight", "true bin"), rows
    )


def _numbers(report: Report) -> list[Table]:
    tables = []
    # Variants have a comma in their name, and tables have a width.
    references = [name for name in report.references if "," not in name]
    for kind, title, label in _KINDS:
        groups = report.groups(kind)
        ceilings = {
            name: title
            for name, title in (
                (BAYES, "bayes ceiling"), (MEANS, MEANS), ("fisher median", "fisher median ceiling"),
            )
            if any(name in g.ceilings for g in groups)
        }  # fmt: skip
        efficient = {name: title for name, title in EFFICIENCIES.items() if name in ceilings}
        rows = []
        for k, group in enumerate(groups):
            cells: list[Cell] = [
                f"{group.n:,}",
                number(group.r2),
                bracket(group.r2_interval),
                number(group.mae),
                number(group.rmse),
                number(group.bias, sign=True),
                *(group_efficiency(group, name) for name in efficient),
                *(number(group.ceilings.get(name)) for name in ceilings),
                *(number(report.references[name].r2_by(kind)[k]) for name in references),
            ]
            rows.append((label(group), cells))
        header = (
            "", "n", "R²", "interval", "MAE", "RMSE", "bias", *efficient.values(), *ceilings.values(),
            *references,
        )  # fmt: skip
        words = "; ceilings and references are R² within the group"
        words += ", efficiency is R² over the Bayes ceiling there" * (BAYES in efficient)
        words += ", of means R² over that of the exact posterior means" * (MEANS in efficient)
        tables.append(Table(title + words, header, rows))
    low = report.low_snr
    named = [
        ("all", low.overall),
        *((signs(group.name), group) for group in low.metallicity),
        *((group.name, group) for group in low.grid),
    ]
    rows = [(name, [f"{g.n:,}", number(g.r2), bracket(g.r2_interval), number(g.rmse)]) for name, g in named]
    title = f"Stars with snr_norm up to {low.snr_norm_up_to:g}"
    return [*tables, Table(title, ("", "n", "R²", "interval", "RMSE"), rows)]


def _terms(report: Report) -> list[tuple[str, str]]:
    """What the words mean, and how it was measured."""
    protocol, data, model = report.protocol, report.data_set, report.model
    grid = protocol.grid
    edges = " / ".join(f"{edge:g}" for edge in grid.t_eff_edges)
    metal = " / ".join(f"{edge:g}".replace("-", "−") for edge in grid.m_h_edges)
    claim = data.reference_set
    known = (
        f"; recognised by its content as {claim['reference_set']} {claim['part']}, the set with the fingerprint "
        f"{claim['fingerprint']}"
        if claim
        else ""
    )
    return [
        (
            "R²",
            "1 − SS_res/SS_tot about the mean label of the same group; pooled over stars, never a mean over bins",
        ),
        ("snr_norm", "‖flux‖₂/‖error‖₂ of a spectrum. It defines the bins X ≤ 2, L (2, 4], M (4, 7], H > 7"),
        ("snr_median", "median(flux/error) of a spectrum, the axis of the figures. The two are different numbers"),
        ("Bins", f"T_eff {edges} K × [M/H] {metal} dex; a star outside counts in the nearest bin"),
        ("Metal-poor", f"[M/H] < {protocol.metal_poor_below:g} dex".replace("-", "−")),
        (
            "Intervals",
            f"{100 * protocol.level:g} % percentile bootstrap over stars, {protocol.n_resamples} resamples, seed "
            f"{protocol.seed}; differences are paired over the same stars",
        ),
        ("No prediction", "a prediction that is not finite counts as the mean label and is reported, never left out"),
        ("Noise", _noise(data) + "; the same noisy stars for every model"),
        (
            "Ceilings",
            "Bayes: R² of the exact posterior mean under the prior and noise that made the stars, which no method "
            "exceeds but by chance. Fisher: 1 − CRLB/Var(log g) with five free labels, median or mean over stars; it "
            "bounds unbiased estimators only, so a method that knows the prior may exceed it",
        ),
        ("ρ", "(R² − R² of the global ridge)/(R² of the oracle, true bins − R² of the global ridge)"),
        ("Gap closed", "(R² − R² of the published-style ridge)/(ceiling − R² of the published-style ridge)"),
        ("Test set", f"{data.name}, file fingerprint {data.fingerprint}{known}"),
        ("Measured", f"{model.get('name', 'model')}, SHA-256 {model.get('sha256') or 'none: never saved'}"),
    ]  # fmt: skip
