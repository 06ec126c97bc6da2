"""The roadmap C0 to C4, run in its order: fits, evaluations, verdicts, and which branch follows.

Design: `roadmap_stages.py` says what a stage is and what follows from it. Every run keeps its model and its evaluation
under its own name, complete or absent, so that a roadmap which was killed goes on where it stood. Nothing is judged
here: `milestones.judge` does, on the evaluations of the folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from moefast.protocol.roadmap_result import Comparison, Plan, RoadmapResult, StageResult
from moefast.protocol.roadmap_stages import END, STAGES, Run
from moefast.recipes import fit
from moefast.simulate import SimulatedSpectra
from moefast.simulate.sets import simulate_set

__all__ = ["Plan", "roadmap", "roadmap_text"]

SCHEMA_VERSION = 1
RESULT, TEXT, PAGE = "roadmap.json", "roadmap.txt", "roadmap.html"


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
