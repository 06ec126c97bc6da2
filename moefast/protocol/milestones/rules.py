"""What a milestone is made of: quantities, checks of a quantity against a mark, rules of several checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from moefast.protocol.milestones.evaluations import ROUNDING, Interval, NotRunError, Section
from moefast.protocol.milestones.verdicts import CheckResult, Relation, RuleResult, Verdict

__all__ = ["Check", "Measured", "Milestone", "Quantity", "Rule"]


@dataclass(frozen=True)
class Measured:
    """A number with its bootstrap interval, and in `note` whatever a reader must know about it."""

    value: float
    interval: Interval | None = None
    note: str = ""


@dataclass(frozen=True)
class Quantity:
    """A number that is found in evaluations.

    Attributes
    ----------
    what : str
    measure : callable
        Takes the section and one report per model; raises where they do not hold the number.
    models : tuple of str
        Recipes of the models whose reports it needs.
    """

    what: str
    measure: Callable[..., Measured]
    models: tuple[str, ...] = ()

    def worst(self, section: Section, relation: Relation) -> Measured:
        """The number that is hardest to bring past a mark, over every choice of one report per model."""
        found = [self.measure(section, *choice) for choice in product(*map(section.of, self.models))]
        worst = (min if relation == "≥" else max)(found, key=lambda one: one.value)
        many = f"weakest of {len(found)}" if len(found) > 1 else ""
        return replace(worst, note=", ".join(part for part in (worst.note, many) if part))


@dataclass(frozen=True)
class Check:
    """A quantity that must be at least ("≥") or at most ("≤") the mark."""

    quantity: Quantity
    relation: Relation
    mark: float

    def run(self, section: Section) -> CheckResult:
        """The number, and whether it passes the mark."""
        named = (self.quantity.what, self.relation, self.mark)
        try:
            found = self.quantity.worst(section, self.relation)
        except NotRunError as error:
            return CheckResult(*named, value=None, interval=None, passed=None, reason=str(error))
        above = found.value - self.mark if self.relation == "≥" else self.mark - found.value
        return CheckResult(*named, found.value, found.interval, above >= -ROUNDING, note=found.note)


@dataclass(frozen=True)
class Rule:
    """Checks of which all, or any one, must pass."""

    checks: tuple[Check, ...]
    combine: Literal["all", "any"] = "all"

    def run(self, section: Section) -> RuleResult:
        """The verdict and the checks. One that decides alone decides, even if others were not run."""
        checks = tuple(check.run(section) for check in self.checks)
        passed = [check.passed for check in checks]
        decisive = self.combine == "any"
        verdict: Verdict = "fail" if decisive else "pass"
        if decisive in passed:
            verdict = "pass" if decisive else "fail"
        elif None in passed:
            verdict = "not run"
        return RuleResult(verdict, "", self.combine, checks)


@dataclass(frozen=True)
class Milestone:
    """One row of the table of milestones.

    Attributes
    ----------
    id, what : str
    published : str
        What others reported on data that are not public.
    ours : Quantity
        Our headline number.
    absolute : Rule
        The mark that was set on the published data.
    reference : Rule
        The mark that holds on any reference set.
    commands : tuple of str
        What reproduces the row; {set} is the reference set.
    """

    id: str
    what: str
    published: str
    ours: Quantity
    absolute: Rule
    reference: Rule
    commands: tuple[str, ...]
