"""Experts of other families: a library of templates, those that are fitted bin by bin, and the choice for each bin.

Design: both are made of stars that are not in the sample, so that the sample can judge them. A bin keeps its linear
expert unless another is better beyond doubt (`moefast.experts.choice`).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import MoefastError
from moefast.core.metrics import r2
from moefast.experts.choice import choose
from moefast.experts.protocol import (
    Components,
    Expert,
    Inputs,
    family,
    fitted_clean,
    fitted_on_components,
    on_flux,
)
from moefast.experts.template import choose_library, fit_library
from moefast.fitting.options import WHOLE
from moefast.fitting.sample import Sample, flux_of_sample
from moefast.fitting.training_set import TrainingSet
from moefast.kernels import Library
from moefast.mixture import Mixture

__all__ = ["FIT_ROWS", "LIBRARY_ROWS", "check_installed", "choose_families", "make_library"]

LIBRARY_ROWS = 200_000
"""Stars that a library is made of at most: a thousand clouds of two hundred."""
FIT_ROWS = 100_000
"""Stars that the experts of all bins of another family are fitted on at most."""
FLUX_ROWS, CLEAN_ROWS = 20_000, 10_000
"""Stars of one bin whose pixels are held at most: 16 kB each, and 33 kB with their errors."""


def make_library(data: TrainingSet, mixture: Mixture) -> tuple[Library, dict[str, float]]:
    """A library of stars that are not in the sample, and the R² of what was tried on noisy stars of the sample."""
    stars, rows = data.inputs(mixture, "templates", data.other_stretches(LIBRARY_ROWS), noisy=False)
    labels = np.column_stack([data.labels[name][rows] for name in ("T_eff", "log_g", "M_H")])

    def fit(n_clouds: int, n_tangents: int) -> Library:
        return fit_library(
            stars.z, labels, data.y[rows], data.bins[rows], data.options.grid.n_bins,
            n_clouds=n_clouds, n_tangents=n_tangents, seed=data.options.seed,
        )  # fmt: skip

    judges, of_judges = data.inputs(mixture, "held-out stars", data.held_stretches(), noisy=True)
    return choose_library(
        fit, judges.z, judges.log_level, data.y[of_judges],
        n_stars=len(rows), progress=partial(data.progress, "library"),
    )  # fmt: skip


def choose_families(data: TrainingSet, mixture: Mixture, sample: Sample) -> tuple[Mixture, dict[str, Any]]:
    """The family of each bin that is best, beyond doubt, on stars of the sample that do not measure the outcome.

    Families that are fitted bin by bin see the library's stars, with one draw of noise or with those that they make.
    """
    options, names = data.options, data.options.grid.names
    everywhere = range(options.grid.n_bins)
    bins_of = {name: tuple(everywhere) for name in options.families if name not in WHOLE}
    bins_of |= {name: options.metal_poor_bins for name in options.metal_poor_families}
    fitted = _fit_bins(data, mixture, bins_of)
    for name, experts in fitted.items():
        # What sees pixels is asked for all bins once it is chosen.
        _ask(data, sample, name, experts, own_bin=on_flux(name))
    seen = data.part_of(sample.rows) != 0
    bins = data.bins[sample.rows[seen]]
    own = np.arange(len(sample.rows)), data.bins[sample.rows]
    candidates = {name: sample.values[name][own][seen] for name in options.all_families}
    for name in options.metal_poor_families:
        candidates[name] = np.where(np.isin(bins, options.metal_poor_bins), candidates[name], np.nan)
    choice = choose(data.y[sample.rows[seen]], candidates, bins, "linear", n_bins=options.grid.n_bins)
    # Its evidence counts for every bin, whether or not one of them takes its mean.
    mixture = replace(
        mixture,
        experts=tuple(
            replace(
                place,
                bins=tuple(k for k, name in enumerate(choice.families) if name == place.expert.family),
            )
            for place in mixture.experts
        ),
    )
    for k, name in enumerate(choice.families):
        if name in fitted:
            mixture = mixture.with_expert(fitted[name][k], k)
    for name in filter(on_flux, bins_of):
        chosen = {k: fitted[name][k] for k, family_name in enumerate(choice.families) if family_name == name}
        if chosen:
            _ask(data, sample, name, chosen, own_bin=False)
    table = {
        names[k]: {
            "family": choice.families[k],
            "n": int(choice.n[k]),
            "gain": _numbers(choice.names, choice.gain[k]),
            "standard_error": _numbers(choice.names, choice.standard_error[k]),
            "r2": _r2_of(data.y[sample.rows[seen]], candidates, bins == k),
        }
        for k in range(options.grid.n_bins)
    }
    return mixture, table


def _numbers(names: Sequence[str], values: NDArray) -> dict[str, float]:
    """Values by name, but for those that do not exist."""
    return {name: value for name, value in zip(names, values.tolist(), strict=True) if not math.isnan(value)}


def _r2_of(y: NDArray, candidates: Mapping[str, NDArray], members: NDArray[np.bool_]) -> dict[str, float]:
    """R² of each family among some stars; none of them where there are fewer than two."""
    if members.sum() < 2:
        return {}
    return {
        name: r2(y[members], values[members])
        for name, values in candidates.items()
        if np.isfinite(values[members]).all()
    }


def check_installed(families: Sequence[str]) -> None:
    """Refuse families whose fit lacks a module: before the first pass, not after.

    Raises
    ------
    MoefastError
    """
    for name in families:
        missing = (
            []
            if name in WHOLE
            else [one for one in family(name).requires if importlib.util.find_spec(one) is None]
        )
        if missing:
            raise MoefastError(
                f"experts of the family {name} are fitted by {', '.join(missing)}, which is not installed; "
                f"install it (pip install {' '.join(missing)}), or leave {name} out of the families"
            )


def _fit_bins(
    data: TrainingSet, mixture: Mixture, bins_of: Mapping[str, Sequence[int]]
) -> dict[str, dict[int, Expert]]:
    """Experts of families by the bins that are named for each."""
    small = {name: bins for name, bins in bins_of.items() if not on_flux(name)}
    fitted = _fit_small(data, mixture, small) if small else {}
    fitted |= {
        name: _fit_on_flux(data, mixture, name, bins) for name, bins in bins_of.items() if on_flux(name)
    }
    return {name: fitted[name] for name in bins_of}


def _fit_small(
    data: TrainingSet, mixture: Mixture, bins_of: Mapping[str, Sequence[int]]
) -> dict[str, dict[int, Expert]]:
    """The same of families that see no pixels: all from the same stars, read once."""
    inputs, rows = data.inputs(mixture, "stars of the bins", data.other_stretches(FIT_ROWS), noisy=True)
    components = Components(mixture.wave, mixture.reference, mixture.noise_shape, mixture.basis)
    step = data.steps("families", sum(map(len, bins_of.values())))
    fitted: dict[str, dict[int, Expert]] = {name: {} for name in bins_of}
    for name, k in ((name, k) for name, bins in bins_of.items() for k in bins):
        here = data.bins[rows] == k
        seen, y = Inputs(*(a[here] for a in inputs[:3])), data.y[rows[here]]
        if fitted_on_components(name):
            fitted[name][k] = family(name).fit_on_components(seen, y, components, seed=data.options.seed)
        else:
            fitted[name][k] = family(name).fit(seen, y, seed=data.options.seed)
        step()
    return fitted


def _fit_on_flux(data: TrainingSet, mixture: Mixture, name: str, bins: Sequence[int]) -> dict[int, Expert]:
    """The same of one family that sees pixels: those of one bin at a time, or they would not be held."""
    own, n_bins, seed = family(name), data.options.grid.n_bins, data.options.seed
    fitted: dict[int, Expert] = {}
    step = data.steps("families", len(bins))
    clean = fitted_clean(name)
    most = CLEAN_ROWS if clean else FLUX_ROWS
    for k in bins:
        stretches = data.other_stretches(round(most / max(float((data.bins == k).mean()), 1e-9)))
        stage = f"stars of bin {k + 1} of {n_bins}"
        if clean:
            stars, rows = data.clean_stars(mixture, stage, stretches, k)
            fitted[k] = own.fit_clean(stars, data.y[rows], seed=seed)
        else:
            inputs, rows = data.inputs(mixture, stage, stretches, noisy=True, flux=True, bin_=k)
            fitted[k] = own.fit(inputs, data.y[rows], seed=seed)
        step()
    return fitted


def _ask(
    data: TrainingSet, sample: Sample, name: str, experts: Mapping[int, Expert], *, own_bin: bool
) -> None:
    """Add to the sample what experts of a family, by their bin, say of it; with `own_bin` only of stars of that bin."""
    values = sample.values.setdefault(name, sample.values["linear"].copy())
    sample.noise[name] = sample.noise["linear"]
    whole = slice(0, len(sample.rows))
    parts: Iterable[tuple[slice, NDArray | None]] = [(whole, None)]
    if on_flux(name):
        parts = flux_of_sample(data, f"what {name} says")
    z, level, lines = sample.inputs.z, sample.inputs.log_level, sample.inputs.lines
    for here, x in parts:
        bins = data.bins[sample.rows[here]]
        for k, one in experts.items():
            rows = np.flatnonzero(bins == k) if own_bin else np.arange(len(bins))
            if rows.size:
                at = here.start + rows
                values[at, k] = one.predict(
                    Inputs(z[at], level[at], lines[at], None if x is None else x[rows])
                )
