"""The roadmap C0 to C4, run in its order: fits, evaluations, verdicts, and which branch follows.

Design: a stage is a few runs (a fit and its evaluations) and the milestones that judge them; what follows is decided
by numbers alone, by the rules of the roadmap. Every run keeps its model and its evaluation under its own name, complete
or absent, so that a roadmap which was killed goes on where it stood. Nothing is judged here: `milestones.judge` does,
on the evaluations of the folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from moefast.core.atomic import write_atomically, write_json
from moefast.core.errors import InputError, OutputError
from moefast.core.progress import StageProgress
from moefast.core.random import NOISE_SEED
from moefast.core.records import as_entries
from moefast.core.text import bracket, number, table
from moefast.model import Model
from moefast.protocol.compare import compare, verdict_of
from moefast.protocol.comparisons import GLOBAL_AVERAGE, SNR_ORACLE
from moefast.protocol.evaluate import evaluate
from moefast.protocol.milestones.evaluations import read_reports
from moefast.protocol.milestones.judge import judge
from moefast.protocol.milestones.text import format_checks
from moefast.protocol.milestones.verdicts import MilestoneResult
from moefast.protocol.report_folder import write_report
from moefast.protocol.report_text import PUBLISHED_SNR_GAIN
from moefast.protocol.roadmap_page import comparison_words, page
from moefast.protocol.roadmap_result import Comparison, Decision, Plan, RoadmapResult, StageResult
from moefast.recipes import fit
from moefast.simulate import SimulatedSpectra
from moefast.simulate.sets import simulate_set

__all__ = ["STAGES", "Decision", "Plan", "Stage", "roadmap", "roadmap_text"]

SCHEMA_VERSION = 1
END = "the end"
RESULT, TEXT, PAGE = "roadmap.json", "roadmap.txt", "roadmap.html"


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


def roadmap(
    folder: str | Path,
    plan: Plan | None = None,
    *,
    everything: bool = False,
    resume: bool = False,
    backend: str = "auto",
    say: Callable[[str], None] | None = None,
    progress: StageProgress | None = None,
) -> RoadmapResult:
    """Run the roadmap and write its table.

    Parameters
    ----------
    folder : path
        Keeps test spectra, models, reports and the table.
    plan : Plan, optional
    everything : bool
        Run all stages, whatever the decisions say; they are told all the same.
    resume : bool
        Go on with what is in the folder.
    backend : "auto", "cpu" or "cuda"
    say : callable, optional
        Called with each decision.
    progress : callable, optional
        Called with a stage of a fit, rows or steps done, and those in all.

    Returns
    -------
    RoadmapResult

    Raises
    ------
    InputError
        The folder holds a roadmap of another plan.
    OutputError
        It is not empty, and `resume` was not asked for.
    """
    plan, folder = plan or Plan(), Path(folder)
    told = say or (lambda _: None)
    _open_folder(folder, plan, resume)
    test = folder / "test.h5"
    if not test.exists():
        simulate_set(test, plan.set, plan.part)
    stages = {stage.id: stage for stage in STAGES}
    done: dict[str, StageResult] = {}
    order, following = [stage.id for stage in STAGES], STAGES[0].id
    while following != END and following not in done:
        stage = stages[following]
        told(f"{stage.id}: {stage.what}")
        begin = time.monotonic()
        runs = stage.runs(plan)
        for run in runs:
            told(f"{stage.id}: {run.name}")
            _perform(run, plan, folder, test, backend, progress)
        rows = _judged(folder, runs)
        decision = stage.decide(rows)
        done[stage.id] = StageResult(
            id=stage.id,
            what=stage.what,
            seconds=time.monotonic() - begin,
            commands=tuple(line for run in runs for line in run.commands(plan, backend)),
            milestones=tuple(rows[name] for name in stage.milestones),
            comparisons=(
                *_by_snr(folder, stage.snr_oracle),
                *(_compared(folder, *pair) for pair in stage.pairs(plan)),
            ),
            decision=decision,
        )
        for one in done[stage.id].comparisons:
            told(f"{stage.id}: {comparison_words(one)}")
        told(f"{stage.id}: {decision.words}")
        result = _write(folder, plan, done)
        position = order.index(stage.id) + 1
        following = decision.follows if not everything else order[position] if position < len(order) else END
    return result


def _open_folder(folder: Path, plan: Plan, resume: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "plan.json"
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if not resume:
            raise OutputError(
                f"{folder}: holds a roadmap already; go on with --resume, or name another folder"
            )
        own = as_entries(plan)
        if found != own:
            other = ", ".join(
                f"{k} was {found.get(k)!r}, is {v!r}" for k, v in own.items() if found.get(k) != v
            )
            raise InputError(f"{folder}: holds a roadmap of another plan ({other}); name another folder")
        return
    if any(folder.iterdir()):
        raise OutputError(f"{folder}: is not empty and holds no roadmap; name another folder")
    write_json(as_entries(plan), kept)


def _perform(
    run: Run, plan: Plan, folder: Path, test: Path, backend: str, progress: StageProgress | None
) -> None:
    """Fit and evaluate, as far as it is not done."""
    target = folder / "models" / run.name
    target.parent.mkdir(exist_ok=True)
    if not (target / "manifest.json").exists():
        first = run.training * plan.train
        spectra = SimulatedSpectra.of_set(plan.set, rows=(first, first + plan.train))
        model = fit(
            spectra, recipe=run.recipe, families=run.families, strong=run.strong, size=plan.size, steps=plan.steps,
            backend=backend, progress=progress,
        )  # fmt: skip
        model.save(target)
    for seed in (NOISE_SEED, *run.noise_seeds):
        name = run.name if seed == NOISE_SEED else f"{run.name}-noise-{seed}"
        report = folder / "reports" / name
        if (report / "report.json").exists():
            continue
        report.parent.mkdir(exist_ok=True)
        noise: Literal["auto", "draw"] = "auto" if seed == NOISE_SEED else "draw"
        found = evaluate(test, Model.load(target), noise=noise, noise_seed=seed, backend=backend)
        write_report(found, report, pictures=False)


def _judged(folder: Path, runs: Sequence[Run]) -> dict[str, MilestoneResult]:
    """Milestones by their id, judged by all evaluations of the stage."""
    reports = [
        folder / "reports" / name
        for run in runs
        for name in (run.name, *(f"{run.name}-noise-{seed}" for seed in run.noise_seeds))
    ]
    (section,) = judge(read_reports(reports)).sections
    return {row.id: row for row in section.milestones}


def _compared(folder: Path, what: str, base: str, other: str) -> Comparison:
    """The paired difference in R² of two runs, with its interval and verdict."""
    found = compare([folder / "reports" / base, folder / "reports" / other])["comparisons"][0]["overall"][
        "r2"
    ]
    low, high = found["interval"]
    return Comparison(
        what, base, other, found["from"], found["to"], found["difference"], (low, high), found["verdict"]
    )


def _by_snr(folder: Path, run: str | None) -> tuple[Comparison, ...]:
    """What the report of a run says of one ridge for each bin of snr_norm against one for all; nothing without them."""
    if run is None:
        return ()
    (evaluation,) = read_reports([folder / "reports" / run])
    found = evaluation.report.snr_oracle
    if found is None:
        return ()
    low, high = found.gain_interval
    return (
        Comparison(
            f"what a ridge for each of four bins of SNR brings over one for all (published {PUBLISHED_SNR_GAIN:+.2f})",
            GLOBAL_AVERAGE,
            SNR_ORACLE,
            found.r2_one,
            found.r2,
            found.gain,
            (low, high),
            verdict_of(found.gain, low, high, higher_is_better=True),
        ),
    )


def _write(folder: Path, plan: Plan, done: Mapping[str, StageResult]) -> RoadmapResult:
    result = RoadmapResult(SCHEMA_VERSION, "moefast roadmap", plan, tuple(done), tuple(done.values()))
    write_json(as_entries(result), folder / RESULT)
    write_atomically(folder / TEXT, (roadmap_text(result) + "\n").encode())
    write_atomically(folder / PAGE, page(result).encode())
    return result


def roadmap_text(result: RoadmapResult) -> str:
    """The table, the decisions in their order, and every check, as plain text.

    Parameters
    ----------
    result : RoadmapResult
    """
    plan = result.plan
    lines = [
        f"Roadmap on {plan.set} {plan.part}: {plan.train:,} training spectra, networks {plan.size}", "",
    ]  # fmt: skip
    cells = [
        (
            row.id, row.published, number(row.ours.value), bracket(row.ours.interval),
            row.absolute.verdict, row.reference.verdict, f"{stage.seconds:.0f} s",
        )
        for stage in result.stages
        for row in stage.milestones
    ]  # fmt: skip
    lines += table(("", "published R²", "our R²", "interval", "their mark", "any set", "time"), cells, left=2)
    lines += ["", "Decisions"]
    lines += [f"  {stage.id}  {stage.decision.words}" for stage in result.stages]
    compared = [
        f"  {stage.id}  {comparison_words(one)}" for stage in result.stages for one in stage.comparisons
    ]
    lines += ["", "Paired comparisons", *compared] if compared else []
    milestones = [
        replace(row, commands=stage.commands) for stage in result.stages for row in stage.milestones
    ]
    return "\n".join([*lines, *(line.rstrip() for line in format_checks(milestones))])
