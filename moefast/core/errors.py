"""The errors that moefast raises on purpose, each with its exit code.

Design: one small family, so that the command line can turn any of them into one clear message and a
meaningful exit code, and callers of the library can catch `MoefastError` alone. A message names the file,
dataset and row, what was expected, what was found, and what to do.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BenchmarkError",
    "DisagreementError",
    "InputError",
    "LabelError",
    "ModelError",
    "MoefastError",
    "OddSpectraWarning",
    "OutputError",
    "WaveGridError",
]


class OddSpectraWarning(UserWarning):
    """Something about spectra as a whole that looks wrong; no number is changed for it."""


class MoefastError(Exception):
    """Base class of every error that moefast raises on purpose."""

    exit_code = 1


class InputError(MoefastError):
    """A spectrum file is missing, truncated, corrupt, or lacks a dataset."""

    exit_code = 3


class WaveGridError(InputError):
    """A file lies on another wave grid than the model or its neighbours."""

    exit_code = 4


class LabelError(InputError):
    """Labels (log_g, T_eff, M_H) are needed and missing, not finite, or contradictory."""

    exit_code = 5


class ModelError(MoefastError):
    """A model folder is incomplete, altered, of an unknown schema, or not to be trusted."""

    exit_code = 6


class BackendError(MoefastError):
    """The backend asked for cannot be used on this machine."""

    exit_code = 7


class DisagreementError(BackendError):
    """A GPU gives other numbers than the CPU."""


class OutputError(MoefastError):
    """A result could not be written."""

    exit_code = 8


class BenchmarkError(MoefastError):
    """An engine of a benchmark gives another answer than the reference, or the benchmark cannot be carried out."""

    exit_code = 9
