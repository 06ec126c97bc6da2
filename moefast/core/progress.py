"""Progress of long work: the callbacks that are told of it, and what the stages of a fit count."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["FILES", "SAMPLED", "STEP_STAGES", "RowProgress", "StageProgress", "Whole", "unit_of"]

RowProgress = Callable[[int, int], None]
"""Called with rows (or steps) done and those in all."""

StageProgress = Callable[[str, int, int], None]
"""Called with the name of a stage, rows (or steps) done and those in all."""

STEP_STAGES = frozenset(
    {
        "components",
        "clouds",
        "experts",
        "gate",
        "tower",
        "error model",
        "simpler fits",
        "library",
        "families",
        "residuals",
        "network",
    }
)
"""Stages of a fit that go through steps, not through spectra."""

OTHER_STEPS = frozenset({"intervals", "pictures"})
"""The same of other commands."""

SAMPLED = ", sampled"
"""Ending of the stages of a fit that is repeated with drawn noise."""


FILES = "files"
"""Stage of a run that goes through files."""


def unit_of(stage: str) -> str:
    """What a stage counts: "files", "steps" or "spectra"."""
    if stage == FILES:
        return FILES
    return "steps" if stage.removesuffix(SAMPLED) in STEP_STAGES | OTHER_STEPS else "spectra"


class Whole:
    """How much is done of work that has several stages: a share that never falls.

    Parameters
    ----------
    shares : mapping of str to float
        Stages in their order, with what each is expected to take in any unit of time. Stages that are reported and not
        expected count nothing; one that never comes is done as soon as a later one begins.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        total = sum(shares.values())
        self._first: dict[str, float] = {}
        self._size: dict[str, float] = {}
        first = 0.0
        for stage, share in shares.items():
            self._first[stage], self._size[stage] = first / total, share / total
            first += share
        self.share = 0.0

    def report(self, stage: str, done: int, total: int) -> None:
        """A stage has done so much; a total of 0 if it counts nothing."""
        if stage in self._first:
            within = min(done / total, 1.0) if total else 0.0
            self.share = max(self.share, self._first[stage] + within * self._size[stage])
