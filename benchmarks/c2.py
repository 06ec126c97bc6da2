"""C2, the gate: what it must see, how it must learn, and what towers are worth.

    python -m moefast.benchmarks.c2 --out FOLDER

Design: nine linear experts per noise level are fitted once on rows of a set's part `train`; further rows of it, which
the experts did not see, with many noise draws teach every gate; stars of the part `validation` judge. No test star is
looked at. Everything a gate can see is gathered in one pass, so a gate is a function from what is gathered to weights.
ρ goes from the global ridge to the experts with true bins, with bootstrap intervals over stars.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from moefast.benchmarks.environment import describe
from moefast.core import metrics
from moefast.core.grids import PHYSICAL_GRID, SNR_NORM_NAMES, assign_snr_bins
from moefast.core.random import add_noise
from moefast.experts.linear_form import LinearForm
from moefast.experts.protocol import Inputs
from moefast.fitting import Options, fit_mixture
from moefast.gating.mlp import fit_gate, fit_perceptron, softmax
from moefast.gating.tower import quality_logs
from moefast.kernels import project
from moefast.kernels.reference import prepare_reference
from moefast.mixture import Mixture, hat_weights
from moefast.recipes import RECIPES
from moefast.simulate import SimulatedSpectra

__all__ = ["Seen", "measure_set", "tables"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Source = Callable[[str, str, tuple[int, int] | None], SimulatedSpectra]

SETS = ("z0", "survey")
PHYS = "regression: lines, 48 components"
"""The gate of phys-moe."""
LIMIT = 2.0
"""Upper end of bin X, in snr_norm."""
BLOCK_ROWS = 2048
GATE_ROWS = 1_000_000
"""The first row of `train` that teaches gates: far beyond those that experts were fitted on."""


@dataclass(frozen=True)
class Plan:
    """Sizes of a run: stars for the experts, for the gates, to judge by; noise draws of each star for the gates."""

    experts: int = 50_000
    gate: int = 50_000
    draws: int = 8
    validation: int = 20_000
    steps: int | None = None
    wide_steps: int = 10_000
    n_resamples: int = 1000


class Seen(NamedTuple):
    """What gates may see of n noisy stars, what experts say of them, and the truth.

    `lines` (n, 9), `z` (n, r), `level` (n,), `quality` (n, 10), `snr_norm` (n,), `values` (n, 9), `global_` (n,) of one
    ridge per noise level, `star` (n,) its row, `bin` (n,) the true bin, `y` (n,) log g.
    """

    lines: F32
    z: F32
    level: F32
    quality: F32
    snr_norm: F32
    values: F32
    global_: F32
    star: NDArray[np.int64]
    bin: NDArray[np.int64]
    y: F64

    def take(self, rows: NDArray) -> Seen:
        """Some rows."""
        return Seen(*(column[rows] for column in self))

    def view(self, components: int, *, lines: bool = True, quality: bool = False) -> F32:
        """Features of a gate: lines, so many components, noise level, quality features."""
        parts = [self.lines] if lines else []
        parts += [self.z[:, :components], self.level[:, None]]
        return np.concatenate([*parts, self.quality] if quality else parts, axis=1)


# --- what is gathered --------------------------------------------------------------------------------------


def look(
    mixture: Mixture, ridge: LinearForm, flux: F32, error: F32, star: NDArray, labels: Mapping[str, F64]
) -> Seen:
    """Everything about a block of noisy stars."""
    found = project(flux, error, None, mixture.projection)
    _, values, _, _ = prepare_reference(found, mixture.mixing)
    inputs: Inputs = mixture.inputs(found)
    level = np.clip(found.log_level, mixture.knots[0], mixture.knots[-1])
    at_knots = (flux - mixture.reference) @ ridge.weights[:, 0] + ridge.intercepts[0]
    return Seen(
        inputs.lines, found.columns[:, : mixture.n_gate], level, quality_logs(error), found.snr_norm,
        values, (at_knots * hat_weights(level, mixture.knots)).sum(1), star,
        PHYSICAL_GRID.assign(labels["T_eff"][star], labels["M_H"][star]).astype(np.int64), labels["log_g"][star],
    )  # fmt: skip


def gather(
    mixture: Mixture, ridge: LinearForm, spectra: SimulatedSpectra, draws: int, *, faint: bool = False
) -> Seen:
    """Stars of a part with stored noise (no draws) or several draws.

    `faint` lends each star the error of one of bin X; those that do not come to lie there are left out.
    """
    labels = spectra.labels(("T_eff", "log_g", "M_H"))
    parts = []
    for block in spectra.blocks(BLOCK_ROWS, array="flux" if draws else "noisy"):
        rows = np.arange(block.first_row, block.first_row + len(block))
        rng = np.random.default_rng([7, block.first_row])
        # Clean flux: noise adds one.
        clean = np.hypot(np.linalg.norm(block.flux, axis=1) / np.linalg.norm(block.error, axis=1), 1)
        lenders = np.flatnonzero(clean <= LIMIT)
        for draw in range(max(draws, 1)):
            error = block.error[rng.choice(lenders, len(rows))] if faint else block.error
            flux = add_noise(block.flux, error, 9000 + draw, rows) if draws else block.flux
            parts.append(look(mixture, ridge, flux, error, rows, labels))
    seen = Seen(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    return seen.take(seen.snr_norm <= LIMIT) if faint else seen


# --- gates -------------------------------------------------------------------------------------------------


def held(seen: Seen) -> NDArray[np.bool_]:
    """An eighth of the stars, with all their draws, decides when to stop."""
    return seen.star % 8 == 0


def classifier(
    seen: Seen, features: F32, n: int, *, hidden: int | None, steps: int | None
) -> Callable[[F32], F64]:
    """Logits of least cross-entropy of the true bin; without hidden units a logistic regression."""
    if hidden is None:
        # Other people's solver: nothing of ours is linear without a hidden layer.
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        some = slice(None, None, max(1, len(features) // 100_000))
        fit = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(
            features[some], seen.bin[some]
        )
        return fit.decision_function

    def loss(logits: NDArray, rows: NDArray[np.intp]) -> tuple[float, NDArray]:
        gate = softmax(logits)
        here = np.arange(len(rows)), seen.bin[rows]
        slope = gate.copy()
        slope[here] -= 1
        return float(-np.log(np.maximum(gate[here], 1e-30)).sum(dtype=np.float64)), slope

    return fit_perceptron(features, n, loss, held(seen), hidden=hidden, steps=steps)


def hard(gate: NDArray) -> NDArray:
    """All weight on the largest."""
    return (gate == gate.max(1, keepdims=True)).astype(gate.dtype)


def gates(
    train: Seen, faint: Seen, test: Seen, plan: Plan, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """By name: log g of the mixture, weights (n, 9), and what the gate sees."""
    found: dict[str, dict[str, Any]] = {}

    def keep(name: str, gate: NDArray, sees: str, log_g: NDArray | None = None) -> None:
        found[name] = {
            "gate": gate,
            "sees": sees,
            "log_g": (gate * test.values).sum(1) if log_g is None else log_g,
        }
        say(f"  {name}")

    def regression(
        view: Callable[[Seen], F32], hidden: int = 64, steps: int | None = None
    ) -> Callable[[F32], F64]:
        return fit_gate(
            view(train), train.values, train.y, held(train), hidden=hidden, steps=steps or plan.steps
        )

    views: dict[str, Callable[[Seen], F32]] = {
        "lines, 4 components": lambda s: s.view(4),
        "lines, 16 components": lambda s: s.view(16),
        "48 components": lambda s: s.view(48, lines=False),
        "lines": lambda s: s.view(0),
        "quality features": lambda s: s.quality,
        "lines, 48 components, quality features": lambda s: s.view(48, quality=True),
        "lines, 48 components": lambda s: s.view(48),
    }
    for sees, view in views.items():
        net = regression(view)
        keep(f"regression: {sees}", softmax(net(view(test))), sees)
    base_sees = sees
    base, base_train, base_faint = net(view(test)), net(view(train)), net(view(faint))
    soft = softmax(base)
    wide = regression(view, 256, plan.wide_steps)
    keep("regression, 256 hidden units", softmax(wide(view(test))), base_sees)
    for name, hidden in (("classification, linear", None), ("classification", 64)):
        classes = softmax(
            classifier(train, view(train), base.shape[1], hidden=hidden, steps=plan.steps)(view(test))
        )
        keep(name, classes, base_sees)
    keep("classification, hard", hard(classes), base_sees)
    keep("regression, hard", hard(soft), base_sees)
    mixed = (soft * test.values).sum(1)
    for threshold in (0.3, 0.5):
        unsure = soft.max(1) < threshold
        keep(f"regression, global below {threshold}", soft, base_sees, np.where(unsure, test.global_, mixed))
    near = (test.snr_norm <= LIMIT)[:, None]
    for temperature in (0.7, 0.85, 1.2):
        keep(f"temperature {temperature} in X", softmax(np.where(near, base / temperature, base)), base_sees)

    def tower(view: Callable[[Seen], F32], seen: Seen, given: F64, **options: Any) -> F64:
        net = fit_gate(view(seen), seen.values, seen.y, held(seen), given=given, **options)
        return net(view(test))

    own = train.snr_norm <= LIMIT
    dual = tower(lambda s: s.quality, train, base_train, hidden=32, steps=plan.steps)
    keep("dual tower (quality features)", softmax(base + dual), f"{base_sees} + quality features")
    dual = tower(lambda s: s.quality, train.take(own), base_train[own], hidden=32, steps=plan.steps)
    keep(
        "conditional, quality features",
        softmax(base + np.where(near, dual, 0)),
        f"{base_sees} + quality in X",
    )
    dual = tower(view, train.take(own), base_train[own], hidden=128, steps=plan.wide_steps)
    keep("conditional, wide, own noise", softmax(base + np.where(near, dual, 0)), f"{base_sees}, again in X")
    dual = tower(view, faint, base_faint, hidden=128, steps=plan.wide_steps)
    keep("conditional, wide, lent noise", softmax(base + np.where(near, dual, 0)), f"{base_sees}, again in X")
    return found


# --- one set -----------------------------------------------------------------------------------------------


def measure_set(name: str, source: Source, plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """All of C2 on one reference set: JSON-ready."""
    spectra = source(name, "train", (0, plan.experts))
    # Their own gates are not looked at.
    few = Options(sample_rows=2048, sample_draws=1, references=False)
    fit = fit_mixture(spectra, few)
    mixture, ridge = fit.mixture, fit.references["global-ridge"]
    assert isinstance(mixture, Mixture)
    low, high = mixture.label_range
    say(f"{name}: experts, {fit.summary['solver']}")
    teachers = source(name, "train", (GATE_ROWS, GATE_ROWS + plan.gate))
    train = gather(mixture, ridge, teachers, plan.draws)
    faint = gather(mixture, ridge, teachers, plan.draws, faint=True)
    judges = source(name, "validation", (0, plan.validation))
    test = gather(mixture, ridge, judges, 0)
    say(f"{name}: {len(train.y)} noisy rows to learn from, {len(faint.y)} of them again as faint stars")
    found = gates(train, faint, test, plan, say)
    own = RECIPES["snr-moe"]
    snr = fit_mixture(spectra, replace(few, grid=own.grid, **own.options)).mixture
    blocks = list(judges.blocks(BLOCK_ROWS, array="noisy"))
    log_g = np.concatenate([snr.predict(block.flux, block.error).log_g for block in blocks])
    bins = assign_snr_bins(test.snr_norm)
    oracle = test.values[np.arange(len(test.y)), test.bin]
    reference = {"global ridge": test.global_, "true bins": oracle, "snr-moe": log_g}
    base, best = (np.clip(reference[which], low, high) for which in ("global ridge", "true bins"))

    def scores(prediction: NDArray, gate: NDArray | None) -> dict[str, Any]:
        prediction = np.clip(prediction, low, high)
        one: dict[str, Any] = {
            "r2": metrics.r2(test.y, prediction),
            "r2_by_snr_norm": [metrics.r2(test.y[bins == k], prediction[bins == k]) for k in range(4)],
        }
        if gate is not None:
            rho = metrics.bootstrap_rho(test.y, prediction, base, best, n_resamples=plan.n_resamples)
            one |= {"rho": rho.value, "rho_interval": [rho.low, rho.high]}
            entropy = -(gate * np.log(np.maximum(gate, 1e-30))).sum(1)
            right = gate[np.arange(len(gate)), test.bin]
            one |= {
                "entropy": [float(entropy[bins == k].mean()) for k in range(4)],
                "weight_of_true_bin": [float(right[bins == k].mean()) for k in range(4)],
                "weights_by_true_bin": [gate[test.bin == b].mean(0).tolist() for b in range(gate.shape[1])],
            }
        return one

    phys = found[PHYS]["log_g"]
    in_x = bins == 0
    result = {
        "references": {which: scores(prediction, None) for which, prediction in reference.items()},
        "gates": {
            which: {"sees": one["sees"], **scores(one["log_g"], one["gate"])} for which, one in found.items()
        },
        "n_by_snr_norm": np.bincount(bins, minlength=4).tolist(),
        "n_noisy": len(train.y),
        "rank": mixture.n_basis,
    }
    for which, one in found.items():
        if "conditional" in which or "dual" in which or "temperature" in which:
            pair = (np.clip(each[in_x], low, high) for each in (one["log_g"], phys))
            gain = metrics.bootstrap_difference(test.y[in_x], *pair, n_resamples=plan.n_resamples)
            result["gates"][which]["gain_in_x"] = [gain.value, gain.low, gain.high]
    return result


# --- what people read --------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Markdown tables of a result, by what they show."""
    sets = result["sets"]
    names = list(next(iter(sets.values()))["gates"])
    main, inside = [], []
    for which in next(iter(sets.values()))["references"]:
        scores = [f"{one['references'][which]['r2']:.4f}" for one in sets.values()]
        main.append([which, *(cell for score in scores for cell in (score, ""))])
    for which in names:
        row = [which]
        for one in sets.values():
            gate = one["gates"][which]
            low, high = gate["rho_interval"]
            row += [f"{gate['r2']:.4f}", f"{gate['rho']:.2f} [{low:.2f}, {high:.2f}]"]
        main.append(row)
    for which in names:
        if "gain_in_x" in next(iter(sets.values()))["gates"][which]:
            row = [which]
            for one in sets.values():
                value, low, high = one["gates"][which]["gain_in_x"]
                row += [
                    f"{one['gates'][which]['r2_by_snr_norm'][0]:.4f}",
                    f"{value:+.4f} [{low:+.4f}, {high:+.4f}]",
                ]
            inside.append(row)
    by_snr = []
    for name, one in sets.items():
        for which in ("classification", PHYS):
            gate = one["gates"][which]
            for what, numbers in (
                ("R²", "r2_by_snr_norm"), ("entropy", "entropy"), ("weight of the true bin", "weight_of_true_bin"),
            ):  # fmt: skip
                by_snr.append(
                    [f"{name}, {which.split(':')[0]}: {what}", *(f"{v:.3f}" for v in gate[numbers])]
                )
    columns = [text for name in sets for text in (f"{name}: R²", "ρ")]
    gains = [text for name in sets for text in (f"{name}: R² in X", "gain over phys-moe")]
    return {
        "gates": _table(["gate", *columns], main),
        "X": _table(["gate", *gains], inside),
        "snr_norm": _table(["", *SNR_NORM_NAMES], by_snr),
    }


def picture(result: Mapping[str, Any], target: Path) -> None:
    """ρ of every gate with its interval; mean weights of the regression gate by true bin. One column per set."""
    from matplotlib.figure import Figure

    sets = result["sets"]
    figure = Figure(figsize=(11, 10), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.25, 1])
    upper, lower = halves
    bars = upper.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for axes, (name, one) in zip(bars, sets.items(), strict=True):
        which = list(one["gates"])[::-1]
        rho = np.array([one["gates"][gate]["rho"] for gate in which])
        low, high = np.array([one["gates"][gate]["rho_interval"] for gate in which]).T
        colours = [
            "tab:blue" if gate.startswith("regression") else "tab:orange" if "class" in gate else "tab:green"
            for gate in which
        ]
        axes.barh(which, rho, xerr=[rho - low, high - rho], color=colours, alpha=0.75)
        axes.axvline(0.95, color="black", linestyle="--", label="mark: 0.95")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.tick_params(axis="y", labelsize=8)
        axes.set(title=name, xlabel="ρ")
    bars[0].legend(fontsize=8, loc="lower left")
    images = lower.subplots(1, len(sets), squeeze=False)[0]
    for axes, (name, one) in zip(images, sets.items(), strict=True):
        weights = np.array(one["gates"][PHYS]["weights_by_true_bin"])
        shown = axes.imshow(weights, vmin=0, vmax=1, cmap="viridis")
        axes.set_xticks(range(len(weights)), PHYSICAL_GRID.names, rotation=60, fontsize=8)
        axes.set_yticks(range(len(weights)), PHYSICAL_GRID.names, fontsize=8)
        axes.set(title=f"{name}: mean weight", xlabel="expert", ylabel="true bin")
    lower.colorbar(shown, ax=list(images), shrink=0.8)
    figure.savefig(target, dpi=90)


@click.command()
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder to write to.")
@click.option("--quick", is_flag=True, help="Few stars and steps: to see that it runs.")
def main(out: str, quick: bool) -> None:
    """Measure C2 on z0 and survey: c2.json, c2.md, c2.png."""
    begin = time.monotonic()
    plan = Plan(6000, 4000, 2, 2000, 100, 100, 50) if quick else Plan()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)

    def say(what: str) -> None:
        click.echo(f"{time.monotonic() - begin:6.0f} s  {what}", err=True)

    found = {name: measure_set(name, SimulatedSpectra.of_set, plan, say) for name in SETS}
    result = {
        "what": "C2",
        "plan": asdict(plan),
        "seconds": round(time.monotonic() - begin),
        "environment": describe(),
        "sets": found,
    }
    (folder / "c2.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    text = "\n\n".join(f"## {what}\n\n{table}" for what, table in tables(result).items())
    (folder / "c2.md").write_text(text + "\n", encoding="utf-8")
    picture(result, folder / "c2.png")
    click.echo(text)


if __name__ == "__main__":
    main()
