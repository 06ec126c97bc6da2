"""Arguments in each other's place: a model where spectra are expected, spectra or a table where a model is."""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import click

from moefast.core.errors import InputError, ModelError

__all__ = ["swapped_told"]

Kind = Literal["model", "table", "spectra", ""]


def swapped_told(command: Callable[..., Any]) -> Callable[..., Any]:
    """If a command cannot use its `files`, those to be `like`, or its `model`, say so where they are swapped.

    They are opened only once something is wrong with them, so that a command that is right loses no time.
    """

    @functools.wraps(command)
    def told(*args: Any, **kwargs: Any) -> Any:
        files = [*kwargs.get("files", ()), *kwargs.get("like", ())]
        try:
            # Of several files those that cannot be used are left out, but a model among them is a slip.
            if any(_is_shipped(file) for file in files):
                raise InputError("spectra are expected")
            return command(*args, **kwargs)
        except (InputError, ModelError) as error:
            words = words_of_swapped(click.get_current_context(), files, kwargs.get("model"))
            if words is None:
                raise
            raise type(error)(words) from error

    return told


def words_of_swapped(context: click.Context, files: Sequence[str], model: str | None) -> str | None:
    """What is in the wrong place and what to write instead; None if nothing is.

    Parameters
    ----------
    context : click.Context
        Of the command.
    files : sequence of str
        What was named as spectra.
    model : str, optional
        What was named as the model.
    """
    command = str(context.info_name)
    kinds = {file: _kind(file) for file in files}
    models, tables = ([file for file in kinds if kinds[file] == kind] for kind in ("model", "table"))
    kind_of_model = _kind(model) if model else ""
    spectra_as_model = [model] if model and kind_of_model == "spectra" else []
    takes_model = any("-m" in param.opts for param in context.command.params)
    if models:
        spectra = [file for file in kinds if file not in models] + spectra_as_model
        remedy = (
            f"the model comes after -m, spectra without it: {_line(command, spectra, models[0])}"
            if takes_model
            else "name files of spectra"
        )
        return f"{models[0]}: is {_words_of_model(models[0])}, where spectra are expected; {remedy}"
    # What `inspect` does with tables is its own to tell.
    if tables and len(tables) == len(kinds) and command != "inspect":
        found = f"{tables[0]}: is a table of predictions, where spectra are expected; "
        if command == "evaluate":
            return found + f"to evaluate it, write {_line(command, spectra_as_model, tables[0])}"
        return (
            found
            + f"name the spectra that it was made of; moefast inspect {shlex.quote(tables[0])} looks at a table"
        )
    if kind_of_model == "spectra" or (kind_of_model == "table" and command != "evaluate"):
        what = "holds spectra" if kind_of_model == "spectra" else "is a table of predictions"
        line = f": {_line(command, files, None)}" if files else ""
        return (
            f"{model}: {what}, where a model is expected; name the folder of a model that moefast fit wrote, or a "
            f"model that comes with moefast ({', '.join(_shipped())}){line}"
        )
    return None


def _line(command: str, spectra: Sequence[str], model: str | None) -> str:
    """The command as it should be written."""
    words = [shlex.quote(str(file)) for file in spectra] or ["FILE"]
    return f"moefast {command} {' '.join(words)} -m {shlex.quote(model) if model else 'MODEL'}"


def _shipped() -> tuple[str, ...]:
    from moefast.model import SHIPPED

    return SHIPPED


def _is_shipped(name: str) -> bool:
    """Whether nothing of this name is here, and a model of this name comes with moefast."""
    return name in _shipped() and not os.path.lexists(name)


def _words_of_model(name: str) -> str:
    return "the folder of a model" if os.path.isdir(name) else "a model that comes with moefast"


def _kind(name: str) -> Kind:
    """What a file, folder or name stands for, as far as that can be told."""
    import h5py

    from moefast.inspection.run import is_table
    from moefast.model import MANIFEST

    path = Path(name)
    # What the system cannot open, such as a name that is too long, has been told by whoever tried before.
    with suppress(OSError):
        if path.is_dir():
            return "model" if (path / MANIFEST).exists() else ""
        if _is_shipped(name):
            return "model"
        if is_table(path):
            return "table"
        if not path.is_file():
            return ""
        if any(part in {".fits", ".fit"} for part in path.suffixes):
            return "spectra"
        with h5py.File(path, "r") as file:
            return "spectra" if "dataset" in file else ""
    return ""
