"""Evaluations as they are read from their files, and those of one test set together."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from moefast.core import metrics
from moefast.core.errors import InputError
from moefast.core.grids import METAL_POOR, PHYSICAL_GRID, SNR_NORM_EDGES
from moefast.core.records import as_entries, check_seal, read_entries
from moefast.core.regular import refuse_special
from moefast.protocol.report import SCHEMA_VERSION
from moefast.protocol.report_parts import CeilingComparison, Protocol, ReferenceScores, Report
from moefast.spectra.tables import read_table

__all__ = [
    "BAYES",
    "ROUNDING",
    "Interval",
    "NotRunError",
    "ReadEvaluation",
    "Section",
    "deviation",
    "read_reports",
]

BAYES = "bayes"
"""Name of the ceiling that the closed gap and the efficiency of a milestone refer to."""

# Reports are rounded to ten significant digits: a difference of two R² that meets its mark may miss it by that much.
ROUNDING = 1e-9
Interval = tuple[float, float]


class NotRunError(Exception):
    """The evaluations do not hold what a check needs; the message is the reason."""


@dataclass(frozen=True)
class ReadEvaluation:
    """An evaluation as read from its file: where it is, the SHA-256 of its bytes, its report."""

    path: str
    sha256: str
    report: Report

    @property
    def recipe(self) -> str:
        """Recipe of the model; for predictions of others, which are of no recipe, what they are."""
        model = self.report.model
        kind, name = model.get("kind", "model"), str(model.get("recipe") or model.get("name") or "")
        return name if kind == "model" else f"{kind} {name}"

    @property
    def training(self) -> Mapping[str, Any]:
        """What the model was fitted on: fingerprint, n_spectra, seed; empty where the report does not say."""
        return self.report.model.get("training") or {}

    def reference(self, name: str) -> ReferenceScores:
        """Scores of a reference on the same stars."""
        if name not in self.report.references:
            raise NotRunError(f"{self.path} holds no reference {name}")
        return self.report.references[name]

    def ceiling(self) -> CeilingComparison:
        """The Bayes ceiling and what depends on it."""
        if BAYES not in self.report.ceilings:
            raise NotRunError(f"{self.path} holds no Bayes ceiling")
        return self.report.ceilings[BAYES]

    def stars(self) -> dict[str, NDArray] | None:
        """Label, prediction and group labels of every star, where the evaluation kept them beside its report."""
        kept = Path(self.path).with_name("predictions.h5")
        if not kept.is_file():
            return None
        stars, _ = read_table(kept)
        own = self.report.overall.r2
        # A table that does not give this report's R² is not its table.
        if own is None or not math.isclose(
            metrics.r2(stars["log_g_true"], stars["log_g"]), own, abs_tol=ROUNDING
        ):
            return None
        return stars


def read_reports(paths: Iterable[str | Path]) -> list[ReadEvaluation]:
    """Read evaluations.

    Parameters
    ----------
    paths : iterable of path
        Files written by `moefast evaluate`, folders with a report.json, or folders of such folders.

    Returns
    -------
    list of ReadEvaluation
        In the order given, without repetitions: the same bytes count once, under whatever name.

    Raises
    ------
    InputError
        Something is no evaluation, of another schema, or was not made by the frozen protocol.
    """
    found: dict[str, ReadEvaluation] = {}
    for path in paths:
        for file in _files(Path(path)):
            one = _read(file)
            found.setdefault(one.sha256, one)
    return list(found.values())


def _files(path: Path) -> list[Path]:
    if not os.path.isdir(path):
        return [path]
    files = [path / "report.json"] if (path / "report.json").is_file() else sorted(path.glob("*/report.json"))
    if not files:
        raise InputError(
            f"{path}: neither this folder nor one in it holds a report.json; make one with "
            f"moefast evaluate TEST… -m MODEL -o {path}"
        )
    return files


def _read(path: Path) -> ReadEvaluation:
    hint = "give files that moefast evaluate wrote"
    refuse_special(path)
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {hint}") from error
    except ValueError as error:
        raise InputError(
            f"{path}: expected the JSON of an evaluation, found no JSON ({error}); {hint}"
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: expected the JSON of an evaluation, found a {type(content).__name__}; {hint}"
        )
    if "schema_version" not in content:
        raise InputError(f"{path}: is no evaluation: it has no entry schema_version; {hint}")
    if content["schema_version"] != SCHEMA_VERSION:
        raise InputError(
            f"{path}: expected an evaluation of schema {SCHEMA_VERSION}, found {content['schema_version']}; "
            "evaluate again with this version"
        )
    check_seal(Report, content, str(path))
    report = read_entries(Report, content, str(path))
    changed = deviation(report.protocol)
    if changed:
        raise InputError(
            f"{path}: was not made by the frozen protocol: {changed}; evaluate again with moefast evaluate"
        )
    found = ReadEvaluation(str(path), hashlib.sha256(raw).hexdigest(), report)
    same = found.training.get("fingerprint", "") == report.data_set.fingerprint
    if same or report.model.get("share_seen"):
        raise InputError(
            f"{path}: the model was fitted on stars of its test set; evaluate it on spectra it has not seen"
        )
    return found


def deviation(protocol: Protocol) -> str:
    """In what a report's protocol is not the frozen one."""
    entries = as_entries(protocol)
    frozen = {
        "grid": PHYSICAL_GRID.to_dict(),
        "snr_norm_edges": list(SNR_NORM_EDGES),
        "metal_poor_below": METAL_POOR,
        "n_resamples": metrics.N_RESAMPLES,
        "seed": metrics.SEED,
        "level": metrics.LEVEL,
    }
    wrong = [key for key, value in frozen.items() if entries[key] != value]
    return f"expected {wrong[0]} = {frozen[wrong[0]]}, found {entries[wrong[0]]}" if wrong else ""


@dataclass(frozen=True)
class Section:
    """Evaluations of one test set at one noise level.

    Attributes
    ----------
    reports : tuple of ReadEvaluation
        All of them.
    scored : tuple of ReadEvaluation
        Those whose noise is the protocol's: stored in the file, or drawn from the protocol's seed.
    reference_set, part : str or None
        Which reference set it is; None for any other.
    """

    reports: tuple[ReadEvaluation, ...]
    scored: tuple[ReadEvaluation, ...]
    reference_set: str | None
    part: str | None

    def of(self, recipe: str) -> list[ReadEvaluation]:
        """Evaluations of a recipe."""
        found = [one for one in self.scored if one.recipe == recipe]
        if not found:
            raise NotRunError(f"no evaluation of {recipe}{_unknown(recipe)}")
        return found


def _unknown(recipe: str) -> str:
    from moefast.recipes import RECIPES

    return "" if recipe in RECIPES else ", a recipe that this version does not have"
