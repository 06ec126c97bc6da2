"""Milestones C0 … C4: the marks, and what evaluations say about each: pass, fail or not run.

Design: a milestone is a record of checks, each a quantity, a relation and a mark; a quantity knows how to take its
number from the evaluations of the models it needs. Nothing is computed from spectra here, and what no evaluation holds
is "not run", never a pass. A verdict compares points with marks, as the marks were written; intervals stand beside.
Evaluations of different test sets or noise levels are never mixed. Where several evaluations could speak, each check
takes its worst number, so that giving more files cannot help.

Names that a rule looks for: a model by the recipe in its report, a reference by its name there. The report of a hybrid
must hold `HYBRID_ORACLE` (its own experts with true bins), `RIDGE_ORACLE` and `SAMPLED_ORACLE` on the same stars.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from moefast.core.random import NOISE_SEED
from moefast.protocol.milestones.evaluations import NotRunError, ReadEvaluation, Section, deviation
from moefast.protocol.milestones.marks import MILESTONES
from moefast.protocol.milestones.quantities import TEST_PART
from moefast.protocol.milestones.rules import Milestone, as_entries

__all__ = ["SCHEMA_VERSION", "judge", "judge_alone"]

SCHEMA_VERSION = 1


def judge(reports: Sequence[ReadEvaluation], milestones: Sequence[Milestone] = MILESTONES) -> dict[str, Any]:
    """Judge every milestone by the evaluations given.

    Parameters
    ----------
    reports : sequence of ReadEvaluation
        From `read_reports`; may be empty.
    milestones : sequence of Milestone

    Returns
    -------
    dict
        JSON-ready: schema_version, what, sections. One section per test set and noise level, each with data_set (None
        without any report), notes, and per milestone: id, what, published, ours (what, value, interval, reason, note),
        absolute and reference (verdict, combine, checks), commands.
    """
    apart: dict[tuple[Any, Any], list[ReadEvaluation]] = {}
    for one in reports:
        data = one.content["data_set"]
        apart.setdefault((data["fingerprint"], data["noise_level"]), []).append(one)
    sections = [_section(group, milestones) for group in apart.values()] or [_section([], milestones)]
    return {"schema_version": SCHEMA_VERSION, "what": "moefast milestones", "sections": sections}


def judge_alone(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """What one evaluation says by itself, for a section of its own report.

    Parameters
    ----------
    content : mapping
        From `evaluate_predictions`.

    Returns
    -------
    dict or None
        As from `judge`; None if the evaluation was not made by the frozen protocol.
    """
    return None if deviation(content["protocol"]) else judge([ReadEvaluation("this evaluation", "", content)])


def _section(reports: Sequence[ReadEvaluation], milestones: Sequence[Milestone]) -> dict[str, Any]:
    scored = _protocol_noise(reports)
    name, part = _identity(reports)
    section = Section(tuple(reports), scored, name, part)
    notes = []
    if len(scored) < len(reports):
        notes.append(f"{len(reports) - len(scored)} evaluations with another draw of noise count for C0 only")
    for recipe, n in Counter(one.recipe for one in scored).items():
        if n > 1:
            notes.append(f"of {n} evaluations of {recipe} the weakest counts, in each check")
    if reports and part != TEST_PART:
        notes.append(
            f"no report shows that this is {TEST_PART} of a reference set: marks for any set are not run"
        )
    data = reports[0].content["data_set"] if reports else None
    return {
        "data_set": None
        if data is None
        else {
            "name": data["name"],
            "reference_set": name,
            "part": part,
            "fingerprint": data["fingerprint"],
            "n": data["n"],
            "noise_level": data["noise_level"],
        },
        "evaluations": [{"path": one.path, "sha256": one.sha256, "recipe": one.recipe} for one in reports],
        "notes": notes,
        "milestones": [_row(milestone, section) for milestone in milestones],
    }


def _protocol_noise(reports: Sequence[ReadEvaluation]) -> tuple[ReadEvaluation, ...]:
    seeds = {one.content["data_set"]["noise_seed"] for one in reports}
    wanted = None if None in seeds else NOISE_SEED
    return tuple(one for one in reports if one.content["data_set"]["noise_seed"] == wanted)


def _identity(reports: Sequence[ReadEvaluation]) -> tuple[str | None, str | None]:
    """Set and part that the reports claim, if they agree and the fingerprint is the frozen one."""
    from moefast.simulate.sets import FINGERPRINTS

    found = set()
    for one in reports:
        claim = one.content["data_set"].get("reference_set") or {}
        key = (str(claim.get("reference_set")), str(claim.get("part")))
        found.add(key if FINGERPRINTS.get(key, "") == claim.get("fingerprint") else (None, None))
    return found.pop() if len(found) == 1 else (None, None)


def _row(milestone: Milestone, section: Section) -> dict[str, Any]:
    reference = milestone.reference.run(section)
    if section.part != TEST_PART and reference["verdict"] != "not run":
        found = f"{section.reference_set} {section.part}" if section.reference_set else "not known to be one"
        reference |= {
            "verdict": "not run",
            "reason": f"needs {TEST_PART} of a reference set, this is {found}",
        }
    ours = {"what": milestone.ours.what, "value": None, "interval": None, "reason": "", "note": ""}
    try:
        ours |= as_entries(milestone.ours.worst(section, "≥"))
    except NotRunError as error:
        ours["reason"] = str(error)
    return {
        "id": milestone.id,
        "what": milestone.what,
        "published": milestone.published,
        "ours": ours,
        "absolute": milestone.absolute.run(section),
        "reference": reference,
        "commands": [line.format(set=section.reference_set or "z0") for line in milestone.commands],
    }
