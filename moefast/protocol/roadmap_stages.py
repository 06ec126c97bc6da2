"""The stages of the roadmap C0 to C4: their runs, the milestones that judge them, and what follows.

Design: a stage is a few runs (a fit and its evaluations) and the milestones that judge them; what follows is decided
by numbers alone, by the rules of the roadmap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moefast.protocol.milestones.verdicts import MilestoneResult
from moefast.protocol.roadmap_result import Decision, Plan

__all__ = ["END", "STAGES", "Run", "Stage"]

END = "the end"


@dataclass(frozen=True)
class Run:
    """A model that a stage fits and evaluates.

    Attributes
    ----------
    name : str
        Of its folders.
    recipe : str
    training : int
        Which stretch of the training part it is fitted on.
    noise_seeds : tuple of int
        Draws of noise that it is evaluated with, besides the protocol's.
    families : tuple of str, or None
        Instead of the recipe's.
    strong : str or None
        What residuals stand on, instead of what the recipe says.
    """

    name: str
    recipe: str
    training: int = 0
    noise_seeds: tuple[int, ...] = ()
    families: tuple[str, ...] | None = None
    strong: str | None = None

    def commands(self, plan: Plan, backend: str) -> list[str]:
        """What gives the same at the command line."""
        first = self.training * plan.train
        rows = "" if not first else f" --rows {first}:{first + plan.train}"
        size = "" if plan.size == "small" else f" --size {plan.size}"
        steps = "" if plan.steps is None else f" --steps {plan.steps}"
        families = "" if self.families is None else f" --families {','.join(self.families)}"
        strong = "" if self.strong is None else f" --strong {self.strong}"
        return [
            f"moefast simulate train.h5 --set {plan.set} --part train{rows or f' -n {plan.train}'}",
            f"moefast fit train.h5 -o models/{self.name}/ --recipe {self.recipe}{families}{strong}{size}{steps} "
            f"--backend {backend}",
            f"moefast evaluate test.h5 -m models/{self.name}/ -o reports/{self.name}/",
        ]


@dataclass(frozen=True)
class Stage:
    """A stage of the roadmap.

    Attributes
    ----------
    id, what : str
    runs : callable
        The runs of a plan.
    milestones : tuple of str
        That judge it.
    decide : callable
        What follows, from the judged milestones by their id.
    pairs : callable
        Of a plan: questions that paired comparisons answer, each with two runs: the one that stands for no, and the
        other.
    snr_oracle : str or None
        Run whose report says what experts by SNR alone bring.
    """

    id: str
    what: str
    runs: Callable[[Plan], tuple[Run, ...]]
    milestones: tuple[str, ...]
    decide: Callable[[Mapping[str, MilestoneResult]], Decision]
    pairs: Callable[[Plan], tuple[tuple[str, str, str], ...]] = lambda _: ()
    snr_oracle: str | None = None


def _ruler(plan: Plan) -> tuple[Run, ...]:
    """One ridge on several training sets; the first also under several draws of noise."""
    draws = tuple(range(1, plan.seeds))
    return tuple(Run(f"ruler-{i}", "published-ridge", i, draws if i == 0 else ()) for i in range(plan.seeds))


def _check(row: MilestoneResult, words: str) -> float | None:
    """Number of the check, on either mark, whose words begin so."""
    for check in (*row.absolute.checks, *row.reference.checks):
        if check.what.startswith(words) and check.value is not None:
            return check.value
    return None


def _after_ruler(rows: Mapping[str, MilestoneResult]) -> Decision:
    spread = _check(rows["C0"], "half the spread")
    if spread is None:
        return Decision("C1", "the stability of the ruler was not measured on this test set; C1 follows")
    state = "stable" if spread <= 0.01 else "NOT stable: numbers below are known to this only"
    return Decision(
        "C1", f"half the spread over seeds is {spread:.4f} (mark 0.01): the ruler is {state}; C1 follows"
    )


def _hybrids(plan: Plan) -> tuple[Run, ...]:
    """The best family in each bin, and the same with line indices to choose from where stars are metal-poor."""
    return tuple(Run(name, name, families=plan.families) for name in ("hybrid-moe", "hybrid-metal-poor"))


def _gates(plan: Plan) -> tuple[Run, ...]:
    """Both gates of the hybrid, and the gates of linear experts."""
    hybrids = (Run(name, name, families=plan.families) for name in ("hybrid-moe", "hybrid-regression"))
    return (*hybrids, Run("phys-moe", "phys-moe"), Run("conditional-moe", "conditional-moe"))


def _residuals(plan: Plan) -> tuple[Run, ...]:
    """A strong model, and the same with residuals learnt from all stars, and from the weak alone."""
    own = None if plan.strong == "heads" else plan.strong
    recipes = ("residual-moe", "residual-metal-poor")
    return (Run(plan.strong, plan.strong), *(Run(name, name, strong=own) for name in recipes))


def _residual_pairs(plan: Plan) -> tuple[tuple[str, str, str], ...]:
    """What residuals bring over the model that they stand on."""
    return (
        ("what residuals bring", plan.strong, "residual-moe"),
        ("what those learnt from metal-poor and faint stars bring", plan.strong, "residual-metal-poor"),
    )


def _after_hybrid(rows: Mapping[str, MilestoneResult]) -> Decision:
    value = _check(rows["C1"], "R² of hybrid-moe with true bins")
    if value is None:
        return Decision("C3", "the oracle of the hybrid was not measured; C3 follows")
    if value >= 0.70:
        return Decision(
            "C2", f"oracle-hybrid {value:.3f} ≥ 0.70: experts are strong enough for a gate; C2 follows"
        )
    return Decision(
        "C3", f"oracle-hybrid {value:.3f} < 0.70: a gate cannot give what experts lack; C3 follows"
    )


def _after_gate(rows: Mapping[str, MilestoneResult]) -> Decision:
    found = {
        "regression": _check(rows["C2.0"], "ρ of hybrid-regression"),
        "evidence": _check(rows["C2.0e"], "ρ of hybrid-moe"),
    }
    known = {gate: value for gate, value in found.items() if value is not None}
    if not known:
        return Decision("C3", "ρ of the hybrid was not measured; C3 follows")
    value = max(known.values())
    said = ", ".join(f"{value:.3f} by {gate}" for gate, value in known.items())
    what = f"ρ of the hybrid is {said}; the best, {value:.3f},"
    if value >= 0.85:
        return Decision("C4", f"{what} ≥ 0.85: the gate gives what the experts have; C4 follows")
    if value >= 0.70:
        return Decision("C3", f"{what} lies between 0.70 and 0.85: a shared trunk may do better; C3 follows")
    return Decision(
        "C1", f"{what} < 0.70: back to the experts of C1; more spectra or other families are needed"
    )


def _after_trunk(rows: Mapping[str, MilestoneResult]) -> Decision:
    verdict = rows["C3"].reference.verdict
    return Decision(
        "C4", f"trunk and heads: {verdict} on the mark for any set; residuals on top of them follow in C4"
    )


def _after_residual(rows: Mapping[str, MilestoneResult]) -> Decision:
    return Decision(END, f"residual mixture: {rows['C4'].reference.verdict} on the mark for any set")


STAGES = (
    Stage("C0", "the ruler: one ridge as published, over training and noise seeds", _ruler, ("C0",), _after_ruler),
    Stage(
        "C1", "experts: the best family in each bin, true bins; rescue of the metal-poor",
        _hybrids, ("C1", "C1.1"), _after_hybrid,
        lambda _: (("what line indices bring where stars are metal-poor", "hybrid-moe", "hybrid-metal-poor"),),
        snr_oracle="hybrid-moe",
    ),
    Stage(
        "C2", "a gate that can be deployed, and conditional fusion for faint stars",
        _gates, ("C2.0", "C2.0e", "C2.0+", "C2"), _after_gate,
        lambda _: (
            ("what a gate by regression brings over one by evidence", "hybrid-moe", "hybrid-regression"),
            ("what the experts of the hybrid bring over linear ones, both behind gates", "phys-moe", "hybrid-moe"),
        ),
    ),
    Stage(
        "C3", "a shared trunk and heads, and the same trunk with one head",
        lambda _: (Run("heads", "heads"), Run("heads-single", "heads-single")), ("C3", "C3+"), _after_trunk,
        lambda _: (("what the heads bring over one head on the same trunk", "heads-single", "heads"),),
    ),
    Stage(
        "C4", "residuals on a strong model",
        _residuals, ("C4",), _after_residual, _residual_pairs,
    ),
)  # fmt: skip
"""In their order. Thresholds are the roadmap's; none was chosen by what came out."""
