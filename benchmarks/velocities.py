"""Velocities fitted to stars in motion: errors, calibration, what log g loses, and the rate.

`python -m moefast.benchmarks.velocities [MODEL] [-n STARS] [-o FILE]`

Design: stars of the simulator move by up to ± 300 km/s before a detector and a sky that do not. They are predicted at
rest (never moved), with their velocities given, and with velocities fitted, without a mask and with the telluric mask,
which stays where it is while stars move. Stars are grouped by their median signal-to-noise ratio at rest. Beside them:
noise without a star, and stars whose velocities lie beyond the range of the fit. Rates are of one run, alternating.
"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np
from astropy.table import Table
from numpy.typing import NDArray

from moefast.core.atomic import write_json
from moefast.core.errors import OddSpectraWarning, OutputError
from moefast.core.random import standard_normals
from moefast.core.text import number, percent, table
from moefast.model import Model
from moefast.predicting.arrays import predict_arrays
from moefast.simulate import Emulator, simulate_rows
from moefast.simulate.nuisance import doppler
from moefast.spectra.quality import Flag
from moefast.spectra.telluric import telluric_pixels

__all__ = ["GROUPS", "format_text", "moving_stars", "run"]

LABELS = ("T_eff", "log_g", "M_H", "a_M", "C_M")
GROUPS = {
    "all": (0.0, np.inf), "SNR > 5": (5.0, np.inf), "below 4": (0.0, 4.0), "4-6": (4.0, 6.0), "6-8": (6.0, 8.0),
    "8-12": (8.0, 12.0), "12-16": (12.0, 16.0), "above 16": (16.0, np.inf),
}  # fmt: skip
"""Limits of the median signal-to-noise ratio."""
LARGEST = 300.0
SHORT_RANGE = 150.0
"""Range of a fit, km/s, beyond which some stars lie."""
FAR, FAR_SIGMAS = 30.0, 5.0
"""A velocity is wrong if it is off by more, in km/s and in its errors."""
SEED, REPEATS = 73_011, 3


def moving_stars(n: int, largest: float = LARGEST, seed: int = SEED) -> dict[str, NDArray]:
    """Simulated stars: log_g, velocity, error, and noisy flux at rest and moved; wave.

    Parameters
    ----------
    n : int
    largest : float
        Velocities are uniform within it, km/s.
    seed : int
    """
    emulator = Emulator.load()
    block = simulate_rows(0, n, seed=seed)
    labels = np.stack([block.params[name] for name in LABELS], axis=1)
    padded = emulator.padded_flux(labels, np.empty((n, len(emulator.mean)), np.float32), first_row=0)
    rng = np.random.default_rng(seed)
    velocity = rng.uniform(-largest, largest, n)
    noise = block.error * standard_normals(seed, np.arange(n), len(emulator.wave))
    return {
        "wave": emulator.wave, "log_g": np.asarray(block.params["log_g"]), "velocity": velocity, "error": block.error,
        "at_rest": (block.flux + noise).astype(np.float32),
        "moved": (doppler(padded, velocity, emulator.wave) + noise).astype(np.float32),
    }  # fmt: skip


def run(model: Model, *, n: int = 2000, repeats: int = REPEATS) -> dict[str, Any]:
    """Velocities, log g and rates of a posterior.

    Parameters
    ----------
    model : Model
    n : int
        Stars.
    repeats : int
        Of each timing.

    Returns
    -------
    dict
        JSON-ready: `rows`, one for each mask and group; `noise` and `beyond`, shares flagged; `rates`, spectra per
        second.
    """
    stars = moving_stars(n)
    rows = []
    for mask in ("none", "telluric"):
        bad = telluric_pixels(stars["wave"]) if mask == "telluric" else np.zeros(len(stars["wave"]), bool)
        bad = np.repeat(bad[None], n, axis=0)

        def predicted(flux: str, velocity: Any, bad: NDArray[np.bool_] = bad) -> Table:
            return predict_arrays(stars[flux], stars["error"], model, mask=bad, velocity=velocity)

        tables = {
            "rest": predicted("at_rest", 0.0),
            "given": predicted("moved", stars["velocity"]),
            "fitted": predicted("moved", "fit"),
        }
        rows += [
            {"mask": mask, "group": group} | _row(tables, stars, limits)
            for group, limits in GROUPS.items()
            if _members(tables, limits).any()
        ]
    return {
        "model": {"name": model.name, "sha256": model.hash}, "n": n, "rows": rows, "noise": _of_noise(model, stars),
        "beyond": _beyond(model, stars), "rates": _rates(model, stars, repeats),
    }  # fmt: skip


def _members(tables: dict[str, Table], limits: tuple[float, float]) -> NDArray[np.bool_]:
    snr = np.asarray(tables["rest"]["snr_median"])
    return (snr > limits[0]) & (snr <= limits[1])


def _row(tables: dict[str, Table], stars: dict[str, NDArray], limits: tuple[float, float]) -> dict[str, Any]:
    here = _members(tables, limits)
    fitted = tables["fitted"][here]
    off = np.asarray(fitted["v_los"], np.float64) - stars["velocity"][here]
    error = np.asarray(fitted["v_los_err"], np.float64)
    sure = np.asarray(fitted["flag"]) & int(Flag.VELOCITY_UNCERTAIN) == 0
    truth = stars["log_g"][here]
    scored: dict[str, Any] = {}
    for name, found in tables.items():
        wrong = np.asarray(found["log_g"][here], np.float64) - truth
        scored[f"r2_{name}"] = float(1 - np.mean(wrong**2) / np.var(truth)) if len(truth) > 1 else None
        scored[f"within_{name}"] = float(np.mean(np.abs(wrong) < np.asarray(found["log_g_err"][here])))
    far = np.abs(off) > np.maximum(FAR, FAR_SIGMAS * error)
    return {
        "n": int(here.sum()), "uncertain": float(np.mean(~sure)), "wrong_unflagged": float(np.mean(far & sure)),
        "scatter": float(1.4826 * np.median(np.abs(off[sure]))) if sure.any() else None,
        "claimed": float(np.median(error[sure])) if sure.any() else None,
        "within_1_sigma": float(np.mean(np.abs(off[sure]) < error[sure])) if sure.any() else None,
        "within_2_sigma": float(np.mean(np.abs(off[sure]) < 1.96 * error[sure])) if sure.any() else None,
        "within_1_sigma_all": float(np.mean(np.abs(off) < error)), **scored,
    }  # fmt: skip


def _flagged(found: Table) -> dict[str, float]:
    flag = np.asarray(found["flag"])
    return {
        "uncertain": float(np.mean(flag & int(Flag.VELOCITY_UNCERTAIN) > 0)),
        "any": float(np.mean(flag & int(Flag.VELOCITY_UNCERTAIN | Flag.UNLIKE_TRAINING) > 0)),
    }


def _of_noise(model: Model, stars: dict[str, NDArray]) -> dict[str, float]:
    """Spectra without a star."""
    noise = stars["error"] * standard_normals(SEED + 1, np.arange(len(stars["error"])), len(stars["wave"]))
    with warnings.catch_warnings():
        # Noise is odd in every respect.
        warnings.simplefilter("ignore", OddSpectraWarning)
        return _flagged(predict_arrays(noise.astype(np.float32), stars["error"], model, velocity="fit"))


def _beyond(model: Model, stars: dict[str, NDArray]) -> dict[str, float]:
    """Stars that move faster than the fit looks for, by 50 km/s at least."""
    there = np.abs(stars["velocity"]) > SHORT_RANGE + 50
    found = predict_arrays(
        stars["moved"][there], stars["error"][there], model, velocity="fit", velocity_range=SHORT_RANGE
    )
    return _flagged(found)


def _rates(model: Model, stars: dict[str, NDArray], repeats: int) -> dict[str, float]:
    """Spectra per second in memory, the best of several: taken to be at rest, and with velocities fitted."""
    best = {"at_rest": 0.0, "fitted": 0.0}
    for _ in range(repeats):
        for name, velocity in (("at_rest", 0.0), ("fitted", "fit")):
            start = time.perf_counter()
            predict_arrays(stars["moved"], stars["error"], model, velocity=velocity)
            best[name] = max(best[name], len(stars["moved"]) / (time.perf_counter() - start))
    return best


def format_text(found: dict[str, Any]) -> str:
    """The result for people."""
    rows = [
        (
            one["mask"], one["group"], str(one["n"]), percent(one["uncertain"]), percent(one["wrong_unflagged"]),
            number(one["scatter"], 2), number(one["claimed"], 2), percent(one["within_1_sigma"]),
            percent(one["within_2_sigma"]), percent(one["within_1_sigma_all"]), number(one["r2_rest"]),
            number(one["r2_given"]), number(one["r2_fitted"]), percent(one["within_fitted"]),
        )
        for one in found["rows"]
    ]  # fmt: skip
    header = (
        "mask", "SNR", "stars", "uncertain", "wrong", "scatter", "claimed", "1σ", "1.96σ", "1σ, all", "R² at rest",
        "given", "fitted", "1σ of log g",
    )  # fmt: skip
    rates = found["rates"]
    noise, beyond = (
        ", ".join(f"{k} {percent(v)}" for k, v in found[name].items()) for name in ("noise", "beyond")
    )
    return "\n".join(
        [
            f"{found['model']['name']}, {found['n']} stars that move by up to {LARGEST:g} km/s",
            "",
            *table(header, rows, left=2),
            "",
            f"  noise without a star, flagged: {noise}",
            f"  beyond a range of {SHORT_RANGE:g} km/s, flagged: {beyond}",
            f"  {rates['at_rest']:,.0f} spectra/s at rest, {rates['fitted']:,.0f} fitted "
            f"({rates['fitted'] / rates['at_rest']:.2f})",
        ]
    )


@click.command()
@click.argument("model", required=False)
@click.option("-n", "--stars", type=click.IntRange(10), default=2000, show_default=True)
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="Write the results as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(model: str | None, stars: int, out: str | None, as_json: bool) -> None:
    """Fit velocities to moving stars with MODEL (a model folder or a shipped model, a posterior)."""
    if out and Path(out).exists():
        raise OutputError(f"{out}: exists already; choose another name")
    found = run(Model.load(model), n=stars)
    click.echo(json.dumps(found, indent=1, ensure_ascii=False) if as_json else format_text(found))
    if out:
        write_json(found, out)


if __name__ == "__main__":
    main()
