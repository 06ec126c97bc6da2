"""A run without labels, looked at: how many stars are flagged, how well spectra are fitted, which stars are worst.

Design: from the table of predictions alone, which every run has; small tables of numbers, so that figures and page are
functions of them and `--json` gives the same. No truth is needed, and none is pretended: what is shown is what a user
can judge before joining the table to a catalogue.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.core.outputs import label_columns
from moefast.core.text import counted, percent, table
from moefast.spectra.layouts.fits_file import FitsFile
from moefast.spectra.quality import Flag
from moefast.spectra.tables import GROUP, READERS, read_table

__all__ = [
    "ERROR_STEPS",
    "RunSummary",
    "Step",
    "WorstStar",
    "format_text",
    "is_table",
    "summarise",
    "summarise_table",
]

N_STEPS = 10
"""Steps of equal numbers of stars along the signal-to-noise ratio."""
N_CELLS = (30, 30)
"""Cells of the Kiel diagram in T_eff and log g."""
N_LOG_G = 40
"""Bars of the distribution of log g."""
N_WORST = 4
"""Stars that are shown for each reason."""
N_DRAWN = 1500
"""Stars at most that are drawn as points: each is a symbol in the page."""
ERROR_STEPS = (0.15, 0.25, 0.4, 0.6, 0.8)
"""Errors of log g [dex] between which the Kiel diagram changes its colour."""
LIMITS = (0.0, 6.0)
"""dex: log g that is drawn."""
NEEDED = ("row", "log_g", "log_g_err", "chi2", "snr_median", "flag")

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Step:
    """Stars of like signal-to-noise ratio.

    Attributes
    ----------
    range : (float, float)
        Of snr_median.
    centre : float
        Its median.
    n : int
    flagged : dict of str to float
        Share of the stars with each flag; "any" is that with one at least.
    chi2, log_g_err : (float, float, float)
        16th, 50th and 84th percentile.
    foreign : (float, float, float), or None
        50th, 95th and 99th percentile of the probability that a spectrum is that of no star; only of posteriors.
    """

    range: tuple[float, float]
    centre: float
    n: int
    flagged: dict[str, float]
    chi2: tuple[float, float, float]
    log_g_err: tuple[float, float, float]
    foreign: tuple[float, float, float] | None


@dataclass(frozen=True)
class WorstStar:
    """A star that should be looked at.

    Attributes
    ----------
    row : int
        Row of its file.
    file : int
        Index of its file among the inputs.
    ids : dict of str to value
    flags : tuple of str
    reason : str
        In words, from the columns of the table.
    values : dict of str to float
        log_g, log_g_err, snr_median, chi2.
    velocity : float or None
        km/s, that was removed.
    """

    row: int
    file: int
    ids: dict[str, Any]
    flags: tuple[str, ...]
    reason: str
    values: dict[str, float | None]
    velocity: float | None = None


@dataclass(frozen=True)
class RunSummary:
    """What is known of a run.

    Attributes
    ----------
    path : str
        The table.
    attributes : dict
        Of the table: model, inputs, backend, notes, …
    n, n_flagged : int
        Rows, and those with one flag at least.
    flags : dict of str to int
        Rows with each flag.
    percentiles : dict of str to list of float
        5, 25, 50, 75 and 95 % of snr_median, log_g, log_g_err and chi2, over rows that have them.
    by_snr : list of Step
    points : dict of str to list of float
        snr_median, chi2 and log_g_err of up to `N_DRAWN` stars, spread over the table, and whether they are flagged.
    log_g : dict
        edges [dex], and counts of all stars and of those without a flag.
    kiel : dict or None
        t_eff and log_g (edges), and cells: index of T_eff, index of log g, number of stars, median error [dex]; None
        where the model gives no T_eff.
    worst : list of WorstStar
    """

    path: str
    attributes: dict[str, Any]
    n: int
    n_flagged: int
    flags: dict[str, int]
    percentiles: dict[str, list[float] | None]
    by_snr: list[Step]
    points: dict[str, list[float]]
    log_g: dict[str, list[float]]
    kiel: dict[str, Any] | None
    worst: list[WorstStar] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the points of the figures."""
        out = asdict(self)
        del out["points"]
        return out


def is_table(path: str | Path) -> bool:
    """Whether a file is a table of predictions, by what it holds; spectra are none."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READERS or not os.path.isfile(path):
        return False
    if suffix == ".parquet":
        return True
    try:
        if suffix == ".fits":
            file = FitsFile(path)
            file.close()
            return GROUP.upper() in file
        with h5py.File(path, "r") as file:
            return GROUP in file
    except (OSError, ValueError, InputError):
        return False


def summarise_table(path: str | Path) -> RunSummary:
    """What is known of the run that wrote a table of predictions.

    Parameters
    ----------
    path : path
        Written by `moefast.predict`: .h5, .parquet or .fits. It is read into memory.

    Raises
    ------
    InputError
        It cannot be read, or lacks columns that predictions have.
    """
    columns, attributes = read_table(path)
    missing = [name for name in NEEDED if name not in columns]
    if missing:
        raise InputError(
            f"{path}: has no column {missing[0]}; a table that moefast predict wrote is expected, which has "
            + ", ".join(NEEDED)
        )
    return summarise(columns, attributes, str(path))


def summarise(columns: Mapping[str, NDArray], attributes: Mapping[str, Any], path: str = "") -> RunSummary:
    """What is known of a run.

    Parameters
    ----------
    columns : mapping of str to array of shape (n,)
        Of a table of predictions.
    attributes : mapping
    path : str
    """
    flag = np.asarray(columns["flag"]).astype(np.uint32)
    flags = {str(one.name): int(np.count_nonzero(flag & np.uint32(one))) for one in Flag}
    names = ("snr_median", "log_g", "log_g_err", "chi2")
    values = {name: np.asarray(columns[name], np.float64) for name in names}
    return RunSummary(
        path=path,
        attributes=dict(attributes),
        n=len(flag),
        n_flagged=int(np.count_nonzero(flag)),
        flags={name: count for name, count in flags.items() if count},
        percentiles={name: _percentiles(column) for name, column in values.items()},
        by_snr=_by_snr(values, flag, columns.get("foreign")),
        points=_points(values, flag),
        log_g=_histogram(values["log_g"], flag),
        kiel=_kiel(columns, values),
        worst=_worst(columns, flag),
    )


def _percentiles(values: F64) -> list[float] | None:
    known = values[np.isfinite(values)]
    return None if not known.size else [float(v) for v in np.percentile(known, (5, 25, 50, 75, 95))]


def _by_snr(values: Mapping[str, F64], flag: NDArray, foreign: NDArray | None) -> list[Step]:
    snr = values["snr_median"]
    known = np.flatnonzero(np.isfinite(snr) & np.isfinite(values["log_g"]))
    order = known[np.argsort(snr[known], kind="stable")]
    steps = []
    for members in np.array_split(order, min(N_STEPS, max(1, len(order) // 10))):
        if not members.size:
            continue
        flagged = {
            str(one.name): float(np.mean((flag[members] & np.uint32(one)) != 0))
            for one in Flag
            if (flag & np.uint32(one)).any()
        }
        chi2, err = (np.percentile(values[name][members], (16, 50, 84)) for name in ("chi2", "log_g_err"))
        steps.append(
            Step(
                range=(float(snr[members[0]]), float(snr[members[-1]])),
                centre=float(np.median(snr[members])),
                n=len(members),
                flagged={"any": float(np.mean(flag[members] != 0))} | flagged,
                chi2=tuple(chi2.tolist()),
                log_g_err=tuple(err.tolist()),
                foreign=None
                if foreign is None
                else tuple(np.percentile(np.asarray(foreign, np.float64)[members], (50, 95, 99)).tolist()),
            )
        )
    return steps


def _points(values: Mapping[str, F64], flag: NDArray) -> dict[str, list[float]]:
    known = np.flatnonzero(np.isfinite(values["snr_median"]) & np.isfinite(values["log_g"]))
    chosen = known[:: max(1, -(-len(known) // N_DRAWN))]
    out = {name: values[name][chosen].tolist() for name in ("snr_median", "chi2", "log_g_err")}
    return out | {"flagged": [float(bit) for bit in flag[chosen] != 0]}


def _histogram(log_g: F64, flag: NDArray) -> dict[str, list[float]]:
    known = np.isfinite(log_g)
    low, high = (log_g[known].min(), log_g[known].max()) if known.any() else LIMITS
    low, high = max(LIMITS[0], np.floor(2 * low) / 2), min(LIMITS[1], np.ceil(2 * high) / 2)
    edges = np.linspace(low, max(high, low + 0.5), N_LOG_G + 1)
    every, _ = np.histogram(log_g[known], edges)
    clean, _ = np.histogram(log_g[known & (flag == 0)], edges)
    return {"edges": edges.tolist(), "all": every.tolist(), "without_flag": clean.tolist()}


def _kiel(columns: Mapping[str, NDArray], values: Mapping[str, F64]) -> dict[str, Any] | None:
    if "T_eff" not in columns:
        return None
    t_eff, log_g, error = np.asarray(columns["T_eff"], np.float64), values["log_g"], values["log_g_err"]
    known = np.isfinite(t_eff) & np.isfinite(log_g) & np.isfinite(error)
    if not known.any():
        return None
    t_eff, log_g, error = t_eff[known], log_g[known], error[known]
    edges = [_edges(each, n) for each, n in zip((t_eff, log_g), N_CELLS, strict=True)]
    place = [
        np.clip(np.searchsorted(e, v, side="right") - 1, 0, n - 1)
        for e, v, n in zip(edges, (t_eff, log_g), N_CELLS, strict=True)
    ]
    cell = place[0] * N_CELLS[1] + place[1]
    order = np.argsort(cell, kind="stable")
    found = []
    for members in np.split(order, np.flatnonzero(np.diff(cell[order])) + 1):
        i, k = divmod(int(cell[members[0]]), N_CELLS[1])
        found.append([i, k, len(members), float(np.median(error[members]))])
    return {"t_eff": edges[0].tolist(), "log_g": edges[1].tolist(), "cells": found}


def _edges(values: F64, n: int) -> F64:
    low, high = float(values.min()), float(values.max())
    margin = 1e-3 * max(high - low, 1.0)
    return np.linspace(low - margin, high + margin, n + 1)


_EDGES = (("log_g", 2), ("T_eff", 0), ("M_H", 2))
"""Labels that may lie at an edge, and digits."""

# --- worst stars ---------------------------------------------------------------------------------------


def _misfit(columns: Mapping[str, F64]) -> F64:
    return np.abs(np.log(np.maximum(columns["chi2"], 1e-9)))


_WORST: tuple[tuple[Flag, str, Callable[[Mapping[str, F64]], F64]], ...] = (
    (Flag.UNLIKE_TRAINING, "unlike the training set, chi2 {chi2:.3g}", _misfit),
    (Flag.BAD_ERROR, "a pixel has an error that is not positive or above 1e6", lambda c: c["chi2"]),
    (Flag.OUT_OF_GRID, "at the edge of the training labels", lambda c: c["snr_median"]),
    (Flag.FEW_GOOD_PIXELS, "fewer than half of the pixels are good", lambda c: c["log_g_err"]),
    (
        Flag.LOW_CONFIDENCE,
        "the spectrum says next to nothing, log_g_err {log_g_err:.2f}",
        lambda c: c["snr_median"],
    ),
    (Flag.NO_DATA, "not one pixel is good", lambda c: np.zeros_like(c["chi2"])),
)
"""Flag, reason in words, and what makes a star with it worse than another: of flags that a bright star should not have,
the signal-to-noise ratio."""


def _worst(columns: Mapping[str, NDArray], flag: NDArray) -> list[WorstStar]:
    """Up to `N_WORST` stars for each flag, each star once; the surest evidence first."""
    numbers = {name: np.asarray(columns[name], np.float64) for name in NEEDED[1:-1]}
    numbers |= {
        name: np.asarray(columns[name], np.float64) for name in ("foreign", "blend") if name in columns
    }
    out: list[WorstStar] = []
    taken: set[int] = set()
    ids = _identifiers(columns)
    for one, words, measure in _WORST:
        rows = np.flatnonzero(flag & np.uint32(one))
        with np.errstate(invalid="ignore"):
            order = rows[np.argsort(-np.nan_to_num(measure(numbers)[rows], nan=-1.0), kind="stable")]
        fresh = [int(row) for row in order[: N_WORST + len(taken)] if int(row) not in taken][:N_WORST]
        taken |= set(fresh)
        out += [_worst_star(columns, numbers, ids, row, int(flag[row]), words) for row in fresh]
    return out


def _worst_star(
    columns: Mapping[str, NDArray],
    numbers: Mapping[str, F64],
    ids: Sequence[str],
    row: int,
    flag: int,
    words: str,
) -> WorstStar:
    here = {name: float(values[row]) for name, values in numbers.items()}
    reason = words.format(**here)
    if flag & Flag.UNLIKE_TRAINING and here.get("foreign", 0.0) > 0.01:
        reason += f", probability of no star {here['foreign']:.2g}"
    if here.get("blend", 0.0) > 0.1:
        reason += f", probability of two stars {here['blend']:.2g}"
    if flag & Flag.OUT_OF_GRID:
        labels = [f"{name} {float(columns[name][row]):.{n}f}" for name, n in _EDGES if name in columns]
        reason += f" ({', '.join(labels)})"
    return WorstStar(
        row=int(columns["row"][row]),
        file=int(columns["file"][row]) if "file" in columns else 0,
        ids={name: _plain(columns[name][row]) for name in ids},
        flags=tuple(str(one.name) for one in Flag if flag & one),
        reason=reason,
        values={
            name: here[name] if np.isfinite(here[name]) else None
            for name in ("log_g", "log_g_err", "snr_median", "chi2")
        },
        velocity=float(np.nan_to_num(columns["v_los"][row])) if "v_los" in columns else None,
    )


def _identifiers(columns: Mapping[str, NDArray]) -> list[str]:
    """What stands between the row and the numbers: identifiers, and what was to be kept."""
    from moefast.spectra.layouts.pfsspec import IDENTIFIER

    own = {column.name for column in label_columns(("T_eff", "M_H", "a_M", "C_M"))}
    return [name for name in columns if IDENTIFIER.fullmatch(name) and name not in own]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


# --- text ----------------------------------------------------------------------------------------------


def format_text(run: RunSummary) -> str:
    """What is known of a run, for a terminal."""
    attributes = run.attributes
    inputs = attributes.get("inputs") or []
    lines = [
        f"{run.path}: {counted(run.n, 'prediction')} by {attributes.get('model', 'a model that is not named')}"
    ]
    if inputs:
        lines.append(
            f"  spectra          {inputs[0]}" + (f" and {len(inputs) - 1} more" if len(inputs) > 1 else "")
        )
    if attributes.get("r2") is not None:
        lines.append(f"  R²               {attributes['r2']:.3f}, against the labels of the files")
    share = run.n_flagged / max(run.n, 1)
    lines.append(f"  flagged          {run.n_flagged:,} ({percent(share)})")
    lines += [
        f"    {name:<17}{count:>9,} ({percent(count / max(run.n, 1))})" for name, count in run.flags.items()
    ]
    lines += ["", "  percentiles      " + "".join(f"{p:>8} %" for p in (5, 25, 50, 75, 95))]
    for name, values in run.percentiles.items():
        row = "  none is finite" if values is None else "".join(f"{value:>10.3g}" for value in values)
        lines.append(f"  {name:<17}{row}")
    if run.by_snr:
        rows = [
            (
                f"{step.range[0]:.3g} to {step.range[1]:.3g}", f"{step.n:,}", percent(step.flagged["any"]),
                f"{step.chi2[1]:.3f}", f"{step.log_g_err[1]:.3f}",
            )
            for step in run.by_snr
        ]  # fmt: skip
        header = ("snr_median", "n", "flagged", "chi2", "log_g_err")
        lines += ["", "By signal-to-noise ratio (medians)", *table(header, rows)]
    if run.worst:
        lines += ["", "Stars to look at (moefast inspect FILE --row N --picture star.png shows one)"]
        lines += [_line(star, len(inputs) > 1) for star in run.worst]
    lines += [f"  note: {note}" for note in attributes.get("notes") or []]
    return "\n".join(line.rstrip() for line in lines)


def _line(star: WorstStar, several: bool) -> str:
    ids = "".join(f", {name} {value}" for name, value in star.ids.items())
    file = f"file {star.file}, " if several else ""
    return f"  {file}row {star.row}{ids}: {star.reason}"
