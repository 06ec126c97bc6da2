"""What commands say on standard error of what could not be read."""

from __future__ import annotations

import sys
from typing import Any

import click

__all__ = ["tell_failures"]

MOST = 50
"""Lines at most: of a file that is wrong throughout, every row is a failure."""


def tell_failures(failures: Any) -> None:
    """Name what could not be read and leave with the exit code of the first failure."""
    for failure in failures[:MOST]:
        click.echo(f"moefast: error: {failure.error}", err=True)
    if len(failures) > MOST:
        click.echo(
            f"moefast: error: {len(failures) - MOST:,} more; --json and the table's attribute failures name all",
            err=True,
        )
    if failures:
        sys.exit(failures[0].error.exit_code)
