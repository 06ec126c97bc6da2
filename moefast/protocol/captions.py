"""Figures of a report in words, for those who cannot see them, and whether a report has what one shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moefast.protocol.report_parts import GroupKind, OctileScores, Report

__all__ = [
    "LEAST_IN_CELL",
    "as_text",
    "has_calibration",
    "has_error_by_snr",
    "has_gate",
    "has_giants",
    "has_kiel",
    "in_brackets",
    "says_calibration",
    "says_density",
    "says_error_by_snr",
    "says_error_size",
    "says_gate",
    "says_giants",
    "says_groups",
    "says_kiel",
    "says_ladder",
    "says_low_snr",
    "says_metal_poor",
    "says_residuals",
    "shortly",
]

NO_ERRORS = "No errors are claimed."

LEAST_IN_CELL = 5
"""Stars that a cell of the Kiel diagram needs, to have a bias."""


def as_text(value: float | None) -> str:
    """A number with three decimals; a dash where there is none."""
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def in_brackets(interval: Sequence[float | None]) -> str:
    """An interval, if there is one."""
    return "" if None in interval else f" [{as_text(interval[0])}, {as_text(interval[1])}]"


def shortly(value: float | None) -> str:
    """A number with one decimal; a dash where there is none."""
    return "–" if value is None else f"{value:.1f}"


def says_kiel(report: Report) -> str:
    """The largest bias in the Kiel diagram."""
    kiel = report.kiel
    cells = [] if kiel is None else [cell for cell in kiel.cells if cell[2] >= LEAST_IN_CELL]
    if kiel is None or not cells:
        return "No cell of T_eff and log g holds enough stars for a bias."
    worst = max(cells, key=lambda cell: abs(cell[3]))
    place = [
        0.5 * (edges[k] + edges[k + 1]) for edges, k in zip((kiel.t_eff, kiel.log_g), worst[:2], strict=True)
    ]
    return (
        f"Bias of log g in {len(cells)} cells of T_eff and log g; the largest, {as_text(worst[3])} dex, at "
        f"{place[0]:.0f} K and log g {place[1]:.2f}."
    )


def says_giants(report: Report) -> str:
    """Shares of giants and dwarfs on their side."""
    if report.giants is None:
        return "Giants were not told from dwarfs."
    return "Share on their side of log g 3.5 by snr_median: " + "; ".join(
        f"{part.name} " + ", ".join(f"{shortly(g.centre)}: {as_text(g.right)}" for g in part.groups)
        for part in report.giants.parts
    )


def says_error_by_snr(report: Report) -> str:
    """Errors claimed and made."""
    return "Claimed and made error of log g in dex by snr_median: " + ", ".join(
        f"{shortly(row.centre)}: {as_text(row.rms)}, {as_text(row.rmse)}" for row in report.errors_by_snr
    )


def says_groups(what: str, kind: GroupKind) -> Callable[[Report], str]:
    """R² per group of a kind."""

    def describe(report: Report) -> str:
        rows = [
            (shortly(group.centre) if isinstance(group, OctileScores) else group.name, group.r2)
            for group in report.groups(kind)
        ]
        return f"{what}: " + ", ".join(f"{name}: {as_text(r2)}" for name, r2 in rows) + "."

    return describe


def says_residuals(label: str) -> Callable[[Report], str]:
    """Medians of residuals along a label."""

    def describe(report: Report) -> str:
        rows = report.residuals[label]
        return f"Median of predicted minus true log g along {label}: " + ", ".join(
            f"{row.centre:.4g}: {as_text(row.median)} dex" for row in rows
        )

    return describe


def says_metal_poor(report: Report) -> str:
    """R² of metal-poor stars and of the rest."""
    return "; ".join(
        f"{part.name}: " + ", ".join(f"{shortly(g.centre)}: {as_text(g.r2)}" for g in part.groups)
        for part in report.metallicity.by_snr_median
    )


def says_low_snr(report: Report) -> str:
    """R² per bin of the faint stars."""
    return "R² of stars with snr_norm up to 4: " + ", ".join(
        f"{g.name} {as_text(g.r2)}" for g in report.low_snr.grid
    )


def says_density(report: Report) -> str:
    """What the cloud of predictions amounts to."""
    overall = report.overall
    return f"Density of predicted against true log g; R² {as_text(overall.r2)}, bias {as_text(overall.bias)} dex."


def says_calibration(report: Report) -> str:
    """Shares of stars within their errors."""
    if report.calibration is None:
        return NO_ERRORS
    return "Expected and found share of stars: " + ", ".join(
        f"{row.expected:.2f}: {row.fraction:.3f}" for row in report.calibration.levels[1::4]
    )


def says_error_size(report: Report) -> str:
    """RMSE of stars by the error that they claim."""
    if report.calibration is None:
        return NO_ERRORS
    return "Claimed error and RMSE in dex: " + ", ".join(
        f"{row.err:.3f}: {row.rmse:.3f}" for row in report.calibration.by_error
    )


def says_gate(kind: GroupKind) -> Callable[[Report], str]:
    """Which expert has most of the weight, per group."""

    def describe(report: Report) -> str:
        routing = report.routing
        if routing is None:
            return "There is no gate."
        parts = []
        for group in routing.by_group[kind]:
            if group.mean_weight is not None:
                k = int(np.argmax(group.mean_weight))
                parts.append(f"{group.name}: most to {routing.names[k]}, {group.mean_weight[k]:.2f}")
        return "Mean weights: " + "; ".join(parts)

    return describe


def says_ladder(report: Report) -> str:
    """R² of references, of this model and of ceilings."""
    rows = [f"{name} {as_text(entry.r2)}" for name, entry in report.references.items()]
    rows.append(f"this model {as_text(report.overall.r2)}")
    rows += [f"{name} ceiling {as_text(entry.r2)}" for name, entry in report.ceilings.items()]
    return "R² on all stars: " + ", ".join(rows)


def has_calibration(report: Report) -> bool:
    """Whether errors are claimed."""
    return report.calibration is not None


def has_giants(report: Report) -> bool:
    """Whether giants were told from dwarfs; reports of earlier versions do not say."""
    return report.giants is not None


def has_kiel(report: Report) -> bool:
    """Whether there is a Kiel diagram; reports of earlier versions have none."""
    return report.kiel is not None


def has_error_by_snr(report: Report) -> bool:
    """Whether there are errors by SNR; reports of earlier versions have none."""
    return bool(report.errors_by_snr)


def has_gate(report: Report) -> bool:
    """Whether there is a gate."""
    return report.routing is not None
