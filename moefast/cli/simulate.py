"""The command `moefast simulate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from moefast.cli.messages import tell_failures, tell_result
from moefast.cli.options import CONFIG, LIKE, OVERWRITE, RESOLUTION, SCHEDULER, positive, rows, talk
from moefast.cli.swapped import swapped_told
from moefast.core.atomic import refuse_taken
from moefast.core.errors import MoefastError
from moefast.core.progress import ProgressLine
from moefast.core.text import counted

__all__ = ["simulate"]

LARGEST_CALIBRATION = 0.5
"""Relative error of a calibration beyond which percent are meant."""


def _positive_if_given(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    return None if value is None else positive(context, option, value)


@click.command(short_help="Simulate spectra with labels.")
@click.argument("out", required=False, type=click.Path(dir_okay=False))
@click.option("-n", "--number", type=click.IntRange(1), metavar="N", help="How many spectra.")
@click.option(
    "--rows",
    callback=rows,
    metavar="FIRST:LAST",
    help="Which rows of the survey, for shards; instead of -n.",
)
@click.option(
    "--seed", type=click.IntRange(0), metavar="N", help="Seed; row i is the same for any number of rows."
)
@click.option(
    "--set",
    "name",
    metavar="NAME",
    help="A reference set, z0, survey or wild, instead of a seed and settings.",
)
@click.option("--part", metavar="PART", help="Part of the set: train, validation, test_10k or test_1k.")
@click.option("--list-sets", is_flag=True, help="Show the reference sets and their fingerprints.")
@click.option(
    "--mag", nargs=2, type=float, help="Bright and faint limit of the HSC i magnitude.  [default: 20.5 22.5]"
)
@click.option(
    "--velocity",
    type=float,
    callback=_positive_if_given,
    metavar="KM/S",
    help="Scatter of radial velocities [off].",
)
@click.option("--redshift", nargs=2, type=float, metavar="LOW HIGH", help="Range of redshifts [off].")
@click.option(
    "--reddening", nargs=2, type=float, metavar="LOW HIGH", help="Range of E(B-V) in magnitudes [off]."
)
@click.option(
    "--calibration", type=float, callback=_positive_if_given, metavar="RMS",
    help="Smooth relative error of the flux calibration, 0.03 for 3 % [off].",
)  # fmt: skip
@click.option(
    "--noise-level",
    type=float,
    callback=_positive_if_given,
    help="Factor on the physical noise.  [default: 1]",
)
@LIKE
@RESOLUTION
@SCHEDULER
@click.option(
    "--noisy/--clean", default=None,
    help="Whether to store the array with noise added.  [default: noisy, but clean for train and validation parts]",
)  # fmt: skip
@CONFIG
@OVERWRITE
@talk
@swapped_told
def simulate(
    out: str | None, number: int | None, rows: tuple[int, int] | None, seed: int | None, name: str | None,
    part: str | None, list_sets: bool, mag: tuple[float, float] | None, velocity: float | None,
    redshift: tuple[float, float] | None, reddening: tuple[float, float] | None, calibration: float | None,
    noise_level: float | None, like: tuple[str, ...], resolution: str | None, scheduler: str | None,
    noisy: bool | None, overwrite: bool, quiet: bool,
) -> None:  # fmt: skip
    """Simulate spectra of the PFS medium-resolution red arm, with labels, and write them to OUT.

    Labels are uniform in T_eff 3750-6000 K, log g 1-5, [M/H] -2.5…0.75, [a/M] -0.3…0.5, [C/M] -0.5…0.5. The file
    has the layout of the survey's simulator: flux without noise, its 1σ error and, unless --clean, the flux with noise.
    Velocity, redshift, reddening and calibration are switches: each changes nothing but what it says.

    \b
        moefast simulate train.h5 -n 20000 --seed 1 --clean
        moefast simulate test.h5 --set z0 --part test_10k
        moefast simulate shard-3.h5 --set survey --part train --rows 300000:400000
        moefast simulate mine.h5 -n 5000 --seed 2 --like coadd.fits
        moefast simulate train/ --set z0 --part train -n 1000000 --scheduler local:4

    With --scheduler OUT is a folder of files.
    """
    from moefast.simulate.sets import format_sets

    if list_sets:
        click.echo(format_sets())
        return
    if out is None:
        raise click.UsageError("name the file to write: moefast simulate OUT …")
    if Path(out).suffix.lower() in {".fits", ".parquet", ".csv"}:
        raise click.UsageError(f"{out}: spectra are written as HDF5; name the file .h5")
    if calibration is not None and calibration > LARGEST_CALIBRATION:
        raise click.BadParameter(
            f"{calibration:g} is an error of {calibration:.0%}; give a part of 1, such as 0.03 for 3 %",
            param_hint="--calibration",
        )
    if reddening is not None and min(reddening) < 0:
        raise click.BadParameter("E(B-V) is 0 or more", param_hint="--reddening")
    if scheduler is None:
        refuse_taken(out, overwrite=overwrite)
    if number and rows:
        raise click.UsageError("-n and --rows both say which rows to make; give one of them")
    span = rows or ((0, number) if number else None)
    own: dict[str, Any] = {
        "mag": mag, "velocity_scatter": velocity, "redshift": redshift, "reddening": reddening,
        "calibration": calibration, "noise_level": noise_level,
    }  # fmt: skip
    own = {key: value for key, value in own.items() if value is not None}
    if resolution is not None and not like:
        raise click.UsageError("--resolution is that of the spectra which --like names")
    if like and mag is not None:
        raise click.UsageError("--mag: the signal-to-noise ratios are those of the spectra that --like names")
    if name is None:
        if part is not None:
            raise click.UsageError("--part is a part of a reference set; say which with --set")
        _free_set(
            out, span, seed, own, like=like, resolution=resolution, noisy=noisy is None or noisy,
            scheduler=scheduler, overwrite=overwrite, quiet=quiet,
        )  # fmt: skip
        return
    flags = (
        ("--seed",) * (seed is not None)
        + ("--like",) * bool(like)
        + tuple("--" + key.split("_scatter")[0].replace("_", "-") for key in own)
    )
    if flags:
        raise click.UsageError(
            f"{', '.join(flags)}: a reference set is what it is; leave --set away to choose"
        )
    _reference_set(
        out, name, _part_of(name, part, span), span, noisy=noisy, scheduler=scheduler, overwrite=overwrite,
        quiet=quiet,
    )  # fmt: skip


def _part_of(name: str, part: str | None, span: tuple[int, int] | None) -> str:
    """The part, if there is one of this name in the set, and rows are said where they must be."""
    from moefast.simulate.sets import REFERENCE_SETS

    if name not in REFERENCE_SETS:
        raise click.BadParameter(
            f"{name!r} is unknown; choose one of {', '.join(REFERENCE_SETS)}", param_hint="--set"
        )
    parts = REFERENCE_SETS[name].parts
    if part is None or part not in parts:
        found = f"{part!r} is unknown" if part else "a reference set has several"
        raise click.BadParameter(f"{found}; choose one of {', '.join(parts)}", param_hint="--part")
    if parts[part].n_rows is not None and span is not None:
        raise click.UsageError(f"{name} {part} has {parts[part].n_rows:,} spectra; leave -n and --rows away")
    if parts[part].n_rows is None and span is None:
        raise click.UsageError(
            f"{name} {part} has any number of rows: say how many with -n, or which with --rows"
        )
    return part


def _reference_set(
    out: str, name: str, part: str, span: tuple[int, int] | None, *, noisy: bool | None, scheduler: str | None,
    overwrite: bool, quiet: bool,
) -> None:  # fmt: skip
    """Rows of a part of a reference set, and whether they are those that were frozen."""
    from moefast.simulate.sets import FINGERPRINTS, part_rows, simulate_set

    total = part_rows(name, part, span)[2]
    with _getting_ready(quiet) as progress:
        if scheduler is not None:
            if span is None:
                raise click.UsageError(
                    f"{name} {part} is one file; --scheduler writes parts of any size to a folder"
                )
            _on_cluster(
                scheduler, out, total, progress, quiet=quiet, name=name, part=part, noisy=noisy, overwrite=overwrite,
            )  # fmt: skip
            return
        report = progress.rows("simulate")
        identity = simulate_set(
            out, name, part, rows=span, noisy=noisy, overwrite=overwrite,
            progress=lambda done: report(done, total[1] - total[0]),
        )  # fmt: skip
    frozen = FINGERPRINTS.get((name, part), "")
    as_frozen = " (as frozen)" if identity.fingerprint == frozen else ""
    tell_result(f"{out}: {counted(total[1] - total[0], 'spectrum')}, {name} {part}", quiet=quiet)
    tell_result(f"  set fingerprint {identity.fingerprint}{as_frozen}", quiet=quiet)
    if frozen and not as_frozen:
        progress.note(f"  this is NOT the frozen {name} {part}, whose fingerprint is {frozen}")


def _free_set(
    out: str, span: tuple[int, int] | None, seed: int | None, own: dict[str, Any], *, like: tuple[str, ...],
    resolution: str | None, noisy: bool, scheduler: str | None, overwrite: bool, quiet: bool,
) -> None:  # fmt: skip
    """Spectra with settings of one's own."""
    from moefast.simulate import Observed, Settings, SimulatedSpectra, simulate_file

    if span is None or seed is None:
        raise click.UsageError(
            "a free set needs -n (or --rows) and --seed; a reference set needs --set and --part"
        )
    for key in ("mag", "redshift", "reddening"):
        low, high = own.get(key, (0.0, 1.0))
        if low > high or (key == "mag" and low == high):
            which = "brighter" if key == "mag" else "lower"
            raise click.BadParameter(f"{low} {high}: the {which} limit comes first", param_hint=f"--{key}")
    first, last = span
    observed = Observed.of_files(like, resolution=resolution) if like else None
    try:
        settings = Settings(**own)
        # Refuses what cannot be simulated.
        SimulatedSpectra(1, seed=seed, settings=settings, observed=observed)
    except MoefastError as error:
        raise click.UsageError(str(error)) from error
    with _getting_ready(quiet) as progress:
        if scheduler is not None:
            _on_cluster(
                scheduler, out, span, progress, quiet=quiet, seed=seed, settings=settings, like=like,
                resolution=resolution, noisy=noisy, overwrite=overwrite,
            )  # fmt: skip
            return
        report = progress.rows("simulate")
        simulate_file(
            out, last - first, seed=seed, settings=settings, first_row=first, noisy=noisy, overwrite=overwrite,
            progress=lambda done: report(done, last - first), observed=observed,
        )  # fmt: skip
    shard = f", rows {first}:{last}" if first else ""
    arrays = "flux, error, noisy" if noisy else "flux, error"
    say = partial(tell_result, quiet=quiet)
    say(
        f"{out}: {counted(last - first, 'spectrum')}, seed {seed}{shard}, {arrays}{', mask' if observed else ''}"
    )
    if observed is not None:
        say(f"  {observed}")
        for note in observed.notes:
            say(f"  note: {note}")
        tell_failures(observed.failures)


@contextmanager
def _getting_ready(quiet: bool) -> Iterator[ProgressLine]:
    """Progress of spectra; compiling, the first time on a machine, is before the first of them."""
    with ProgressLine(quiet) as progress:
        progress.doing("simulate: getting ready")
        yield progress


def _on_cluster(
    scheduler: str, out: str, rows: tuple[int, int], progress: ProgressLine, *, quiet: bool, **job: Any
) -> None:
    """The same spectra in the files of a folder, by the workers of a cluster."""
    from moefast.cli.spread import connected
    from moefast.cluster.rows_on_workers import simulate_on

    with connected(scheduler, progress) as (client, _):
        paths = simulate_on(client, out, rows, progress=progress.rows("simulate"), **job)
    progress.close()
    tell_result(
        f"{out}: {counted(rows[1] - rows[0], 'spectrum')}, rows {rows[0]}:{rows[1]}, in {counted(len(paths), 'file')}",
        quiet=quiet,
    )
