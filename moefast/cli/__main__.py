"""Makes `python -m moefast.cli` the command `moefast`."""

from moefast.cli import main

main()
