"""C0, the ruler: is it stable, and what explains the published R²? `python benchmarks/c0.py --train N --out FOLDER`.

Design: training seed k is rows k·n … (k + 1)·n of a set's part `train` with noise of seed k, generated in memory; noise
seeds are the stored noise of the test stars and further draws. One pass per training seed gathers normal equations, one
for each way to see a spectrum; all penalties, the smaller training set and everything linear that is done to spectra
follow from them. Predictions of all fits for one draw of noise are one matrix product. A penalty is chosen on stars of
the part `validation`, never on test stars: test R² along a path is shown, not used. Every R² is `moefast.protocol`'s.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from moefast.benchmarks.c0_report import PUBLISHED_R2, TESTS, picture, tables
from moefast.benchmarks.environment import describe
from moefast.core.atomic import write_json
from moefast.core.groups import assign_octiles, octile_edges
from moefast.core.metrics import r2
from moefast.core.random import NOISE_SEED, add_noise
from moefast.core.records import as_entries
from moefast.experts.normal_equations import Moments, NormalEquations
from moefast.experts.ridge import NoisePath, principal_subspace, ridge
from moefast.fitting import PUBLISHED_ALPHA
from moefast.mixture import hat_weights
from moefast.protocol.report import DataSet, Predictions, evaluate_predictions
from moefast.protocol.report import Stars as Measured
from moefast.protocol.report_parts import Report
from moefast.simulate import SimulatedSpectra
from moefast.spectra.quality import assess

__all__ = ["measure_set", "rectified"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Source = Callable[[str, str, tuple[int, int] | None], SimulatedSpectra]
"""Set, part, rows -> spectra."""

SETS = ("z0", "survey")
STABLE = 0.01
"""Half the spread of R² over all seeds that a ruler may have."""

PENALTIES = 10.0 ** np.arange(-7, 0.25, 0.5)
"""α/n of the path of `published-ridge`, in flux²."""
OTHER_PENALTIES = 10.0 ** np.arange(-4, 3.25, 0.5)
"""α/n where flux is brought to another unit, in that unit squared."""
NOISE_PENALTIES = np.array([0.0, *10.0 ** np.arange(-3, 2.25, 0.5)])
"""α/n of `global-ridge`, in units of the mean noise variance."""
N_LEVELS = 8
BLOCK_ROWS = 2048
ROWS_FOR_LEVELS = 8192


# --- ways to see a spectrum --------------------------------------------------------------------------------


def clipped(flux: F32, error: F32) -> F32:
    """Flux, zero where it is negative: as published."""
    return np.maximum(flux, np.float32(0))


def as_it_is(flux: F32, error: F32) -> F32:
    """Flux."""
    return flux


def over_error(flux: F32, error: F32) -> F32:
    """Clipped flux over the star's own error. The error holds the star's photon noise, and so its labels."""
    return clipped(flux, error) / error


def standard_spectrum(flux: F32, error: F32) -> F32:
    """(x − mean)/standard deviation of the clipped spectrum."""
    x = clipped(flux, error)
    x = x - x.mean(1, keepdims=True)
    return x / x.std(1, keepdims=True)


VIEWS = {view.__name__: view for view in (clipped, as_it_is, over_error, standard_spectrum)}


def rectified(flux: F32, error: F32) -> tuple[F32, F32]:
    """Mean xΦ(t) + σφ(t) and variance of max(x + σε, 0) with ε ~ N(0, 1) and t = x/σ: clipping in closed form.

    Parameters
    ----------
    flux, error : array of shape (n, p), float32

    Returns
    -------
    mean, variance : array of shape (n, p), float32
    """
    mean, variance = flux.copy(), error * error
    # Six σ above zero nothing is cut.
    near = flux < 6 * error
    x, s = flux[near].astype(np.float64), error[near].astype(np.float64)
    t = x / s
    below, density = ndtr(t), np.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)
    m = x * below + s * density
    mean[near] = m
    variance[near] = np.maximum((x * x + s * s) * below + x * s * density - m * m, 0)
    return mean, variance


# --- fits --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fits:
    """Linear fits of one view, side by side: log g = (view − reference) W + c; W (p, c), c (c,)."""

    weights: F64
    intercepts: F64

    def __add__(self, other: Fits) -> Fits:
        return Fits(
            np.concatenate([self.weights, other.weights], 1),
            np.concatenate([self.intercepts, other.intercepts]),
        )


def path(
    moments: Moments,
    penalties: Sequence[float] | F64,
    *,
    closed: bool = False,
    scale: F64 | None = None,
    centre: bool = False,
) -> Fits:
    """Ridge fits for every α/n; with `closed` the mean noise variance is added to the normal equations.

    `scale` multiplies the pixels first, `centre` takes off each spectrum's mean first: linear maps, so the normal
    equations of the mapped spectra follow. The weights are those for spectra that are not mapped.
    """
    gram, cross = moments.gram, moments.cross
    if scale is not None:
        gram, cross = gram * scale[:, None] * scale, cross * scale
    if centre:
        gram = gram - gram.mean(0)
        gram -= gram.mean(1, keepdims=True)
        cross = cross - cross.mean()
    mapped = replace(moments, gram=gram, cross=cross)
    noise = moments.variance if closed else 0.0
    weights = np.full((moments.mean_x.size, len(penalties)), np.nan)
    for i, alpha in enumerate(penalties):
        # Too small a penalty for so few rows gives no fit: predictions of NaN, which score 0.
        with suppress(np.linalg.LinAlgError):
            weights[:, i] = ridge(mapped, alpha * moments.n, noise)[0]
    if scale is not None:
        weights *= scale[:, None]
    if centre:
        weights -= weights.mean(0)
    return Fits(weights, moments.mean_y - moments.mean_x @ weights)


@dataclass(frozen=True)
class NoiseConditional:
    """`global-ridge` for several penalties: weights (r, A, M) in the basis T (p, r), intercepts (A, M), knots (M,)."""

    basis: F32
    noise_shape: F64
    knots: F64
    weights: F64
    intercepts: F64

    @classmethod
    def of(cls, equations: NormalEquations, errors: F32, penalties: F64) -> NoiseConditional:
        """Solve as `moefast.fitting` does, for every penalty instead of the cross-validated one."""
        moments = equations.moments()
        subspace = principal_subspace(moments, moments.variance)
        small = NoisePath(equations.transform(subspace.basis).moments())
        low, high = np.quantile(log_levels(errors, moments.variance), [0.001, 0.999])
        knots = np.linspace(low - math.log(2), high + math.log(2), N_LEVELS)
        solved = [[small.solve(math.exp(knot), alpha) for knot in knots] for alpha in penalties]
        weights = np.array([[w for w, _ in row] for row in solved]).transpose(2, 0, 1)
        intercepts = np.array([[c for _, c in row] for row in solved])
        return cls(subspace.basis.astype(np.float32), moments.variance, knots, weights, intercepts)

    def predict(self, x: F32, levels: F64) -> F64:
        """(n, A) from flux less the reference and ln s."""
        hat = hat_weights(np.clip(levels, self.knots[0], self.knots[-1]), self.knots)
        values = np.einsum("nr,ram->nam", x @ self.basis, self.weights, optimize=True) + self.intercepts
        return np.einsum("nam,nm->na", values, hat)


def log_levels(error: F32, noise_shape: F64) -> F64:
    """Noise level ln s of each star: s² = mean(σ²/D)."""
    return 0.5 * np.log((error * error) @ (1 / noise_shape) / noise_shape.size)


@dataclass
class Gathered:
    """Normal equations of one training seed, by name: a view's name, "closed" (clean flux) or "rectified"."""

    equations: dict[str, NormalEquations]
    errors: F32
    labels: tuple[float, float]

    def moments(self, name: str, **which: Any) -> Moments:
        """See `NormalEquations.moments`; the first fifth of the rows is fold 0."""
        return self.equations[name].moments(**which)


def gather(
    spectra: SimulatedSpectra, seed: int, names: Sequence[str], references: Mapping[str, F64]
) -> Gathered:
    """One pass over training spectra. Noise is the draw that `moefast fit --noise sampled --seed SEED` makes."""
    y = spectra.labels(("log_g",))["log_g"]
    equations = {name: NormalEquations(references[name], n_folds=2) for name in names}
    errors = []
    for block in spectra.blocks(BLOCK_ROWS, array="flux"):
        rows = np.arange(block.first_row, block.first_row + len(block))
        folds = (rows >= spectra.n_rows // 5).astype(np.int64)
        noisy = add_noise(block.flux, block.error, seed, rows)
        for name, x, variance in seen(names, block.flux, block.error, noisy):
            equations[name].add(x, y[rows], variance, folds=folds)
        if block.first_row < ROWS_FOR_LEVELS:
            errors.append(block.error)
    for total in equations.values():
        total.finish()
    return Gathered(equations, np.concatenate(errors), (float(y.min()), float(y.max())))


def seen(names: Sequence[str], flux: F32, error: F32, noisy: F32) -> Iterator[tuple[str, F32, F32]]:
    """Name, rows and noise variance for each of the names."""
    for name in names:
        if name == "closed":
            yield name, flux, error * error
        elif name == "rectified":
            yield name, *rectified(flux, error)
        else:
            yield name, VIEWS[name](noisy, error), error * error


def find_references(spectra: SimulatedSpectra, names: Sequence[str]) -> dict[str, F64]:
    """Mean row of the first block, per name; "closed" and "rectified" share those of the flux that they stand for."""
    block = next(spectra.blocks(BLOCK_ROWS, array="flux"))
    noisy = add_noise(block.flux, block.error, 0, np.arange(len(block)))
    found = {name: x.mean(0, dtype=np.float64) for name, x, _ in seen(names, block.flux, block.error, noisy)}
    stands_for = {"closed": "as_it_is", "rectified": "clipped"}
    return {name: found.get(stands_for.get(name, name), found[name]) for name in names}


# --- stars to score ----------------------------------------------------------------------------------------


@dataclass
class Stars:
    """A part that is scored, in memory."""

    spectra: SimulatedSpectra
    flux: F32
    error: F32
    stored: F32
    labels: dict[str, F64]

    @classmethod
    def of(cls, spectra: SimulatedSpectra) -> Stars:
        """Make the stars."""
        clean = list(spectra.blocks(BLOCK_ROWS, array="flux"))
        return cls(
            spectra,
            np.concatenate([block.flux for block in clean]),
            np.concatenate([block.error for block in clean]),
            np.concatenate([block.flux for block in spectra.blocks(BLOCK_ROWS, array="noisy")]),
            spectra.labels(("T_eff", "log_g", "M_H")),
        )

    def noisy(self, seed: int | None) -> F32:
        """Stored noise, or the draw of `moefast.protocol.scorer` with this seed."""
        if seed is None:
            return self.stored
        return add_noise(self.flux, self.error, seed, np.arange(len(self.flux)))


@dataclass(frozen=True)
class Plan:
    """Sizes and seeds of a run."""

    train: int
    validation: int = 10_000
    n_training: int = 5
    noise_seeds: tuple[int | None, ...] = (None, *(NOISE_SEED + k for k in range(1, 5)))
    penalties: tuple[float, ...] = tuple(PENALTIES)
    other_penalties: tuple[float, ...] = tuple(OTHER_PENALTIES)
    noise_penalties: tuple[float, ...] = tuple(NOISE_PENALTIES)


def at_published(penalties: Sequence[float]) -> int:
    """Where the published penalty is on a path."""
    found = int(np.abs(np.log(np.array(penalties) / PUBLISHED_ALPHA)).argmin())
    if not math.isclose(penalties[found], PUBLISHED_ALPHA):
        raise ValueError(f"the path lacks the published penalty {PUBLISHED_ALPHA}: {penalties}")
    return found


@dataclass(frozen=True)
class Choice:
    """One thing done otherwise than published: equations and view it needs, and how `path` is to treat them."""

    what: str
    equations: str
    view: str
    treat: Mapping[str, Any]
    other_unit: bool = False


def choices(moments: Moments) -> list[Choice]:
    """The published configuration first, then one change each; `moments` are those of the published configuration."""
    deviation, noise = np.sqrt(np.diag(moments.gram) / moments.n), np.sqrt(moments.variance)
    return [
        Choice("as published", "clipped", "clipped", {}),
        Choice("flux not clipped", "as_it_is", "as_it_is", {}),
        Choice("noise in closed form", "rectified", "clipped", {"closed": True}),
        Choice("noise in closed form, flux not clipped", "closed", "as_it_is", {"closed": True}),
        Choice("each pixel standardised", "clipped", "clipped", {"scale": 1 / deviation}, True),
        Choice("each pixel over its mean noise", "clipped", "clipped", {"scale": 1 / noise}, True),
        Choice("mean of each spectrum taken off", "clipped", "clipped", {"centre": True}),
        Choice("each spectrum standardised", "standard_spectrum", "standard_spectrum", {}, True),
        Choice("each pixel over the star's own error", "over_error", "over_error", {}, True),
    ]


# --- one set -----------------------------------------------------------------------------------------------


@dataclass
class Fitted:
    """All fits of one set.

    Attributes
    ----------
    references : dict of str to array of shape (p,)
        See `find_references`.
    of_view : dict of str to Fits
        Fits by the view that they are applied to.
    places : dict
        View and columns of each path: of ("path", training seed), of "fewer", and of what was changed.
    conditional : list of NoiseConditional
        `global-ridge`, one for each training seed.
    labels : list of tuple of float
        Least and largest label of each training seed; predictions are clipped to them as `evaluate` does.
    training : list of dict
        Rows, fingerprint and seed of each.
    choices : list of Choice
    """

    references: dict[str, F64] = field(default_factory=dict)
    of_view: dict[str, Fits] = field(default_factory=dict)
    places: dict[Any, tuple[str, slice]] = field(default_factory=dict)
    conditional: list[NoiseConditional] = field(default_factory=list)
    labels: list[tuple[float, float]] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)

    def keep(self, key: Any, view: str, new: Fits) -> None:
        """Put the fits of a path beside those of the same view."""
        before = self.of_view.get(view)
        start = 0 if before is None else before.intercepts.size
        self.of_view[view] = new if before is None else before + new
        self.places[key] = (view, slice(start, start + new.intercepts.size))


def fit_all(name: str, source: Source, plan: Plan, say: Callable[[str], None]) -> Fitted:
    """All fits of a set; whatever differs from what was published by the first training seed alone."""
    basic = ("clipped", "closed")
    every = ("clipped", "closed", "as_it_is", "rectified", "over_error", "standard_spectrum")
    fitted = Fitted()
    for k in range(plan.n_training):
        rows = (k * plan.train, (k + 1) * plan.train)
        spectra = source(name, "train", rows)
        fitted.references = fitted.references or find_references(spectra, every)
        gathered = gather(spectra, k, every if k == 0 else basic, fitted.references)
        say(f"{name}: training seed {k}, normal equations")
        fitted.training.append({"rows": list(rows), "fingerprint": spectra.fingerprint(), "seed": k})
        fitted.labels.append(gathered.labels)
        moments = gathered.moments("clipped")
        fitted.keep(("path", k), "clipped", path(moments, plan.penalties))
        fitted.conditional.append(
            NoiseConditional.of(gathered.equations["closed"], gathered.errors, np.array(plan.noise_penalties))
        )
        if k == 0:
            fewer = gathered.moments("clipped", without_fold=1)
            fitted.keep("fewer", "clipped", path(fewer, plan.penalties))
            fitted.choices = choices(moments)
            for choice in fitted.choices[1:]:
                penalties = plan.other_penalties if choice.other_unit else plan.penalties
                new = path(gathered.moments(choice.equations), penalties, **choice.treat)
                fitted.keep(choice.what, choice.view, new)
        say(f"{name}: training seed {k}, fits")
        # Before the next ones are gathered: each holds gigabytes.
        del gathered, moments
    return fitted


@dataclass
class Scores:
    """R² of every fit on the stars of a part, for every draw of noise.

    Attributes
    ----------
    places : dict
        Those of `Fitted`.
    of_view : dict of str to array of shape (draws, fits)
    unclipped : array of shape (draws, penalties)
        `published-ridge` of the first training seed, predictions not clipped to its labels.
    levelled : array of shape (training seeds, draws, penalties)
        `global-ridge`.
    predicted : dict of tuple of int to array of shape (n, penalties)
        Predictions of `published-ridge` by training seed and draw, if they are kept.
    predicted_levelled : list of array of shape (n, penalties)
        Those of `global-ridge` of the first training seed by draw, if they are kept.
    """

    places: Mapping[Any, tuple[str, slice]]
    of_view: dict[str, F64]
    unclipped: F64
    levelled: F64
    predicted: dict[tuple[int, int], F64] = field(default_factory=dict)
    predicted_levelled: list[F64] = field(default_factory=list)

    def of(self, key: Any) -> F64:
        """R² of a path, (draws, penalties)."""
        view, columns = self.places[key]
        return self.of_view[view][:, columns]


def score(fitted: Fitted, stars: Stars, draws: Sequence[int | None], plan: Plan, *, keep: bool) -> Scores:
    """R² of every fit for every draw; `keep` says whether predictions are kept."""
    y, n = stars.labels["log_g"], len(draws)
    scores = Scores(
        fitted.places,
        {view: np.empty((n, fits.intercepts.size)) for view, fits in fitted.of_view.items()},
        np.empty((n, len(plan.penalties))),
        np.empty((plan.n_training, n, len(plan.noise_penalties))),
    )
    for d, seed in enumerate(draws):
        noisy = stars.noisy(seed)
        for view, fits in fitted.of_view.items():
            x = VIEWS[view](noisy, stars.error) - fitted.references[view].astype(np.float32)
            raw = (x @ fits.weights.astype(np.float32)).astype(np.float64) + fits.intercepts
            clipped_to_labels = np.clip(raw, *fitted.labels[0])
            if view == "clipped":
                # Each training seed has its own range of labels.
                for k in range(plan.n_training):
                    columns = fitted.places["path", k][1]
                    clipped_to_labels[:, columns] = np.clip(raw[:, columns], *fitted.labels[k])
                    if keep:
                        scores.predicted[k, d] = clipped_to_labels[:, columns].copy()
                first = raw[:, fitted.places["path", 0][1]]
                scores.unclipped[d] = [r2(y, column) for column in first.T]
            scores.of_view[view][d] = [r2(y, column) for column in clipped_to_labels.T]
        x = noisy - fitted.references["closed"].astype(np.float32)
        for k, model in enumerate(fitted.conditional):
            levels = log_levels(stars.error, model.noise_shape)
            predicted = np.clip(model.predict(x, levels), *fitted.labels[k])
            scores.levelled[k, d] = [r2(y, column) for column in predicted.T]
            if keep and k == 0:
                scores.predicted_levelled.append(predicted)
    return scores


def measure_set(
    name: str, source: Source, plan: Plan, say: Callable[[str], None], reports: Path | None = None
) -> dict[str, Any]:
    """All of C0 on one reference set.

    Parameters
    ----------
    name : str
    source : callable
        Makes spectra of set, part and rows.
    plan : Plan
    say : callable
        Told what is being done.
    reports : Path, optional
        Folder to which evaluations of `published-ridge` are written, for `moefast milestones`.

    Returns
    -------
    dict
        JSON-ready.
    """
    parts = {part: Stars.of(source(name, part, None)) for part in TESTS}
    parts["validation"] = Stars.of(source(name, "validation", (0, plan.validation)))
    fitted = fit_all(name, source, plan, say)
    scores: dict[str, Scores] = {}
    for part, stars in parts.items():
        draws = plan.noise_seeds if part in TESTS else (None,)
        scores[part] = score(fitted, stars, draws, plan, keep=part == TESTS[0])
        say(f"{name}: {part} scored")
    held, seeds = scores["validation"], range(plan.n_training)
    chosen = [int(held.of(("path", k))[0].argmax()) for k in seeds]
    chosen_level = [int(held.levelled[k, 0].argmax()) for k in seeds]
    published = at_published(plan.penalties)
    if reports is not None:
        for (k, d), predicted in scores[TESTS[0]].predicted.items():
            if 0 in {k, d}:
                content = evaluation(
                    name,
                    parts[TESTS[0]],
                    predicted[:, published],
                    plan,
                    fitted.training[k],
                    plan.noise_seeds[d],
                )
                folder = reports / f"{name}-training-{k}-noise-{d}"
                folder.mkdir(parents=True, exist_ok=True)
                write_json(as_entries(content), folder / "report.json")
        say(f"{name}: reports written")
    return {
        "fingerprints": {
            "train": fitted.training,
            **{part: stars.spectra.fingerprint() for part, stars in parts.items()},
        },
        "recipes": {
            "published-ridge": {
                part: spread(np.array([scores[part].of(("path", k))[:, published] for k in seeds]))
                for part in TESTS
            },
            "global-ridge": {
                part: spread(np.array([scores[part].levelled[k][:, chosen_level[k]] for k in seeds]))
                for part in TESTS
            },
        },
        "paths": {
            "published-ridge": {
                "penalties": list(plan.penalties),
                "unit": "flux² per star",
                "chosen": [plan.penalties[c] for c in chosen],
                "validation": [held.of(("path", k))[0].tolist() for k in seeds],
                **{part: [scores[part].of(("path", k)).tolist() for k in seeds] for part in TESTS},
            },
            "global-ridge": {
                "penalties": list(plan.noise_penalties),
                "unit": "mean noise variance per star",
                "chosen": [plan.noise_penalties[c] for c in chosen_level],
                "validation": held.levelled[:, 0].tolist(),
                **{part: scores[part].levelled.tolist() for part in TESTS},
            },
        },
        "choices": compare_choices(fitted, scores[TESTS[0]], held, plan),
        "octiles": by_octile(parts[TESTS[0]], scores[TESTS[0]], published, chosen[0], chosen_level[0]),
    }


def spread(values: F64) -> dict[str, Any]:
    """Of R² (training seeds, noise seeds)."""
    half = float(values.max() - values.min()) / 2
    return {
        "r2": values.tolist(),
        "mean": float(values.mean()),
        "half_spread": half,
        "deviation_of_training_seeds": float(values.mean(1).std(ddof=1)),
        "deviation_of_noise_seeds": float(values.mean(0).std(ddof=1)),
        "stable": half <= STABLE,
    }


def compare_choices(fitted: Fitted, test: Scores, held: Scores, plan: Plan) -> list[dict[str, Any]]:
    """R² of each thing done otherwise, at the published penalty and at the one chosen on stars held out."""
    words = {
        "fewer": f"{plan.train // 5:,} training stars instead of {plan.train:,}",
        "unclipped": "predictions not clipped to the range of labels",
    }
    other_unit = {choice.what for choice in fitted.choices if choice.other_unit}
    rows = []
    for what in [*(choice.what for choice in fitted.choices), "fewer", "unclipped"]:
        key = ("path", 0) if what == fitted.choices[0].what else what
        on_test, on_held = (each.unclipped if what == "unclipped" else each.of(key) for each in (test, held))
        best = int(on_held[0].argmax())
        penalties = plan.other_penalties if what in other_unit else plan.penalties
        rows.append(
            {
                "what": words.get(what, what),
                "r2_published_penalty": on_test[:, at_published(penalties)].tolist(),
                "penalty_chosen": penalties[best],
                "at_the_end_of_the_path": best in {0, len(penalties) - 1},
                "r2_penalty_chosen": on_test[:, best].tolist(),
            }
        )
    return rows


def by_octile(stars: Stars, scores: Scores, published: int, chosen: int, chosen_level: int) -> dict[str, Any]:
    """R² within octiles of snr_median, mean over the draws, of the first training seed.

    Parameters
    ----------
    stars : Stars
    scores : Scores
        Of these stars, with predictions.
    published, chosen, chosen_level : int
        Penalties: the published one, the one chosen on stars held out, and that of `global-ridge`.
    """
    snr = assess(stars.stored, stars.error, None, None)
    octile = assign_octiles(snr.snr_median, octile_edges(snr.snr_median))
    y, draws = stars.labels["log_g"], range(len(scores.predicted_levelled))
    columns = {
        "published": [scores.predicted[0, d][:, published] for d in draws],
        "chosen": [scores.predicted[0, d][:, chosen] for d in draws],
        "global-ridge": [scores.predicted_levelled[d][:, chosen_level] for d in draws],
    }

    def within(column: F64) -> F64:
        return np.array([r2(y[octile == o], column[octile == o]) for o in range(8)])

    return {
        "snr_median": [float(np.median(snr.snr_median[octile == o])) for o in range(8)],
        **{
            what: np.mean([within(column) for column in of_draws], axis=0).tolist()
            for what, of_draws in columns.items()
        },
    }


def evaluation(
    name: str, stars: Stars, predicted: F64, plan: Plan, training: Mapping[str, Any], seed: int | None
) -> Report:
    """The evaluation of one fit of `published-ridge`, as `moefast evaluate` writes it."""
    quality = assess(stars.noisy(seed), stars.error, None, None)
    identity = stars.spectra.identity
    return evaluate_predictions(
        Measured(
            stars.labels["log_g"], stars.labels["T_eff"], stars.labels["M_H"], quality.snr_norm, quality.snr_median
        ),
        Predictions(predicted),
        DataSet(
            f"{name} {TESTS[0]}", stars.spectra.fingerprint(),
            reference_set=None if identity is None else identity._asdict(),
            noise="stored" if seed is None else "drawn", noise_level=1.0, noise_seed=seed,
        ),
        model={
            "kind": "model", "name": "published-ridge", "recipe": "published-ridge",
            "training": {"fingerprint": training["fingerprint"], "n_spectra": plan.train, "seed": training["seed"]},
        },
    )  # fmt: skip


@click.command()
@click.option(
    "--train", default=100_000, show_default=True, help="Training stars of each of the five training seeds."
)
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder to write to.")
@click.option("--quick", is_flag=True, help="8000 training stars, two seeds of each kind, a coarse path.")
@click.option(
    "--reports/--no-reports", default=True, show_default=True, help="Write evaluations for milestones."
)
def main(train: int, out: str, quick: bool, reports: bool) -> None:
    """Measure C0 on z0 and survey: c0.json, c0.md, c0.png, and evaluations for moefast milestones in c0/."""
    begin = time.monotonic()
    plan = Plan(train)
    if quick:
        plan = Plan(8000, 1000, 2, plan.noise_seeds[:2], (1e-4, 0.1), (0.1, 10.0), (0.0, 1.0))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)

    def say(what: str) -> None:
        click.echo(f"{time.monotonic() - begin:6.0f} s  {what}", err=True)

    found = {
        name: measure_set(
            name,
            SimulatedSpectra.of_set,
            plan,
            say,
            folder / "c0" if reports else None,
        )
        for name in SETS
    }
    result = {
        "what": "C0",
        "train": plan.train,
        "validation": plan.validation,
        "noise_seeds": list(plan.noise_seeds),
        "published": {"r2": PUBLISHED_R2, "alpha_per_star": PUBLISHED_ALPHA},
        "seconds": round(time.monotonic() - begin),
        "environment": describe(),
        "sets": found,
    }
    (folder / "c0.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    text = "\n\n".join(f"## {what}\n\n{table}" for what, table in tables(result).items())
    (folder / "c0.md").write_text(text + "\n", encoding="utf-8")
    picture(result, folder / "c0.png")
    click.echo(text)


if __name__ == "__main__":
    main()
