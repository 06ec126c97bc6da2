"""What a gate of linear experts can gain for the faintest stars, bin X of snr_norm, and what bounds it.

    python -m moefast.benchmarks.studies.faint_gates z0 -n 20000

Design: experts and a library are fitted on rows of the part `train`, gates on as many others, stars of the part
`validation` compare, as in `moefast.benchmarks.c2`. All gates weigh the same nine values. Whatever its weights, a
mixture lies between the least and the largest of them, so that the best of all gates is the posterior mean held
within that range; the library stands in for the exact posterior. The evidence of the library knows the noise level
and components of a star exactly: it is Bayes' rule for the bin, not for log g. Rows for a tower are drawn in pixels
with the errors of faint stars, or in components, where noise is white and a draw takes few random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import click
import numpy as np
from numpy.typing import NDArray

from moefast.benchmarks.c2 import BLOCK_ROWS, GATE_ROWS, LIMIT, Seen, gather, held
from moefast.core import metrics
from moefast.core.grids import PHYSICAL_GRID
from moefast.core.text import bracket, number, table
from moefast.experts.template import Templates
from moefast.fitting import fit_mixture
from moefast.gating.mlp import fit_gate, softmax
from moefast.kernels import project, tangent_posterior
from moefast.kernels.reference import prepare_reference
from moefast.mixture import Mixture
from moefast.recipes import options_of
from moefast.simulate import SimulatedSpectra
from moefast.trunks.training import component_covariance

__all__ = ["gates", "in_components", "measure", "of_library"]

F64 = NDArray[np.float64]
TEMPERATURES = (0.5, 0.7, 0.85, 1.2, 1.5)
OWN_DRAWS = 8
"""Draws of each star with its own errors, for the gate of `phys-moe`."""


def in_components(mixture: Mixture, spectra: SimulatedSpectra, draws: int, seed: int) -> Seen:
    """Stars with the noise levels of faint ones, each that of another in every draw, drawn in components.

    What no tower looks at is left empty, or holds the noise level.
    """
    labels = spectra.labels(("T_eff", "log_g", "M_H"))
    rng = np.random.default_rng(seed)
    covariance = component_covariance(mixture.columns, mixture.line_columns, mixture.noise_shape)
    tiny = 1e-9 * np.trace(covariance) / len(covariance)
    factor = np.linalg.cholesky(covariance + tiny * np.eye(len(covariance))).T.astype(np.float32)
    parts, c = [], mixture.columns.shape[1]
    for block in spectra.blocks(BLOCK_ROWS, array="flux"):
        rows = np.arange(block.first_row, block.first_row + len(block))
        clean = project(block.flux, block.error, None, mixture.projection)
        snr = np.hypot(np.linalg.norm(block.flux, axis=1) / np.linalg.norm(block.error, axis=1), 1)
        lenders = np.flatnonzero(snr <= LIMIT)
        for _ in range(draws):
            level = clean.log_level[rng.choice(lenders, len(rows))]
            noise = (
                rng.standard_normal((len(rows), len(factor)), np.float32) @ factor * np.exp(level)[:, None]
            )
            noisy = replace(
                clean,
                columns=clean.columns + noise[:, :c],
                windows=clean.windows + noise[:, c:],
                log_level=level,
            )
            _, values, _, _ = prepare_reference(noisy, mixture.mixing)
            inputs = mixture.inputs(noisy)
            nothing = np.empty((len(rows), 0), np.float32)
            parts.append(
                Seen(
                    inputs.lines, noisy.columns[:, : mixture.n_gate],
                    np.clip(level, mixture.knots[0], mixture.knots[-1]), nothing, level, values, level, rows,
                    PHYSICAL_GRID.assign(labels["T_eff"][rows], labels["M_H"][rows]).astype(np.int64),
                    labels["log_g"][rows],
                )
            )  # fmt: skip
    return Seen(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def of_library(mixture: Mixture, spectra: SimulatedSpectra) -> tuple[F64, F64]:
    """Posterior mean of log g (n,) and probability of each bin (n, K) of stars with their stored noise."""
    place = mixture.place(Templates)
    assert place is not None
    means, weights = [], []
    for block in spectra.blocks(BLOCK_ROWS, array="noisy"):
        seen = mixture.inputs(project(block.flux, block.error, None, mixture.projection))
        found = tangent_posterior(seen.z, seen.log_level, place.library)
        weights.append(softmax(found.log_evidence.astype(np.float64)))
        means.append((weights[-1] * found.mean).sum(1))
    return np.concatenate(means), np.concatenate(weights)


def gates(
    train: Seen, lent: Seen, drawn: Seen, test: Seen, mean: F64, probability: F64, steps: int
) -> dict[str, F64]:
    """Log g of the stars of bin X by every gate, the first that of `phys-moe`, and what bounds them."""

    def lines(seen: Seen) -> NDArray:
        return seen.view(48)

    first = fit_gate(lines(train), train.values, train.y, held(train))
    near = test.snr_norm <= LIMIT
    test, mean, probability = test.take(near), mean[near], probability[near]
    base = first(lines(test))

    def mixed(logits: F64) -> F64:
        return (softmax(logits) * test.values).sum(1)

    def tower(seen: Seen, view: Callable[[Seen], NDArray], hidden: int, n: int) -> F64:
        net = fit_gate(
            view(seen), seen.values, seen.y, held(seen), given=first(lines(seen)), hidden=hidden, steps=n
        )
        return base + net(view(test))

    own = train.take(train.snr_norm <= LIMIT)
    by_lent = tower(lent, lines, 128, steps)
    by_drawn = tower(drawn, lines, 128, steps)
    found = {"phys-moe": mixed(base)}
    found |= {f"temperature {t}": mixed(base / t) for t in TEMPERATURES}
    found["tower: quality features, own noise"] = mixed(tower(own, lambda seen: seen.quality, 32, steps))
    found["tower: lines and components, lent noise"] = mixed(by_lent)
    found["the same, quality features besides"] = mixed(
        tower(lent, lambda seen: seen.view(48, quality=True), 128, steps)
    )
    found |= {f"the same at temperature {t}": mixed(by_lent / t) for t in (0.85, 1.2)}
    found["tower: noise drawn in components"] = mixed(by_drawn)
    found["the same, 256 units, twice the steps"] = mixed(tower(drawn, lines, 256, 2 * steps))
    found["true bins"] = test.values[np.arange(len(test.y)), test.bin].astype(np.float64)
    found["evidence of the bins"] = (probability * test.values).sum(1)
    found["any gate: posterior mean within the values"] = np.clip(
        mean, test.values.min(1), test.values.max(1)
    )
    found["no gate: posterior mean"] = mean
    return found


def measure(
    experts: SimulatedSpectra,
    teachers: SimulatedSpectra,
    judges: SimulatedSpectra,
    *,
    draws: int,
    white: int,
    steps: int,
    seed: int,
) -> tuple[F64, dict[str, F64]]:
    """True log g of the stars of bin X among `judges`, and what every gate and bound gives for them."""
    few = options_of("template", references=False, sample_rows=2048, sample_draws=1, seed=seed)
    fit = fit_mixture(experts, few)
    mixture, ridge = fit.mixture, fit.references["global-ridge"]
    assert isinstance(mixture, Mixture)
    test = gather(mixture, ridge, judges, 0)
    found = gates(
        gather(mixture, ridge, teachers, OWN_DRAWS),
        gather(mixture, ridge, teachers, draws, faint=True),
        in_components(mixture, teachers, white, seed),
        test,
        *of_library(mixture, judges),
        steps,
    )
    return test.y[test.snr_norm <= LIMIT], {
        name: np.clip(log_g, *mixture.label_range) for name, log_g in found.items()
    }


@click.command()
@click.argument("name", default="z0")
@click.option("-n", "n", default=20_000, help="Stars for the experts, and for the gates.")
@click.option("--validation", default=20_000, help="Stars that compare.")
@click.option(
    "--seed", "seeds", multiple=True, default=(0, 1), help="One of disjoint sets of training stars."
)
@click.option("--draws", default=24, help="Draws of each star in pixels, for a tower.")
@click.option("--white", default=72, help="The same in components.")
@click.option("--steps", default=10_000, help="Of a tower.")
def main(
    name: str, n: int, validation: int, seeds: tuple[int, ...], draws: int, white: int, steps: int
) -> None:
    """R² in bin X by every gate, and gains over the first, paired over the stars."""
    for seed in seeds:
        first = seed * n
        y, found = measure(
            SimulatedSpectra.of_set(name, rows=(first, first + n)),
            SimulatedSpectra.of_set(name, rows=(GATE_ROWS + first, GATE_ROWS + first + n)),
            SimulatedSpectra.of_set(name, "validation", (0, validation)),
            draws=draws,
            white=white,
            steps=steps,
            seed=seed,
        )
        rows = []
        for which, log_g in found.items():
            apart = metrics.bootstrap_difference(y, log_g, found["phys-moe"])
            interval = bracket((apart.low, apart.high), 4, True)
            rows.append((which, number(metrics.r2(y, log_g), 4), number(apart.value, 4, True), interval))
        click.echo(f"{name}, seed {seed}: {len(y)} stars of bin X")
        click.echo("\n".join(table(("gate", "R²", "gain", "interval"), rows)))


if __name__ == "__main__":
    main()
