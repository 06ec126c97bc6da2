"""Made-up templates at several velocities and stars of them, and a space whose spectra change with velocity."""

from __future__ import annotations

import numpy as np

from moefast.kernels import Slopes, Space, VelocityTemplates
from moefast.kernels.reference_velocity import velocity_evidence_reference, velocity_step_reference
from moefast.posterior.cells import neighbouring_pixels


def templates(n_v=5, r=3, m=11, c=3, k=640, seed=0, first=20):
    """Lines of r components, whose squares are exactly those of r (r + 1) / 2 components."""
    rng = np.random.default_rng(seed)
    x = np.linspace(-1, 1, k)
    lines = 0.1 * rng.standard_normal((n_v, r, k))
    pairs = [(a, b) for a in range(r) for b in range(a, r)]
    of_lines = rng.standard_normal((m, r))
    squares = np.stack([lines[:, a] * lines[:, b] for a, b in pairs], axis=1)
    of_squares = np.stack([(1 + (a != b)) * of_lines[:, a] * of_lines[:, b] for a, b in pairs], axis=1)
    return VelocityTemplates(
        first=first,
        continuum=(1 + 0.2 * x) * np.stack([x**i for i in range(c)]),
        precision=np.array([1.0, 10.0, 20.0, 30.0, 40.0])[:c],
        lines=lines.astype(np.float32),
        squares=squares.astype(np.float32),
        of_lines=of_lines.astype(np.float32),
        of_squares=of_squares.astype(np.float32),
        log_weights=np.log(rng.dirichlet(np.ones(m))).astype(np.float32),
    )


def stars_of(templates, n, p=700, seed=1, which_velocity=2):
    """Flux and error (n, p) of stars like some of the templates at one of their velocities."""
    rng = np.random.default_rng(seed)
    k = templates.continuum.shape[1]
    flux, error = rng.standard_normal((n, p)), rng.uniform(0.02, 0.2, (n, p))
    shown = slice(templates.first, templates.first + k)
    which = rng.integers(0, len(templates.of_lines), n)
    lines = np.einsum("nr,rk->nk", templates.of_lines[which], templates.lines[which_velocity].astype(float))
    scale = rng.uniform(0.5, 20, (n, 1))
    flux[:, shown] = templates.continuum[0] + lines + error[:, shown] * flux[:, shown]
    return (scale * flux).astype(np.float32), (scale * error).astype(np.float32)


def expected_evidence(templates, flux, error, mask):
    """What the equations give, in float64."""
    k = templates.continuum.shape[1]
    shown = slice(templates.first, templates.first + k)
    lines = np.einsum("mr,vrk->vmk", templates.of_lines.astype(float), templates.lines.astype(float))
    good = np.isfinite(flux) & (error > 0) & ~mask
    rows = []
    for x, sigma, known in zip(flux[:, shown], error[:, shown], good[:, shown], strict=True):
        rows.append(
            velocity_evidence_reference(
                np.where(known, x, 0.0), np.where(known, sigma, np.inf).astype(float), templates.continuum,
                templates.precision, lines, templates.log_weights.astype(float),
            )
        )  # fmt: skip
    return np.array(rows)


def space_of(mix, cell):
    """The space of a made-up mixture, in cells of so many pixels, and slopes of its spectra."""
    cells, shares = neighbouring_pixels(mix.n_pixels, cell)
    numbers = mix.numbers
    space = Space(
        reference=mix.reference, noise_shape=mix.noise_shape, directions=mix.directions, n_nuisances=mix.n_nuisances,
        cells=cells, cell_shares=shares, precision=numbers["library_precision"], pull=numbers["library_pull"][:, 0],
    )  # fmt: skip
    moved = np.gradient(mix.directions, axis=0)
    moved[:, mix.n_coordinates :] = 0
    slopes = Slopes(np.gradient(mix.reference).astype(np.float32), moved.astype(np.float32), mix.n_nuisances)
    return space, slopes


def expected_step(mix, space, slopes, flux, error, mask):
    """Velocity and its 1σ of one star, as the equations give them in float64."""
    good = np.isfinite(flux) & (error > 0) & ~mask
    return velocity_step_reference(
        np.where(good, flux, 0.0).astype(float), np.where(good, error, np.inf).astype(float),
        *(a.astype(float) for a in (mix.reference, mix.directions)), space.precision,
        space.pull, slopes.of_reference.astype(float), slopes.of_directions.astype(float),
    )  # fmt: skip
