"""What is said about milestones: numbers found, checks, rules, and all of them per test set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moefast.protocol.milestones.evaluations import Interval

__all__ = [
    "CheckResult",
    "EvaluatedSet",
    "JudgedEvaluation",
    "JudgedSet",
    "Judgement",
    "MilestoneResult",
    "OwnNumber",
    "Relation",
    "RuleResult",
    "Verdict",
]

Verdict = Literal["pass", "fail", "not run"]
Relation = Literal["≥", "≤"]


@dataclass(frozen=True)
class OwnNumber:
    """Our number of a milestone with its bootstrap interval; None, and the reason, if no evaluation holds it."""

    what: str
    value: float | None
    interval: Interval | None = None
    reason: str = ""
    note: str = ""


@dataclass(frozen=True)
class CheckResult:
    """A number against its mark; `value` and `passed` are None, with the reason, if the check was not run."""

    what: str
    relation: Relation
    mark: float
    value: float | None
    interval: Interval | None
    passed: bool | None
    reason: str = ""
    note: str = ""


@dataclass(frozen=True)
class RuleResult:
    """The verdict of a rule, and its checks, of which all or any one must pass."""

    verdict: Verdict
    reason: str
    combine: Literal["all", "any"]
    checks: tuple[CheckResult, ...]


@dataclass(frozen=True)
class MilestoneResult:
    """One row of the table of milestones: `absolute` is the mark on the published data, `reference` that on any set."""

    id: str
    what: str
    published: str
    ours: OwnNumber
    absolute: RuleResult
    reference: RuleResult
    commands: tuple[str, ...]


@dataclass(frozen=True)
class EvaluatedSet:
    """Which test set, and at which noise level; `reference_set` and `part` are None for sets that are no references."""

    name: str
    reference_set: str | None
    part: str | None
    fingerprint: str
    n: int
    noise_level: float | None


@dataclass(frozen=True)
class JudgedEvaluation:
    """An evaluation that was read: where it lies, the SHA-256 of its bytes, the recipe of its model."""

    path: str
    sha256: str
    recipe: str


@dataclass(frozen=True)
class JudgedSet:
    """Milestones by the evaluations of one test set at one noise level; `data_set` is None without any evaluation."""

    data_set: EvaluatedSet | None
    evaluations: tuple[JudgedEvaluation, ...]
    notes: tuple[str, ...]
    milestones: tuple[MilestoneResult, ...]


@dataclass(frozen=True)
class Judgement:
    """What evaluations say about all milestones, test sets apart."""

    schema_version: int
    what: str
    sections: tuple[JudgedSet, ...]
