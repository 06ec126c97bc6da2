"""Evaluate a model on labelled spectra by the frozen protocol.

Design: one way to make a number. Test spectra carry noise exactly once: `noisy` where a file has it, otherwise a draw
from the stored seed that belongs to the row, so that every model meets the same noisy stars. The simpler fits that a
model folder carries are scored on the same stars in the same pass; the oracle is the model's experts with true bins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moefast.errors import InputError, OutputError
from moefast.fitting import LinearForm
from moefast.mixture import hat_weights
from moefast.model import Model
from moefast.noise import standard_normals
from moefast.protocol.report import evaluate_predictions, format_text, write_atomically, write_json
from moefast.scoring import BLOCK_ROWS, open_engine, score_block, warm_up
from moefast.spectra.files import Block, open_spectra
from moefast.spectra.quality import good_pixels

__all__ = ["NOISE_SEED", "Evaluation", "check_report_folder", "evaluate", "write_report"]

NOISE_SEED = 20250102
"""Stream of the noise that test spectra without a `noisy` array get."""


@dataclass(frozen=True)
class Evaluation:
    """The report, as written to JSON, with the labels and predictions (n,) it was made of."""

    report: dict[str, Any]
    log_g: NDArray[np.float64]
    predicted: NDArray[np.float64]


def evaluate(
    paths: str | Path | Iterable[str | Path],
    model: Model | str | Path | None = None,
    *,
    noise: Literal["auto", "draw", "none"] = "auto",
    noise_level: float = 1.0,
    noise_seed: int = NOISE_SEED,
    backend: str = "auto",
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate a model on labelled spectra.

    Parameters
    ----------
    paths : path, folder, pattern, or several
        Labelled spectra (T_eff, log_g, M_H).
    model : Model or path of a model folder, optional
        The model shipped with moefast if absent.
    noise : "auto", "draw" or "none"
        "auto" takes the array `noisy` where a file has it (at noise level 1) and else adds noise to `flux`; "draw"
        always adds noise to `flux`; "none" scores `flux` as it is, for spectra that are observed.
    noise_level : float
        Factor on the errors of the files.
    noise_seed : int
    backend : "auto", "cpu" or "cuda"
    name : str, optional
        Name of the test set in the report.
    progress : callable, optional
        Called with rows done and rows in all.

    Raises
    ------
    LabelError
        Labels are missing or not finite.
    InputError
        A file cannot be read.
    """
    chosen = model if isinstance(model, Model) else Model.load(model)
    if not noise_level > 0:
        raise InputError(f"the noise level must be positive, found {noise_level}")
    engine, where = open_engine(chosen.mixture, backend)
    spectra = open_spectra(paths)
    chosen.check_wave(spectra.wave, str(spectra.shards[0].path))
    labels = spectra.labels(("T_eff", "log_g", "M_H"))
    bins = chosen.grid.assign(labels["T_eff"], labels["M_H"])
    stored = noise == "auto" and noise_level == 1.0 and all("noisy" in s.arrays for s in spectra.shards)
    references: dict[str, list[NDArray]] = {key: [] for key in chosen.references}
    found: dict[str, list[NDArray]] = {}
    scoring = 0.0
    warm_up(engine, chosen.mixture.n_pixels)
    for block in spectra.blocks(BLOCK_ROWS, array="noisy" if stored else "flux"):
        rows = np.arange(block.first_row, block.first_row + len(block))
        if noise_level != 1.0:
            block.error *= np.float32(noise_level)
        if noise != "none" and not stored:
            draw = standard_normals(noise_seed, rows, spectra.n_pixels)
            draw *= block.error
            block.flux += draw
        base = int(spectra.first_rows[block.shard])
        begin = time.perf_counter()
        columns, _ = score_block(chosen, engine, block, block.first_row - base)
        scoring += time.perf_counter() - begin
        good = good_pixels(block.flux, block.error, block.mask)
        prepared = chosen.mixture.prepare(block.flux, block.error, good)
        columns["oracle"] = prepared.expert_log_g[np.arange(len(block)), bins[rows]]
        for key, values in columns.items():
            found.setdefault(key, []).append(values)
        for key, form in chosen.references.items():
            references[key].append(_linear(form, chosen, block, good, prepared.log_level, bins[rows]))
        if progress is not None:
            progress(int(rows[-1]) + 1, spectra.n_rows)
    table = {key: np.concatenate(parts) for key, parts in found.items()}
    others = {key: np.concatenate(parts) for key, parts in references.items()}
    if chosen.mixture.n_experts > 1:
        others["oracle-ridge"] = np.clip(table["oracle"].astype(np.float64), *chosen.mixture.label_range)
    weights = np.column_stack([table[f"weight_{k}"] for k in range(chosen.mixture.n_experts)])
    predicted = table["log_g"].astype(np.float64)
    report = evaluate_predictions(
        labels["log_g"],
        predicted,
        table["log_g_err"],
        t_eff=labels["T_eff"],
        m_h=labels["M_H"],
        snr_norm=table["snr_norm"],
        snr_median=table["snr_median"],
        data_set=name or " + ".join(s.path.name for s in spectra.shards[:3]),
        fingerprint=spectra.fingerprint(),
        weights=weights if chosen.mixture.n_experts > 1 else None,
        expert_grid=chosen.grid if chosen.mixture.n_experts > 1 else None,
        references=others,
        oracle_reference="oracle-ridge" if chosen.mixture.n_experts > 1 else None,
        noise_level=None if noise == "none" else noise_level,
        noise_seed=None if stored or noise == "none" else noise_seed,
        model={"name": chosen.manifest["recipe"], "sha256": chosen.hash},
        throughput={
            "spectra_per_second": spectra.n_rows / scoring,
            "backend": where.name,
            "device": where.device,
            "what": "scoring alone, spectra in memory",
        },
    )
    return Evaluation(report, labels["log_g"], predicted)


def _linear(
    form: LinearForm,
    model: Model,
    block: Block,
    good: NDArray[np.bool_] | None,
    log_level: NDArray,
    bins: NDArray[np.integer],
) -> NDArray[np.float64]:
    """Predictions of a reference fit for a block, with true bins where it has one expert per bin."""
    flux = np.maximum(block.flux, 0) if form.clipped else block.flux
    x = flux - model.mixture.reference
    if good is not None:
        x[~good] = 0
    p, k, m = form.weights.shape
    values = (x @ form.weights.reshape(p, k * m)).reshape(-1, k, m).astype(np.float64) + form.intercepts
    if m > 1:
        hat = hat_weights(np.clip(log_level, form.levels[0], form.levels[-1]), form.levels)
        each = (values * hat[:, None]).sum(2)
    else:
        each = values[:, :, 0]
    chosen = each[:, 0] if k == 1 else each[np.arange(len(x)), bins]
    return np.clip(chosen, *model.mixture.label_range)


REPORT_FILES = ("report.json", "report.txt", "report.png")


def check_report_folder(folder: str | Path, overwrite: bool) -> None:
    """Refuse a folder that holds a report already: known before the evaluation, not after.

    Raises
    ------
    OutputError
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; name a folder for the report")
    there = [name for name in REPORT_FILES if (target / name).exists()]
    if there and not overwrite:
        raise OutputError(f"{target / there[0]}: exists already; choose another folder or use --overwrite")


def write_report(evaluation: Evaluation, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
    """Write report.json, report.txt and report.png to a folder, which is made if need be.

    Raises
    ------
    OutputError
        A report is there already, or the folder cannot be written.
    """
    from moefast.protocol.figures import figure

    check_report_folder(folder, overwrite)
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target}: cannot be made ({error.strerror})") from error
    paths = [target / name for name in REPORT_FILES]
    write_json(evaluation.report, paths[0])
    write_atomically(paths[1], (format_text(evaluation.report) + "\n").encode())
    figure(evaluation.report, evaluation.log_g, evaluation.predicted, paths[2])
    return paths
