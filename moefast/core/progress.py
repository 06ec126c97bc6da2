"""Progress of long work: the callbacks that are told of it, and what the stages of a fit count."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["FILES", "SAMPLED", "STEP_STAGES", "RowProgress", "StageProgress", "unit_of"]

RowProgress = Callable[[int, int], None]
"""Called with rows (or steps) done and those in all."""

StageProgress = Callable[[str, int, int], None]
"""Called with the name of a stage, rows (or steps) done and those in all."""

STEP_STAGES = frozenset(
    {"experts", "gate", "tower", "error model", "simpler fits", "library", "families", "residuals", "network"}
)
"""Stages of a fit that go through steps, not through spectra."""

SAMPLED = ", sampled"
"""Ending of the stages of a fit that is repeated with drawn noise."""


FILES = "files"
"""Stage of a run that goes through files."""


def unit_of(stage: str) -> str:
    """What a stage counts: "files", "steps" or "spectra"."""
    if stage == FILES:
        return FILES
    return "steps" if stage.removesuffix(SAMPLED) in STEP_STAGES else "spectra"
