"""The stages of a fit in their order, and about how long each takes: what one time to go for all of them needs.

Design: estimates in seconds, for two cores and spectra of 4096 pixels, from what a stage does with rows, noise draws
and bins. Only their ratios count, and none is exact: a stage whose share is off by two makes the time to go wrong by a
part of that stage alone. A test holds names and order to what fits report.
"""

from __future__ import annotations

import math

from moefast.core.progress import SAMPLED
from moefast.fitting.correction import PASSES, planned_draws
from moefast.fitting.families import FIT_ROWS, LIBRARY_ROWS
from moefast.fitting.linear_experts import LEVEL_ROWS
from moefast.fitting.options import Options
from moefast.fitting.posterior import CALIBRATION_DRAWS, CALIBRATION_ROWS
from moefast.fitting.sample import NOISY_ROWS
from moefast.gating.tower import FEATURES
from moefast.trunks.presets import PRESETS

__all__ = ["expected_stages"]

# Seconds per row: reading or simulating a spectrum, adding it to normal equations, projecting it, a noise draw, and the
# same with the posterior of a star whose noise is its own.
READ, ADD, PROJECT, DRAW, POSTERIOR = 6e-5, 2.5e-4, 5e-5, 2e-5, 3e-4
LEARN = 8e-6
"""Seconds per step and draw of a correction."""
LEAST_SQUARES = 1.5
"""A ridge in pixels."""
MULTIPLICATIONS = 5e10
"""Per second, of networks that torch fits."""


def expected_stages(options: Options, n_rows: int) -> dict[str, float]:
    """Stages of a fit in their order, with about the seconds that each takes.

    Parameters
    ----------
    options : Options
    n_rows : int
        Training spectra.
    """
    families, n_bins = set(options.all_families), options.grid.n_bins
    seconds = _first_pass(options, n_rows)
    sample = min(options.sample_rows, n_rows if families == {"linear"} else n_rows // 3)
    others = n_rows - sample
    if "posterior" in families:
        rows = min(others, LIBRARY_ROWS)
        apart = n_rows - rows
        draws = apart * planned_draws(options.correction_draws, apart)
        learning = {"noisy stars": draws * POSTERIOR, "correction": draws * PASSES * LEARN} if draws else {}
        return (
            seconds
            | {
                "templates": rows * (READ + PROJECT),
                "clouds": 4.0 + 2e-4 * rows,
                **learning,
                "calibration": min(sample * min(options.sample_draws, CALIBRATION_DRAWS), CALIBRATION_ROWS)
                * POSTERIOR,
                "error model": 3.0,
            }
            | _simpler_fits(options)
        )
    if "template" in families:
        seconds |= {
            "templates": min(others, LIBRARY_ROWS) * (READ + PROJECT),
            "held-out stars": 1.0,
            "library": 40.0,
        }
    if "heads" in families:
        preset = PRESETS[options.trunk, options.size]
        steps, batch = options.steps or preset.schedule.steps, preset.schedule.batch
        width, depth = preset.plan["width"], preset.plan["depth"]
        per_star = {
            "pca-mlp": 6 * width * width * (depth + 2),
            "cnn": 4e6 * depth,
            "vit": 1e5 * width * depth,
        }
        seconds |= {
            "held-out stars": 1.0,
            "stars of the network": others * (READ + PROJECT),
            "network": steps * (0.004 + batch * per_star[options.trunk] / MULTIPLICATIONS),
        }
    draws = min(sample * options.sample_draws, max(NOISY_ROWS, sample))
    seconds["gate sample"] = sample * READ + draws * (DRAW if "heads" not in families else POSTERIOR)
    if families - {"linear", "template", "heads"}:
        seconds |= {"stars of the bins": min(others, FIT_ROWS) * (READ + PROJECT), "families": 4.0 * n_bins}
    if n_bins > 1 and options.first_tower and "heads" not in families:
        seconds["gate"] = 9.0
    if options.tower == FEATURES and options.tower_limit < math.inf and options.noise != "observed":
        seconds["faint stars"] = draws * DRAW
    if options.tower is not None:
        seconds["tower"] = 6.0
    if options.residuals:
        seconds["residuals"] = 1.5 * len(options.residuals) * n_bins
    seconds |= {"error model": 5.0} | _simpler_fits(options)
    if options.has_sampled_oracle:
        seconds |= {f"{stage}{SAMPLED}": size for stage, size in _first_pass(options, n_rows).items()}
    return seconds


def _simpler_fits(options: Options) -> dict[str, float]:
    return {"simpler fits": 1.0 + LEAST_SQUARES} if options.n_simpler_fits else {}


def _first_pass(options: Options, n_rows: int) -> dict[str, float]:
    """Stages up to the linear experts."""
    n_bins, n_solves = options.grid.n_bins, options.n_folds + 1
    each = 0.08 if options.alpha is None else LEAST_SQUARES
    return {
        "mean spectrum": 0.2,
        "normal equations": n_rows * (READ + ADD * (1 + options.has_published)) + 0.5,
        "components": 8.0,
        "noise levels": min(n_rows, LEVEL_ROWS) * READ,
        "experts": 1.0 + n_bins * n_solves * each,
    }
