"""Observed stars of known log g: bias, scatter, claimed error and flags of a model.

`python -m moefast.benchmarks.real_stars [MODEL] [-o FILE]`

Design: three stars (``data/real_stars.h5``, with sources and licences in its attributes), each at two signal-to-noise
ratios, with all pixels and without those that the Earth's absorption takes. Errors are those of the simulator's noise
model for a star of that spectrum, as bright as gives the ratio; every case has the same number of draws of noise, from
a stored seed. The observed flux has noise of its own, far below what is added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import h5py
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from moefast.core.atomic import write_json
from moefast.core.errors import InputError, OutputError
from moefast.core.random import add_noise
from moefast.core.text import number, percent, table
from moefast.model import Model
from moefast.predicting.columns import columns_of
from moefast.predicting.engines import open_engine, score_block
from moefast.protocol.scenarios import FLAGS, measure
from moefast.simulate.emulator import Emulator
from moefast.simulate.noise import NoiseModel
from moefast.spectra.source import Block
from moefast.spectra.telluric import telluric_pixels

__all__ = ["DATA", "RealStar", "case", "format_text", "read_stars", "run"]

DATA = Path(__file__).parent / "data" / "real_stars.h5"
SNRS = (5.0, 20.0)
"""Medians of flux / error over all pixels."""
MASKS = ("none", "telluric")
DRAWS = 200
SEED = 73_001
SEEING = 0.75
MAGNITUDES = (12.0, 28.0)
"""Between which the magnitude is sought."""


@dataclass(frozen=True)
class RealStar:
    """An observed star.

    Attributes
    ----------
    name : str
    t_eff, log_g, m_h : float
        As published [K, dex].
    flux : array of shape (p,), float32
    source, licence : str
    """

    name: str
    t_eff: float
    log_g: float
    m_h: float
    flux: NDArray[np.float32]
    source: str
    licence: str


def read_stars(path: Path = DATA) -> tuple[NDArray[np.float64], list[RealStar]]:
    """Wave grid [Å] and stars of the file.

    Raises
    ------
    InputError
        The file cannot be read.
    """
    try:
        with h5py.File(path) as file:
            stars = [
                RealStar(
                    name,
                    float(group.attrs["T_eff"]),
                    float(group.attrs["log_g"]),
                    float(group.attrs["M_H"]),
                    group["flux"][:].astype(np.float32),
                    str(group.attrs["source"]),
                    str(group.attrs["licence"]),
                )
                for name, group in file.items()
                if isinstance(group, h5py.Group)
            ]
            return file["wave"][:], stars
    except (OSError, KeyError) as error:
        raise InputError(
            f"{path}: not a file of observed stars ({error}); take it from the repository"
        ) from error


def case(
    star: RealStar, snr: float, noise: NoiseModel, *, draws: int = DRAWS, first: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Noisy flux and errors of a star, each of shape (draws, p).

    Parameters
    ----------
    star : RealStar
    snr : float
        Median of flux / error.
    noise : NoiseModel
        On the star's wave grid.
    draws : int
    first : int
        Number of the first draw: others are independent of it.
    """
    flux = star.flux[None]

    def excess(mag: float) -> float:
        return float(noise.error(flux, np.array([mag]), np.array([SEEING]))[1][0]) - snr

    mag = brentq(excess, *MAGNITUDES, xtol=1e-4)
    error = np.repeat(noise.error(flux, np.array([mag]), np.array([SEEING]))[0], draws, axis=0)
    clean = np.repeat(flux, draws, axis=0)
    return add_noise(clean, error, SEED, np.arange(first, first + draws)), error


def run(model: Model, *, draws: int = DRAWS, backend: str = "auto", path: Path = DATA) -> dict[str, Any]:
    """What a model says of every case.

    Parameters
    ----------
    model : Model
    draws : int
        Of noise, for each case.
    backend : "auto", "cpu" or "cuda"
    path : Path

    Returns
    -------
    dict
        JSON-ready: model, draws, and a row per case: star, log_g, snr, mask, mean, bias, scatter (standard deviation
        over the draws), claimed (median error), within_1_sigma, within_2_sigma, flagged, silent, flags.

    Raises
    ------
    InputError, WaveGridError
    """
    wave, stars = read_stars(path)
    model.check_wave(wave, str(path))
    engine, where = open_engine(model.mixture, backend)
    noise = NoiseModel(Emulator.load().wave_edges)
    lost = np.repeat(telluric_pixels(wave)[None], draws, axis=0)
    rows = []
    for index, (star, snr, mask) in enumerate(
        (star, snr, mask) for star in stars for snr in SNRS for mask in MASKS
    ):
        flux, error = case(star, snr, noise, draws=draws, first=index // len(MASKS) * draws)
        block = Block(0, 0, flux, error, lost if mask == "telluric" else None, {})
        columns = columns_of(model, *score_block(engine, block, 0))
        found = measure(columns, np.full(draws, star.log_g))
        predicted = columns["log_g"].astype(float)
        rows.append(
            {
                "star": star.name,
                "log_g": star.log_g,
                "snr": snr,
                "mask": mask,
                "mean": _finite(np.nanmean(predicted)) if np.isfinite(predicted).any() else None,
                "bias": found.bias,
                "scatter": _finite(np.nanstd(predicted)) if np.isfinite(predicted).any() else None,
                "claimed": found.median_error,
                "within_1_sigma": found.within_1_sigma,
                "within_2_sigma": found.within_2_sigma,
                "flagged": found.flagged,
                "silent": found.silent,
                "flags": {name: share for name, share in found.flags.items() if share},
            }
        )
    return {
        "model": {"name": model.name, "recipe": model.manifest["recipe"], "sha256": model.hash},
        "backend": where.name,
        "draws": draws,
        "sources": {star.name: f"{star.source} ({star.licence})" for star in stars},
        "cases": rows,
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def format_text(found: Mapping[str, Any]) -> str:
    """The results of `run` as a table for a terminal."""
    rows = [
        (
            one["star"],
            f"{one['snr']:g}",
            one["mask"],
            number(one["log_g"], 2),
            number(one["mean"], 2),
            number(one["bias"], 2, sign=True),
            number(one["scatter"], 2),
            number(one["claimed"], 2),
            percent(one["within_1_sigma"]),
            percent(one["flagged"]),
            percent(one["silent"]),
            ", ".join(
                f"{flag.name} {percent(one['flags'][flag.name])}"
                for flag in FLAGS
                if flag.name in one["flags"]
            ),
        )
        for one in found["cases"]
    ]
    header = (
        "star",
        "SNR",
        "mask",
        "log g",
        "mean",
        "bias",
        "scatter",
        "claimed",
        "1σ",
        "flagged",
        "silent",
        "",
    )
    sources = [f"  {name}: {source}" for name, source in found["sources"].items()]
    return "\n".join(
        [
            f"{found['model']['name']}, {found['draws']} draws of noise in each case",
            "",
            *table(header, rows),
            "",
            *sources,
        ]
    )


@click.command()
@click.argument("model", required=False)
@click.option("-n", "--draws", type=click.IntRange(2), default=DRAWS, show_default=True)
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="Write the results as JSON.")
@click.option("--backend", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(model: str | None, draws: int, out: str | None, backend: str, as_json: bool) -> None:
    """Measure MODEL (a model folder or a shipped model) on observed stars of known log g."""
    if out and Path(out).exists():
        raise OutputError(f"{out}: exists already; choose another name")
    found = run(Model.load(model), draws=draws, backend=backend)
    click.echo(json.dumps(found, indent=1, ensure_ascii=False) if as_json else format_text(found))
    if out:
        write_json(found, out)


if __name__ == "__main__":
    main()
