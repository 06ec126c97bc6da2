"""What bounds and posteriors of single stars say of a set: R² ceilings, by group and magnitude; ranks of the truth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, kstest

from moefast.ceilings import fisher
from moefast.ceilings.star_bounds import BLOCK_ROWS
from moefast.core import metrics
from moefast.core.groups import groups_of
from moefast.simulate.emulator import LABELS
from moefast.simulate.forward import ForwardModel
from moefast.simulate.rows import SEEING_MEDIAN

__all__ = [
    "LEAST_ESS",
    "PUBLISHED_CRLB",
    "bayes_summary",
    "by_magnitude",
    "fisher_r2",
    "groups_summary",
    "rank_statistics",
]

F64 = NDArray[np.float64]

LEAST_ESS = 200.0
RANK_BINS = 20
PUBLISHED_CRLB = ((18.0, 0.9993), (20.0, 0.989), (21.5, 0.874), (22.0, 0.698), (22.5, 0.265), (23.0, 0.0))
"""(magnitude, R²max) of the five-parameter bound, as published for a test set that is not public."""


def fisher_r2(table: Mapping[str, F64], members: NDArray[np.bool_]) -> dict[str, float]:
    """1 − CRLB/Var(log g): mean and median over stars, without and with the prior on the labels."""
    variance = table["log_g"][members].var()
    return {
        "mean": float(1 - table["crlb"][members].mean() / variance),
        "median": float(1 - np.median(table["crlb"][members]) / variance),
        "mean, with prior": float(1 - table["crlb_prior"][members].mean() / variance),
        "median, with prior": float(1 - np.median(table["crlb_prior"][members]) / variance),
    }


def by_magnitude(forward: ForwardModel, parameters: dict[str, F64], stars: int = 1000) -> list[dict]:
    """The bound for the same stars at fixed magnitudes and the median seeing, beside the published curve."""
    some = {key: values[:stars] for key, values in parameters.items()}
    n = len(some["log_g"])
    variance = parameters["log_g"].var()
    crlb: list[list[F64]] = [[] for _ in PUBLISHED_CRLB]
    for first in range(0, n, BLOCK_ROWS):
        here = {key: values[first : first + BLOCK_ROWS] for key, values in some.items()}
        flux = forward.flux(here)
        seeing = np.full(len(flux), SEEING_MEDIAN)
        for (mag, _), parts in zip(PUBLISHED_CRLB, crlb, strict=True):
            error, _ = forward.noise.error(
                flux, np.full(len(flux), mag), seeing, noise_level=forward.settings.noise_level
            )
            names, matrices = fisher.information(forward, here, error)
            parts.append(fisher.bounds(matrices, fisher.prior_information(forward, names, labels=False)))
    rows = []
    for (mag, published), parts in zip(PUBLISHED_CRLB, crlb, strict=True):
        values = np.concatenate(parts)
        mean, median = 1 - values.mean() / variance, 1 - np.median(values) / variance
        rows.append(
            {"mag": mag, "n": n, "mean": float(mean), "median": float(median), "published": published}
        )
    return rows


def rank_statistics(ranks: F64) -> dict[str, Any]:
    """Simulation-based calibration: ranks of the truth must be uniform on (0, 1).

    Source: Talts et al. 2018, arXiv:1804.06788.
    """
    counts, _ = np.histogram(ranks, bins=RANK_BINS, range=(0, 1))
    expected = len(ranks) / RANK_BINS
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return {
        "histogram": counts.tolist(),
        "chi2": statistic,
        "chi2_p": float(chi2.sf(statistic, RANK_BINS - 1)),
        "ks_p": float(kstest(ranks, "uniform").pvalue),
    }


def bayes_summary(
    table: Mapping[str, F64], seconds: float, likelihoods: int, target_ess: float, seed: int
) -> dict[str, Any]:
    """The Bayes ceiling with its intervals, and whether the truth lies where the posteriors say."""
    log_g, mean, sd = table["log_g"], table["bayes"], table["bayes_sd"]
    expected = 1 - (sd**2).mean() / log_g.var()
    achieved = metrics.bootstrap(log_g, mean)
    ranks = {"log_g": table["rank"]} | {
        key: table[f"rank_{key}"]
        for key in LABELS
        if key != "log_g" and np.isfinite(table[f"rank_{key}"]).all()
    }
    return {
        "r2": float(expected),
        "r2_interval": _r2_interval(log_g, sd),
        "r2_of_posterior_means": achieved.value,
        "r2_of_posterior_means_interval": [achieved.low, achieved.high],
        "rmse": metrics.rmse(log_g, mean),
        "error_coverage": metrics.coverage(log_g, mean, sd),
        "monte_carlo_error": {
            "median": float(np.median(table["monte_carlo_error"])),
            "largest": float(table["monte_carlo_error"].max()),
            # Noise of the means adds to their squared error: what R² of them loses by it.
            "r2_lost": float((table["monte_carlo_error"] ** 2).mean() / log_g.var()),
        },
        "effective_sample_size": {
            "target": target_ess,
            "smallest": float(table["ess"].min()),
            "percentile_1": float(np.percentile(table["ess"], 1)),
            "median": float(np.median(table["ess"])),
            "share_of_stars_at_least_200": float((table["ess"] >= LEAST_ESS).mean()),
        },
        "ranks": {key: rank_statistics(values) for key, values in ranks.items()},
        "likelihoods_per_star": likelihoods / len(log_g),
        "seed": seed,
        "seconds": seconds,
    }


def _r2_interval(log_g: F64, sd: F64) -> list[float]:
    """95 % percentile interval of the expected R² over stars; resamples of one star alone have no R²."""
    rng = np.random.default_rng(metrics.SEED)
    n, resampled = len(log_g), []
    for _ in range(metrics.N_RESAMPLES):
        chosen = rng.integers(0, n, n)
        if np.ptp(log_g[chosen]) > 0:
            resampled.append(1 - (sd[chosen] ** 2).mean() / log_g[chosen].var())
    return np.quantile(resampled, [0.025, 0.975]).tolist()


def groups_summary(table: Mapping[str, F64]) -> dict[str, list[dict[str, Any]]]:
    """Ceilings of the groups that every evaluation reports, R² within each group."""
    groups = groups_of(table["T_eff"], table["M_H"], table["snr_norm"], table["snr_median"])
    return {
        kind: [_group(table, name, members) for name, members in members_of]
        for kind, members_of in groups.items()
    }


def _group(table: Mapping[str, F64], name: str, members: NDArray[np.bool_]) -> dict[str, Any]:
    out: dict[str, Any] = {"name": name, "n": int(members.sum())}
    if members.sum() < 2 or not table["log_g"][members].var() > 0:
        return out
    out["snr_median"] = float(np.median(table["snr_median"][members]))
    if "crlb" in table:
        out["fisher"] = fisher_r2(table, members)
    if "bayes" in table:
        log_g = table["log_g"][members]
        out["bayes"] = float(1 - (table["bayes_sd"][members] ** 2).mean() / log_g.var())
        achieved = metrics.bootstrap(log_g, table["bayes"][members])
        out["bayes_means"] = achieved.value
        out["bayes_means_interval"] = [achieved.low, achieved.high]
    return out
