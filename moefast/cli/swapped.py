"""Files in the wrong place: a model where spectra are expected, spectra where a table is, and so on.

Design: readers say what is wrong with what they read; what it is instead, they need not know. Here every argument that
names a file says which kinds it takes. Once a command has failed, the files in its arguments are looked at, and the
first one of a known kind that does not belong where it is is told with what is expected there.
"""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from moefast.core.errors import InputError, ModelError

__all__ = ["FOUND", "PLACES", "Place", "swapped_told"]

Kind = Literal["model", "table", "spectra", "survey", "report", "ceiling", "onnx", "part", "page", ""]

FOUND: dict[Kind, str] = {
    "model": "is the folder of a model",
    "table": "is a table",
    "spectra": "holds spectra",
    "survey": "holds spectra",
    "report": "is an evaluation, as moefast evaluate writes them",
    "ceiling": "is a ceiling, as moefast ceiling writes them",
    "onnx": "is an ONNX file",
    "part": "holds the statistics of a part of a fit",
    "page": "is an HTML page",
}
"""What is said of files of each kind."""


@dataclass(frozen=True)
class Place:
    """What an argument takes.

    Attributes
    ----------
    kinds : tuple of str
        Kinds of files that belong there.
    expected : str
        What is expected, in words, and how to come by it.
    takes_text : bool
        Whether names are read from any file, so that one of another kind would be taken for a list of names.
    """

    kinds: tuple[Kind, ...]
    expected: str
    takes_text: bool = False


_SPECTRA = Place(("spectra", "survey"), "spectra are expected; name files of spectra (docs/formats.md)")
_MODEL = "a model is expected; name the folder of a model that moefast fit wrote, or a model that comes with moefast"
_EVALUATIONS = Place(("report",), "an evaluation is expected; name the folder that moefast evaluate -o wrote")

PLACES: dict[str, Place] = {
    "files": _SPECTRA,
    "inspect files": Place(
        ("spectra", "survey", "table"), "spectra, or a table that moefast predict wrote, are expected"
    ),
    "like": _SPECTRA,
    "spectra": _SPECTRA,
    "model": Place(("model",), _MODEL),
    "evaluate model": Place(("model", "onnx", "table"), f"{_MODEL}, an ONNX file or a table of predictions"),
    "velocity": Place(
        ("table", "survey"),
        "velocities are expected: a number in km/s, a column of the spectra, fit, or a table with identifiers and a "
        "column v_los, VRAD or RV",
    ),
    "targets": Place(
        ("table", "survey"),
        "a list of targets is expected: identifiers with commas between, a text file with one in each line, or a table "
        "with a column of them",
        takes_text=True,
    ),
    "listing": Place(
        (), "a text file is expected that names a file of spectra on each line", takes_text=True
    ),
    "ceiling": Place(("ceiling",), "a ceiling is expected; name the file that moefast ceiling -o wrote"),
    "reports": _EVALUATIONS,
    "parts": Place(
        ("table", "part"),
        "parts are expected: tables that moefast predict wrote, or statistics that moefast fit --shard wrote",
    ),
}
"""By the name of an argument, that of its command before it where the command takes other kinds than the others do."""


def swapped_told(command: Callable[..., Any]) -> Callable[..., Any]:
    """If a command cannot use its `files`, those to be `like`, or its `model`, say so where they are swapped.

    They are opened only once something is wrong with them, so that a command that is right loses no time.
    """

    @functools.wraps(command)
    def told(*args: Any, **kwargs: Any) -> Any:
        context = click.get_current_context()
        files = [*kwargs.get("files", ()), *kwargs.get("like", ())]
        try:
            # Of several files those that cannot be used are left out, but a model among them is a slip.
            if any(_is_shipped(file) for file in files):
                raise InputError("spectra are expected")
            if words := _words_of_misplaced(context, kwargs, takes_text=True):
                raise InputError(words)
            return command(*args, **kwargs)
        except (InputError, ModelError) as error:
            words = words_of_swapped(context, files, kwargs.get("model")) or _words_of_misplaced(
                context, kwargs
            )
            if words is None:
                raise
            raise type(error)(words) from error

    return told


def _words_of_misplaced(
    context: click.Context, arguments: Mapping[str, Any], *, takes_text: bool = False
) -> str | None:
    """The first file that does not belong where it is, and what does; None if there is none.

    With `takes_text`, of those arguments alone that would take it for text.
    """
    for argument, value in arguments.items():
        place = PLACES.get(f"{context.info_name} {argument}") or PLACES.get(argument)
        if place is None or (takes_text and not place.takes_text):
            continue
        for file in _names(value):
            kind = _kind(file) if os.path.lexists(file) else ""
            if kind and kind not in place.kinds:
                return f"{file}: {FOUND[kind]}, where {place.expected}".replace(_MODEL, _model_expected())
    return None


def _model_expected() -> str:
    return f"{_MODEL} ({', '.join(_shipped())})"


def _names(value: Any) -> Iterable[str]:
    """What an argument names, one or several."""
    return (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ()


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
    holds_spectra = kind_of_model in {"spectra", "survey"}
    spectra_as_model = [model] if model and holds_spectra else []
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
    if holds_spectra or (kind_of_model == "table" and command != "evaluate"):
        what = "holds spectra" if holds_spectra else "is a table of predictions"
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
    path = Path(name)
    # What the system cannot open, such as a name that is too long, has been told by whoever tried before.
    with suppress(OSError):
        if path.is_dir():
            return _kind_of_folder(path)
        if _is_shipped(name):
            return "model"
        if path.is_file():
            return _kind_of_file(path)
    return ""


def _kind_of_folder(path: Path) -> Kind:
    from moefast.model import MANIFEST

    if (path / MANIFEST).exists():
        return "model"
    return "report" if (path / "report.json").exists() else ""


def _kind_of_file(path: Path) -> Kind:
    import h5py

    from moefast.cluster.fit_parts import is_part, read_header
    from moefast.inspection.run import is_table

    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-1] if suffixes else ""
    if is_table(path):
        return "table"
    if last in {".onnx", ".html"}:
        return "onnx" if last == ".onnx" else "page"
    if ".json" in suffixes[-2:]:
        return _kind_of_document(path)
    if is_part(path):
        with suppress(InputError):
            read_header(path)
            return "part"
        return ""
    if any(suffix in {".fits", ".fit"} for suffix in suffixes):
        return _kind_of_fits(path)
    with h5py.File(path, "r") as file:
        return "spectra" if "dataset" in file else ""


def _kind_of_fits(path: Path) -> Kind:
    """Spectra if it has rows of pixels; tables and damaged files are none."""
    from moefast.core.errors import MoefastError
    from moefast.spectra.layouts.registry import open_survey_file

    with suppress(MoefastError):
        open_survey_file(path).close()
        return "survey"
    return ""


def _kind_of_document(path: Path) -> Kind:
    """Of a JSON file: by what is in it."""
    from moefast.ceilings.ceiling import read
    from moefast.protocol.milestones.evaluations import read_reports

    with suppress(InputError):
        read(path)
        return "ceiling"
    with suppress(InputError):
        read_reports([path])
        return "report"
    return ""
