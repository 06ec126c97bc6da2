"""What was judged about the milestones, as text: a table per test set, then every check with its numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from moefast.core.text import bracket, counted, number, table
from moefast.protocol.milestones.verdicts import CheckResult, JudgedSet, Judgement, MilestoneResult, OwnNumber

__all__ = ["format_checks", "format_section", "format_text"]

_WIDTH = 100
_TIE = "\N{NO-BREAK SPACE}"


def format_text(result: Judgement) -> str:
    """Plain text within 100 columns, names and paths permitting: a table per test set, then every check.

    Parameters
    ----------
    result : Judgement
        From `judge`.

    Returns
    -------
    str
        Without a final newline.
    """
    blocks = []
    for section in result.sections:
        lines = [*_head(section), "", *_summary(section.milestones)]
        for note in section.notes:
            lines += _wrapped(f"  {note}", "  ")
        lines += format_checks(section.milestones)
        if section.evaluations:
            lines += [
                "",
                "Evaluations",
                *(f"  {one.path}: {one.recipe}" for one in section.evaluations),
            ]
        blocks.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(blocks)


def format_checks(rows: Sequence[MilestoneResult]) -> list[str]:
    """Every check of milestones, and the commands of each; a blank line before each."""
    lines: list[str] = []
    before: Sequence[str] = ()
    for row in rows:
        lines += ["", *_format_row(row)]
        if row.commands != before:
            lines += ["  commands:", *(line for one in row.commands for line in _command(one))]
        before = row.commands
    return lines


def format_section(result: Judgement) -> list[str]:
    """Lines for the report of an evaluation: the milestones that it bears on; none if there are none.

    Parameters
    ----------
    result : Judgement
        From `judge_alone`.
    """
    rows = [row for row in result.sections[0].milestones if row.ours.value is not None]
    return ["Milestones (moefast milestones shows every check)", *_summary(rows)] if rows else []


def _head(section: JudgedSet) -> list[str]:
    data = section.data_set
    if data is None:
        return ["Milestones: no evaluation was given, so none was run"]
    level = "" if data.noise_level is None else f", noise level {data.noise_level:g}"
    name = f"{data.reference_set} {data.part}" if data.reference_set else data.name
    return [f"Milestones on {name}: {counted(data.n, 'star')}{level}", f"file fingerprint {data.fingerprint}"]


def _summary(rows: Sequence[MilestoneResult]) -> list[str]:
    header = ("", "published R²", "our R²", "interval", "their mark", "any set")
    cells = [
        (
            row.id,
            row.published,
            number(row.ours.value),
            bracket(row.ours.interval),
            row.absolute.verdict,
            row.reference.verdict,
        )
        for row in rows
    ]
    return table(header, cells, left=2)


def _format_row(row: MilestoneResult) -> list[str]:
    ours = row.ours
    measured = ours.reason or _measured(ours)
    lines = [f"{row.id}  {row.what}", *_wrapped(f"  {ours.what}: {measured}", "    ")]
    for rule, title in (
        (row.absolute, "mark set on the published data"),
        (row.reference, "mark on any reference set"),
    ):
        how = " (one is enough)" if rule.combine == "any" else ""
        reason = f": {rule.reason}" if rule.reason else ""
        lines.append(f"  {title}{how}: {rule.verdict}{reason}")
        for check in rule.checks:
            verdict = "not run" if check.passed is None else "pass" if check.passed else "fail"
            what = f"    {verdict:<7}  {check.what}"
            found = _measured(check) if check.passed is not None else check.reason
            # What is missing for all of a milestone was said in its first line.
            found = "" if found == ours.reason else f"{found}, " if check.passed is not None else f"{found}; "
            mark = f"mark{_TIE}{check.relation}{_TIE}{check.mark:g}"
            lines += _wrapped(f"{what}: {found}{mark}", " " * 13)
    return lines


def _measured(found: OwnNumber | CheckResult) -> str:
    note = f"({found.note})" if found.note else ""
    parts = (number(found.value, 4), bracket(found.interval, 4), note)
    return " ".join(part for part in parts if part)


def _wrapped(line: str, indent: str) -> list[str]:
    lines = textwrap.wrap(
        line, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return [one.replace(_TIE, " ") for one in lines]


def _command(line: str) -> list[str]:
    """A command over as many lines as it needs, as a shell takes them."""
    pieces = textwrap.wrap(
        line, _WIDTH - 2, initial_indent="    ", subsequent_indent="      ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return [f"{piece} \\" for piece in pieces[:-1]] + pieces[-1:]
