"""Arguments and options that several commands share, and how their values are read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import click

from moefast.cli.messages import start_talking

__all__ = [
    "BACKEND",
    "CONFIG",
    "DEVICE",
    "EXPERT",
    "FAMILIES",
    "FILES",
    "FOCUS",
    "JSON",
    "LIKE",
    "MEDIUM",
    "MODEL",
    "NOISE_LEVEL",
    "OF_TASK",
    "OVERWRITE",
    "RESOLUTION",
    "SCHEDULER",
    "STRONG",
    "TELLURIC",
    "VELOCITY",
    "VELOCITY_RANGE",
    "names",
    "positive",
    "rows",
    "shard_of",
    "talk",
]


def rows(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """First row and the one after the last of FIRST:LAST."""
    if value is None:
        return None
    try:
        first, last = (int(part) for part in value.split(":"))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not FIRST:LAST, for example 0:1000") from None
    if not 0 <= first < last:
        raise click.BadParameter(f"{value!r}: FIRST counts from 0 and must be less than LAST")
    return first, last


OF_TASK = "of this task"
"""What `--shard` alone stands for."""


def shard_of(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Part i of N, or what the batch system says of this task."""
    if value is None:
        return None
    if value == OF_TASK:
        from moefast.cluster.job_array import shard_of_task

        return shard_of_task(os.environ)
    try:
        index, count = (int(part) for part in value.split("/"))
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not i/N, for example 0/8; without a value --shard comes last, or before another option"
        ) from None
    if not 0 <= index < count:
        raise click.BadParameter(f"{value!r}: i counts from 0 and must be less than N")
    return index, count


def _use_device(_: click.Context, __: click.Parameter, value: int | None) -> None:
    """Choose the GPU before anything starts the driver."""
    if value is not None:
        # Only now: help needs no library of its own.
        from moefast.backend import use_device

        use_device(value)


def names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Names of a list with commas."""
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


def _import_experts(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> None:
    """Import families of one's own before anything asks for them by name."""
    from moefast.core.errors import InputError

    for source in value:
        # Only now: help needs no library of its own.
        from moefast.experts.protocol import import_families

        try:
            import_families(source)
        except InputError as error:
            raise click.BadParameter(str(error)) from error


def _families(ctx: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Names of families of experts that are known here; None if the option is absent."""
    if value is None:
        return None
    from moefast.experts.protocol import fitted_in_bins
    from moefast.fitting.options import WHOLE

    known = (*WHOLE, *sorted(fitted_in_bins()))
    chosen = names(ctx, option, value)
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        found = ", ".join(map(repr, unknown)) or "nothing"
        raise click.BadParameter(
            f"found {found}; known families are {', '.join(known)}. A family of your own is known once --expert names "
            "its file, or its package is installed"
        )
    return chosen


def positive(_: click.Context, __: click.Parameter, value: float) -> float:
    """A finite number above 0."""
    if not 0 < value < math.inf:
        raise click.BadParameter(f"{value:g} is not a positive number")
    return value


def _settings(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    """Take the command's settings from a file; what the command line says counts more."""
    if value is None:
        return
    import tomllib

    try:
        with open(value, "rb") as file:
            document = tomllib.load(file)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{value} cannot be read as TOML: {error}") from error
    command = str(ctx.command.name)
    settings = document.get(command, {})
    if not isinstance(settings, dict) or not settings:
        found = ", ".join(f"[{name}]" for name in document) or "nothing"
        raise click.BadParameter(f"{value} has no settings for [{command}]; it has {found}")
    params = {_said(one): one for one in ctx.command.params if one.name not in {"config", "help"}}
    defaults: dict[str, Any] = {}
    for name, setting in settings.items():
        if name not in params:
            close = get_close_matches(name, params, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(params))}"
            raise click.BadParameter(f"{value}, [{command}]: {name!r} is no option of this command{hint}")
        one = params[name]
        many = isinstance(setting, list) and not (
            one.multiple if isinstance(one, click.Option) else one.nargs != 1
        )
        # Options with commas take TOML lists as well.
        defaults[str(one.name)] = ",".join(map(str, setting)) if many and one.nargs == 1 else setting
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def _said(param: click.Parameter) -> str:
    """Name of an option in a file of settings: as on the command line, without the dashes."""
    if isinstance(param, click.Option):
        return max(param.opts, key=len).lstrip("-")
    return str(param.name)


CONFIG = click.option(
    "--config",
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_settings,
    help='TOML file with settings of this command, such as [predict] with model = "z0"; options given on the command '
    "line count more.",
)


FILES = click.argument("files", nargs=-1, required=True, metavar="FILE…")


MODEL = click.option(
    "-m",
    "--model",
    metavar="MODEL",
    help="Model folder, or a shipped model: observed (gaps, scale, slope, sky residuals and 5 km/s are free; the "
    "default), z0 (stars at rest whose flux calibration can be trusted) or survey (with unknown velocities).",
)


BACKEND = click.option(
    "--backend",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute. auto takes a GPU if there is a usable one and says so; cuda fails without one.",
)


DEVICE = click.option(
    "--device",
    type=click.IntRange(0),
    metavar="N",
    expose_value=False,
    callback=_use_device,
    help="Number of the GPU, from 0, among those that moefast doctor lists; the environment variable "
    "CUDA_VISIBLE_DEVICES (such as 2,3) says which these are, and in which order. A process works on one GPU: give "
    "each a process of its own, for instance with --shard of predict.  [default: 0]",
)


JSON = click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")


_LOG = "moefast.log"


def _keep_log(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    ctx.meta[_LOG] = value


def _talk(ctx: click.Context, _: click.Parameter, verbose: bool) -> None:
    """Begin to show and keep what is logged: -q and --log were read before."""
    quiet, log = ctx.params.get("quiet", False), ctx.meta.get(_LOG)
    if quiet and verbose:
        raise click.UsageError("-q says nothing and -v says more; give one of them")
    try:
        start_talking(ctx, quiet=quiet, verbose=verbose, log=log)
    except OSError as error:
        raise click.BadParameter(
            f"{log}: cannot be written ({error.strerror})", param_hint="--log"
        ) from error


def talk(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options -q (passed on as `quiet`), -v and --log."""
    for option in (
        click.option(
            "--log", metavar="FILE", is_eager=True, expose_value=False, callback=_keep_log,
            help="Append what -v says to a file, with the time of each line.",
        ),
        click.option(
            "-v", "--verbose", is_flag=True, expose_value=False, callback=_talk,
            help="Say more: what is read, chosen and decided, and how long each stage takes.",
        ),
        click.option(
            "-q", "--quiet", is_flag=True, is_eager=True,
            help="Say nothing but errors, and the result if it is not written to a file.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


LIKE = click.option(
    "--like", multiple=True, metavar="FILE",
    help="Spectra of your own, of any layout that moefast reads (file, folder or pattern; may be repeated): simulated "
    "stars get their wave grid, resolution, noise, gaps and signal-to-noise ratios.",
)  # fmt: skip


RESOLUTION = click.option(
    "--resolution", metavar="R",
    help="With --like: resolving power such as 4500, or FWHM in Å such as 1.8A; not sharper than the emulator's 5000.  "
    "[default: what the files say, else the emulator's]",
)  # fmt: skip


NOISE_LEVEL = click.option(
    "--noise-level",
    type=float,
    callback=positive,
    default=1.0,
    show_default=True,
    help="Factor on the errors of the files.",
)


VELOCITY = click.option(
    "--velocity",
    metavar="V",
    help="Velocities to remove: a number [km/s], a column of the spectra, or a table that is joined by identifiers "
    "(pfsStarCatalog, pfsStar files, redrock, rvspecfit, or any with v_los); or fit: one is fitted to each spectrum.  "
    "[default: fit where files are of surveys and the model is a posterior, else 0]",
)
VELOCITY_RANGE = click.option(
    "--velocity-range", type=click.FloatRange(min=0, min_open=True), default=500.0, show_default=True, metavar="KM/S",
    help="Fitted velocities lie within so many km/s of 0.",
)  # fmt: skip


MEDIUM = click.option(
    "--wave-medium",
    "medium",
    type=click.Choice(["auto", "vacuum", "air"]),
    default="auto",
    show_default=True,
    help="What wavelengths are in; auto is what the survey uses.",
)


TELLURIC = click.option(
    "--telluric",
    type=click.Choice(["auto", "mask", "keep"]),
    default="auto",
    show_default=True,
    help="Whether pixels where the Earth's atmosphere absorbs count as bad; auto says so of spectra of surveys, not of "
    "the simulator's.",
)


EXPERT = click.option(
    "--expert", multiple=True, is_eager=True, expose_value=False, callback=_import_experts, metavar="FILE.py|MODULE",
    help="Python file, or module, with experts of your own (moefast.expert), which is run to import them; may be "
    "repeated. Not needed for packages with an entry point moefast.experts.",
)  # fmt: skip


FAMILIES = click.option(
    "--families", callback=_families, metavar="A,B,…",
    help="Families of experts of which each bin keeps the best, instead of those of the recipe: linear with any of "
    "template, trees, trees-flux, cnn, whitened and your own (--expert). moefast doctor lists what is known here.",
)  # fmt: skip


FOCUS = click.option(
    "--focus", type=click.Choice(["metal-poor"]),
    help="With hybrid-moe or residual-moe: the recipe with more for these stars, hybrid-metal-poor or "
    "residual-metal-poor.",
)  # fmt: skip
STRONG = click.option(
    "--strong", type=click.Choice(["template", "heads", "heads-cnn", "heads-vit"]),
    help="Model whose residuals are learnt.  [default: heads]",
)  # fmt: skip
SCHEDULER = click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Work on a Dask cluster with its scheduler at this address, such as tcp://host:8786, or on N workers of this "
    "machine: local:N.",
)


OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
