"""Campaigns of faults: kills, failed writes, damaged files and models, strange names; what was tried and what survived.

Run them all with `python -m moefast.benchmarks.faults`; `--cases N` says how many of each kind.
"""
