"""Whether anything can be learnt beside a posterior: corrections of its log g from (u, M) and its own moments.

`python -m moefast.benchmarks.studies.posterior_corrections MODEL [--train SET] [--validate SET]... [--gap NAME]...`

Design: a correction sees the Wiener coordinates of a star, (P⁻¹ + M)⁻¹(u + P⁻¹b₀) of `moefast.posterior.forward`, the
posterior means, standard deviations and correlations of all labels, the evidence of each expert and its mean. It is
fitted to log g minus the posterior mean on stars that the model was not fitted on, with nuisances, every kind of gap
and the errors of another star, so that errors tell nothing of the labels of the star whose noise they are. Its gain is
the paired difference of squared errors over the variance of log g, with its standard error, on validation stars with
the errors that they have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from moefast.core.metrics import r2
from moefast.core.random import add_noise
from moefast.core.text import number, table
from moefast.experts.trees import fit_trees
from moefast.fitting.noisy_stars import GAP_KINDS
from moefast.gating.mlp import fit_perceptron
from moefast.kernels import forest_predict
from moefast.model import Model
from moefast.ops.on_numpy import NumPyArithmetic
from moefast.posterior import PosteriorMixture
from moefast.posterior.forward import cell_products
from moefast.simulate.gaps import GAPS
from moefast.simulate.source import SimulatedSpectra
from moefast.spectra.source import Block

__all__ = ["CORRECTIONS", "Draws", "draw_stars", "from_errors_alone", "gains", "seen"]

F64 = NDArray[np.float64]
Correction = Callable[[F64, F64], F64]
"""Features (n, f) and standard deviations (n,) -> what is added to log g (n,)."""

BLOCK_ROWS = 2048
FIRST_ROW = 300_000
"""Rows of a training set beyond those that shipped models were fitted on."""
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
HIDDEN, DECAY = 32, 0.3
N_TREES = 100
SEED = 91
LEAST_WEIGHT = 1e-4
FARTHEST = 5.0
"""Standard deviations at which a feature is cut off."""


class Draws(NamedTuple):
    """Noisy stars: what a correction sees (n, f); posterior mean, its standard deviation and truth of log g (n,)."""

    features: F64
    log_g: F64
    sd: F64
    truth: F64


def seen(mixture: PosteriorMixture, products: F64, flux: NDArray, error: NDArray) -> tuple[F64, F64, F64]:
    """Features of stars, and the mean and standard deviation of their log g; `products` are `cell_products`."""
    found = mixture.outputs(flux, error)
    count, numbers = len(mixture.label_names), mixture.numbers
    sd = found["label_sd"][:, :count]
    good = np.isfinite(flux) & (error > 0)
    weight = np.where(good, found["scale"] / np.where(good, error, 1.0), 0.0) ** 2
    width = mixture.directions.shape[1]
    cells = ((weight * mixture.noise_shape)[:, mixture.cells] * mixture.cell_shares).sum(2)
    information = (cells @ products).reshape(-1, width, width)
    apart = np.where(good, flux / found["scale"] - mixture.reference, 0.0)
    u = (weight * apart) @ mixture.directions.astype(np.float64)
    right = u[:, :, None] + numbers["library_pull"]
    wiener = np.linalg.solve(information + numbers["library_precision"], right)[:, : mixture.n_coordinates, 0]
    features = [
        wiener,
        found["label"][:, :count],
        np.log(sd),
        found["label_cov"][:, 1:count] / (sd[:, :1] * sd[:, 1:]),
        np.log(np.maximum(found["weights"], LEAST_WEIGHT)),
        np.clip(found["expert_label"], *mixture.label_range),
    ]
    return np.concatenate(features, axis=1), found["label"][:, 0], sd[:, 0]


def draw_stars(
    mixture: PosteriorMixture,
    spectra: SimulatedSpectra,
    *,
    seed: int,
    gap: str | None = None,
    nuisances: bool = True,
) -> Draws:
    """One draw of noise of each star.

    Parameters
    ----------
    mixture : PosteriorMixture
    spectra : SimulatedSpectra
    seed : int
    gap : str, optional
        Of `GAPS`, for stars with errors of their own. If None, the stars are for training: with none or any kind of
        gap, and the errors of another star.
    nuisances : bool
        Whether stars for training have the nuisances of the model added to them.
    """
    products = cell_products(NumPyArithmetic(mixture.numbers), mixture.sizes)
    parts = []
    for block in spectra.blocks(BLOCK_ROWS, array="flux"):
        rows = np.arange(block.first_row, block.first_row + len(block))
        flux, error, lost = block.flux, block.error, np.zeros(block.flux.shape, bool)
        if block.mask is not None:
            lost |= block.mask
        if gap is None:
            rng = np.random.default_rng([seed, block.first_row])
            flux, error, lost = _for_training(mixture, block, lost, rows, rng, seed)
            if nuisances:
                flux = _with_nuisances(mixture, flux, error, rng)
        else:
            lost |= GAPS[gap](mixture.wave, rows, seed)
        noisy = add_noise(flux, error, seed, rows)
        parts.append(seen(mixture, products, noisy, np.where(lost | ~(error > 0), np.nan, error)))
    features, log_g, sd = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Draws(features, log_g, sd, spectra.labels(("log_g",))["log_g"])


def _for_training(
    mixture: PosteriorMixture,
    block: Block,
    lost: NDArray[np.bool_],
    rows: NDArray[np.int64],
    rng: np.random.Generator,
    seed: int,
) -> tuple[NDArray, NDArray, NDArray[np.bool_]]:
    """Flux, the errors and lost pixels of another star, and gaps in every other star."""
    other = np.roll(np.arange(len(rows)), 1 + int(rng.integers(max(1, len(rows) - 1))))
    error, lost = block.error[other], lost[other]
    kind = rng.integers(2 * len(GAP_KINDS), size=len(rows))
    for k, name in enumerate(GAP_KINDS):
        mine = kind == k
        if mine.any():
            lost[mine] |= GAPS[name](mixture.wave, rows[mine], seed)
    return block.flux, error, lost


def _with_nuisances(
    mixture: PosteriorMixture, flux: NDArray, error: NDArray, rng: np.random.Generator
) -> NDArray:
    """Flux with nuisances as large as their prior widths have them."""
    n, q, n_sky = mixture.n_coordinates, mixture.n_nuisances, mixture.n_sky
    size = rng.standard_normal((len(flux), q))
    size[:, q - n_sky :] *= np.sqrt((error.astype(np.float64) ** 2 / mixture.noise_shape).mean(1))[:, None]
    return (flux + size @ mixture.directions[:, n:].T).astype(np.float32)


# -- corrections -----------------------------------------------------------------------------------------------


def _standardised(features: F64) -> Callable[[F64], F64]:
    mean, scale = features.mean(0), features.std(0) + 1e-9
    return lambda x: np.clip((x - mean) / scale, -FARTHEST, FARTHEST)


def _ridge(train: Draws) -> Correction:
    """σ (f·c + b), with the penalty that is best on one star of five."""
    standard = _standardised(train.features)

    def terms(features: F64, sd: F64) -> F64:
        return sd[:, None] * np.column_stack([standard(features), np.ones(len(sd))])

    x, wrong = terms(train.features, train.sd), train.truth - train.log_g
    held = np.arange(len(x)) % 5 == 0

    def solve(part: NDArray[np.bool_], penalty: float) -> F64:
        own = x[part]
        ridge = penalty * part.sum() * np.mean(train.sd**2) * np.eye(x.shape[1])
        return np.asarray(np.linalg.solve(own.T @ own + ridge, own.T @ wrong[part]))

    errors = [np.mean((wrong[held] - x[held] @ solve(~held, penalty)) ** 2) for penalty in PENALTIES]
    best = solve(np.ones(len(x), bool), PENALTIES[int(np.argmin(errors))])
    return lambda features, sd: terms(features, sd) @ best


def _trees(train: Draws) -> Correction:
    """A boosted forest of small trees."""
    forest = fit_trees(
        train.features.astype(np.float32), train.truth - train.log_g, n_trees=N_TREES, rate=0.03, seed=SEED
    ).forest
    return lambda features, _: forest_predict(features.astype(np.float32), forest).astype(np.float64)


def _network(train: Draws) -> Correction:
    """σ times a perceptron, stopped by one star of five."""
    standard = _standardised(train.features)
    sd, wrong = train.sd.astype(np.float32), (train.truth - train.log_g).astype(np.float32)

    def loss(outputs: NDArray, rows: NDArray[np.intp]) -> tuple[float, NDArray]:
        left = sd[rows] * outputs[:, 0] - wrong[rows]
        return float(np.sum(left**2, dtype=np.float64)), (2 * sd[rows] * left)[:, None]

    net = fit_perceptron(
        standard(train.features), 1, loss, np.arange(len(sd)) % 5 == 0, hidden=HIDDEN, decay=DECAY, seed=SEED
    )
    return lambda features, own: own * net(standard(features))[:, 0]


CORRECTIONS: dict[str, Callable[[Draws], Correction]] = {
    "ridge": _ridge,
    "trees": _trees,
    "network": _network,
}


def gains(correction: Correction, stars: Draws, limits: tuple[float, float]) -> tuple[float, float]:
    """Gain in R² of log g by a correction, and its standard error."""
    before = np.clip(stars.log_g, *limits) - stars.truth
    after = np.clip(stars.log_g + correction(stars.features, stars.sd), *limits) - stars.truth
    gain = (before**2 - after**2) / stars.truth.var()
    return float(gain.mean()), float(gain.std() / np.sqrt(len(gain)))


def from_errors_alone(mixture: PosteriorMixture, spectra: SimulatedSpectra) -> float:
    """R² of log g from the features of stars that all have one spectrum, each with noise and errors of its own."""
    products = cell_products(NumPyArithmetic(mixture.numbers), mixture.sizes)
    parts = []
    for block in spectra.blocks(BLOCK_ROWS, array="flux"):
        rows = np.arange(block.first_row, block.first_row + len(block))
        same = np.repeat(mixture.reference[None], len(rows), axis=0)
        error = np.where(block.error > 0, block.error, np.nan)
        parts.append(seen(mixture, products, add_noise(same, block.error, SEED, rows), error)[0])
    features, truth = np.concatenate(parts), spectra.labels(("log_g",))["log_g"]
    fitted = np.arange(len(truth)) % 2 == 0
    mean = np.full(len(truth), truth[fitted].mean())
    both = Draws(features, mean, np.ones(len(truth)), truth)
    line = _ridge(Draws(*(column[fitted] for column in both)))
    return r2(truth[~fitted], mean[~fitted] + line(features[~fitted], both.sd[~fitted]))


@click.command()
@click.argument("model")
@click.option("--train", default="z0", show_default=True, help="Set whose stars corrections are fitted on.")
@click.option("--validate", multiple=True, default=("z0",), help="Set to validate on; repeat it for several.")
@click.option("--gap", "gaps", multiple=True, default=("none",), help="Kind of gap; repeat it for several.")
@click.option(
    "--nuisances/--no-nuisances", default=True, show_default=True, help="Added to the stars that are fitted."
)
@click.option("-n", "n_train", type=click.IntRange(1000), default=100_000, show_default=True)
@click.option("--stars", "n_stars", type=click.IntRange(100), default=16_000, show_default=True)
def main(
    model: str,
    train: str,
    validate: Sequence[str],
    gaps: Sequence[str],
    nuisances: bool,
    n_train: int,
    n_stars: int,
) -> None:
    """Fit corrections to the log g of MODEL, a posterior, and print what each gains."""
    mixture = Model.load(model).mixture
    if not isinstance(mixture, PosteriorMixture):
        raise click.BadParameter(f"{model} is no posterior", param_hint="MODEL")
    stars = SimulatedSpectra.of_set(train, rows=(FIRST_ROW, FIRST_ROW + n_train))
    drawn = draw_stars(mixture, stars, seed=SEED, nuisances=nuisances)
    fitted = {name: fit(drawn) for name, fit in CORRECTIONS.items()}
    rows = []
    for name in validate:
        spectra = SimulatedSpectra.of_set(name, "validation", (0, n_stars))
        for gap in gaps:
            judged = draw_stars(mixture, spectra, seed=SEED + 1, gap=gap)
            columns = [gains(correction, judged, mixture.label_range) for correction in fitted.values()]
            alone = r2(judged.truth, np.clip(judged.log_g, *mixture.label_range))
            words = [f"{number(gain, 4, sign=True)} ± {number(error, 4)}" for gain, error in columns]
            rows.append((name, gap, f"{n_stars:,}", number(alone, 4), *words))
    click.echo("\n".join(table(("set", "gap", "stars", "R²", *fitted), rows)))
    spectra = SimulatedSpectra.of_set(train, "validation", (0, n_stars))
    click.echo(f"R² of log g from errors alone: {number(from_errors_alone(mixture, spectra), 3, sign=True)}")


if __name__ == "__main__":
    main()
