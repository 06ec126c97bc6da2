"""The HTML page of a roadmap: marks, decisions, every check with its number, and the commands."""

from __future__ import annotations

from collections.abc import Sequence

from moefast.pages.page import Table, Words, bracket, number, render, tile
from moefast.protocol.milestones.verdicts import MilestoneResult
from moefast.protocol.roadmap_result import Comparison, RoadmapResult, StageResult

__all__ = ["comparison_words", "page"]

_SECTIONS = (
    ("marks", "Marks"),
    ("decisions", "Decisions"),
    ("checks", "Every check"),
    ("again", "Commands"),
)


def page(result: RoadmapResult) -> str:
    """The page of a roadmap.

    Parameters
    ----------
    result : RoadmapResult

    Returns
    -------
    str
        One HTML document, the same for the same argument.
    """
    plan, stages = result.plan, result.stages
    rows = [(stage, row) for stage in stages for row in stage.milestones]
    passed = sum(row.reference.verdict == "pass" for _, row in rows)
    return render(
        "roadmap.html.j2",
        parts="roadmap",
        sections=_SECTIONS,
        title=f"Roadmap on {plan.set}",
        plan=plan,
        tiles=[
            tile("stages run", " → ".join(result.path), "in the order that the decisions gave", main=True),
            tile("marks for any set", f"{passed} of {len(rows)}", "passed"),
            tile("time", _time(sum(stage.seconds for stage in stages)), "of fits and evaluations of this run"),
        ],
        notes=[],
        marks=_marks(rows),
        decisions=[(stage.id, words) for stage in stages for words in _said(stage)],
        checks=_checks(rows),
        commands=[(f"{stage.id}: {stage.what}", list(dict.fromkeys(stage.commands))) for stage in stages],
    )  # fmt: skip


def comparison_words(one: Comparison) -> str:
    """A comparison of a stage in one sentence."""
    return (
        f"{one.what}: {number(one.difference, sign=True)} {bracket(one.interval, sign=True)} of R² "
        f"({one.base} {number(one.from_base)}, {one.other} {number(one.to_other)}), {one.verdict}"
    )


def _said(stage: StageResult) -> list[str]:
    """What was found besides the marks, and what follows."""
    return [*map(comparison_words, stage.comparisons), stage.decision.words]


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _marks(rows: Sequence[tuple[StageResult, MilestoneResult]]) -> Table:
    cells = [
        (
            row.id,
            [
                Words(row.what),
                Words(row.published),
                number(row.ours.value),
                bracket(row.ours.interval),
                row.absolute.verdict,
                row.reference.verdict,
                _time(stage.seconds),
            ],
        )
        for stage, row in rows
    ]
    return Table(
        "The published numbers, and their mark, belong to data that are not public; time is that of the whole stage",
        ("", Words("what"), Words("published R²"), "our R²", "interval", "their mark", "any set", "time"),
        cells,
    )


def _checks(rows: Sequence[tuple[StageResult, MilestoneResult]]) -> Table:
    cells = [
        (
            row.id,
            [
                Words(words),
                Words(check.what),
                f"{check.relation} {check.mark:g}",
                number(check.value),
                bracket(check.interval),
                {True: "pass", False: "fail", None: f"not run: {check.reason}"}[check.passed],
            ],
        )
        for _, row in rows
        for words, rule in (("their mark", row.absolute), ("any set", row.reference))
        for check in rule.checks
    ]
    header = ("", Words("mark"), Words("check"), "asked", "ours", "interval", "verdict")
    return Table("What each mark asks for, and the number that it was judged by", header, cells)
