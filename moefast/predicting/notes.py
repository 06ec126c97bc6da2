"""What users should know before they use the numbers of a run, in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moefast.core.outputs import HEADLINE
from moefast.core.text import counted
from moefast.model import Model, shipped_path
from moefast.posterior.mixture import PosteriorMixture
from moefast.posterior.velocities import KNOWN, VelocityFit
from moefast.predicting.flags import SURE
from moefast.predicting.run import Counts
from moefast.predicting.summary import Summary
from moefast.spectra.layouts.pfsspec import IDENTIFIER
from moefast.spectra.prepared import PreparedShard
from moefast.spectra.quality import Flag
from moefast.spectra.spectrum_set import SpectrumSet
from moefast.spectra.velocities import Velocities

__all__ = [
    "LEAST_HALF",
    "LEAST_MISFIT",
    "misfit",
    "notes_on_input",
    "notes_on_params",
    "notes_on_predictions",
]

LEAST_MISFIT, LEAST_HALF = 0.01, 30
"""How much larger χ² of the brighter half must be, and of how many spectra, to be told."""


def notes_on_input(
    spectra: SpectrumSet,
    moved: Velocities | VelocityFit | None,
    model: Model,
    velocity: float | str | Path | None,
    *,
    weighed: VelocityFit | None,
) -> list[str]:
    """What the files, and the velocities, have users know; `weighed` is what weighs velocities with the spectra."""
    notes = [note for shard in spectra.shards if isinstance(shard, PreparedShard) for note in shard.notes]
    if isinstance(moved, VelocityFit):
        why = "" if velocity is not None else "none were given, so "
        how = (
            ""
            if velocity is not None
            else "; --velocity TABLE gives them, --velocity 0 takes spectra to be at rest"
        )
        # Without a word on velocities, spectra of the simulator beside those of surveys are at rest.
        still = velocity is None and not all(
            isinstance(shard, PreparedShard) and shard.observed for shard in spectra.shards
        )
        of = "star of a survey's files" if still else "star"
        beside = "; spectra of the simulator are taken to be at rest" if still else ""
        notes.append(
            f"velocities: {why}one was fitted to each {of} within {moved.largest:g} km/s (v_los, "
            f"v_los_err){beside}{how}"
        )
    elif moved is not None:
        notes += moved.notes
        if weighed is not None and moved.error is not None:
            notes.append(
                f"velocities: those with errors above {KNOWN:g} km/s are weighed with what the spectra say; v_los and "
                "v_los_err are those of both together"
            )
            beyond = int(np.sum((moved.error > KNOWN) & (np.abs(moved.velocity) >= weighed.largest)))
            if beyond:
                notes.append(
                    f"velocities: {beyond} with such errors lie beyond {weighed.largest:g} km/s and are taken as they "
                    "are, as if they were exact; a wider --velocity-range weighs them, too"
                )
    elif any(isinstance(shard, PreparedShard) and shard.observed for shard in spectra.shards):
        notes.append(
            "velocities: none were given, and this model fits none: spectra are taken to be at rest, which those of "
            "surveys are not; use --velocity, or a model that fits them (-m observed)"
        )
    elif isinstance(model.mixture, PosteriorMixture):
        notes.append(
            "velocities: spectra of the simulator are taken to be at rest; --velocity fit fits one to each"
        )
    return list(dict.fromkeys(notes))


def notes_on_params(spectra: SpectrumSet, ids: Mapping[str, np.dtype], labelled: bool) -> list[str]:
    """What of the params tables is not used, and why; and what to know about the rest."""
    notes = []
    names = [
        name
        for shard in spectra.shards
        if not isinstance(shard, PreparedShard)
        for name in (*shard.columns, *shard.unreadable)
    ]
    for name in dict.fromkeys(names):
        wanted = IDENTIFIER.fullmatch(name) or name == HEADLINE
        if not wanted or name in ids or (name == HEADLINE and labelled):
            continue
        for shard in spectra.shards:
            if name in shard.unreadable:
                notes.append(f"column {name!r} is left out: in {shard.path} it {shard.unreadable[name]}")
                break
            if name not in shard.columns:
                notes.append(f"column {name!r} is left out: {shard.path} has none")
                break
        else:
            notes.append(f"column {name!r} is left out: it holds text where numbers are expected")
    notes += _identifiers_left_out(spectra, ids)
    if labelled:
        notes += spectra.label_notes((HEADLINE,))
    return notes


def _identifiers_left_out(spectra: SpectrumSet, ids: Mapping[str, np.dtype]) -> list[str]:
    """Identifiers of files of surveys that go into no table, because another file has none."""
    lacking: dict[str, list[str]] = {}
    for shard in spectra.shards:
        for name in shard.identifiers if isinstance(shard, PreparedShard) and shard.observed else ():
            if name in ids or any(name in names for names in lacking.values()):
                continue
            without = next((str(other.path) for other in spectra.shards if name not in other.columns), None)
            if without is not None:
                lacking.setdefault(without, []).append(name)
    return [
        f"identifiers {', '.join(names)} are left out: {path} has none of that name; predicted apart, files keep them"
        for path, names in lacking.items()
    ]


def notes_on_predictions(counts: Counts, summary: Summary, model: Model) -> list[str]:
    """What the predictions themselves say: spectra lost, unlike the training set, or fitting worse if bright."""
    notes = []
    lost = summary.flags.get(str(Flag.NO_DATA.name), 0)
    if lost:
        mean = "; each counts as the label mean in R²" if summary.r2 is not None else ""
        notes.append(
            f"{lost:,} of {counted(summary.n_rows, 'spectrum')} without a good pixel got no prediction{mean}"
        )
    chi2, snr = (np.concatenate(values) if values else np.empty(0) for values in (counts.chi2, counts.snr))
    chi2, snr = chi2[np.isfinite(chi2)], snr[np.isfinite(chi2)]
    if summary.n_rows and counts.unlike > summary.n_rows / 2:
        notes.append(
            f"{counts.unlike:,} of {counted(summary.n_rows, 'spectrum')} {'is' if counts.unlike == 1 else 'are'} "
            "flagged UNLIKE_TRAINING: check that flux is "
            + ("" if isinstance(model.mixture, PosteriorMixture) else "normalised to a median near 1 and ")
            + "in the units of its error, or fit a model on spectra like these"
        )
    elif (found := misfit(chi2, snr)) is not None:
        notes.append(
            f"the brighter half of the spectra fits the model worse than the fainter one (median chi2 {found[0]:.3f}, "
            f"{found[1]:.3f}), so they hold what it has not seen: velocities, reddening or calibration errors? "
            + (
                "Try -m survey, or fit"
                if model.path and model.path.parent == shipped_path().parent
                else "Fit"
            )
            + " a model on spectra like these"
        )
    return notes


def misfit(chi2: NDArray, snr: NDArray) -> tuple[float, float] | None:
    """Median χ² of the brighter and of the fainter half, if the first is larger beyond doubt.

    Errors that are wrong by a factor raise both alike; light that the components cannot give counts by the square of
    the SNR. It is lost in the noise of one spectrum, not in that of thousands.
    """
    bright = snr > np.median(snr) if snr.size else np.empty(0, bool)
    halves = chi2[bright], chi2[~bright]
    if min(half.size for half in halves) < LEAST_HALF:
        return None
    a, b = (float(np.median(half)) for half in halves)
    # Of a median, 1.2533 times that of a mean; spreads from quartiles, which no odd spectrum moves.
    spread = [np.subtract(*np.quantile(half, (0.75, 0.25))) / 1.349 / np.sqrt(half.size) for half in halves]
    return (a, b) if a - b > max(LEAST_MISFIT, SURE * 1.2533 * float(np.hypot(*spread))) else None
