"""The command `moefast fit`."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from moefast.cli.messages import tell_failures, tell_result
from moefast.cli.options import (
    BACKEND,
    CONFIG,
    DEVICE,
    EXPERT,
    FAMILIES,
    FOCUS,
    JSON,
    LIKE,
    NOISE_LEVEL,
    OF_TASK,
    OVERWRITE,
    RESOLUTION,
    SCHEDULER,
    STRONG,
    shard_of,
    talk,
)
from moefast.cli.swapped import swapped_told
from moefast.core.progress import ProgressLine
from moefast.core.text import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from moefast.checkpoint import Checkpoint
    from moefast.cluster.fit_parts import FitPlan
    from moefast.model import Model
    from moefast.recipes import PreparedFit

__all__ = ["fit", "tell_model"]

WRITING = "writing the model"
"""Last stage of the command: an ONNX file that is compared with the model before it is kept."""


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


@click.command(short_help="Fit a model on labelled spectra.")
@click.argument("files", nargs=-1, metavar="[FILE…]")
@click.option("-o", "--out", required=True, metavar="FOLDER",
              help="Model folder to write; with --shard a file of statistics, PART.npz.")  # fmt: skip
@click.option(
    "--simulate", type=click.IntRange(1), metavar="N",
    help="Fit N spectra that are simulated as they are needed, with no file between; instead of FILE.",
)  # fmt: skip
@click.option(
    "--set", "name", metavar="NAME",
    help="Reference set to simulate, part train.  [default: z0, with --like library]",
)  # fmt: skip
@LIKE
@RESOLUTION
@click.option(
    "--recipe",
    default="phys-moe",
    show_default=True,
    help="Which model: see above.",
)
@FAMILIES
@FOCUS
@STRONG
@EXPERT
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
@NOISE_LEVEL
@click.option(
    "--size", type=click.Choice(["small", "base"]), default="small", show_default=True,
    help="Size of a recipe's network: small is fitted in ten minutes on a laptop, base needs a GPU.",
)  # fmt: skip
@click.option(
    "--steps",
    type=click.IntRange(1),
    metavar="N",
    help="Number of training steps of the network; the default depends on --size.",
)
@click.option("--references/--no-references", default=True, show_default=True,
              help="Also fit the published-style ridge to compare with (doubles the first pass).")  # fmt: skip
@click.option(
    "--seed",
    type=click.IntRange(0),
    metavar="N",
    default=0,
    show_default=True,
    help="Seed of folds, draws of noise and networks.",
)
@click.option(
    "--checkpoint", metavar="FOLDER",
    help="Keep the statistics here every two minutes (up to 3 GB with nine bins, twice that while they are replaced): "
    "the same command goes on where a killed one stood, to the same model. Cleared once the model is written.",
)  # fmt: skip
@click.option("--shard", callback=shard_of, metavar="[i/N]", is_flag=False, flag_value=OF_TASK,
              help="Gather the statistics of part i of N (from 0) and write them to the file -o; moefast merge "
              "finishes the fit. Without a value: the part of this task of a SLURM job array.")  # fmt: skip
@SCHEDULER
@BACKEND
@DEVICE
@CONFIG
@OVERWRITE
@talk
@JSON
@swapped_told
def fit(
    files: tuple[str, ...], out: str, simulate: int | None, name: str | None, like: tuple[str, ...],
    resolution: str | None, recipe: str, families: tuple[str, ...] | None, focus: str | None, strong: str | None,
    grid: tuple[int, int] | None, noise: str, noise_level: float, size: str, steps: int | None,
    references: bool, seed: int, checkpoint: str | None, shard: tuple[int, int] | None, scheduler: str | None,
    backend: str, overwrite: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Fit a model on labelled spectra (T_eff, log_g, M_H in dataset/params) and write it to a folder.

    \b
        moefast fit train.h5 -o model/
        moefast fit --simulate 200000 --set library --recipe posterior -o model/
        moefast fit train/ -o model/ --checkpoint fit-so-far/
        moefast fit --simulate 20000 --like coadd.fits --recipe posterior -o model/
        moefast fit train.h5 --expert mine.py --families linear,mine -o model/

    \b
    Recipes:
        posterior        posterior over clouds of templates at the noise and
                         gaps of each star; scale, slope and sky residuals of
                         the flux are free. Of 50 000 spectra or more a
                         network learns what clouds leave out of log g. Needs
                         clean spectra
        posterior-calibrated
                         the same where the calibration can be trusted: the
                         scale is free, the slope is not
        posterior-linear linear experts for bins of T_eff, [M/H] and log g at
                         the noise and gaps of each star; nuisances as for
                         posterior
        template         posterior mean over templates, at the mean noise of
                         the training set; needs clean spectra
        phys-moe         nine linear experts behind a gate; any spectra
        hybrid-moe       the best of linear, template, trees in each bin, or
                         of --families
        hybrid-regression
                         the same experts, with a gate by regression instead
                         of one by evidence
        hybrid-metal-poor
                         hybrid-moe, and trees on line indices to choose from
                         where stars are metal-poor (--focus metal-poor)
        residual-moe     heads, or another model (--strong), and what it gets
                         wrong on average learnt beside it, where that helps
                         by more than its standard error
        residual-metal-poor
                         the same, learnt from metal-poor and faint stars
                         alone (--focus metal-poor)
        conditional-moe  phys-moe, its gate with a second part for faint stars
        dual-moe         phys-moe, its gate also on statistics of the errors
        heads            a network on components with nine heads and its gate;
                         fitted by torch, scored without it
        heads-cnn        the same, convolutions on the flux
        heads-vit        the same, a vision transformer on the flux
        heads-single     the network of heads with one head, to compare with
        heads-vit-single that of heads-vit with one head, to compare with
        snr-moe          linear experts for four bins of signal-to-noise
        global-ridge     one linear expert
        published-ridge  one ridge as published, to compare with
    """
    from moefast.backend import resolve_kernels
    from moefast.checkpoint import Checkpoint
    from moefast.cluster.fit_parts import FitPlan, TrainingSpectra
    from moefast.core.grids import uniform
    from moefast.fitting import expected_stages
    from moefast.recipes import RECIPES, focused, options_of
    from moefast.recipes import fit as run
    from moefast.spectra import open_spectra

    if recipe not in RECIPES:
        raise click.BadParameter(
            f"{recipe!r} is unknown; choose one of {', '.join(RECIPES)}", param_hint="--recipe"
        )
    recipe = focused(recipe, focus)
    _refuse_unused(recipe, strong)
    _check_request(
        out, overwrite, files=files, simulate=simulate, name=name, like=like, resolution=resolution, shard=shard,
        scheduler=scheduler, checkpoint=checkpoint,
    )  # fmt: skip
    with ProgressLine(quiet) as progress:
        # A posterior takes templates without gaps, and has errors calibrated over those of the files.
        whole = bool(like) and RECIPES[recipe].options.get("families") == ("posterior",)
        progress.doing("fit: reading")
        source = TrainingSpectra(simulate=simulate, name=name, like=like, resolution=resolution, whole=whole)
        observed = source.observed()
        spectra = source.open(observed) if simulate else open_spectra(files)
        if observed is not None:
            progress.note(str(observed))
        where = resolve_kernels(backend)
        progress.note(f"backend {where.name} ({where.device}): {where.reason}")
        begin = time.monotonic()
        arguments: dict[str, Any] = {
            "recipe": recipe, "families": families, "strong": strong, "grid": uniform(*grid) if grid else None,
            "noise": noise, "noise_level": noise_level, "size": size, "steps": steps, "references": references,
            "seed": seed,
        }  # fmt: skip
        kept = Checkpoint(checkpoint, tell=progress.note) if checkpoint else None
        progress.expect(expected_stages(options_of(**arguments), spectra.n_rows) | {WRITING: 3.0})

        def save(model: Model) -> Model:
            progress.doing(WRITING)
            return model.save(out, overwrite=overwrite)

        if shard is not None or scheduler is not None:
            plan = FitPlan(source if simulate else TrainingSpectra.of_files(files), arguments)
            prepared = plan.prepare(spectra if simulate else None, progress.tell)
        if shard is not None:
            _gather(
                plan, prepared, shard, out, kept, where.name, progress, begin, quiet=quiet, as_json=as_json
            )
            return
        if scheduler is not None:
            model = _on_cluster(scheduler, plan, prepared, out, where.name, progress, save)
        else:
            model = run(
                spectra, **arguments, progress=progress.stage, checkpoint=kept, backend=where.name,
                tell=progress.tell,
            )  # fmt: skip
            model = save(model)
    if kept is not None:
        kept.remove()
    facts = {
        "model": str(out), "seconds": time.monotonic() - begin, "backend": model.manifest["training"]["backend"],
        **model.manifest["fit"],
    }  # fmt: skip
    if observed is not None:
        facts["left_out"] = [str(failure.error) for failure in observed.failures]
    tell_model(facts, model, out, quiet=quiet, as_json=as_json)
    if observed is not None and not as_json:
        tell_failures(observed.failures)


def _refuse_unused(recipe: str, strong: str | None) -> None:
    """Refuse options of networks with recipes that have none: they would change nothing."""
    from moefast.recipes import RECIPES

    if "trunk" in RECIPES[recipe].options or (strong is not None and "trunk" in RECIPES[strong].options):
        return
    source = click.get_current_context().get_parameter_source
    for name in ("size", "steps"):
        if source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} is that of a network, and {recipe} has none")


def _check_request(
    out: str, overwrite: bool, *, files: tuple[str, ...], simulate: int | None, name: str | None,
    like: tuple[str, ...], resolution: str | None, shard: tuple[int, int] | None, scheduler: str | None,
    checkpoint: str | None,
) -> None:  # fmt: skip
    """Refuse arguments that do not go together, and a target that is taken, before anything is read."""
    from moefast.core.atomic import refuse_taken
    from moefast.model import check_target
    from moefast.simulate.sets import REFERENCE_SETS, TRAINING_SETS

    if bool(files) == bool(simulate):
        raise click.UsageError("name the files to fit, or say how many spectra to simulate with --simulate N")
    if name is not None and name not in REFERENCE_SETS | TRAINING_SETS:
        known = ", ".join(REFERENCE_SETS | TRAINING_SETS)
        raise click.BadParameter(f"{name!r} is unknown; choose one of {known}", param_hint="--set")
    if name is not None and not simulate:
        raise click.UsageError("--set says what to simulate; say how many with --simulate N")
    if (like or resolution is not None) and not simulate:
        raise click.UsageError("--like and --resolution say what to simulate; say how many with --simulate N")
    if resolution is not None and not like:
        raise click.UsageError("--resolution is that of the spectra which --like names")
    if scheduler is not None and (shard or checkpoint):
        raise click.UsageError(
            "--scheduler has parts and checkpoints of its own: leave out --shard and --checkpoint"
        )
    if shard is None:
        check_target(Path(out), overwrite)
        return
    if Path(out).suffix != ".npz":
        raise click.UsageError("--shard writes a file of statistics: -o PART.npz")
    refuse_taken(out, overwrite=overwrite)


def _gather(
    plan: FitPlan, prepared: PreparedFit, shard: tuple[int, int], out: str, kept: Checkpoint | None, backend: str,
    progress: ProgressLine, begin: float, *, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """The statistics of one part."""
    from moefast.cluster.fit_parts import gather_to_file, only_one_first_pass
    from moefast.fitting.statistics import rows_of_part

    only_one_first_pass(prepared)
    rows = rows_of_part(prepared.spectra.n_rows, *shard)
    gather_to_file(
        out, plan, prepared, rows, shard=shard, backend="cuda" if backend == "cuda" else "cpu",
        progress=progress.stage, checkpoint=kept,
    )  # fmt: skip
    progress.close()
    if kept is not None:
        kept.remove()
    facts = {
        "statistics": out, "rows": list(rows), "shard": list(shard), "of_rows": prepared.spectra.n_rows,
        "seconds": time.monotonic() - begin, "backend": backend,
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    tell_result(
        f"{out}: statistics of rows {rows[0]}:{rows[1]} of {prepared.spectra.n_rows:,}, part {shard[0]}/{shard[1]}; "
        "moefast merge PART… -o FOLDER finishes the fit",
        quiet=quiet,
    )


def _on_cluster(
    scheduler: str, plan: FitPlan, prepared: PreparedFit, out: str, backend: str, progress: ProgressLine,
    save: Callable[[Model], Model],
) -> Model:  # fmt: skip
    """The same model by the workers of a cluster."""
    from moefast.cli.spread import connected
    from moefast.cluster.fit_on_workers import fit_on

    with connected(scheduler, progress) as (client, _):
        return fit_on(
            client, plan, prepared, out, backend="cuda" if backend == "cuda" else "cpu", save=save,
            progress=progress.stage, tell=progress.tell,
        )  # fmt: skip


def tell_model(facts: dict[str, Any], model: Model, out: str, *, quiet: bool, as_json: bool) -> None:
    """Say what was fitted."""
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    check = facts["cross_validation"]
    say = partial(tell_result, quiet=quiet)
    say(
        f"{out}: {model.manifest['recipe']}, {counted(facts['rows']['used'], 'spectrum')}, {facts['seconds']:.0f} s on "
        f"{facts['backend']}"
    )
    unlabelled = facts["rows"].get("unlabelled", 0)
    if facts["rows"]["left_out"] > unlabelled:
        n_out = facts["rows"]["left_out"] - unlabelled
        say(f"  left out: {counted(n_out, 'spectrum')} with fewer than half of the pixels good")
    if unlabelled:
        say(f"  left out: {counted(unlabelled, 'spectrum')} without labels")
    for note in model.manifest["training"]["notes"]:
        say(f"  note: {note}")
    say(f"  {facts['solver']}")
    if "calibrated_on_cpu" in facts:
        say(f"  note: posteriors of the sample were computed on the CPU: {facts['calibrated_on_cpu']}")
    kernels = facts.get("heads", {}).get("kernels", "")
    if kernels.startswith("plain: "):
        say(f"  note: the network was fitted without fused kernels, slower: {kernels[7:]}")
    if learnt := facts.get("correction"):
        say(f"  {_correction_in_words(learnt)}")
    say(
        f"  rows held back: R² {check['r2']:.3f} (with true bins {check['r2_true_bins']:.3f}), "
        f"1σ holds {100 * check['coverage_68']:.1f} %, 1.96σ {100 * check['coverage_95']:.1f} %"
    )
    say("  measure it on spectra it has not seen: moefast evaluate TEST… -m " + str(out))


def _correction_in_words(learnt: dict[str, Any]) -> str:
    """What became of the network that corrects log g; gains are those on stars that only measure."""
    gain = f"R² {learnt['measured_gain_r2']:+.4f} ± {learnt['measured_gain_r2_error']:.4f}"
    if learnt["kept"]:
        return (
            f"a network corrects log g, learnt from {learnt['draws']:,} noisy draws of {learnt['stars']:,} stars: "
            f"{gain} on stars that it has not seen"
        )
    return f"a network to correct log g was tried, does not help ({gain}), and is left out"
