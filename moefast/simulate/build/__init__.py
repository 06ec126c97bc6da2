"""Offline: LTE synthesis and training of the shipped emulator. Nothing here is imported at run time."""
