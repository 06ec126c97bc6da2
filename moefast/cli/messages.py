"""What commands say on standard error of what could not be read."""

from __future__ import annotations

import sys
from typing import Any

import click

__all__ = ["tell_failures"]


def tell_failures(failures: Any) -> None:
    """Name what could not be read and leave with the exit code of the first failure."""
    for failure in failures:
        click.echo(f"moefast: error: {failure.error}", err=True)
    if failures:
        sys.exit(failures[0].error.exit_code)
