"""What the physics allows: R² ceilings of a set of labelled spectra, by Fisher information and by Bayes.

Design: one pass over the spectra, block by block (`star_bounds.py`), and a summary of what is found (`summary.py`). The
Fisher bound needs labels and errors only and works for any file; the Bayes ceiling needs to know how the file was made
(the attribute `settings` of `moefast simulate`). What is found is one JSON document: a summary, the same groups as in
every evaluation, and a few numbers per star, so that nothing has to be computed twice. The ceilings of the reference
sets come with the package and are found by the fingerprint of the set.
"""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.ceilings import bayes
from moefast.ceilings.star_bounds import FREE_LABELS, BlockBounds, Method, StarBounds
from moefast.ceilings.summary import bayes_summary, by_magnitude, fisher_r2, groups_summary
from moefast.core.atomic import write_atomically
from moefast.core.errors import InputError
from moefast.core.progress import RowProgress, StageProgress
from moefast.core.random import NOISE_SEED
from moefast.simulate.emulator import LABELS
from moefast.simulate.sets import Identity, identify_spectra, name_of_set

__all__ = ["Ceiling", "compute", "known", "read", "write"]

_LOG = logging.getLogger(__name__)

F64 = NDArray[np.float64]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Ceiling:
    """The ceilings of one set.

    Attributes
    ----------
    summary : dict
        JSON-ready; see `compute`.
    stars : dict of str to array of shape (n,), float64
        row; log_g, T_eff, M_H, snr_norm, snr_median; crlb and crlb_prior [dex²]; bayes, bayes_sd and
        monte_carlo_error [dex], ess and rank, as far as they were computed.
    """

    summary: dict[str, Any]
    stars: dict[str, F64]

    def r2(self) -> dict[str, float]:
        """R² ceilings by name, as every evaluation takes them."""
        found: dict[str, float] = {}
        if self.summary["bayes"]:
            found["bayes"] = self.summary["bayes"]["r2"]
        if self.summary["fisher"]:
            found |= {f"fisher {name}": value for name, value in self.summary["fisher"]["r2"].items()}
        return found


def compute(
    paths: str | Path | Iterable[str | Path],
    *,
    method: Method = "auto",
    stars: int | None = None,
    target_ess: float = bayes.TARGET_ESS,
    seed: int = 0,
    threads: int | None = None,
    name: str | None = None,
    progress: StageProgress | None = None,
    spread: Callable[..., Iterator[BlockBounds]] | None = None,
) -> Ceiling:
    """Compute the ceilings of labelled spectra.

    Parameters
    ----------
    paths : path, folder, pattern, or several
        Spectra with the labels T_eff, log_g, M_H; a_M and C_M count as 0 where a file has none.
    method : "auto", "both", "fisher" or "bayes"
        "auto" is both if the files say how they were made, else the Fisher bound alone.
    stars : int, optional
        Use the first rows only.
    target_ess : float
        Effective sample size of each star's posterior.
    seed : int
        Of the posterior samples.
    threads : int, optional
        As many as there are cores if absent.
    name : str, optional
        Name of the set.
    progress : callable, optional
        Called with the name of the stage, "ceiling", rows done and rows in all.
    spread : callable, optional
        Has the rows computed elsewhere: called with what makes a `StarBounds`, the number
        of rows, and a callback that is told of them.

    Returns
    -------
    Ceiling

    Raises
    ------
    LabelError
        Labels are missing or not finite.
    InputError
        A file cannot be read, or does not say what the Bayes ceiling needs.
    """
    stars_of = StarBounds(paths, method=method, target_ess=target_ess, seed=seed, threads=threads)
    n = min(stars or stars_of.spectra.n_rows, stars_of.spectra.n_rows)
    _LOG.info("%d stars; Fisher bound: %s, Bayes ceiling: %s", n, method != "bayes", stars_of.with_bayes)
    report: RowProgress = partial(progress or (lambda *_: None), "ceiling")
    report(0, n)
    blocks = stars_of.blocks((0, n), report) if spread is None else spread(stars_of.arguments, n, report)
    bounds = BlockBounds.joined(blocks)
    table = bounds.columns | {
        key: np.asarray(values[:n], dtype=float) for key, values in stars_of.labels.items()
    }
    summary: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "data_set": _data_set(stars_of, table["log_g"], name),
        "fisher": None,
        "bayes": None,
    }
    if method != "bayes":
        summary["fisher"] = _fisher_summary(stars_of, bounds, table)
    if stars_of.with_bayes:
        summary["bayes"] = bayes_summary(table, bounds.seconds["bayes"], bounds.likelihoods, target_ess, seed)
    summary["groups"] = groups_summary(table)
    return Ceiling(summary, table)


def _data_set(stars_of: StarBounds, log_g: F64, name: str | None) -> dict[str, Any]:
    """Which stars these are; those with a label in `log_g`, (n,), were looked at."""
    spectra, settings = stars_of.spectra, stars_of.settings
    identity = identify_spectra(spectra)
    return {
        "name": name or name_of_set(spectra, identity),
        "fingerprint": spectra.fingerprint(),
        "reference_set": None if identity is None else identity._asdict(),
        "n": len(log_g),
        "n_rows": spectra.n_rows,
        "noise_seed": None if stars_of.stored else NOISE_SEED,
        "settings": None if settings is None else json.loads(settings.to_json()),
        "log_g_variance": float(log_g.var()),
    }


def _fisher_summary(stars_of: StarBounds, bounds: BlockBounds, table: dict[str, F64]) -> dict[str, Any]:
    n = len(table["log_g"])
    without_range = stars_of.settings is None
    return {
        "parameters": list(bounds.names),
        "prior_on_labels": None if without_range else "uniform in the simulated ranges, as 12 / range²",
        "r2": fisher_r2(table, np.ones(n, dtype=bool)),
        "schur": {
            "free": ["log_g", *FREE_LABELS, *(key for key in bounds.names if key not in LABELS)],
            "median_share": np.median(bounds.share, axis=0).tolist(),
        },
        "by_magnitude": by_magnitude(
            stars_of.forward, {key: values[:n] for key, values in stars_of.parameters.items()}
        ),
        "seconds": bounds.seconds["fisher"],
    }


def known(identity: Identity | None) -> Ceiling | None:
    """The ceiling of a part of a reference set that comes with the package, if there is one."""
    if identity is None:
        return None
    source = files("moefast.ceilings") / "data" / f"{identity.reference_set}-{identity.part}.json.gz"
    if not source.is_file():
        return None
    with as_file(source) as path:
        found = read(path)
    return found if found.summary["data_set"]["reference_set"] == identity._asdict() else None


def write(ceiling: Ceiling, path: str | Path, *, overwrite: bool = True) -> None:
    """Write as JSON, compressed if the name ends in .gz.

    Raises
    ------
    OutputError
    """
    stars = {
        key: [int(v) for v in values] if key == "row" else [_rounded(v) for v in values]
        for key, values in ceiling.stars.items()
    }
    text = json.dumps({**ceiling.summary, "stars": stars}, ensure_ascii=False, allow_nan=False)
    content = (text + "\n").encode()
    if str(path).endswith(".gz"):
        # No time stamp: the same ceiling gives the same bytes.
        content = gzip.compress(content, mtime=0)
    write_atomically(path, content, overwrite=overwrite)


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


def read(path: str | Path) -> Ceiling:
    """Read what `write` wrote.

    Raises
    ------
    InputError
        The file is missing, damaged, of another schema or no ceiling.
    """
    try:
        content = Path(path).read_bytes()
        if str(path).endswith(".gz"):
            content = gzip.decompress(content)
        document = json.loads(content)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: is no readable ceiling ({error})") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION or "stars" not in document:
        raise InputError(
            f"{path}: expected a ceiling of schema {SCHEMA_VERSION}, found {version}; make it with moefast ceiling"
        )
    stars = {
        key: np.array([np.nan if v is None else v for v in values], dtype=float)
        for key, values in document.pop("stars").items()
    }
    return Ceiling(document, stars)
