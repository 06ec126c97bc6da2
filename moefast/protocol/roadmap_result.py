"""What a roadmap was run on and what came of it: the entries of roadmap.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moefast.protocol.milestones.verdicts import MilestoneResult

__all__ = ["Comparison", "Decision", "Plan", "RoadmapResult", "StageResult"]


@dataclass(frozen=True)
class Plan:
    """What a roadmap is run on.

    Attributes
    ----------
    set : str
        Reference set.
    train : int
        Training spectra of each fit.
    part : "test_10k" or "test_1k"
        Test spectra. Marks for any set are judged on test_10k alone.
    size : "small" or "base"
        Of networks.
    steps : int or None
        Of networks; what belongs to the size if None.
    seeds : int
        Training sets, and draws of noise, of the ruler C0.
    families : tuple of str, or None
        Families of experts that each bin of C1 chooses from; those of the recipe `hybrid-moe` if None.
    strong : "template", "heads", "heads-cnn" or "heads-vit"
        Recipe of the model that the residuals of C4 stand on.
    """

    set: str = "z0"
    train: int = 20_000
    part: str = "test_10k"
    size: Literal["small", "base"] = "small"
    steps: int | None = None
    seeds: int = 5
    families: tuple[str, ...] | None = None
    strong: Literal["template", "heads", "heads-cnn", "heads-vit"] = "heads"


@dataclass(frozen=True)
class Decision:
    """Which stage follows, and by which number."""

    follows: str
    words: str


@dataclass(frozen=True)
class Comparison:
    """What a paired comparison of two runs says: R² of each, the difference with its interval, and a verdict."""

    what: str
    base: str
    other: str
    from_base: float | None
    to_other: float | None
    difference: float | None
    interval: tuple[float | None, float | None]
    verdict: str


@dataclass(frozen=True)
class StageResult:
    """A stage that was run: how long it took, what reproduces it, its milestones, and what was decided."""

    id: str
    what: str
    seconds: float
    commands: tuple[str, ...]
    milestones: tuple[MilestoneResult, ...]
    comparisons: tuple[Comparison, ...]
    decision: Decision


@dataclass(frozen=True)
class RoadmapResult:
    """A roadmap as far as it was run; `path` are the stages in the order in which they were."""

    schema_version: int
    what: str
    plan: Plan
    path: tuple[str, ...]
    stages: tuple[StageResult, ...]
