"""The command line: parse, call, print.

Design: no numerics here, and heavy imports only inside the command that needs them, so that `moefast --help` is quick.
People read standard output; `--json` gives machines the same facts. Progress and notes go to standard error.
"""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import click

from moefast.core.errors import MoefastError, OutputError
from moefast.core.progress import unit_of
from moefast.core.version import __version__

__all__ = ["cli", "main"]

EXIT_CODES = """\b
Exit codes:
  0  done
  1  something unforeseen; please report it
  2  the command line was not understood
  3  a file is missing, damaged or lacks a dataset (with several files: the others were still done)
  4  a file is on another wave grid than the model
  5  labels are needed and missing, or are numbers that no star has
  6  the model folder is incomplete, altered or of another version
  7  the backend asked for cannot be used here
  8  the result cannot be written
  9  an engine of a benchmark gives another answer, or the benchmark cannot be carried out
  143  terminated (SIGTERM)
  130  interrupted; nothing half-written is left under the name of the result
"""


class Progress:
    """Rows done with rate and time to go: one changing line on a terminal, a line now and then elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet, self._live = quiet, sys.stderr.isatty()
        self._stage, self._begin, self._first, self._last, self._shown = "", 0.0, 0, 0.0, 0

    def stage(self, stage: str, done: int, total: int) -> None:
        """Report `done` of `total` rows, or steps, of a named stage."""
        if self._quiet:
            return
        now = time.monotonic()
        if stage != self._stage:
            self.close()
            # The first report of a stage starts its clock: what came before it is not known here.
            self._stage, self._begin, self._first, self._last = stage, now, done, 0.0
        every = 0.2 if self._live else 10.0
        if now - self._last < every and done < total:
            return
        self._last = now
        unit = unit_of(stage)
        text = f"{stage}: {done:,} of {total:,} {unit} ({100 * done / max(total, 1):.0f} %)"
        if done > self._first and now > self._begin:
            rate = (done - self._first) / (now - self._begin)
            text += f", {rate:,.0f}/s" if unit == "spectra" else ""
            text += f", {(total - done) / rate:.0f} s left" if done < total else ""
        if self._live:
            click.echo("\r" + text.ljust(self._shown), err=True, nl=False)
            self._shown = len(text)
        else:
            click.echo(text, err=True)

    def rows(self, stage: str) -> Callable[[int, int], None]:
        """A callback for work that has a single stage."""
        return lambda done, total: self.stage(stage, done, total)

    def note(self, text: str) -> None:
        """Say something between two reports; with --quiet, too, for it is no progress."""
        self.close()
        click.echo(text, err=True)

    def close(self) -> None:
        """End the changing line."""
        if self._live and self._shown:
            click.echo("", err=True)
            self._shown = 0


class _Group(click.Group):
    """Turns our errors into one message and their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except MoefastError as error:
            click.echo(f"\nmoefast: error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("\nmoefast: interrupted; nothing was written", err=True)
            ctx.exit(130)
        except Terminated:
            click.echo("\nmoefast: terminated; nothing was written", err=True)
            ctx.exit(143)
        except (MemoryError, OSError) as error:
            # What no check of a file foresees: a full disk, a lost network share, no memory.
            number = getattr(error, "errno", None)
            if number == errno.EPIPE:
                raise
            click.echo(f"\nmoefast: error: {str(error) or 'out of memory'}", err=True)
            ctx.exit(OutputError.exit_code if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) else 1)


def _rows(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    try:
        first, last = (int(part) for part in value.split(":"))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not FIRST:LAST, for example 0:1000") from None
    if not 0 <= first < last:
        raise click.BadParameter(f"{value!r}: FIRST counts from 0 and must be less than LAST")
    return first, last


def _shard(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    try:
        index, count = (int(part) for part in value.split("/"))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not i/N, for example 0/8") from None
    if not 0 <= index < count:
        raise click.BadParameter(f"{value!r}: i counts from 0 and must be less than N")
    return index, count


def _names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


def _positive(_: click.Context, __: click.Parameter, value: float) -> float:
    if not 0 < value < math.inf:
        raise click.BadParameter(f"{value:g} is not a positive number")
    return value


def _positive_if_given(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    return None if value is None else _positive(context, option, value)


def _grid(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    try:
        rows, columns = (int(part) for part in value.lower().split("x"))
        if rows < 1 or columns < 1:
            raise ValueError
    except ValueError:
        raise click.BadParameter(f"{value!r} is not TxM, for example 3x3") from None
    return rows, columns


FILES = click.argument("files", nargs=-1, required=True, metavar="FILE…")
MODEL = click.option(
    "-m",
    "--model",
    metavar="MODEL",
    help="Model folder, or a shipped model: z0 (stars at rest; the default) or survey (with "
    "velocities, reddening and calibration errors).",
)
BACKEND = click.option(
    "--backend",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute. auto takes a GPU if there is a usable one and says so; cuda fails without one.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
QUIET = click.option("-q", "--quiet", is_flag=True, help="No progress.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")


@click.group(cls=_Group, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="moefast")
def cli() -> None:
    """Surface gravities (log g) for faint stellar spectra, from the survey's own HDF5 files.

    \b
    Score spectra with the model that comes with moefast:
        moefast predict spectra.h5 -o log_g.h5
    Fit and measure your own:
        moefast simulate train.h5 -n 20000 --seed 1 --clean
        moefast simulate test.h5 -n 5000 --seed 2
        moefast fit train.h5 -o model/
        moefast evaluate test.h5 -m model/ -o report/

    FILE may be a file, a folder of shards, or a quoted pattern; several are read in the order given.
    """


@cli.command()
@click.argument("out", required=False, type=click.Path(dir_okay=False))
@click.option("-n", "--number", type=click.IntRange(1), help="How many spectra.")
@click.option(
    "--rows",
    callback=_rows,
    metavar="FIRST:LAST",
    help="Which rows of the survey, for shards; instead of -n.",
)
@click.option("--seed", type=click.IntRange(0), help="Seed; row i is the same for any number of rows.")
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
@click.option(
    "--noisy/--clean", default=None,
    help="Whether to store the array with noise added.  [default: noisy, but clean for train and validation parts]",
)  # fmt: skip
@OVERWRITE
@QUIET
def simulate(
    out: str | None, number: int | None, rows: tuple[int, int] | None, seed: int | None, name: str | None,
    part: str | None, list_sets: bool, mag: tuple[float, float] | None, velocity: float | None,
    redshift: tuple[float, float] | None, reddening: tuple[float, float] | None, calibration: float | None,
    noise_level: float | None, noisy: bool | None, overwrite: bool, quiet: bool,
) -> None:  # fmt: skip
    """Simulate spectra of the PFS medium-resolution red arm, with labels, and write them to OUT.

    Labels are uniform in T_eff 3750-6000 K, log g 1-5, [M/H] -2.5…0.75, [a/M] -0.3…0.5, [C/M] -0.5…0.5. The file
    has the layout of the survey's simulator: flux without noise, its 1σ error and, unless --clean, the flux with noise.
    Velocity, redshift, reddening and calibration are switches: each changes nothing but what it says.

    \b
        moefast simulate train.h5 -n 20000 --seed 1 --clean
        moefast simulate test.h5 --set z0 --part test_10k
        moefast simulate shard-3.h5 --set survey --part train --rows 300000:400000
    """
    from moefast.simulate import REFERENCE_SETS, Settings, simulate_file, simulate_rows, simulate_set
    from moefast.simulate.sets import FINGERPRINTS, format_sets, part_rows

    if list_sets:
        click.echo(format_sets())
        return
    if out is None:
        raise click.UsageError("name the file to write: moefast simulate OUT …")
    if number and rows:
        raise click.UsageError("-n and --rows both say which rows to make; give one of them")
    span = rows or ((0, number) if number else None)
    progress = Progress(quiet)
    report = progress.rows("simulate")
    own: dict[str, Any] = {
        "mag": mag, "velocity_scatter": velocity, "redshift": redshift, "reddening": reddening,
        "calibration": calibration, "noise_level": noise_level,
    }  # fmt: skip
    own = {key: value for key, value in own.items() if value is not None}
    if name is not None:
        flags = ("--seed",) * (seed is not None) + tuple(
            "--" + key.split("_scatter")[0].replace("_", "-") for key in own
        )
        if flags:
            raise click.UsageError(
                f"{', '.join(flags)}: a reference set is what it is; leave --set away to choose"
            )
        if name not in REFERENCE_SETS:
            raise click.BadParameter(
                f"{name!r} is unknown; choose one of {', '.join(REFERENCE_SETS)}", param_hint="--set"
            )
        parts = REFERENCE_SETS[name].parts
        if part not in parts:
            found = f"{part!r} is unknown" if part else "a reference set has several"
            raise click.BadParameter(f"{found}; choose one of {', '.join(parts)}", param_hint="--part")
        if parts[part].n_rows is not None and span is not None:
            raise click.UsageError(
                f"{name} {part} has {parts[part].n_rows:,} spectra; leave -n and --rows away"
            )
        if parts[part].n_rows is None and span is None:
            raise click.UsageError(
                f"{name} {part} has any number of rows: say how many with -n, or which with --rows"
            )
        total = part_rows(name, part, span)[2]
        identity = simulate_set(
            out, name, part, rows=span, noisy=noisy, overwrite=overwrite,
            progress=lambda done: report(done, total[1] - total[0]),
        )  # fmt: skip
        progress.close()
        frozen = FINGERPRINTS.get((name, part), "")
        as_frozen = " (as frozen)" if identity.fingerprint == frozen else ""
        click.echo(f"{out}: {total[1] - total[0]:,} spectra, {name} {part}")
        click.echo(f"  fingerprint {identity.fingerprint}{as_frozen}")
        if frozen and not as_frozen:
            click.echo(f"  this is NOT the frozen {name} {part}, whose fingerprint is {frozen}", err=True)
        return
    if part is not None:
        raise click.UsageError("--part is a part of a reference set; say which with --set")
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
    try:
        settings = Settings(**own)
        simulate_rows(first, first, seed=seed, settings=settings)
    except MoefastError as error:
        raise click.UsageError(str(error)) from error
    noisy = noisy is None or noisy
    simulate_file(
        out, last - first, seed=seed, settings=settings, first_row=first, noisy=noisy, overwrite=overwrite,
        progress=lambda done: report(done, last - first),
    )  # fmt: skip
    progress.close()
    shard = f", rows {first}:{last}" if first else ""
    arrays = "flux, error, noisy" if noisy else "flux, error"
    click.echo(f"{out}: {last - first:,} spectra, seed {seed}{shard}, {arrays}")


@cache
def _grid_of(model: str | None) -> Any:
    """Wavelengths of a model."""
    from moefast.model import Model

    return Model.load(model).mixture.wave


@cli.command()
@FILES
@MODEL
@click.option(
    "--picture", type=click.Path(dir_okay=False), help="Draw a few spectra and the SNR histograms to a PNG."
)
@click.option("--limit", type=click.IntRange(1), help="Look at so many rows at most.")
@JSON
def inspect(
    files: tuple[str, ...], model: str | None, picture: str | None, limit: int | None, as_json: bool
) -> None:
    """Show what is in spectrum files: arrays, wave grid, labels, SNR percentiles, bad rows.

    FITS files of surveys are shown as the model would see them, on its grid.
    """
    from moefast.spectra.prepared import open_as_found
    from moefast.spectra.summary import format_text, summarise
    from moefast.spectra.summary import picture as draw

    # Files of surveys have no grid of their own that all rows share.
    spectra = open_as_found(files, lambda: _grid_of(model), on_error="skip")
    facts = summarise(spectra, max_rows=limit)
    click.echo(json.dumps(facts, indent=1) if as_json else format_text(facts))
    if picture:
        draw(spectra, picture)
        click.echo(f"picture: {picture}", err=True)
    _tell_failures(spectra.failures)


@cli.command()
@click.argument("files", nargs=-1, metavar="[FILE…]")
@click.option("-o", "--out", required=True, metavar="FOLDER", help="Model folder to write.")
@click.option(
    "--simulate", type=click.IntRange(1), metavar="N",
    help="Fit N spectra that are simulated as they are needed, with no file between; instead of FILE.",
)  # fmt: skip
@click.option("--set", "name", metavar="NAME", help="Reference set to simulate, part train.  [default: z0]")
@click.option(
    "--recipe",
    default="phys-moe",
    show_default=True,
    help="Which model: see above.",
)
@click.option(
    "--grid", callback=_grid, metavar="TxM", help="Bins in T_eff and [M/H], instead of the recipe's."
)
@click.option(
    "--noise",
    type=click.Choice(["closed-form", "sampled", "observed"]),
    default="closed-form",
    show_default=True,
    help="closed-form: flux is clean, noise enters the normal equations exactly. sampled: flux is clean, one draw "
    "of noise per spectrum. observed: the spectra are noisy already.",
)
@click.option(
    "--noise-level",
    type=float,
    callback=_positive,
    default=1.0,
    show_default=True,
    help="Factor on the errors of the files.",
)
@click.option(
    "--size", type=click.Choice(["small", "base"]), default="small", show_default=True,
    help="Of a recipe's network: small for ten minutes of a laptop, base for a GPU.",
)  # fmt: skip
@click.option(
    "--steps", type=click.IntRange(1), help="Of the network's fit, instead of what belongs to its size."
)
@click.option("--references/--no-references", default=True, show_default=True,
              help="Also fit the published-style ridge to compare with (doubles the first pass).")  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of folds, draws and networks."
)
@click.option(
    "--checkpoint", metavar="FOLDER",
    help="Keep the statistics here every two minutes (up to 3 GB with nine bins, twice that while they are replaced): "
    "the same command goes on where a killed one stood, to the same model. Cleared once the model is written.",
)  # fmt: skip
@BACKEND
@OVERWRITE
@QUIET
@JSON
def fit(
    files: tuple[str, ...], out: str, simulate: int | None, name: str | None, recipe: str,
    grid: tuple[int, int] | None, noise: str, noise_level: float, size: str, steps: int | None,
    references: bool, seed: int, checkpoint: str | None, backend: str, overwrite: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Fit a model on labelled spectra (T_eff, log_g, M_H in dataset/params) and write it to a folder.

    \b
        moefast fit train.h5 -o model/
        moefast fit --simulate 200000 --set library --recipe posterior -o model/
        moefast fit train/ -o model/ --checkpoint fit-so-far/

    \b
    Recipes:
        posterior        posterior over clouds of templates at the noise and
                         gaps of each star; scale, slope and sky residuals of
                         the flux are free; needs clean spectra
        posterior-calibrated
                         the same where the calibration can be trusted: the
                         scale is free, the slope is not
        template         posterior mean over templates, at the mean noise of
                         the training set; needs clean spectra
        phys-moe         nine linear experts behind a gate; any spectra
        hybrid-moe       the best of linear, template, trees in each bin
        residual-moe     heads, and what they get wrong on average learnt
                         beside them, where that helps beyond doubt
        conditional-moe  phys-moe, its gate with a second part for faint stars
        dual-moe         phys-moe, its gate also on statistics of the errors
        heads            a network on components with nine heads and its gate;
                         fitted by torch, scored without it
        heads-cnn        the same, convolutions on the flux
        heads-vit        the same, a vision transformer on the flux
        snr-moe          linear experts for four bins of signal-to-noise
        global-ridge     one linear expert
        published-ridge  one ridge as published, to compare with
    """
    from moefast.backend import resolve_kernels
    from moefast.checkpoint import Checkpoint
    from moefast.core.grids import uniform
    from moefast.model import check_target
    from moefast.recipes import RECIPES
    from moefast.recipes import fit as run
    from moefast.simulate import SimulatedSpectra

    if recipe not in RECIPES:
        raise click.BadParameter(
            f"{recipe!r} is unknown; choose one of {', '.join(RECIPES)}", param_hint="--recipe"
        )
    if bool(files) == bool(simulate):
        raise click.UsageError("name the files to fit, or say how many spectra to simulate with --simulate N")
    if name is not None and not simulate:
        raise click.UsageError("--set says what to simulate; say how many with --simulate N")
    check_target(Path(out), overwrite)
    spectra = SimulatedSpectra.of_set(name or "z0", rows=(0, simulate)) if simulate else files
    progress = Progress(quiet)
    kept = Checkpoint(checkpoint, tell=progress.note) if checkpoint else None
    where = resolve_kernels(backend)
    progress.note(f"backend {where.name} ({where.device}): {where.reason}")
    begin = time.monotonic()
    model = run(
        spectra, recipe=recipe, grid=uniform(*grid) if grid else None, noise=noise,  # type: ignore[arg-type]
        noise_level=noise_level, size=size, steps=steps, references=references, seed=seed,  # type: ignore[arg-type]
        progress=progress.stage, checkpoint=kept, backend=where.name,
    )  # fmt: skip
    progress.close()
    model = model.save(out, overwrite=overwrite)
    if kept is not None:
        kept.remove()
    facts = {
        "model": str(out), "seconds": time.monotonic() - begin, "backend": model.manifest["training"]["backend"],
        **model.manifest["fit"],
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    check = facts["cross_validation"]
    click.echo(
        f"{out}: {model.manifest['recipe']}, {facts['rows']['used']:,} spectra, {facts['seconds']:.0f} s on "
        f"{facts['backend']}"
    )
    unlabelled = facts["rows"].get("unlabelled", 0)
    if facts["rows"]["left_out"] > unlabelled:
        click.echo(
            f"  {facts['rows']['left_out'] - unlabelled:,} spectra with fewer than half of their pixels good were left "
            "out"
        )
    if unlabelled:
        click.echo(f"  {unlabelled:,} spectra without labels were left out")
    for note in model.manifest["training"]["notes"]:
        click.echo(f"  note: {note}")
    click.echo(f"  {facts['solver']}")
    kernels = facts.get("heads", {}).get("kernels", "")
    if kernels.startswith("plain: "):
        click.echo(f"  note: the network was fitted without fused kernels, slower: {kernels[7:]}")
    click.echo(
        f"  rows held back: R² {check['r2']:.3f} (with true bins {check['r2_true_bins']:.3f}), "
        f"1σ holds {100 * check['coverage_68']:.1f} %, 1.96σ {100 * check['coverage_95']:.1f} %"
    )
    click.echo("  measure it on spectra it has not seen: moefast evaluate TEST… -m " + str(out))


@cli.command()
@FILES
@click.option(
    "-m", "--model", metavar="WHAT",
    help="What is measured: a model folder, an ONNX file (.onnx) with inputs flux and error and an output log_g, or a "
    "table of predictions (.h5, .parquet, .fits, .csv) with columns row and log_g; or a shipped model, z0 (the "
    "default) or survey.",
)  # fmt: skip
@click.option(
    "-o", "--out", metavar="FOLDER",
    help="Write report.json, report.html with all figures, the figures as PNG, report.txt, predictions.h5 (every star) "
    "and run.json to this folder.",
)  # fmt: skip
@click.option(
    "--pictures/--no-pictures", default=True, show_default=True, help="Draw report.html and the PNG files."
)
@click.option(
    "--noise", type=click.Choice(["auto", "draw", "none"]), default="auto", show_default=True,
    help="auto: the array noisy where a file has it, else noise from the stored seed. draw: always a draw on flux. "
    "none: flux as it is, for observed spectra.",
)  # fmt: skip
@click.option(
    "--noise-level",
    type=float,
    callback=_positive,
    default=1.0,
    show_default=True,
    help="Factor on the errors of the files.",
)
@click.option(
    "--ceiling", metavar="FILE",
    help="Ceilings of this test set, written by moefast ceiling -o; those of the reference sets come with moefast.",
)  # fmt: skip
@click.option("--name", help="Name of the test set in the report.")
@BACKEND
@OVERWRITE
@QUIET
@JSON
def evaluate(
    files: tuple[str, ...], model: str | None, out: str | None, pictures: bool, noise: str, noise_level: float,
    ceiling: str | None, name: str | None, backend: str, overwrite: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure a model on labelled spectra: R² with intervals, by SNR and bin, beside simpler fits.

    Models of others are measured by the same rules: as an ONNX file, or as a table with one prediction for each row of
    the test set. A table must have been made of the noise that is measured with: of the array noisy, which moefast
    simulate writes, or of observed flux with --noise none. A prediction that is NaN counts as the mean label.
    """
    from moefast.protocol.evaluate import check_report_folder, write_report
    from moefast.protocol.evaluate import evaluate as run
    from moefast.protocol.report_text import format_text

    if out:
        check_report_folder(out, overwrite)
    progress = Progress(quiet)
    result = run(
        files, model, noise=noise, noise_level=noise_level, ceiling=ceiling, backend=backend, name=name,  # type: ignore[arg-type]
        progress=progress.rows("evaluate"),
    )  # fmt: skip
    progress.close()
    # First what took long; a terminal may refuse the text.
    written = write_report(result, out, pictures=pictures, overwrite=overwrite) if out else []
    click.echo(json.dumps(result.report, indent=1) if as_json else format_text(result.report, result.run))
    if as_json and not quiet and result.run["spectra_per_second"]:
        click.echo(f"{result.run['spectra_per_second']:,.0f} spectra/s on {result.run['device']}", err=True)
    if out:
        click.echo("written: " + ", ".join(str(path) for path in written), err=True)


@cli.command()
@click.argument("reports", nargs=-1, required=True, metavar="REPORT…")
@click.option("-o", "--out", metavar="FILE", help="Write all numbers as JSON.")
@click.option(
    "--picture",
    metavar="FILE",
    help="Draw R² of all of them against SNR, beside the Bayes ceiling, to a PNG.",
)
@OVERWRITE
@JSON
def compare(
    reports: tuple[str, ...], out: str | None, picture: str | None, overwrite: bool, as_json: bool
) -> None:
    """Is one model better than another? Paired differences of two or more evaluations on the same stars.

    REPORT is a folder that moefast evaluate -o wrote; the first is what the others are compared with. Per group of
    stars: the difference of R² with its interval, and better, worse or no difference. Evaluations of other stars or
    other noise are refused.
    """
    from moefast.core.atomic import write_json
    from moefast.protocol.compare import compare as run
    from moefast.protocol.compare import format_text, read_evaluation

    if picture and (Path(picture).suffix.lower() != ".png" or (out and Path(out) == Path(picture))):
        raise OutputError(f"{picture}: the picture is a PNG; give it a name of its own that ends in .png")
    for target in (out, picture):
        if target and Path(target).exists() and not overwrite:
            raise OutputError(
                f"{target}: exists already; choose another name, or replace it with --overwrite"
            )
    kept = [read_evaluation(folder) for folder in reports]
    found = run(kept)
    click.echo(json.dumps(found, indent=1) if as_json else format_text(found))
    if out:
        write_json(found, out)
        click.echo(f"written: {out}", err=True)
    if picture:
        # Only now: drawing takes a second to import.
        from moefast.protocol.figures import compared

        names = [item.path.resolve().name for item in kept]
        if len(set(names)) < len(names):
            # Letters, as in the text, tell folders of the same name apart.
            names = [f"{chr(ord('A') + i)} {name}" for i, name in enumerate(names)]
        compared({name: item.report for name, item in zip(names, kept, strict=True)}, picture)
        click.echo(f"written: {picture}", err=True)


@cli.command()
@FILES
@click.option(
    "-o",
    "--out",
    metavar="FILE",
    help="Write everything, each star's numbers included, as .json or .json.gz.",
)
@click.option("--picture", type=click.Path(dir_okay=False), help="Draw the ceilings to a PNG.")
@click.option(
    "--method",
    type=click.Choice(["auto", "both", "fisher", "bayes"]),
    default="auto",
    show_default=True,
    help="fisher: bound from derivatives and errors. bayes: posterior of every star under the prior and noise that "
    "made it. auto: both for files of moefast simulate, else fisher.",
)
@click.option("--stars", type=click.IntRange(2), metavar="N", help="Use the first N spectra only.")
@click.option("--name", help="Name of the test set in the report.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the posterior samples."
)
@OVERWRITE
@QUIET
@JSON
def ceiling(
    files: tuple[str, ...], out: str | None, picture: str | None, method: str, stars: int | None, name: str | None,
    seed: int, overwrite: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """What the physics allows: R² ceilings of labelled spectra, by Fisher information and by Bayes.

    The Bayes ceiling is the R² of the exact posterior mean: no method does better on these stars. It takes 40 to 130 ms
    per star on two cores. The ceilings of the reference sets come with moefast; evaluate finds them by itself.
    """
    from moefast.ceilings import ceiling as ceilings
    from moefast.protocol.ceiling_report import figure, format_text

    for path in (out, picture):
        if path and Path(path).exists() and not overwrite:
            raise OutputError(f"{path}: exists already; choose another name, or replace it with --overwrite")
        if path and not Path(path).absolute().parent.is_dir():
            raise OutputError(f"{path}: the folder does not exist; create it first")
    progress = Progress(quiet)
    found = ceilings.compute(
        files, method=method, stars=stars, seed=seed, name=name, progress=progress.rows("ceiling"),  # type: ignore[arg-type]
    )  # fmt: skip
    progress.close()
    click.echo(json.dumps(found.summary, indent=1) if as_json else format_text(found.summary))
    if out:
        ceilings.write(found, out)
        click.echo(f"written: {out}", err=True)
    if picture:
        figure(found.summary, picture)
        click.echo(f"picture: {picture}", err=True)


@cli.command()
@click.argument("model", required=False)
@click.option(
    "-n", "--number", type=click.IntRange(2, 10_000), default=1000, show_default=True, metavar="N",
    help="Stars of each scenario.",
)  # fmt: skip
@click.option(
    "--scenario",
    "names",
    multiple=True,
    metavar="NAME",
    help="Only this one; may be repeated.  [default: all]",
)
@click.option("-o", "--out", metavar="FILE", help="Write the results with all their numbers as JSON.")
@BACKEND
@OVERWRITE
@QUIET
@JSON
def scenarios(
    model: str | None, number: int, names: tuple[str, ...], out: str | None, backend: str, overwrite: bool,
    quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """What a model says of spectra with which something is wrong, and how much of it is silently false.

    MODEL is a model folder or a shipped model. A fixed table of scenarios is made from stored seeds: another scale, a
    tilt, F_nu, a velocity that nobody knows, every kind of gap, errors that are too small, no star at all, and more. Of
    each: R², coverage, the share of spectra with a flag, and silent failures, which carry no flag and lie beyond three
    claimed errors.
    """
    from moefast.core.atomic import write_json
    from moefast.core.errors import OutputError
    from moefast.model import Model
    from moefast.protocol.scenarios import format_text, run_scenarios

    if out and Path(out).exists() and not overwrite:
        raise OutputError(f"{out}: exists already; choose another name, or replace it with --overwrite")
    progress = Progress(quiet)
    found = run_scenarios(
        Model.load(model), n=number, names=names or None, backend=backend, progress=progress.rows("scenarios")
    )
    progress.close()
    click.echo(json.dumps(found, indent=1, ensure_ascii=False) if as_json else format_text(found))
    if out:
        write_json(found, out)
        click.echo(f"written: {out}", err=True)


@cli.command()
@click.argument("reports", nargs=-1, metavar="REPORT…")
@click.option("-o", "--out", metavar="FILE", help="Write the verdicts with all their numbers as JSON.")
@OVERWRITE
@JSON
def milestones(reports: tuple[str, ...], out: str | None, overwrite: bool, as_json: bool) -> None:
    """Judge the milestones C0 to C4 by evaluations: published mark, our number, pass, fail or not run.

    REPORT is a folder that moefast evaluate -o wrote, its report.json, or a folder of such folders. Test sets are kept
    apart. What no evaluation holds is not run, never passed; without any REPORT the marks and the commands are shown.
    """
    from moefast.core.atomic import write_json
    from moefast.protocol.milestones import judge, read_reports
    from moefast.protocol.milestones_report import format_text

    if out and Path(out).exists() and not overwrite:
        raise OutputError(f"{out}: exists already; choose another name, or replace it with --overwrite")
    found = judge(read_reports(reports))
    click.echo(json.dumps(found, indent=1, ensure_ascii=False) if as_json else format_text(found))
    if out:
        write_json(found, out)
        click.echo(f"written: {out}", err=True)


@cli.command()
@click.argument("model", metavar="MODEL")
@click.option("-o", "--out", required=True, type=click.Path(dir_okay=False), help="ONNX file to write.")
@click.option("--part", default="mixture", show_default=True, help="mixture, gate, or expert-0, expert-1, …")
@click.option(
    "--half", is_flag=True, help="Products of a network in half precision, for GPUs that are faster in it."
)
@OVERWRITE
def export(model: str, out: str, part: str, half: bool, overwrite: bool) -> None:
    """Write a model folder, or a part of it, as one ONNX file, verified against the model first.

    Inputs flux and error (n, pixels) float32; outputs log_g, log_g_err, weights, expert_log_g and more. The file
    runs in plain ONNX Runtime. MODEL is a model folder, or a shipped model: z0 or survey. What
    half precision costs in R² tells: moefast evaluate TEST -m OUT
    """
    from moefast.export import export_model
    from moefast.model import Model

    if Path(out).exists() and not overwrite:
        raise OutputError(f"{out}: exists already; choose another name, or replace it with --overwrite")
    chosen = Model.load(model)
    parts = ["mixture", "gate", *(f"expert-{k}" for k in range(chosen.mixture.n_experts))]
    if part not in parts:
        raise click.BadParameter(f"{part!r} is none of {', '.join(parts)}", param_hint="--part")
    differences = export_model(
        chosen.mixture, out, part=part, metadata={"recipe": chosen.manifest["recipe"]}, half=half
    )
    size = Path(out).stat().st_size / 1e6
    largest = ", ".join(
        f"{name} {value:.1e}" for name, value in differences.items() if isinstance(value, float)
    )
    click.echo(f"{out}: {part}, {size:.1f} MB; largest difference from the model in float64: {largest}")


@cli.command()
@FILES
@MODEL
@click.option("-o", "--out", metavar="TABLE",
              help="Table to write: .h5, .parquet or .fits.  [default: <FILE>.log_g.h5 in this folder; with --shard "
              "<FILE>.log_g.i-of-N.h5]")  # fmt: skip
@click.option("--array", type=click.Choice(["auto", "flux", "noisy"]), default="auto", show_default=True,
              help="Array to score; auto is noisy where a file has it.")  # fmt: skip
@BACKEND
@click.option(
    "--rows", callback=_rows, metavar="FIRST:LAST", help="Score these rows only, LAST not included."
)
@click.option("--limit", type=click.IntRange(1), help="Score at most so many rows.")
@click.option("--shard", callback=_shard, metavar="i/N", help="Score part i (from 0) of N equal parts.")
@click.option("--velocity", metavar="V",
              help="Velocities to remove: a number [km/s], a column of the spectra, or a table that is joined by "
              "identifiers (pfsStarCatalog, pfsStar files, redrock, rvspecfit, or any with v_los).")  # fmt: skip
@click.option("--wave-medium", "medium", type=click.Choice(["auto", "vacuum", "air"]), default="auto",
              show_default=True, help="What wavelengths are in; auto is what the survey uses.")  # fmt: skip
@click.option(
    "--select", metavar="EXPRESSION", help='Rows to predict, such as "targetType == 1 and nVisit > 2".'
)
@click.option(
    "--keep", callback=_names, metavar="A,B,…", help="Columns of the input to keep besides identifiers."
)
@OVERWRITE
@QUIET
@JSON
def predict(
    files: tuple[str, ...], model: str | None, out: str | None, array: str, backend: str,
    rows: tuple[int, int] | None, limit: int | None, shard: tuple[int, int] | None,
    velocity: str | None, medium: str, select: str | None, keep: tuple[str, ...],
    overwrite: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Predict log g for every spectrum and write a table: one row per spectrum, in order.

    FILE is an HDF5 file of the PFS simulator, a pfsCalibrated, pfsCoadd, pfsSingle, pfsObject or pfsStar, or a DESI
    coadd or spectra file, recognised by its content; a folder of them, or a pattern. Units, masks and grids are the
    file's (docs/formats.md). Spectra are taken to be at rest unless --velocity says how they move.

    Columns: row, identifiers of the input, log_g [dex], log_g_err (calibrated 1σ), log_g_err_raw (pixel noise
    alone), weight_k (gate), expert, snr_norm, snr_median, chi2, flag; of a posterior also T_eff [K], M_H, a_M, C_M
    [dex], each with _err and _corr (correlation with log_g), and scale. Spectra without data get NaN and a flag,
    never a missing row. If the files have labels, R² is printed.
    """
    from moefast.scoring import predict as run

    # Parts that run at the same time must not write to one name.
    part = f".{shard[0]}-of-{shard[1]}" if shard else ""
    # A pattern has no name to take over; a file may be called like one.
    is_pattern = glob.has_magic(files[0]) and not os.path.lexists(files[0])
    stem = "spectra" if is_pattern else Path(os.path.abspath(files[0])).stem
    target = Path(out) if out else Path(f"{stem}.log_g{part}.h5")
    if overwrite and not out:
        _check_same_inputs(target, files)
    progress = Progress(quiet or as_json)
    summary = run(
        files, model, target, array=array, backend=backend, rows=rows, limit=limit,  # type: ignore[arg-type]
        shard=shard, overwrite=overwrite, velocity=velocity, medium=medium, select=select,  # type: ignore[arg-type]
        keep=keep, progress=progress.rows("predict"),
    )  # fmt: skip
    progress.close()
    facts = {
        "table": str(target), "rows": summary.n_rows, "seconds": summary.seconds,
        "spectra_per_second": summary.spectra_per_second, "r2": summary.r2, "array": summary.array,
        "backend": summary.backend, "device": summary.device, "reason": summary.reason,
        "flags": summary.flags, "notes": summary.notes,
        "failures": [str(failure.error) for failure in summary.failures],
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        click.echo(f"{target}: {summary.n_rows:,} spectra, array {summary.array}")
        speed = f"{summary.spectra_per_second:,.0f} spectra/s"
        nothing = summary.flags.get("NO_DATA", 0) == summary.n_rows
        none = "nothing to measure R² on" if nothing else "no labels, so no R²"
        r2 = none if summary.r2 is None else f"R² {summary.r2:.3f}"
        click.echo(f"  {speed} on {summary.backend} ({summary.device}), {r2}")
        click.echo(f"  backend {summary.backend}: {summary.reason}")
        if summary.flags:
            click.echo("  flags: " + ", ".join(f"{name} {count:,}" for name, count in summary.flags.items()))
        for note in summary.notes:
            click.echo(f"  note: {note}")
    _tell_failures(summary.failures)


def _check_same_inputs(target: Path, files: tuple[str, ...]) -> None:
    """Refuse to replace a table of other spectra under the default name: files of spectra are often called alike."""
    from moefast.spectra.files import find_files
    from moefast.spectra.tables import read_attributes

    if not target.is_file():
        return
    inputs = read_attributes(target).get("inputs")
    if not isinstance(inputs, list) or not {os.path.realpath(p) for p in inputs} <= {
        os.path.realpath(p) for p in find_files(files)
    }:
        raise OutputError(f"{target}: is the table of other spectra; name another one with -o")


def _sizes(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in (value or "").replace("_", "").split(",") if part.strip())
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers, for example 10000,100000") from None
    if any(size < 1 for size in sizes):
        raise click.BadParameter(f"{value!r}: every size must be positive")
    return sizes


@cli.command()
@click.option(
    "--task", type=click.Choice(["score", "fit", "all"]), default="score", show_default=True,
    help="score: flux and error to log g. fit: nine ridges, a path of penalties, hold-out errors; takes minutes.",
)  # fmt: skip
@click.option("--engines", callback=_names, metavar="A,B,…", help="Engines by name; all if absent.")
@click.option(
    "--list", "as_list", is_flag=True, help="List the engines, and why one cannot be used; then stop."
)
@click.option("-n", "--number", type=click.IntRange(1), default=20_000, show_default=True, help="Spectra.")
@click.option(
    "--samples", type=click.IntRange(1), default=5, show_default=True, help="Timed runs of each engine."
)
@click.option(
    "--growth", callback=_sizes, metavar="N,N,…",
    help="Sizes for growth curves, such as 10000,100000,1000000; those that do not fit are extrapolated and say so.",
)  # fmt: skip
@MODEL
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="JSON to write, raw samples included.")
@click.option("--picture", type=click.Path(dir_okay=False), help="PNG to draw.")
@click.option(
    "--limit", type=float, callback=_positive, default=300.0, show_default=True, metavar="SECONDS",
    help="Give an engine up after so long.",
)  # fmt: skip
@click.option(
    "--scratch", type=click.Path(file_okay=False, exists=True), metavar="FOLDER",
    help="Folder for the simulated spectra, 33 kB each; choose the disk whose speed matters.",
)  # fmt: skip
@OVERWRITE
@QUIET
@JSON
def bench(
    task: str, engines: tuple[str, ...], as_list: bool, number: int, samples: int, growth: tuple[int, ...],
    model: str | None, out: str | None, picture: str | None, limit: float, scratch: str | None, overwrite: bool,
    quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure throughput next to R²: our engines and other people's, on the same spectra, giving the same answer.

    Spectra are simulated. Each engine has a process of its own and is compared with a float64 reference before it is
    timed; one that differs is reported and the exit code is 9. Shares are those of floors measured in the same run:
    memory bandwidth, BLAS, reading the file. An engine whose package or device is missing is listed with the reason.

    \b
        moefast bench
        moefast bench --task fit -n 20000 --engines moefast,sklearn,himalaya
        moefast bench --growth 1000,10000,100000 -o result.json --picture bench.png
    """
    from moefast.benchmarks.adapter import TASKS, why_not
    from moefast.benchmarks.engines import choose
    from moefast.benchmarks.report import format_text
    from moefast.benchmarks.report import picture as draw
    from moefast.benchmarks.run import benchmark, wrong_answers
    from moefast.core.atomic import partial_path, write_atomically
    from moefast.core.errors import BenchmarkError

    tasks = TASKS if task == "all" else (task,)
    chosen = choose(tasks, engines)
    if as_list:
        facts = [
            {"task": e.task, "engine": e.name, "title": e.title, "unavailable": why_not(e)} for e in chosen
        ]
        if as_json:
            click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
            return
        for e in facts:
            click.echo(f"{e['task']:<6} {e['engine']:<20} {e['title']:<36} {e['unavailable']}".rstrip())
        return
    for path in (out, picture):
        if path:
            # Known before minutes of work, not after.
            partial_path(Path(path), overwrite=overwrite)
    result = benchmark(
        tasks=tasks, engines=engines, n=number, samples=samples, growth=growth, model_path=model, limit=limit,
        scratch=scratch, say=(lambda _: None) if quiet else (lambda text: click.echo(text, err=True)),
    )  # fmt: skip
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    if out:
        write_atomically(out, (text + "\n").encode())
    if picture:
        write_atomically(picture, draw(result))
    click.echo(text if as_json else format_text(result))
    if wrong := wrong_answers(result):
        raise BenchmarkError("; ".join(wrong))


@cli.command()
@JSON
def doctor(as_json: bool) -> None:
    """Say what this machine has, what moefast will use, and why not more."""
    from moefast.doctor import examine, format_text

    facts = examine()
    click.echo(json.dumps(facts, indent=1) if as_json else format_text(facts))
    if facts["problems"]:
        sys.exit(1)


def _tell_failures(failures: Any) -> None:
    """Name what could not be read and leave with the exit code of the first failure."""
    for failure in failures:
        click.echo(f"moefast: error: {failure.error}", err=True)
    if failures:
        sys.exit(failures[0].error.exit_code)


class Terminated(BaseException):
    """Somebody sent SIGTERM; everything is cleared up on the way out."""


def _terminate(*_: Any) -> None:
    # A second one ends at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated


def _not_lost(what: Any, told: Callable[[Any], Any] = sys.unraisablehook) -> None:
    """Repeat an interrupt that came while an object was freed, where Python prints and forgets it."""
    if issubclass(what.exc_type, KeyboardInterrupt | Terminated):
        number = signal.SIGINT if issubclass(what.exc_type, KeyboardInterrupt) else signal.SIGTERM
        if number == signal.SIGTERM:
            signal.signal(number, _terminate)
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
    else:
        told(what)


def main() -> None:
    """Entry point of the `moefast` command."""
    # Numba's threads must not wait actively while BLAS works, on the same cores; read when Numba starts them.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        # Terminals of other alphabets show what they can; no result is lost over a letter.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _not_lost
    if hasattr(signal, "SIGPIPE"):
        # `moefast inspect … | head` must end quietly.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    cli()


if __name__ == "__main__":
    main()
