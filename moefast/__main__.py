"""Makes `python -m moefast` the command `moefast`."""

from moefast.cli import main

main()
