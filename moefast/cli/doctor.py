"""The command `moefast doctor`."""

from __future__ import annotations

import json
import sys

import click

from moefast.cli.options import DEVICE, JSON, talk

__all__ = ["doctor"]


@click.command(short_help="Say what this machine has and what is used of it.")
@DEVICE
@talk
@JSON
def doctor(quiet: bool, as_json: bool) -> None:
    """Say what this machine has, what moefast will use, and why not more.

    \b
        moefast doctor
        moefast doctor --json > machine.json

    Versions, cores, GPUs and why one is not used, where compiled code is kept, shipped models, families of experts. The
    exit code is 1 if something is wrong.
    """
    from moefast.doctor import examine, format_text

    facts = examine()
    click.echo(json.dumps(facts, indent=1) if as_json else format_text(facts))
    if facts["problems"]:
        sys.exit(1)
