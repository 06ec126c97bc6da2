"""The report as one HTML page: every figure and table, nothing from anywhere else.

Design: a function of the report and the facts of its run, so the same inputs give the same bytes. No script, no
resource outside the page (a content policy says so), figures as inline SVG whose colours are the page's variables:
light or dark as the reader's system asks, from the width of a phone to that of a screen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from moefast.core.atomic import write_atomically
from moefast.protocol.figures import DARK, FIGURES, LIGHT, svg
from moefast.protocol.milestones import judge_alone
from moefast.protocol.report import Report
from moefast.protocol.report_text import norm_label, octile_label

__all__ = ["page", "write_page"]

Cell = str

_STYLE = """
:root { color-scheme: light dark; @LIGHT@ }
@media (prefers-color-scheme: dark) { :root { @DARK@ } }
@media print { :root { color-scheme: light; @LIGHT@ } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.25rem clamp(0.9rem, 3vw, 2.5rem) 4rem; max-width: 86rem; background: var(--surface);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: clamp(1.35rem, 1rem + 2vw, 2rem); line-height: 1.2; margin: 0.4rem 0 0.3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 0.4rem; padding-top: 0.9rem; border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1.4rem 0 0.3rem; }
p { margin: 0.4rem 0; max-width: 48rem; }
.quiet, figcaption { color: var(--muted); font-size: 0.875rem; }
code { font: 0.875em ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { margin: 0.6rem 0; padding: 0.7rem 0.9rem; border: 1px solid var(--grid); border-radius: 6px; overflow-x: auto; }
pre code { overflow-wrap: normal; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; margin: 0.8rem 0 0; padding: 0; }
a { color: var(--own); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 10.5rem), 1fr)); gap: 0.7rem;
  margin: 1.2rem 0; padding: 0; }
@media (min-width: 64rem) { .tiles { grid-template-columns: repeat(4, 1fr); } }
.tiles > div { border: 1px solid var(--grid); border-radius: 8px; padding: 0.6rem 0.8rem; }
.tiles dt { color: var(--muted); font-size: 0.875rem; }
.tiles dd { margin: 0; font-variant-numeric: tabular-nums; }
.tiles .value { font-size: 1.5rem; font-weight: 600; line-height: 1.25; }
.tiles .main { border-color: var(--own); border-width: 2px; }
.note { border-left: 4px solid var(--first); padding: 0.15rem 0 0.15rem 0.8rem; margin: 0.7rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.2rem 1.6rem;
  margin: 0.8rem 0; align-items: start; }
figure { margin: 0; max-width: 36rem; }
figcaption { margin-top: 0.35rem; }
figure h3 { margin: 0 0 0.2rem; }
figure svg { display: block; width: 100%; height: auto; }
.table { margin: 0.9rem 0 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.22rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { font-weight: 600; }
th:first-child, .left { text-align: left; }
th:first-child { padding-left: 0; position: sticky; left: 0; background: var(--surface); }
tbody th { font-weight: 400; }
tr.own th, tr.own td { font-weight: 600; }
td.wrap { white-space: normal; min-width: 14rem; }
dl.terms { display: grid; grid-template-columns: minmax(6.5rem, max-content) 1fr; gap: 0.35rem 1.2rem;
  max-width: 60rem; }
dl.terms dt { font-weight: 600; }
dl.terms dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 34rem) { dl.terms { grid-template-columns: 1fr; gap: 0; } dl.terms dd { margin-bottom: 0.7rem; } }
"""


def page(report: Report, run: Mapping[str, Any] | None = None) -> str:
    """The report as an HTML document.

    Parameters
    ----------
    report : mapping
        From `moefast.protocol.report.evaluate_predictions`, or read back from its JSON.
    run : mapping, optional
        `Evaluation.run`: throughput, device and command.

    Returns
    -------
    str
        The same for the same arguments.
    """
    facts = dict(run or {})
    judged = judge_alone(report)
    sections = [
        ("standing", "Where it stands", _standing(report, judged)),
        ("bins", "Where it is good and where it is not", _bins(report)),
        ("residuals", "Predictions and residuals", _residuals(report)),
        ("errors", "Are the claimed errors right?", _errors(report)),
        ("gate", "The gate", _gate(report)),
        ("numbers", "All numbers", _numbers(report)),
        ("method", "How it was measured", _method(report, judged)),
        ("again", "Reproduce it", _again(report, facts, judged)),
    ]
    shown = [(name, title, body) for name, title, body in sections if body]
    links = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in shown)
    body = "\n".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>\n{content}\n</section>'
        for name, title, content in shown
    )
    title = f"{_model(report)} on {report['data_set']['name']}"
    style = _STYLE.replace("@LIGHT@", _variables(LIGHT)).replace("@DARK@", _variables(DARK)).strip()
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="generator" content="moefast">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}: log g, R² {_number(report['overall']['r2'])}</title>\n"
        f"<style>\n{style}\n</style>\n</head>\n<body>\n"
        f'<header>\n{_head(report, title)}\n<nav aria-label="Contents"><ul>{links}</ul></nav>\n</header>\n'
        f"<main>\n{_tiles(report, facts)}\n{_notes(report)}\n{body}\n</main>\n</body>\n</html>\n"
    )


def write_page(report: Report, run: Mapping[str, Any] | None, path: str | os.PathLike[str]) -> None:
    """Write `page` to a file.

    Raises
    ------
    OutputError
    """
    write_atomically(path, page(report, run).encode())


# --- head ----------------------------------------------------------------------------------------------


def _head(report: Report, title: str) -> str:
    data = report["data_set"]
    kind = {
        "model": "model of moefast",
        "onnx": "ONNX file",
        "table": "table of predictions made elsewhere",
    }.get(report["model"].get("kind", ""), "model")
    return (
        f'<p class="quiet">moefast evaluation, surface gravity log g [dex, cgs]</p>\n<h1>{escape(title)}</h1>\n'
        f'<p class="quiet">{kind}; {data["n"]:,} stars, {_noise(data)}<br>fingerprint of the test set '
        f"<code>{escape(data['fingerprint'])}</code></p>"
    )


def _noise(data: Mapping[str, Any]) -> str:
    level = "" if data["noise_level"] is None else f", noise level {data['noise_level']:g}"
    where = {
        "stored": "noise as stored with the spectra",
        "drawn": f"noise drawn from seed {data['noise_seed']}",
        "none": "flux as it is, no noise added",
    }
    return where.get(data["noise"], "noise not recorded") + level


def _tiles(report: Report, run: Mapping[str, Any]) -> str:
    overall = report["overall"]
    level = f"{100 * report['protocol']['level']:g} % interval"
    tiles = [("main", "R², all stars", _number(overall["r2"]), f"{level} {_bracket(overall['r2_interval'])}")]
    for name in ("rmse", "mae", "bias"):
        sign = name == "bias"
        tiles.append(
            (
                "",
                f"{name.upper() if name != 'bias' else 'Bias'} [dex]",
                _number(overall[name], sign=sign),
                _bracket(overall[f"{name}_interval"], sign=sign),
            )
        )
    for name in ("bayes", "fisher median"):
        if name in report["ceilings"]:
            ceiling = report["ceilings"][name]
            word = "Bayes" if name == "bayes" else "median Fisher"
            detail = f"ceiling {_number(ceiling['r2'])}"
            if ceiling["gap_closed"] is not None:
                closed = f"{_number(ceiling['gap_closed'], 2)} {_bracket(ceiling['gap_closed_interval'], 2)}"
                detail += f"; gap closed {closed}"
            tiles.append(("", f"R² over the {word} ceiling", _number(ceiling["efficiency"]), detail))
            break
    if report["rho"] is not None:
        rho = report["rho"]
        detail = rho["reason"] or f"{_bracket(rho['interval'], 2)}, {rho['global']} to {rho['oracle']}"
        tiles.append(("", "ρ, share of the oracle's gain", _number(rho["value"], 2), detail))
    if overall["error_coverage"] is not None:
        one = overall["error_coverage"]["levels"][0]
        tiles.append(
            (
                "",
                "Within 1σ",
                _percent(one["fraction"]),
                f"{_percent(one['expected'])} expected",
            )
        )
    rate = run.get("spectra_per_second")
    if rate is not None:
        where = run.get("device") or run.get("backend") or ""
        tiles.append(("", "Spectra per second", f"{rate:,.0f}", f"{where}; {run.get('what', '')}"))
    cells = "".join(
        f'<div{f" class={kind!r}" if kind else ""}><dt>{escape(label)}</dt><dd class="value">{value}</dd>'
        f'<dd class="quiet">{escape(detail)}</dd></div>'
        for kind, label, value, detail in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _notes(report: Report) -> str:
    overall, notes = report["overall"], []
    if overall["n_nan"]:
        notes.append(
            f"{overall['n_nan']:,} of {overall['n']:,} predictions are not finite: each counts as the mean label, in "
            "every number here."
        )
    if report["data_set"]["noise"] == "none":
        notes.append(
            "No noise was added: right for observed spectra, far too good for simulated ones without noise."
        )
    if report["model"].get("wave_checked") is False:
        notes.append(
            "The ONNX file does not say on which wave grid it was made; only the number of pixels was checked."
        )
    if report["model"].get("kind") == "table" and report["data_set"]["noise"] == "stored":
        notes.append(
            "That these predictions were made of the noisy spectra is taken on trust where the table does not say so."
        )
    for kind in ("snr_norm", "snr_median"):
        if report[kind]["n_unassigned"]:
            notes.append(
                f"{report[kind]['n_unassigned']:,} stars have no finite {kind} and are in no group of it."
            )
    if seen := report["model"].get("share_seen"):
        notes.insert(
            0,
            f"Warning: {100 * seen:.1f} % of these stars are in the training set of the model. This is no measure of "
            "what it does elsewhere.",
        )
    return "\n".join(f'<p class="note">{escape(note)}</p>' for note in notes)


# --- sections ------------------------------------------------------------------------------------------


def _standing(report: Report, judged: Mapping[str, Any] | None) -> str:
    parts = [_figures(report, "r2-against-snr", "what-helped")]
    if report["references"]:
        rows = [
            (
                name,
                [
                    _number(entry["r2"]),
                    _bracket(entry["r2_interval"]),
                    _number(entry["r2_gain"], sign=True),
                    _bracket(entry["r2_gain_interval"], sign=True),
                ],
            )
            for name, entry in report["references"].items()
        ]
        overall = report["overall"]
        rows.append(("this model", [_number(overall["r2"]), _bracket(overall["r2_interval"]), "", ""]))
        parts.append(
            _table(
                "Simpler fits on the same stars and how far this model is above each, paired over the stars; fitted "
                f"with the model {report['model'].get('references_of') or 'itself'}",
                ("reference", "R²", "interval", "gain", "interval"),
                rows,
                own="this model",
            )
        )
    if report["ceilings"]:
        rows = [
            (
                name,
                [
                    _number(entry["r2"]),
                    _number(entry["efficiency"]) if not entry["efficiency_reason"] else "–",
                    _number(entry["gap_closed"]),
                    _bracket(entry["gap_closed_interval"]),
                ],
            )
            for name, entry in report["ceilings"].items()
        ]
        parts.append(
            _table(
                "What the physics allows: efficiency is R² over the ceiling, gap closed the share of the way from the "
                "published-style ridge to it",
                ("ceiling", "R²", "efficiency", "gap closed", "interval"),
                rows,
            )
        )
    parts.append(_milestones(judged))
    return "\n".join(part for part in parts if part)


def _milestones(judged: Mapping[str, Any] | None) -> str:
    if judged is None:
        return ""
    rows = [
        (
            row["id"],
            [
                _left(row["what"]),
                _left(row["published"]),
                _number(row["ours"]["value"]),
                _bracket(row["ours"]["interval"] or [None, None]),
                row["absolute"]["verdict"],
                row["reference"]["verdict"],
            ],
        )
        for row in judged["sections"][0]["milestones"]
        if row["ours"]["value"] is not None
    ]
    if not rows:
        return ""
    return _table(
        "Milestones that this evaluation bears on; the published numbers belong to data that are not public. "
        "moefast milestones shows every check",
        ("", _left("what"), _left("published R²"), "our R²", "interval", "their mark", "any set"),
        rows,
    )


def _bins(report: Report) -> str:
    return _figures(report, "r2-by-bin", "low-snr", "metal-poor")


def _residuals(report: Report) -> str:
    names = ("predicted-against-true", "residuals-log_g", "residuals-T_eff", "residuals-M_H", "residuals-snr")
    return _figures(report, *names)


def _errors(report: Report) -> str:
    if report["calibration"] is None:
        return "<p>Nothing to show: no errors were claimed.</p>"
    found = report["calibration"]
    undefined = f" {found['n_undefined']:,} stars have no usable error." if found["n_undefined"] else ""
    text = (
        f"<p>Multiplied by {found['scale']:.2f} the claimed errors would cover 68.3 % of the stars. "
        f"(predicted − true)/σ has mean {_number(found['pull_mean'], 2, sign=True)} and standard "
        f"deviation {_number(found['pull_std'], 2)}."
        f"{undefined}</p>"
    )
    head = [
        f"within {row['z']:.2f}σ ({_percent(row['expected'])})"
        for row in report["overall"]["error_coverage"]["levels"]
    ]
    groups = [("all stars", report["overall"]), *((norm_label(g), g) for g in report["snr_norm"]["groups"])]
    rows = [
        (name, [f"{group['n']:,}", *(_percent(row["fraction"]) for row in group["error_coverage"]["levels"])])
        for name, group in groups
    ]
    table = _table(
        "Share of stars within the claimed error, by snr_norm (expected in brackets)", ("", "n", *head), rows
    )
    return "\n".join([text, _figures(report, "error-calibration", "error-size"), table])


def _gate(report: Report) -> str:
    routing = report["routing"]
    if routing is None:
        return ""
    accuracy = (
        ""
        if routing["accuracy"] is None
        else f" The largest goes to the true bin for {_percent(routing['accuracy'])} of the stars."
    )
    text = (
        f"<p>{routing['n_experts']} experts; the largest weight of a star is "
        f"{_number(routing['mean_largest_weight'], 2)} on average.{accuracy}</p>"
    )
    rows = []
    for kind, label in (("snr_norm", norm_label), ("snr_median", octile_label)):
        for group, scored in zip(routing["by_group"][kind], report[kind]["groups"], strict=True):
            rows.append(
                (
                    f"{kind} {label(scored)}",
                    [
                        f"{group['n']:,}",
                        _number(group["mean_largest_weight"], 2),
                        _percent(group["accuracy"]),
                    ],
                )
            )
    table = _table(
        "How sure the gate is, by signal-to-noise", ("", "n", "mean largest weight", "true bin"), rows
    )
    return "\n".join([text, _figures(report, "gate-by-bin", "gate-by-snr"), table])


def _numbers(report: Report) -> str:
    tables = []
    references = [name for name in report["references"] if "," not in name]
    for kind, title, label in _KINDS:
        groups = report[kind]["groups"]
        ceilings = [name for name in ("bayes", "fisher median") if any(name in g["ceilings"] for g in groups)]
        header = (
            "",
            "n",
            "R²",
            "interval",
            "MAE",
            "RMSE",
            "bias",
            *(f"{n} ceiling" for n in ceilings),
            *references,
        )
        rows = []
        for k, group in enumerate(groups):
            cells = [
                f"{group['n']:,}",
                _number(group["r2"]),
                _bracket(group["r2_interval"]),
                _number(group["mae"]),
                _number(group["rmse"]),
                _number(group["bias"], sign=True),
                *(_number(group["ceilings"].get(name)) for name in ceilings),
                *(_number(report["references"][name][f"r2_{kind}"][k]) for name in references),
            ]
            rows.append((label(group), cells))
        tables.append(_table(f"{title}; ceilings and references are R² within the group", header, rows))
    low = report["low_snr"]
    rows = [
        (name, [f"{g['n']:,}", _number(g["r2"]), _bracket(g["r2_interval"]), _number(g["rmse"])])
        for name, g in (
            ("all", low["overall"]),
            *((_signs(g["name"]), g) for g in low["metallicity"]),
            *((g["name"], g) for g in low["grid"]),
        )
    ]
    title = f"Stars with snr_norm up to {low['snr_norm_up_to']:g}"
    tables.append(_table(title, ("", "n", "R²", "interval", "RMSE"), rows))
    covered = report["covered"]
    text = (
        f"<p>Of the {report['overall']['n']:,} stars {covered['n']:,} lie on the grid of bins; for them alone R² is "
        f"{_number(covered['r2'])} {_bracket(covered['r2_interval'])}. MAE, RMSE and bias are in dex.</p>"
    )
    return "\n".join([text, *tables])


_KINDS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("snr_norm", "By snr_norm", norm_label),
    ("snr_median", "By octile of snr_median", octile_label),
    ("grid", "By bin of T_eff and [M/H]", lambda group: str(group["name"])),
    (
        "metallicity",
        "By metallicity",
        lambda group: _signs(group["name"]),
    ),
)


def _method(report: Report, judged: Mapping[str, Any] | None) -> str:
    protocol, data, model = report["protocol"], report["data_set"], report["model"]
    grid = protocol["grid"]
    edges = " / ".join(f"{edge:g}" for edge in grid["t_eff_edges"])
    metal = " / ".join(f"{edge:g}".replace("-", "−") for edge in grid["m_h_edges"])
    section = judged["sections"][0]["data_set"] if judged else {}
    known = (
        f"; recognised by its content as {section['reference_set']} {section['part']}"
        if section.get("reference_set")
        else ""
    )
    terms = [
        (
            "R²",
            "1 − SS_res/SS_tot about the mean label of the same group; pooled over stars, never a mean over bins",
        ),
        ("snr_norm", "‖flux‖₂/‖error‖₂ of a spectrum. It defines the bins X ≤ 2, L (2, 4], M (4, 7], H > 7"),
        ("snr_median", "median(flux/error) of a spectrum, the axis of the figures. The two are different numbers"),
        ("Bins", f"T_eff {edges} K × [M/H] {metal} dex; a star outside counts in the nearest bin"),
        ("Metal-poor", f"[M/H] < {protocol['metal_poor_below']:g} dex".replace("-", "−")),
        (
            "Intervals",
            f"{100 * protocol['level']:g} % percentile bootstrap over stars, {protocol['n_resamples']} resamples, seed "
            f"{protocol['seed']}; differences are paired over the same stars",
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
        ("Test set", f"{data['name']}, fingerprint {data['fingerprint']}{known}"),
        ("Measured", f"{model.get('name', 'model')}, SHA-256 {model.get('sha256') or 'none: never saved'}"),
    ]  # fmt: skip
    cells = "".join(f"<dt>{escape(term)}</dt><dd>{escape(words)}</dd>" for term, words in terms)
    return f'<dl class="terms">{cells}</dl>'


def _again(report: Report, run: Mapping[str, Any], judged: Mapping[str, Any] | None) -> str:
    lines = []
    section = judged["sections"][0]["data_set"] if judged else {}
    if section.get("reference_set"):
        lines.append(f"moefast simulate test.h5 --set {section['reference_set']} --part {section['part']}")
    if run.get("command"):
        lines.append(f"{run['command']} -o report/")
    if not lines:
        lines.append("moefast evaluate TEST… -m MODEL -o report/")
    version = f" moefast {run['moefast_version']}." if run.get("moefast_version") else ""
    return (
        f"<pre><code>{escape(chr(10).join(lines))}</code></pre>\n"
        f'<p class="quiet">Evaluating again gives the same report.json.{escape(version)} Report schema '
        f"{report['schema_version']}.</p>"
    )


# --- parts ---------------------------------------------------------------------------------------------


def _figures(report: Report, *names: str) -> str:
    parts = []
    for name in names:
        drawing = FIGURES[name]
        if drawing.exists(report):
            parts.append(
                f'<figure aria-labelledby="{name}-heading"><h3 id="{name}-heading">{escape(drawing.title)}</h3>'
                f"{svg(report, name)}<figcaption>{escape(drawing.caption)}</figcaption></figure>"
            )
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def _table(
    caption: str, header: Sequence[str], rows: Iterable[tuple[str, Sequence[Cell]]], own: str | None = None
) -> str:
    head = "".join(
        f'<th scope="col" class="left">{escape(name[1:])}</th>'
        if name[:1] == _LEFT
        else f'<th scope="col">{escape(name)}</th>'
        for name in header
    )
    body = []
    for name, cells in rows:
        mark = ' class="own"' if name == own else ""
        values = "".join(
            f'<td class="left wrap">{escape(cell[1:])}</td>'
            if cell[:1] == _LEFT
            else f"<td>{escape(cell)}</td>"
            for cell in cells
        )
        body.append(f'<tr{mark}><th scope="row">{escape(name)}</th>{values}</tr>')
    # The caption stays where it is when a wide table is scrolled.
    return (
        f'<div class="table"><p class="quiet">{escape(caption)}</p>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption, quote=True)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div></div>"
    )


_LEFT = "\0"


def _left(text: str) -> Cell:
    """A cell of words, flush left."""
    return _LEFT + text


def _signs(name: str) -> str:
    return name.replace(">=", "≥").replace("-", "−")


def _variables(palette: Mapping[str, str]) -> str:
    return " ".join(f"--{role}: {colour};" for role, colour in palette.items())


def _model(report: Report) -> str:
    return str(report["model"].get("name") or report["model"].get("recipe") or "a model")


def _number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def _bracket(interval: Sequence[float | None] | None, digits: int = 3, sign: bool = False) -> str:
    if interval is None or None in interval:
        return ""
    return f"[{_number(interval[0], digits, sign)}, {_number(interval[1], digits, sign)}]"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
