"""The spectra of the worst stars of a run, where their files are at hand.

Design: a picture must show what the table was made of. So the model is the one that the table names, known by its hash,
and a file is read as the run read it; where something is lacking it is said, and the page goes without pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from moefast.core.errors import MoefastError
from moefast.inspection.run import RunSummary
from moefast.inspection.star import Star, look_at
from moefast.model import Model

__all__ = ["MOST_PICTURES", "spectra_of_worst"]

MOST_PICTURES = 16


def spectra_of_worst(
    run: RunSummary, model: Model | str | Path | None = None, spectra: Sequence[str | Path] = ()
) -> tuple[dict[tuple[int, int], Star], str]:
    """Read the spectra of the worst stars.

    Parameters
    ----------
    run : RunSummary
    model : Model, path or name, optional
        The model of the table; looked for by the name in the table if absent.
    spectra : sequence of path, optional
        The input files in their order, where they are no longer what the table names.

    Returns
    -------
    stars : dict of (file, row) to Star
    reason : str
        Why stars are missing; "" if none is.
    """
    if not run.worst:
        return {}, ""
    named = [str(path) for path in spectra] or [str(path) for path in run.attributes.get("inputs") or []]
    files = [_at_hand(path, run.path) for path in named]
    if not any(file is not None for file in files):
        what = ", ".join(named[:3]) or "not named by the table"
        return {}, f"No pictures: the spectra ({what}) are not at hand; name them with --spectra."
    try:
        chosen = model if isinstance(model, Model) else Model.load(model or _name_in(run))
    except MoefastError as error:
        return {}, f"No pictures: the model of the table cannot be loaded ({error}); name it with --model."
    if run.attributes.get("model_sha256") not in (None, chosen.hash):
        return (
            {},
            f"No pictures: the table was made by another model than {chosen.name}; name it with --model.",
        )
    stars: dict[tuple[int, int], Star] = {}
    reason, options = "", run.attributes.get("options") or {}
    for star in run.worst[:MOST_PICTURES]:
        file = files[star.file] if star.file < len(files) else None
        if file is None:
            reason = "Of some stars the spectra are not at hand."
            continue
        try:
            stars[star.file, star.row] = look_at(
                file,
                chosen,
                row=star.row,
                array=_array(run),
                velocity=star.velocity,
                telluric=run.attributes.get("telluric") or "auto",
                medium=options.get("medium") or "auto",
            )
        except MoefastError as error:
            reason = f"Of some stars the spectra cannot be read: {error}"
    return stars, reason


def _array(run: RunSummary) -> Literal["auto", "flux", "noisy"]:
    array = run.attributes.get("array")
    return "flux" if array == "flux" else "noisy" if array == "noisy" else "auto"


def _at_hand(path: str, table: str) -> Path | None:
    """A file as it is named, or beside the table."""
    return next((each for each in (Path(path), Path(table).parent / path) if each.is_file()), None)


def _name_in(run: RunSummary) -> str | None:
    """Path or name of the model, from "recipe (path)" and "recipe (name, shipped with moefast)"."""
    name = str(run.attributes.get("model") or "")
    if not name.endswith(")") or "(" not in name:
        return None
    return name.partition("(")[2][:-1].removesuffix(", shipped with moefast")
