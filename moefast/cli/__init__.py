"""The command line: a file per command."""

from moefast.cli.group import cli, main

__all__ = ["cli", "main"]
