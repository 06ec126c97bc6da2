"""R² against the number of training stars: ridge, trees and a network on components, beside what is published.

`python -m moefast.benchmarks.scaling [--set z0] [--sizes 10000,50000] [-o FILE]` (torch and lightgbm are needed), and
`… --from FILE --picture PNG` to draw what was measured.

Design: all stars are simulated once, projected to the noise-white components of a model that is fitted first, and kept
without noise: each size takes the first of them. Ridge and trees see one draw of noise per star, the network another
one in every step. All are judged on the same stars of the part `validation`, with the noise of their files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from moefast.benchmarks.environment import describe
from moefast.ceilings.ceiling import read
from moefast.core.grids import PHYSICAL_GRID
from moefast.core.line_features import LEAST_CONTINUUM
from moefast.core.metrics import r2
from moefast.core.random import add_noise
from moefast.experts.protocol import Inputs
from moefast.experts.trees import fit_trees, stacking
from moefast.fitting import Options, fit_mixture
from moefast.gating.mlp import softmax
from moefast.kernels import project
from moefast.kernels.reference import line_features
from moefast.mixture import Mixture
from moefast.simulate import SimulatedSpectra
from moefast.trunks import training
from moefast.trunks.heads import Heads
from moefast.trunks.networks import NetworkPlan, start
from moefast.trunks.presets import PRESETS, SIZES, Size

__all__ = ["PUBLISHED", "measure"]

RESULTS = Path(__file__).parent / "results"
PUBLISHED = {50_000: 0.434, 100_000: 0.596, 200_000: 0.673, 500_000: 0.709, 1_000_000: 0.711}
"""R² of the published vision transformer by training stars, on other spectra, whose ceiling is 0.87."""
METHODS = ("ridge", "LightGBM", "network")
RIDGE_ALPHA = 1e-3
"""Penalty per star, of standardised inputs."""
BASIS_ROWS, JUDGES, BLOCK = 20_000, 10_000, 4096
SEED = 20261127


def stars_of(mixture: Mixture, spectra: SimulatedSpectra, noisy: bool) -> tuple[Inputs, NDArray]:
    """What experts see of all stars of a set, and the line windows."""
    parts = []
    for block in spectra.blocks(BLOCK, array="flux"):
        x = block.flux
        if noisy:
            x = add_noise(x, block.error, SEED, np.arange(block.first_row, block.first_row + len(x)))
        found = project(x, block.error, None, mixture.projection)
        parts.append((*mixture.inputs(found)[:3], found.windows + mixture.line_offsets))
    z, level, lines, windows = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Inputs(z, level, lines), windows


def covariance(mixture: Mixture) -> NDArray:
    """Noise of components and line windows at the mean noise."""
    return training.component_covariance(mixture.basis, mixture.line_columns, mixture.noise_shape)


def noisy(mixture: Mixture, stars: Inputs, windows: NDArray) -> Inputs:
    """The same stars with one draw of noise."""
    rng = np.random.default_rng(SEED)
    factor = np.linalg.cholesky(covariance(mixture) + 1e-9 * np.eye(mixture.n_basis + windows.shape[1]))
    noise = rng.standard_normal((len(windows), len(factor)), np.float32) @ factor.T.astype(np.float32)
    noise *= np.exp(stars.log_level)[:, None]
    z, there = stars.z + noise[:, : mixture.n_basis], windows + noise[:, mixture.n_basis :]
    return Inputs(z, stars.log_level, line_features(there, mixture.line_widths, LEAST_CONTINUUM))


def solve_ridge(seen: Inputs, labels: training.Labels) -> Callable[[Inputs], NDArray]:
    """One linear fit to components, lines and noise level."""
    x = stacking(seen).astype(np.float64)
    mean, spread, centre = x.mean(0), x.std(0), labels.log_g.mean()
    x = (x - mean) / spread
    weights = np.linalg.solve(
        x.T @ x + RIDGE_ALPHA * len(x) * np.eye(x.shape[1]), x.T @ (labels.log_g - centre)
    )
    return lambda others: (stacking(others) - mean) / spread @ weights + centre


def grow_trees(seen: Inputs, labels: training.Labels) -> Callable[[Inputs], NDArray]:
    """LightGBM on the same."""
    return fit_trees(stacking(seen), labels.log_g, sees="stacking", seed=SEED).predict


def train(
    mixture: Mixture, stars: Inputs, windows: NDArray, labels: training.Labels, judges: training.Judges, size: Size,
    steps: int | None,
) -> Callable[[Inputs], NDArray]:  # fmt: skip
    """The network of the recipe `heads`."""
    torch = training.load_torch()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    preset = PRESETS["pca-mlp", size]
    plan = NetworkPlan("pca-mlp", mixture.n_basis, PHYSICAL_GRID.n_bins, **preset.plan)
    scales = training.scales_of(
        labels.log_g, stars.log_level, judges.seen["lines"], mixture.knots, PHYSICAL_GRID.metal_poor
    )
    begin = training.scaled(Heads(plan, start(plan, SEED)), scales | {"variance": stars.z.var(0)})
    pool = training.StarsInComponents(
        torch,
        device,
        stars.z,
        windows,
        stars.log_level,
        covariance(mixture),
        mixture.line_widths,
        LEAST_CONTINUUM,
    )
    schedule = replace(preset.schedule, seed=SEED, steps=steps or preset.schedule.steps)
    heads = training.fit_heads(begin, pool, labels, judges, schedule, device=device).heads

    def predict(seen: Inputs) -> NDArray:
        log_g, _, logits = heads.evaluate(seen)
        return np.asarray((softmax(logits.astype(np.float64)) * log_g).sum(1))

    return predict


def measure(
    name: str, sizes: list[int], size: Size, steps: int | None, judges: int = JUDGES, basis_rows: int = BASIS_ROWS,
    methods: tuple[str, ...] = METHODS,
) -> dict[str, Any]:  # fmt: skip
    """R² and seconds of every method at every size."""
    basis = SimulatedSpectra.of_set(name, rows=(0, basis_rows))
    mixture = fit_mixture(basis, Options(references=False)).mixture
    assert isinstance(mixture, Mixture)
    train_set = SimulatedSpectra.of_set(name, rows=(0, max(sizes)))
    stars, windows = stars_of(mixture, train_set, noisy=False)
    found = train_set.labels()
    bins = PHYSICAL_GRID.assign(found["T_eff"], found["M_H"]).astype(np.int64)
    others = np.column_stack([found["T_eff"], found["M_H"]])
    # One half says when to stop, the other is the measure.
    held = SimulatedSpectra.of_set(name, "validation", rows=(0, 2 * judges))
    seen, _ = stars_of(mixture, held, noisy=True)
    log_g = held.labels()["log_g"]
    first, second = slice(0, judges), slice(judges, None)
    views = {"z": seen.z[first], "lines": seen.lines[first], "log_level": seen.log_level[first, None]}
    stop = training.Judges(views, log_g[first])
    judged = Inputs(*(a[second] for a in seen[:3]))
    curves: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for n in sizes:
        mine, some = Inputs(*(a[:n] for a in stars[:3])), windows[:n]
        labels = training.Labels(found["log_g"][:n], others[:n], bins[:n])
        for method, curve in curves.items():
            begin = time.perf_counter()
            if method == "network":
                predict = train(mixture, mine, some, labels, stop, size, steps)
            else:
                fit = solve_ridge if method == "ridge" else grow_trees
                predict = fit(noisy(mixture, mine, some), labels)
            seconds = time.perf_counter() - begin
            curve[str(n)] = {"r2": r2(log_g[second], predict(judged)), "seconds": seconds}
            click.echo(f"{method:<10} {n:>9,} stars: R² {curve[str(n)]['r2']:.4f}, {seconds:.0f} s")
    return {
        "set": name,
        "judges": judges,
        "components": mixture.n_basis,
        "size": size,
        "steps": steps,
        "curves": curves,
    }


def draw(found: dict[str, Any], networks: dict[str, Any], ceiling: float, path: Path) -> None:
    """R² against training stars, and the learning curves of networks that were fitted on a GPU.

    Parameters
    ----------
    found : dict
        What `measure` gives.
    networks : dict
        Of `benchmarks/results/*-gpu-networks.json`.
    ceiling : float
        Bayes ceiling of the set.
    path : path
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for method, curve in found["curves"].items():
        left.plot([int(n) for n in curve], [entry["r2"] for entry in curve.values()], "o-", label=method)
    same = [n for n in networks.values() if n["set"] == found["set"]]
    base = sorted((n["training_rows"], n["r2_validation"]) for n in same if n["trunk"] == "pca-mlp")
    left.plot(*zip(*base, strict=True), "s-", label="heads, base (GPU)")
    left.plot(
        list(PUBLISHED), list(PUBLISHED.values()), "^:", color="grey", label="published ViT, other spectra"
    )
    left.axhline(ceiling, color="black", linestyle="--", label=f"Bayes ceiling of {found['set']}, test stars")
    left.axhline(0.87, color="grey", linestyle=":", label="published ceiling, other spectra")
    left.set(xscale="log", xlabel="training stars", ylabel="R²", title=f"{found['set']}, validation stars")
    left.set_ylim(0.2, 0.9)
    left.legend(fontsize=8, ncols=2, loc="lower right")
    for name, network in networks.items():
        steps = [look["step"] * network["batch"] / 1e6 for look in network["curve"]]
        right.plot(steps, [look["r2"] for look in network["curve"]], label=name)
    right.set(
        xscale="log", xlabel="stars drawn, millions", ylabel="R², held-out stars", xlim=(0.1, None), ylim=(0.4, 0.8),
        title="networks on a GPU",
    )  # fmt: skip
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@click.command()
@click.option("--set", "name", default="z0", show_default=True, help="Reference set.")
@click.option(
    "--sizes", default="10000,50000,100000,200000,500000,1000000", show_default=True, help="Training stars."
)
@click.option("--size", type=click.Choice(SIZES), default="small", show_default=True, help="Of the network.")
@click.option("--steps", type=int, help="Of its fit, instead of what belongs to its size.")
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), help="By default all.")
@click.option(
    "--from", "stored", type=click.Path(exists=True, path_type=Path), help="Results to draw, not to measure."
)
@click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path),
    help="Draw these, and the networks of the newest results of a GPU.",
)  # fmt: skip
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON file to write.")
def main(
    name: str, sizes: str, size: Size, steps: int | None, methods: tuple[str, ...], stored: Path | None,
    picture: Path | None, out: Path | None,
) -> None:  # fmt: skip
    """Measure, print, and write JSON (by default into benchmarks/results/)."""
    if stored is not None:
        report = json.loads(stored.read_text(encoding="utf-8"))
    else:
        report = {
            "what": "R² against training stars",
            "environment": describe(),
            **measure(name, [int(n) for n in sizes.split(",")], size, steps, methods=methods or METHODS),
            "published": {"vision transformer": PUBLISHED},
        }
        path = out or RESULTS / f"{report['environment']['date']}-scaling-{name}.json"
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        click.echo(f"wrote {path}")
    if picture is not None:
        networks = json.loads(sorted(RESULTS.glob("*-gpu-networks.json"))[-1].read_text(encoding="utf-8"))
        ceilings = Path(str(resources.files("moefast.ceilings"))) / "data"
        ceiling = read(ceilings / f"{report['set']}-test_10k.json.gz").r2()["bayes"]
        draw(report, networks["networks"], ceiling, picture)
        click.echo(f"drew {picture}")


if __name__ == "__main__":
    main()
