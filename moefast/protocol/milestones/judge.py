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
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moefast.core.random import NOISE_SEED
from moefast.core.text import counted
from moefast.protocol.milestones.evaluations import NotRunError, ReadEvaluation, Section, deviation
from moefast.protocol.milestones.marks import ALL_MILESTONES
from moefast.protocol.milestones.quantities import TEST_PART
from moefast.protocol.milestones.rules import Milestone
from moefast.protocol.milestones.verdicts import (
    EvaluatedSet,
    JudgedEvaluation,
    JudgedSet,
    Judgement,
    MilestoneResult,
    OwnNumber,
)
from moefast.protocol.report_parts import Report

__all__ = ["SCHEMA_VERSION", "judge", "judge_alone"]

SCHEMA_VERSION = 1


def judge(reports: Sequence[ReadEvaluation], milestones: Sequence[Milestone] = ALL_MILESTONES) -> Judgement:
    """Judge every milestone by the evaluations given.

    Parameters
    ----------
    reports : sequence of ReadEvaluation
        From `read_reports`; may be empty.
    milestones : sequence of Milestone

    Returns
    -------
    Judgement
        One section per test set and noise level.
    """
    apart: dict[tuple[Any, Any], list[ReadEvaluation]] = {}
    for one in reports:
        data = one.report.data_set
        apart.setdefault((data.fingerprint, data.noise_level), []).append(one)
    sections = [_section(group, milestones) for group in apart.values()] or [_section([], milestones)]
    return Judgement(SCHEMA_VERSION, "moefast milestones", tuple(sections))


def judge_alone(report: Report) -> Judgement | None:
    """What one evaluation says by itself, for a section of its own report.

    Parameters
    ----------
    report : Report
        From `evaluate_predictions`.

    Returns
    -------
    Judgement or None
        As from `judge`; None if the evaluation was not made by the frozen protocol.
    """
    return None if deviation(report.protocol) else judge([ReadEvaluation("this evaluation", "", report)])


def _section(reports: Sequence[ReadEvaluation], milestones: Sequence[Milestone]) -> JudgedSet:
    scored = _protocol_noise(reports)
    name, part = _identity(reports)
    section = Section(tuple(reports), scored, name, part)
    notes = []
    if len(scored) < len(reports):
        n_other = len(reports) - len(scored)
        count = "counts" if n_other == 1 else "count"
        notes.append(f"{counted(n_other, 'evaluation')} with another draw of noise {count} for C0 only")
    for recipe, n in Counter(one.recipe for one in scored).items():
        if n > 1:
            notes.append(f"of {n} evaluations of {recipe} the weakest counts, in each check")
    if reports and part != TEST_PART:
        notes.append(
            f"no report shows that this is {TEST_PART} of a reference set: marks for any set are not run"
        )
    data = reports[0].report.data_set if reports else None
    return JudgedSet(
        data_set=None
        if data is None
        else EvaluatedSet(data.name, name, part, data.fingerprint, data.n, data.noise_level),
        evaluations=tuple(JudgedEvaluation(one.path, one.sha256, one.recipe) for one in reports),
        notes=tuple(notes),
        milestones=tuple(_row(milestone, section) for milestone in milestones),
    )


def _protocol_noise(reports: Sequence[ReadEvaluation]) -> tuple[ReadEvaluation, ...]:
    seeds = {one.report.data_set.noise_seed for one in reports}
    wanted = None if None in seeds else NOISE_SEED
    return tuple(one for one in reports if one.report.data_set.noise_seed == wanted)


def _identity(reports: Sequence[ReadEvaluation]) -> tuple[str | None, str | None]:
    """Set and part that the reports claim, if they agree and the fingerprint is the frozen one."""
    from moefast.simulate.sets import FINGERPRINTS

    found = set()
    for one in reports:
        claim = one.report.data_set.reference_set or {}
        key = (str(claim.get("reference_set")), str(claim.get("part")))
        found.add(key if FINGERPRINTS.get(key, "") == claim.get("fingerprint") else (None, None))
    return found.pop() if len(found) == 1 else (None, None)


def _row(milestone: Milestone, section: Section) -> MilestoneResult:
    reference = milestone.reference.run(section)
    if section.part != TEST_PART and reference.verdict != "not run":
        found = f"{section.reference_set} {section.part}" if section.reference_set else "not known to be one"
        reason = f"needs {TEST_PART} of a reference set, this is {found}"
        reference = replace(reference, verdict="not run", reason=reason)
    try:
        own = milestone.ours.worst(section, "≥")
        ours = OwnNumber(milestone.ours.what, own.value, own.interval, note=own.note)
    except NotRunError as error:
        ours = OwnNumber(milestone.ours.what, None, reason=str(error))
    return MilestoneResult(
        id=milestone.id,
        what=milestone.what,
        published=milestone.published,
        ours=ours,
        absolute=milestone.absolute.run(section),
        reference=reference,
        commands=tuple(line.format(set=section.reference_set or "z0") for line in milestone.commands),
    )
