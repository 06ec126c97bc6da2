"""What a head for all metal-poor stars brings, added to the heads of their bins or with a weight of its own.

    python -m moefast.benchmarks.studies.metal_poor_head z0 -n 20000 --seeds 3

Design: networks of components that differ in this head alone are fitted on the same stars, from the same seed and with
the same draws of noise, and compared star by star on the part `validation`. A head with a weight of its own is a tenth
expert: its logit is one more output of the gate, the gate's loss counts its weight as right where a star is metal-poor,
and the head learns log g of the metal-poor stars alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from moefast.core.grids import METAL_POOR, PHYSICAL_GRID
from moefast.core.line_features import LEAST_CONTINUUM
from moefast.core.metrics import r2
from moefast.core.text import number, table
from moefast.experts.protocol import Inputs
from moefast.fitting.first_pass import gather
from moefast.fitting.linear_experts import mixture_of, solve
from moefast.fitting.network import _clean_stars
from moefast.fitting.training_set import TrainingSet
from moefast.gating.mlp import softmax
from moefast.kernels import project
from moefast.mixture import Mixture
from moefast.recipes import options_of
from moefast.simulate.source import SimulatedSpectra
from moefast.trunks import training
from moefast.trunks.heads import Heads
from moefast.trunks.networks import NetworkPlan, start
from moefast.trunks.presets import PRESETS

__all__ = ["HEADS", "gain", "prepare", "with_head"]

F64 = NDArray[np.float64]
HEADS = ("none", "added", "own weight")
"""No head for all metal-poor stars; one that is added to those of their bins, as in `heads`; a tenth expert."""
N_BINS = PHYSICAL_GRID.n_bins
BLOCK_ROWS = 2048


class Stars(NamedTuple):
    """Stars that train, what the network sees of those that decide when to stop, and of those that compare.

    `inputs`, `truth` and `m_h` (n,) are of the latter; `scales` are those of the network's inputs and outputs.
    """

    stars: training.StarsInComponents
    labels: training.Labels
    judges: training.Judges
    scales: dict[str, NDArray]
    inputs: Inputs
    truth: F64
    m_h: F64


class _Tenth(training._Training):
    """A fit whose last expert is for the metal-poor stars of all bins."""

    def loss(self, seen: Mapping[str, Any], y: Any, others: Any, bins: Any) -> Any:
        torch = self.torch
        log_g, sd, logits, e = self.forward(self.weights, seen)
        mean, spread = self.fixed["log_g.scale"]
        y, mu, sigma = (y - mean) / spread, (log_g - mean) / spread, sd / spread
        log_weights = logits.log_softmax(1)
        scores = -0.5 * ((y[:, None] - mu) / sigma) ** 2 - sigma.log()
        poor = torch.as_tensor(PHYSICAL_GRID.metal_poor)[bins]
        own_bin, tenth = log_weights.gather(1, bins[:, None])[:, 0], log_weights[:, -1]
        right = torch.where(poor, torch.logaddexp(own_bin, tenth), own_bin)
        of_tenth = (y - mu[:, -1]) ** 2 - training.SCORE * scores[:, -1]
        of_labels = (others - e @ self.weights["labels.w"] - self.weights["labels.b"]) ** 2
        return (
            ((y - (log_weights.exp() * mu).sum(1)) ** 2).mean()
            - training.SCORE * torch.logsumexp(log_weights + scores, 1).mean()
            - training.BIN * right.mean()
            + training.LABELS * of_labels.mean()
            + (of_tenth * poor).mean()
        )


def prepare(name: str, n: int, n_validation: int) -> Stars:
    """Stars of a reference set, in its noise-white components."""
    data = TrainingSet(
        SimulatedSpectra.of_set(name, rows=(0, n)),
        options_of("heads-single", references=False),
        lambda *_: None,
    )
    equations, _, times_good, _ = gather(data, None, "cpu")
    mixture = mixture_of(data, solve(data, equations, times_good))
    held, of_held = data.inputs(mixture, "held-out stars", data.held_stretches(), noisy=True)
    rows, level, z, windows, _, _ = _clean_stars(data, mixture, False)
    scales = training.scales_of(data.y[rows], level, held.lines, mixture.knots, PHYSICAL_GRID.metal_poor)
    columns = mixture.line_columns
    covariance = training.component_covariance(mixture.basis, columns, mixture.noise_shape)
    t_eff, m_h = data.labels["T_eff"][rows], data.labels["M_H"][rows]
    validation = SimulatedSpectra.of_set(name, "validation", (0, n_validation))
    return Stars(
        training.StarsInComponents(
            training.load_torch(), "cpu", z, windows, level, covariance, mixture.line_widths, LEAST_CONTINUUM
        ),
        training.Labels(data.y[rows], np.column_stack([t_eff, m_h]), PHYSICAL_GRID.assign(t_eff, m_h)),
        training.Judges(
            {"z": held.z, "lines": held.lines, "log_level": held.log_level[:, None]}, data.y[of_held]
        ),
        scales | {"variance": z.var(0)},
        _noisy(mixture, validation),
        validation.labels(("log_g",))["log_g"],
        validation.labels(("M_H",))["M_H"],
    )


def _noisy(mixture: Mixture, spectra: SimulatedSpectra) -> Inputs:
    """What a network of components sees of stars with their stored noise."""
    blocks = spectra.blocks(BLOCK_ROWS, array="noisy")
    seen = [mixture.inputs(project(block.flux, block.error, None, mixture.projection)) for block in blocks]
    return Inputs(*(np.concatenate([one[i] for one in seen]) for i in range(3)))


def with_head(stars: Stars, head: str, seed: int, steps: int | None) -> tuple[F64, F64]:
    """Log g of the stars that compare, by a network with one of `HEADS`, and the weights of its experts."""
    preset = PRESETS["pca-mlp", "small"]
    tenth = head == "own weight"
    plan = NetworkPlan("pca-mlp", stars.scales["variance"].size, N_BINS + tenth, **preset.plan)
    poor = stars.scales["metal_poor"] * (head == "added")
    scales = stars.scales | {"metal_poor": np.vstack([poor, np.zeros((int(tenth), 1))])}
    schedule = replace(preset.schedule, seed=seed, steps=steps or preset.schedule.steps)
    kind = _Tenth if tenth else training._Training
    begin = training.scaled(Heads(plan, start(plan, seed)), scales)
    fitted = kind(
        training.load_torch(),
        begin,
        stars.stars,
        stars.labels,
        stars.judges,
        schedule,
        "cpu",
        None,
        "",
        False,
        None,
    ).run()
    found = fitted.heads.evaluate(stars.inputs)
    weights = softmax(found.evidence.astype(np.float64))
    return (weights * found.log_g).sum(1), weights


def gain(truth: F64, one: list[F64], other: list[F64]) -> tuple[float, float]:
    """R² of the second less that of the first, of several fits each, and its standard error over stars."""
    apart = np.mean([(truth - a) ** 2 - (truth - b) ** 2 for a, b in zip(one, other, strict=True)], axis=0)
    return float(apart.mean() / truth.var()), float(apart.std() / np.sqrt(truth.size) / truth.var())


@click.command()
@click.argument("name", default="z0")
@click.option("-n", "n", default=20_000, help="Training stars.")
@click.option("--validation", default=20_000, help="Stars that compare.")
@click.option("--seeds", default=3, help="Fits of each network.")
@click.option("--steps", type=int, help="Of a fit; those of the small network if absent.")
@click.option("--head", "heads", multiple=True, type=click.Choice(HEADS), default=("added", "own weight"))
def main(name: str, n: int, validation: int, seeds: int, steps: int | None, heads: tuple[str, ...]) -> None:
    """R² of networks that differ in their metal-poor head, and gains over the first, paired over stars."""
    stars = prepare(name, n, validation)
    poor = stars.m_h < METAL_POOR
    groups = {"all": np.ones(poor.size, bool), "metal-poor": poor, "others": ~poor}
    found: dict[str, list[F64]] = {head: [] for head in heads}
    for seed in range(seeds):
        for head in heads:
            log_g, weights = with_head(stars, head, seed, steps)
            found[head].append(log_g)
            scores = "  ".join(
                f"{key} {r2(stars.truth[here], log_g[here]):.4f}" for key, here in groups.items()
            )
            tenth = f"  weight {weights[poor, -1].mean():.2f}, {weights[~poor, -1].mean():.2f}"
            click.echo(f"{head}, seed {seed}: {scores}{tenth if head == 'own weight' else ''}")
    rows = []
    for head in heads[1:]:
        for key, here in groups.items():
            value, error = gain(
                stars.truth[here],
                [each[here] for each in found[heads[0]]],
                [each[here] for each in found[head]],
            )
            rows.append((head, key, number(value, 4, True), number(error, 4)))
    click.echo("\n".join(table((f"over {heads[0]}", "stars", "gain in R²", "standard error"), rows, left=2)))


if __name__ == "__main__":
    main()
