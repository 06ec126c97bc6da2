"""Errors of log g in dex, star by star against the truth: by signal-to-noise ratio, and with pixels lost.

`python -m moefast.benchmarks.accuracy FILE [MODEL] [--gap NAME]... [-o FILE]`

Design: FILE holds noisy spectra with labels, as `moefast simulate` writes them. A gap is lost in addition to what the
file's own mask holds. Stars are grouped by the median of flux over error of the pixels that they have left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from moefast.core.atomic import write_json
from moefast.core.errors import InputError, OutputError
from moefast.core.text import number, percent, table
from moefast.model import Model
from moefast.predicting.columns import columns_of
from moefast.predicting.engines import open_engine, score_block
from moefast.protocol.scenarios import measure
from moefast.simulate.gaps import GAPS
from moefast.spectra import open_spectra
from moefast.spectra.source import Block

__all__ = ["RATIOS", "format_text", "run"]

RATIOS: dict[str, tuple[float, float]] = {
    "all": (-np.inf, np.inf),
    "SNR 5": (4.0, 6.0),
    "SNR 10": (8.0, 12.0),
    "SNR 20": (16.0, 25.0),
}
"""Groups of stars: limits of the median signal-to-noise ratio, both included."""
SEED = 73_003
BLOCK_ROWS = 512
COLUMNS = ("log_g", "log_g_err", "flag", "snr_median")


def run(
    model: Model, files: str | Path, *, gaps: Sequence[str] = ("none",), backend: str = "auto"
) -> dict[str, Any]:
    """Errors of a model on labelled noisy spectra.

    Parameters
    ----------
    model : Model
    files : path
        Spectra with noise, errors and log_g.
    gaps : sequence of str
        Names in `moefast.simulate.gaps.GAPS`; the whole file is scored once with each.
    backend : "auto", "cpu" or "cuda"

    Returns
    -------
    dict
        JSON-ready: model, backend, file, n, and a row for each gap and group of `RATIOS` with stars: n, rms (of
        predicted minus true log g, dex), median_error (claimed, dex), bias, r2, within_1_sigma, within_2_sigma,
        flagged, unlike, silent.

    Raises
    ------
    InputError, LabelError, WaveGridError
    """
    unknown = [name for name in gaps if name not in GAPS]
    if unknown:
        raise InputError(f"gap {unknown[0]!r} is none of {', '.join(GAPS)}")
    spectra = open_spectra(files)
    truth = spectra.labels(("log_g",))["log_g"]
    model.check_wave(spectra.wave, str(files))
    engine, where = open_engine(model.mixture, backend)
    rows: list[dict[str, Any]] = []
    for gap in gaps:
        parts = []
        for block in spectra.blocks(BLOCK_ROWS, array="noisy"):
            numbers = np.arange(block.first_row, block.first_row + len(block))
            bad = GAPS[gap](spectra.wave, numbers, SEED)
            if block.mask is not None:
                bad = bad | block.mask
            left = Block(block.first_row, 0, block.flux, block.error, bad, {})
            columns = columns_of(model, *score_block(engine, left, block.first_row))
            parts.append({name: columns[name] for name in COLUMNS})
        columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
        for group, (low, high) in RATIOS.items():
            members = (columns["snr_median"] >= low) & (columns["snr_median"] <= high)
            if not members.any():
                continue
            of_group = {name: column[members] for name, column in columns.items()}
            apart = of_group["log_g"] - truth[members]
            rows.append(
                {"gap": gap, "group": group, "rms": float(np.sqrt(np.nanmean(apart**2)))}
                | vars(measure(of_group, truth[members]))
            )
    return {
        "model": {"name": model.name, "recipe": model.manifest["recipe"], "sha256": model.hash},
        "backend": where.name,
        "file": Path(files).name,
        "n": spectra.n_rows,
        "rows": rows,
    }


def format_text(results: Mapping[str, Any]) -> str:
    """The results of `run` as a table for a terminal."""
    rows = [
        (
            one["gap"],
            one["group"],
            f"{one['n']:,}",
            number(one["rms"], 2),
            number(one["median_error"], 2),
            number(one["bias"], 2, sign=True),
            number(one["r2"]),
            percent(one["within_1_sigma"]),
            percent(one["within_2_sigma"]),
            percent(one["flagged"]),
            percent(one["unlike"]),
            percent(one["silent"]),
        )
        for one in results["rows"]
    ]
    header = (
        "gap", "stars", "n", "rms", "claimed", "bias", "R²", "1σ", "1.96σ", "flagged", "unlike", "silent",
    )  # fmt: skip
    title = (
        f"{results['model']['name']}, {results['n']:,} spectra of {results['file']}; errors of log g in dex"
    )
    return "\n".join([title, "", *table(header, rows)])


@click.command()
@click.argument("files", metavar="FILE", type=click.Path(exists=True))
@click.argument("model", required=False)
@click.option("--gap", "gaps", multiple=True, default=("none",), help="Kind of gap; repeat it for several.")
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="Write the results as JSON.")
@click.option("--backend", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(
    files: str, model: str | None, gaps: tuple[str, ...], out: str | None, backend: str, as_json: bool
) -> None:
    """Measure the errors of MODEL (a model folder or a shipped model) on labelled noisy spectra in FILE."""
    if out and Path(out).exists():
        raise OutputError(f"{out}: exists already; choose another name")
    results = run(Model.load(model), files, gaps=gaps, backend=backend)
    click.echo(json.dumps(results, indent=1, ensure_ascii=False) if as_json else format_text(results))
    if out:
        write_json(results, out)


if __name__ == "__main__":
    main()
