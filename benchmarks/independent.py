"""Spectra of another group's emulator: R², coverage and flags of a model on a file that it has nothing to do with.

`python -m moefast.benchmarks.independent FILE [MODEL] [-o FILE]`

Design: FILE has noise-free flux, errors and labels, as the producer's own code writes them. Noise is drawn with the
file's own errors, so its sky lines stand where that group has them; a small file is drawn several times, and R² is that
of each draw, averaged. `--emulator` puts our own emulator's spectra at the same labels in their place, with the same
errors and draws: what the difference between the emulators costs, and what the noise alone does not allow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from moefast.core.atomic import write_json
from moefast.core.errors import OutputError
from moefast.core.random import F32, add_noise
from moefast.core.text import number, percent, table
from moefast.model import Model
from moefast.predicting.columns import columns_of
from moefast.predicting.engines import open_engine, score_block
from moefast.protocol.scenarios import measure
from moefast.simulate.emulator import LABELS, Emulator
from moefast.spectra import open_spectra
from moefast.spectra.source import Block
from moefast.spectra.spectrum_set import SpectrumSet
from moefast.spectra.telluric import telluric_pixels

__all__ = ["format_text", "run"]

SEED = 73_002
DRAWS = 50
BLOCK_ROWS = 512
MASKS = ("none", "telluric")


def run(
    model: Model,
    files: str | Path,
    *,
    draws: int = DRAWS,
    noise_level: float = 1.0,
    emulator: bool = False,
    backend: str = "auto",
) -> dict[str, Any]:
    """What a model says of the spectra, with all pixels and without the telluric ranges.

    Parameters
    ----------
    model : Model
    files : path
        Flux without noise, errors and labels.
    draws : int
        Of noise.
    noise_level : float
        Factor on the errors of the file.
    emulator : bool
        Spectra of our emulator at the labels of the file, instead of its own.
    backend : "auto", "cpu" or "cuda"

    Returns
    -------
    dict
        JSON-ready: model, file, n, draws, and a row per mask: r2 (mean over the draws), r2_scatter (their standard
        deviation), r2_expected (what the errors that the model claims allow: one less the mean of their squares over
        the variance of log g), within_1_sigma, within_2_sigma, bias, median_error, flagged, unlike, silent.

    Raises
    ------
    InputError, LabelError, WaveGridError
    """
    spectra = open_spectra(files)
    log_g = spectra.labels(("log_g",))["log_g"]
    ours = _ours(spectra) if emulator else None
    model.check_wave(spectra.wave, str(files))
    engine, where = open_engine(model.mixture, backend)
    lost = telluric_pixels(spectra.wave)
    ratios = [
        np.median(block.flux / block.error, axis=1) / noise_level
        for block in spectra.blocks(BLOCK_ROWS, array="flux")
    ]
    rows = []
    for mask in MASKS:
        tables = []
        for draw in range(draws):
            parts = []
            for block in spectra.blocks(BLOCK_ROWS, array="flux"):
                numbers = draw * spectra.n_rows + np.arange(block.first_row, block.first_row + len(block))
                error = block.error * np.float32(noise_level)
                clean = block.flux if ours is None else ours[block.first_row : block.first_row + len(block)]
                flux = add_noise(clean, error, SEED, numbers)
                bad = block.mask
                if mask == "telluric":
                    bad = np.repeat(lost[None], len(block), axis=0) if bad is None else bad | lost
                scored = score_block(engine, Block(block.first_row, 0, flux, error, bad, {}), block.first_row)
                columns = columns_of(model, *scored)
                parts.append({name: columns[name] for name in ("log_g", "log_g_err", "flag")})
            tables.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
        r2 = [measure(one, log_g).r2 for one in tables]
        joined = {name: np.concatenate([one[name] for one in tables]) for name in tables[0]}
        found = vars(measure(joined, np.tile(log_g, draws)))
        rows.append(
            {"mask": mask}
            | {key: found[key] for key in found if key not in {"n", "flags"}}
            | {
                "r2": float(np.mean(np.array(r2, float))),
                "r2_scatter": float(np.std(np.array(r2, float))),
                "r2_expected": float(
                    1 - np.mean(np.square(joined["log_g_err"], dtype=float)) / np.var(log_g)
                ),
            }
        )
    return {
        "model": {"name": model.name, "recipe": model.manifest["recipe"], "sha256": model.hash},
        "backend": where.name,
        "file": Path(files).name,
        "n": spectra.n_rows,
        "draws": draws,
        "noise_level": noise_level,
        "emulator": emulator,
        "snr_median": float(np.median(np.concatenate(ratios))),
        "masks": rows,
    }


def _ours(spectra: SpectrumSet) -> F32:
    """Our emulator's spectra at the labels of a file, shape (n, p), divided by their medians as the file's are."""
    labels = spectra.labels(tuple(LABELS))
    flux = Emulator.load().flux(np.column_stack([labels[name] for name in LABELS]))
    return np.asarray(flux / np.median(flux, axis=1, keepdims=True), dtype=np.float32)


def format_text(found: Mapping[str, Any]) -> str:
    """The results of `run` as a table for a terminal."""
    rows = [
        (
            one["mask"],
            f"{number(one['r2'])} ± {number(one['r2_scatter'])}",
            number(one["r2_expected"]),
            percent(one["within_1_sigma"]),
            percent(one["within_2_sigma"]),
            number(one["bias"], 2, sign=True),
            number(one["median_error"], 2),
            percent(one["flagged"]),
            percent(one["unlike"]),
            percent(one["silent"]),
        )
        for one in found["masks"]
    ]
    header = ("mask", "R²", "expected", "1σ", "1.96σ", "bias", "error", "flagged", "unlike", "silent")
    of = "of our emulator at the labels of" if found["emulator"] else "of"
    title = (
        f"{found['model']['name']}, {found['n']} spectra {of} {found['file']}, {found['draws']} draws of noise, "
        f"median SNR {found['snr_median']:.1f}"
    )
    return "\n".join([title, "", *table(header, rows)])


@click.command()
@click.argument("files", metavar="FILE", type=click.Path(exists=True))
@click.argument("model", required=False)
@click.option("-n", "--draws", type=click.IntRange(1), default=DRAWS, show_default=True)
@click.option("--noise-level", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True)
@click.option(
    "--emulator", is_flag=True, help="Spectra of our emulator at the same labels, with the same errors."
)
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="Write the results as JSON.")
@click.option("--backend", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(
    files: str,
    model: str | None,
    draws: int,
    noise_level: float,
    emulator: bool,
    out: str | None,
    backend: str,
    as_json: bool,
) -> None:
    """Measure MODEL (a model folder or a shipped model) on clean spectra of another emulator in FILE."""
    if out and Path(out).exists():
        raise OutputError(f"{out}: exists already; choose another name")
    found = run(
        Model.load(model), files, draws=draws, noise_level=noise_level, emulator=emulator, backend=backend
    )
    click.echo(json.dumps(found, indent=1, ensure_ascii=False) if as_json else format_text(found))
    if out:
        write_json(found, out)


if __name__ == "__main__":
    main()
