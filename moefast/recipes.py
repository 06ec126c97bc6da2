"""Named recipes: which experts and which gate make which model.

Design: a recipe is a grid of experts and options for `moefast.fitting.fit_mixture`; a global fit is a mixture with one
expert. The published-style ridge is also a reference that every fit carries along: always compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moefast.backend import resolve_kernels
from moefast.checkpoint import Checkpoint
from moefast.core.errors import InputError
from moefast.core.grids import PHYSICAL_GRID, Grid, SnrGrid, uniform
from moefast.core.progress import StageProgress, stage_progress
from moefast.core.sketches import sketch
from moefast.core.text import counted
from moefast.fitting import HERE, PUBLISHED_ALPHA, Noise, Options, Passes, expected_stages, fit_mixture
from moefast.model import Model
from moefast.spectra.oddities import noisy_already
from moefast.spectra.sampling import take_sample
from moefast.spectra.source import SpectrumSource
from moefast.spectra.spectrum_set import SpectrumSet, open_spectra
from moefast.trunks.presets import Size

__all__ = [
    "DEFAULT",
    "FOCUSED",
    "RECIPES",
    "STRONG",
    "PreparedFit",
    "Recipe",
    "fit",
    "focused",
    "options_of",
    "prepare",
]


_LEARNT = {"correction_draws": 2_100_000, "sample_rows": 200_000}
"""Noisy draws of which a posterior learns what its clouds leave out (more teach more, at 0.2 ms each on two cores), and
stars that its errors are calibrated on, of large training sets."""


@dataclass(frozen=True)
class Recipe:
    """A named model: its grid of experts, what it is in one line, and what it asks of `Options` besides."""

    grid: Grid | SnrGrid
    what: str
    options: Mapping[str, Any] = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "phys-moe": Recipe(PHYSICAL_GRID, "9 linear experts per noise level, soft gate on line and PCA features"),
    "template": Recipe(
        PHYSICAL_GRID,
        "posterior mean over a library of templates with tangents, grouped in 9 bins, weighed by evidence",
        {"families": ("template",)},
    ),
    "posterior": Recipe(
        PHYSICAL_GRID,
        "posterior over clouds of templates at each star's own noise and gaps; scale and slope of the flux are free",
        {
            "families": ("posterior",),
            "slope_widths": (0.1, 0.05, 0.05, 0.05),
            "calibrated": (0.5, 0.3, 0.1, 0.1, 0.1),
            "sky_width": 4.0,
            "beyond": True,
            "n_blends": 48,
            **_LEARNT,
            "n_clouds": 320,
            "n_tangents": 9,
            "n_coordinates": 56,
        },
    ),
    "posterior-calibrated": Recipe(
        PHYSICAL_GRID,
        "the same for spectra whose flux calibration can be trusted: the scale is free, the slope is not",
        {"families": ("posterior",), **_LEARNT},
    ),
    "posterior-linear": Recipe(
        PHYSICAL_GRID,
        "linear experts at each star's own noise and gaps, 12 bins of log g in each of 9 bins, gate by evidence",
        {
            "families": ("posterior",),
            "n_gravity_bins": 12,
            "n_tangents": 8,
            "slope_widths": (0.1, 0.05, 0.05, 0.05),
            "calibrated": (0.5, 0.3, 0.1, 0.1, 0.1),
            "sky_width": 4.0,
        },
    ),
    "hybrid-moe": Recipe(
        PHYSICAL_GRID,
        "9 experts, each of the family (linear, template, trees) that is best in its bin; soft gate by evidence",
        {"families": ("linear", "template", "trees")},
    ),
    "hybrid-regression": Recipe(
        PHYSICAL_GRID,
        "the experts of hybrid-moe; a gate by regression, with the weights of the least error, without evidence",
        {"families": ("linear", "template", "trees"), "evidence": False},
    ),
    "hybrid-metal-poor": Recipe(
        PHYSICAL_GRID,
        "hybrid-moe, and trees on line indices (Ca II, Na I, Mg I, Fe I, Paschen) to choose from in metal-poor bins",
        {"families": ("linear", "template", "trees"), "metal_poor_families": ("trees-indices",)},
    ),
    "residual-moe": Recipe(
        PHYSICAL_GRID,
        "heads, and residuals (linear, ridge, trees) beside them where they help by more than their standard error",
        {
            "families": ("heads",),
            "trunk": "pca-mlp",
            "sample_rows": 20_000,
            "sample_draws": 8,
            "residuals": ("linear", "ridge", "trees"),
        },
    ),
    "residual-metal-poor": Recipe(
        PHYSICAL_GRID,
        "the same, with residuals learnt from what is metal-poor or has snr_norm up to 4",
        {
            "families": ("heads",),
            "trunk": "pca-mlp",
            "sample_rows": 20_000,
            "sample_draws": 8,
            "residuals": ("linear", "ridge", "trees"),
            "residual_focus": True,
        },
    ),
    "conditional-moe": Recipe(
        PHYSICAL_GRID,
        "phys-moe, and a second, wide tower of the gate for stars with snr_norm up to 2",
        {"tower": "features", "tower_limit": 2.0},
    ),
    "dual-moe": Recipe(
        PHYSICAL_GRID,
        "phys-moe, and a second tower of the gate on the quality features of the error",
        {"tower": "quality"},
    ),
    "snr-moe": Recipe(
        SnrGrid(),
        "4 linear experts per noise level for bins of snr_norm, soft gate on the quality features of the error",
        {"tower": "quality", "first_tower": False},
    ),
    **{
        name: Recipe(
            PHYSICAL_GRID,
            what + ", 9 heads and a metal-poor one, gate on lines and embedding",
            {"families": ("heads",), "trunk": trunk, "sample_rows": rows, "sample_draws": draws},
        )
        for name, trunk, rows, draws, what in (
            ("heads", "pca-mlp", 20_000, 8, "a network on noise-white components"),
            ("heads-cnn", "cnn", 20_000, 2, "a convolutional network on the flux"),
            ("heads-vit", "vit", 10_000, 1, "a vision transformer on patches of the flux"),
        )
    },
    **{
        name: Recipe(
            uniform(1, 1),
            what + " with one head and no gate, to compare with",
            {"families": ("heads",), "trunk": trunk, "sample_rows": rows, "sample_draws": draws},
        )
        for name, trunk, rows, draws, what in (
            ("heads-single", "pca-mlp", 20_000, 8, "the network of heads"),
            ("heads-vit-single", "vit", 10_000, 1, "the network of heads-vit"),
        )
    },
    "global-ridge": Recipe(uniform(1, 1), "one linear expert per noise level, no gate"),
    "published-ridge": Recipe(
        uniform(1, 1),
        "one ridge as published: flux with one draw of noise, clipped at 0, penalty 0.1 per star",
        {"clipped": True, "alpha": PUBLISHED_ALPHA, "n_levels": 2},
    ),
}
DEFAULT = "phys-moe"
FOCUSED = {
    ("hybrid-moe", "metal-poor"): "hybrid-metal-poor",
    ("residual-moe", "metal-poor"): "residual-metal-poor",
}
"""Recipes that are another one with more for some stars, by that recipe and what they are for."""
STRONG = ("template", "heads", "heads-cnn", "heads-vit")
"""Recipes whose model residuals can stand on."""


def focused(recipe: str, focus: str | None) -> str:
    """The recipe that is another one with more for some stars.

    Parameters
    ----------
    recipe : str
    focus : str or None
        For which stars; the recipe itself if None.

    Raises
    ------
    InputError
        There is none.
    """
    if focus is None:
        return recipe
    if (recipe, focus) not in FOCUSED:
        known = ", ".join(f"{one} of {base}" for base, one in FOCUSED)
        raise InputError(f"recipe {recipe!r} has no focus {focus!r}; there is {known}")
    return FOCUSED[recipe, focus]


def options_of(
    recipe: str = DEFAULT,
    *,
    grid: Grid | None = None,
    families: Sequence[str] | None = None,
    strong: str | None = None,
    noise: Noise = "closed-form",
    **changes: Any,
) -> Options:
    """Options of a recipe, with what is said otherwise; parameters as those of `fit`.

    Raises
    ------
    InputError
        The recipe is unknown, or what is said does not go together.
    """
    if recipe not in RECIPES:
        raise InputError(f"recipe {recipe!r} is unknown; choose one of {', '.join(RECIPES)}")
    own = dict(RECIPES[recipe].options)
    if strong is not None:
        if "residuals" not in own or strong not in STRONG:
            raise InputError(
                f"{strong!r} under {recipe!r}: residuals stand on one of {', '.join(STRONG)}; choose one of these and "
                "a recipe with residuals"
            )
        own = {name: own[name] for name in ("residuals", "residual_focus") if name in own}
        own |= RECIPES[strong].options
    if families is not None:
        own["families"] = tuple(families)
    if own.get("clipped") and noise == "closed-form":
        noise = "sampled"
    return Options(grid=grid or RECIPES[recipe].grid, noise=noise, **changes, **own)


def fit(
    paths: str | Path | Iterable[str | Path] | SpectrumSource,
    *,
    recipe: str = DEFAULT,
    grid: Grid | None = None,
    families: Sequence[str] | None = None,
    strong: str | None = None,
    noise: Noise = "closed-form",
    noise_level: float = 1.0,
    size: Size = "small",
    steps: int | None = None,
    references: bool = True,
    seed: int = 0,
    progress: StageProgress | Literal[False] | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
    backend: str = "auto",
    tell: Callable[[str], None] | None = None,
) -> Model:
    """Fit a model on labelled spectra.

    Parameters
    ----------
    paths : path, folder, pattern, or several; or a SpectrumSource
        Training spectra with labels T_eff [K], log_g [dex], M_H [dex]. Simulated spectra are generated as they are
        needed, with no file between.
    recipe : str
        A name in `RECIPES`.
    grid : Grid, optional
        Bins of the experts, instead of the recipe's.
    families : sequence of str, optional
        Families of experts that each bin chooses from, instead of the recipe's; see `moefast.fitting.Options`.
    strong : str, optional
        What residuals stand on, one of `STRONG`, instead of what the recipe says.
    noise : "closed-form", "sampled" or "observed"
        Clean flux, noise in closed form; clean flux, one noise draw per row; flux that is noisy already. There is no
        closed form for clipped flux: a recipe that clips draws noise instead, and the manifest says so.
    noise_level : float
        Factor on the errors of the files.
    size : "small" or "base"
        Of the network of recipes that have one: for a laptop or for a GPU.
    steps : int, optional
        Of its fit; what belongs to the size if None.
    references : bool
        Also fit the published-style ridge to compare with.
    seed : int
        Of folds, noise draws and networks.
    progress : callable, optional
        Called with the name of a stage, rows (or steps) done and rows in all. Without it a line shows them in notebooks
        and interactive sessions; False leaves it out.
    checkpoint : path or Checkpoint, optional
        Folder in which the statistics are kept every two minutes, so that a fit that is killed goes on where it stood
        when it is repeated, on a CPU to a model with the same bits. A folder given by its path is cleared once the fit
        is complete; a Checkpoint is left to the caller, who can keep it until the model is saved.
    backend : "auto", "cpu" or "cuda"
        Where the normal equations are gathered; the manifest says which was taken.
    tell : callable, optional
        Called, before the first row is read, with what makes the noise that is added doubtful.

    Returns
    -------
    Model
        Not saved yet.

    Raises
    ------
    InputError, LabelError, WaveGridError
        InputError also if the checkpoint is of other spectra, options or another version, or if the recipe needs clean
        spectra and flux is noisy already.
    OutputError
        The checkpoint has no room on its disk.
    BackendError
        "cuda" was asked for and cannot be used.
    """
    kept = Checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
    prepared = prepare(
        paths,
        recipe=recipe,
        grid=grid,
        families=families,
        strong=strong,
        noise=noise,
        noise_level=noise_level,
        size=size,
        steps=steps,
        references=references,
        seed=seed,
        tell=tell,
    )
    model = prepared.fit(progress, kept, backend)
    if kept is not None and kept is not checkpoint:
        kept.remove()
    return model


def prepare(
    paths: str | Path | Iterable[str | Path] | SpectrumSource,
    *,
    recipe: str = DEFAULT,
    tell: Callable[[str], None] | None = None,
    **said: Any,
) -> PreparedFit:
    """All that is known of a fit before its first row is read; `said` is for `options_of`, all else as for `fit`."""
    options = options_of(recipe, **said)
    spectra = paths if isinstance(paths, SpectrumSource) else open_spectra(paths)
    odd = _noise_added_twice(spectra, options, recipe) if isinstance(spectra, SpectrumSet) else []
    if tell is not None:
        for words in odd:
            tell(words)
    return PreparedFit(spectra, options, recipe, spectra.fingerprint(), odd)


def _noise_added_twice(spectra: SpectrumSet, options: Options, recipe: str) -> list[str]:
    """What to tell where noise would be added to flux that is noisy already.

    Raises
    ------
    InputError
        It is, and the experts need clean spectra: their library, trees or network would learn the noise.
    """
    if options.noise == "observed":
        return []
    odd = noisy_already(take_sample(spectra, array="flux"), "fit them with --noise observed")
    if odd and options.needs_clean:
        n_others = len(spectra.shards) - 1
        others = f" and {counted(n_others, 'other file')}" if n_others else ""
        raise InputError(
            f"{spectra.shards[0].path}{others}: recipe {recipe} (families {', '.join(options.all_families)}) needs "
            "clean training spectra; found that the dataset flux scatters as its errors say, so it is noisy already; "
            "expected flux without noise. Give the flux that the noise was added to, or fit linear experts, with "
            "--recipe phys-moe --noise observed"
        )
    return [each.words for each in odd]


@dataclass(frozen=True)
class PreparedFit:
    """A fit that is ready to begin: spectra and their `fingerprint`, options, recipe, and notes on what is odd."""

    spectra: SpectrumSource
    options: Options
    recipe: str
    fingerprint: str
    notes: Sequence[str] = ()

    def fit(
        self,
        progress: StageProgress | Literal[False] | None = None,
        checkpoint: Checkpoint | None = None,
        backend: str = "auto",
        passes: Passes = HERE,
    ) -> Model:
        """The fitted model, not saved yet; `passes` says who reads the rows, the rest is as for `fit`."""
        where = resolve_kernels(backend)
        spectra, options = self.spectra, self.options
        with stage_progress(progress, expected_stages(options, spectra.n_rows)) as report:
            fitted = fit_mixture(
                spectra, options, report, checkpoint, "cuda" if where.name == "cuda" else "cpu", passes
            )
        labels = spectra.labels(("T_eff", "log_g", "M_H"), partial=True)
        complete = np.isfinite(np.sum([*labels.values()], axis=0))
        labels = {name: values[complete] for name, values in labels.items()}
        training: dict[str, Any] = {
            "files": [shard.path.name for shard in spectra.shards],
            "fingerprint": self.fingerprint,
            "n_spectra": spectra.n_rows,
            "noise": options.noise,
            "noise_level": options.noise_level,
            "seed": options.seed,
            "backend": where.name,
            "labels": {name: [float(v.min()), float(v.max())] for name, v in labels.items()},
            "log_g_std": float(np.std(labels["log_g"])),
            "row_sketch": sketch(labels),
            "notes": [*self.notes, *spectra.label_notes()],
        }
        return Model.of_mixture(
            fitted.mixture,
            fitted.references,
            recipe=self.recipe,
            grid=options.grid,
            training=training,
            summary=fitted.summary,
        )
