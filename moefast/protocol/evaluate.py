"""Evaluate anything that predicts log g on labelled spectra, by the frozen protocol.

Design: one way to make a number. Test spectra carry noise exactly once: `noisy` where a file has it, otherwise a draw
from the stored seed that belongs to the row, so that every model meets the same noisy stars. The simpler fits that a
model folder carries are scored on the same stars in the same pass; the oracle is the model's experts with true bins.
What a clock measured is kept apart from the report, so that evaluating twice gives the same report.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moefast.ceilings.ceiling import Ceiling, known, read
from moefast.core.atomic import (
    partial_folder,
    publish_folder,
    recover_folder,
    refuse_impossible,
    remove_quietly,
    synchronise_folder,
    write_atomically,
    write_json,
)
from moefast.core.errors import InputError, OutputError
from moefast.core.grids import Grid, SnrGrid
from moefast.core.progress import StageProgress, stage_progress
from moefast.core.random import NOISE_SEED, standard_normals
from moefast.core.sketches import share_seen
from moefast.core.version import __version__
from moefast.experts.linear_form import LinearForm
from moefast.mixture import hat_weights
from moefast.model import SHIPPED, Model, shipped_path
from moefast.posterior.mixture import AnyMixture, PosteriorMixture
from moefast.protocol.predictions import write_kept
from moefast.protocol.report import (
    ORACLE,
    Comparisons,
    DataSet,
    Predictions,
    Stars,
    evaluate_predictions,
)
from moefast.protocol.report_text import format_text
from moefast.protocol.subject import ModelSubject, Subject, open_subject
from moefast.simulate.sets import Identity, identify
from moefast.spectra.guard import noisy_already, take
from moefast.spectra.quality import assess, good_pixels
from moefast.spectra.source import Block
from moefast.spectra.spectrum_set import SpectrumSet, open_spectra
from moefast.spectra.wave import same_wave

__all__ = ["Evaluation", "check_report_folder", "evaluate", "expected_stages", "write_report"]

_LOG = logging.getLogger(__name__)


# Seconds on two cores, by which the stages of an evaluation are weighed.
SECONDS_PER_ROW = 7e-4
INTERVALS = (1.0, 4e-4)
PICTURES = 8.0

BLOCK_ROWS = 2048
"""Spectra that are read and looked at together."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes
    ----------
    report : dict
        See `moefast.protocol.report.evaluate_predictions`: the same for the same model and stars.
    stars : dict of str to array of shape (n,)
        row; log_g_true, log_g, log_g_err [dex] (if errors are claimed); T_eff [K], M_H [dex]; snr_norm, snr_median;
        weight_k (if there is a gate).
    run : dict
        What belongs to this run alone: throughput with R² beside it, backend, device, versions, the command, notes on
        the labels.
    """

    report: dict[str, Any]
    stars: dict[str, NDArray]
    run: dict[str, Any]

    @property
    def log_g(self) -> NDArray[np.float64]:
        """Labels [dex]."""
        return self.stars["log_g_true"]

    @property
    def predicted(self) -> NDArray[np.float64]:
        """Predictions [dex]; NaN where there is none."""
        return self.stars["log_g"]


def evaluate(
    paths: str | Path | Iterable[str | Path],
    model: Model | str | Path | None = None,
    *,
    noise: Literal["auto", "draw", "none"] = "auto",
    noise_level: float = 1.0,
    noise_seed: int = NOISE_SEED,
    ceiling: Ceiling | str | Path | None = None,
    backend: str = "auto",
    name: str | None = None,
    progress: StageProgress | Literal[False] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Evaluation:
    """Evaluate a model, an ONNX file or a table of predictions on labelled spectra.

    Parameters
    ----------
    paths : path, folder, pattern, or several
        Labelled spectra (T_eff, log_g, M_H).
    model : Model or path, optional
        A model folder; an ONNX file (.onnx) with inputs flux and error and an output log_g; or a table of predictions
        (.h5, .parquet, .fits, .csv; see `moefast.protocol.predictions.read_predictions`). The first of the models
        shipped with moefast if absent.
    noise : "auto", "draw" or "none"
        "auto" takes the array `noisy` where a file has it (at noise level 1) and else adds noise to `flux`; "draw"
        always adds noise to `flux`; "none" scores `flux` as it is, for spectra that are observed.
    noise_level : float
        Factor on the errors of the files.
    noise_seed : int
    ceiling : Ceiling or path, optional
        Ceilings of this test set, from `moefast ceiling`; those of the reference sets come with the package.
    backend : "auto", "cpu" or "cuda"
    name : str, optional
        Name of the test set in the report.
    progress : callable, optional
        Called with the name of a stage ("evaluate", "intervals"), rows or steps done, and those in all. Without it a
        line shows them in notebooks and interactive sessions; False leaves it out.
    tell : callable, optional
        Called, before the first row is scored, with what makes the noise that is added doubtful.

    Raises
    ------
    LabelError
        No star has labels.
    InputError
        A file cannot be read; a table lacks, repeats or adds rows, or was made of other spectra or other noise; the
        ceilings are those of another set.
    ModelError
        The model or ONNX file is refused.
    """
    if not noise_level > 0:
        raise InputError(f"the noise level must be positive, found {noise_level}")
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    spectra = open_spectra(given)
    stored = noise == "auto" and noise_level == 1.0 and all("noisy" in s.arrays for s in spectra.shards)
    drawn = noise != "none" and not stored
    about_noise: dict[str, Any] = {
        "noise": "stored" if stored else "drawn" if drawn else "none",
        "noise_level": None if noise == "none" else noise_level,
        "noise_seed": noise_seed if drawn else None,
    }
    odd = noisy_already(take(spectra, array="flux"), "use --noise none") if drawn else []
    for each in odd:
        if tell is not None:
            tell(each.words)
    labels = spectra.labels(("T_eff", "log_g", "M_H"), partial=True)
    labelled = np.isfinite(np.sum([*labels.values()], axis=0))
    identity = identify(spectra.shards[0]) if len(spectra.shards) == 1 else None
    ceilings, group_ceilings = _ceilings(ceiling, spectra, about_noise)
    subject = open_subject(model, spectra, backend=backend, noise=about_noise)
    beside = _references_of(subject, spectra, identity)
    grid = beside.grid if beside else None
    bins = np.zeros(spectra.n_rows, np.int16)
    if isinstance(grid, Grid):
        # Stars without labels are predicted and not measured; any bin will do.
        bins[labelled] = grid.assign(labels["T_eff"][labelled], labels["M_H"][labelled])
    _LOG.info(
        "%s: %d spectra, %d with labels; noise: %s", spectra.shards[0].path, spectra.n_rows, labelled.sum(),
        "the stored array noisy" if stored else f"drawn on flux, seed {noise_seed}" if drawn else "none is added",
    )  # fmt: skip
    _LOG.info(
        "subject %s; simpler fits beside it are those of %s; ceilings: %s", subject.about["name"],
        _name(beside) or "no model", ", ".join(ceilings) or "none known of this set",
    )  # fmt: skip
    with stage_progress(progress, partial(expected_stages, pictures=False)) as told:
        told("evaluate", 0, spectra.n_rows)
        found: dict[str, list[NDArray]] = {}
        references: dict[str, list[NDArray]] = {}
        scoring = 0.0
        for block in spectra.blocks(BLOCK_ROWS, array="noisy" if stored else "flux"):
            rows = np.arange(block.first_row, block.first_row + len(block))
            if noise_level != 1.0:
                block.error *= np.float32(noise_level)
            if drawn:
                draw = standard_normals(noise_seed, rows, spectra.n_pixels)
                draw *= block.error
                block.flux += draw
            good = good_pixels(block.flux, block.error, block.mask)
            quality = assess(block.flux, block.error, good, block.mask)
            begin = time.perf_counter()
            columns = subject.predict(block, good, int(spectra.first_rows[block.shard]))
            scoring += time.perf_counter() - begin
            columns |= {"snr_norm": quality.snr_norm, "snr_median": quality.snr_median}
            for key, values in columns.items():
                found.setdefault(key, []).append(values)
            if isinstance(grid, SnrGrid):
                bins[rows] = grid.assign(np.nan_to_num(quality.snr_norm))
            if beside is not None:
                for key, values in _reference_predictions(beside, subject, block, good, bins[rows]).items():
                    references.setdefault(key, []).append(values)
            told("evaluate", int(rows[-1]) + 1, spectra.n_rows)
        table = {key: np.concatenate(parts)[labelled] for key, parts in found.items()}
        labels = {key: values[labelled] for key, values in labels.items()}
        if not labelled.all():
            # They are those of all stars.
            ceilings, group_ceilings = {}, None
        n_experts = sum(key.startswith("weight_") for key in table)
        several = n_experts > 1
        own = isinstance(subject, ModelSubject)
        report = evaluate_predictions(
            Stars(labels["log_g"], labels["T_eff"], labels["M_H"], table["snr_norm"], table["snr_median"]),
            Predictions(
                table["log_g"].astype(np.float64),
                table.get("log_g_err"),
                weights=np.column_stack([table[f"weight_{k}"] for k in range(n_experts)])
                if several
                else None,
                expert_grid=subject.expert_grid if several else None,
            ),
            DataSet(
                name or _set_name(spectra, identity),
                spectra.fingerprint(),
                n_unlabelled=int((~labelled).sum()),
                reference_set=None if identity is None else identity._asdict(),
                **about_noise,
            ),
            comparisons=Comparisons(
                references={key: np.concatenate(parts)[labelled] for key, parts in references.items()},
                oracle_reference=_oracle(subject.model.mixture)
                if own and several and subject.model
                else None,
                ceilings=ceilings,
                group_ceilings=group_ceilings,
            ),
            model={
                **subject.about,
                "references_of": _name(beside),
                "share_seen": _share_seen(subject, labels),
            },
            progress=partial(told, "intervals"),
        )
    stars: dict[str, NDArray] = {
        "row": np.flatnonzero(labelled).astype(np.int64),
        "log_g_true": labels["log_g"].astype(np.float64),
        "log_g": table["log_g"].astype(np.float64),
        **({"log_g_err": table["log_g_err"].astype(np.float64)} if "log_g_err" in table else {}),
        "T_eff": labels["T_eff"].astype(np.float64),
        "M_H": labels["M_H"].astype(np.float64),
        "snr_norm": table["snr_norm"],
        "snr_median": table["snr_median"],
        **{f"weight_{k}": table[f"weight_{k}"] for k in range(n_experts)},
    }
    run = {
        "moefast_version": __version__,
        "r2": report["overall"]["r2"],
        "spectra_per_second": spectra.n_rows / scoring if subject.where else None,
        "what": "scoring alone, spectra in memory" if subject.where else "computed elsewhere",
        "backend": subject.where.name if subject.where else None,
        "device": subject.where.device if subject.where else None,
        "notes": [*(each.words for each in odd), *spectra.label_notes()],
        "command": _command(
            given,
            model,
            noise=noise,
            noise_level=noise_level,
            noise_seed=noise_seed,
            ceiling=ceiling,
            name=name,
        ),
    }
    return Evaluation(report, stars, run)


def _set_name(spectra: SpectrumSet, identity: Identity | None) -> str:
    if identity is not None:
        return f"{identity.reference_set} {identity.part}"
    return " + ".join(s.path.name for s in spectra.shards[:3])


def _share_seen(subject: Subject, labels: Mapping[str, NDArray]) -> float | None:
    """Estimated share of the test stars that the model was fitted on; None where the model does not tell."""
    if subject.model is None:
        return None
    known = subject.model.manifest.get("training", {}).get("row_sketch")
    return None if known is None else share_seen(known, labels)


def _name(beside: Model | None) -> str | None:
    return None if beside is None or not beside.references else str(beside.manifest["recipe"])


def _references_of(subject: Subject, spectra: SpectrumSet, identity: Identity | None) -> Model | None:
    """The model whose simpler fits are scored beside: the subject itself, else a shipped one where it fits."""
    if subject.model is not None:
        return subject.model
    of_set = identity.reference_set if identity is not None else None
    shipped = Model.load(shipped_path(of_set) if of_set in SHIPPED else None)
    return shipped if same_wave(shipped.mixture.wave, spectra.wave) else None


def _reference_predictions(
    beside: Model,
    subject: Subject,
    block: Block,
    good: NDArray[np.bool_] | None,
    bins: NDArray[np.integer],
) -> dict[str, NDArray[np.float64]]:
    """Simpler fits on the same noisy stars; for a model of moefast also its own experts with true bins."""
    log_level, experts = _experts(beside.mixture, block)
    own = beside is subject.model
    out = {
        key: _linear(form, beside, block, good, log_level, bins)
        for key, form in beside.references.items()
        # An oracle knows the true bins: it says what a better gate could gain, and only of the model that it is of.
        if own or not key.startswith(ORACLE)
    }
    if own and beside.mixture.n_experts > 1:
        here = np.arange(len(block)), bins
        out |= {
            key: np.clip(each[here].astype(np.float64), *beside.mixture.label_range)
            for key, each in experts.items()
        }
    return out


def _experts(mixture: AnyMixture, block: Block) -> tuple[NDArray, dict[str, NDArray]]:
    """The noise level of each star, and what each expert says: the linear ones, and those that the mixture uses."""
    if isinstance(mixture, PosteriorMixture):
        found = mixture.predict(block.flux, block.error, block.mask)
        return found.log_level, {_oracle(mixture): found.expert_log_g}
    prepared = mixture.prepare(block.flux, block.error, block.mask)
    experts = {"oracle-ridge": prepared.linear_log_g, _oracle(mixture): prepared.expert_log_g}
    return prepared.log_level, experts


def _oracle(mixture: AnyMixture) -> str:
    """Name of a mixture's own experts with true bins."""
    return "oracle-ridge" if mixture.is_linear else "oracle-hybrid"


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


def _ceilings(
    ceiling: Ceiling | str | Path | None, spectra: SpectrumSet, noise: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, list[dict[str, float]]] | None]:
    """R² ceilings of the whole set, and of the groups if they were computed for all of its stars."""
    shipped = ceiling is None
    if ceiling is None:
        # That of a reference set comes with the package; it is for the noise stored with the set.
        ceiling = known(spectra) if noise["noise"] == "stored" else None
        if ceiling is None:
            return {}, None
    where = "the ceiling"
    if isinstance(ceiling, str | Path):
        where, ceiling = str(ceiling), read(ceiling)
    data = ceiling.summary["data_set"]
    # A shipped one was found by what the file holds; other machines may write other last bits.
    if not shipped and data["fingerprint"] != spectra.fingerprint():
        raise InputError(
            f"{where}: belongs to the set {data['name']} (fingerprint {data['fingerprint'][:12]}); the test set has "
            f"{spectra.fingerprint()[:12]}; compute its own with moefast ceiling"
        )
    if noise["noise"] == "none" or noise["noise_level"] != 1.0:
        raise InputError(
            f"{where}: holds for the noise of the files; evaluate at noise level 1, or without the ceiling"
        )
    if data["n"] != data["n_rows"]:
        return ceiling.r2(), None
    groups = {
        kind: [_group_ceilings(entry) for entry in entries]
        for kind, entries in ceiling.summary["groups"].items()
    }
    return ceiling.r2(), groups


def _group_ceilings(entry: Mapping[str, Any]) -> dict[str, float]:
    found = {"bayes": entry["bayes"]} if "bayes" in entry else {}
    return found | {f"fisher {key}": value for key, value in entry.get("fisher", {}).items()}


def _command(
    paths: Sequence[str | Path],
    model: Model | str | Path | None,
    *,
    noise: str,
    noise_level: float,
    noise_seed: int,
    ceiling: Any,
    name: str | None,
) -> str | None:
    """The command line that gives this report again; None where there is none (a model that was never saved)."""
    words = ["moefast", "evaluate", *(str(path) for path in paths)]
    folder = model.path if isinstance(model, Model) else model
    if (isinstance(model, Model) and folder is None) or noise_seed != NOISE_SEED:
        return None
    if folder is not None:
        words += ["-m", str(folder)]
    if noise != "auto":
        words += ["--noise", noise]
    if noise_level != 1.0:
        words += ["--noise-level", f"{noise_level:g}"]
    if isinstance(ceiling, str | Path):
        words += ["--ceiling", str(ceiling)]
    if name:
        words += ["--name", name]
    return shlex.join(words)


REPORT_FILES = (
    "report.json",
    "report.txt",
    "predictions.h5",
    "run.json",
    "report.html",
    "report.png",
    "figures",
)
"""What a report folder holds; the last three are pictures."""

_PICTURES = 3


def check_report_folder(folder: str | Path, overwrite: bool) -> None:
    """Refuse a folder that holds a report already: known before the evaluation, not after.

    Raises
    ------
    OutputError
    """
    refuse_impossible(Path(folder))
    recover_folder(Path(folder))
    check_report(Path(folder), overwrite)


def check_report(target: Path, overwrite: bool) -> None:
    """Refuse a folder that holds a report which is not to be replaced.

    Raises
    ------
    OutputError
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; name a folder for the report")
    there = [name for name in REPORT_FILES if (target / name).exists()]
    if there and not overwrite:
        raise OutputError(f"{target / there[0]}: exists already; choose another folder or use --overwrite")


def expected_stages(n_rows: int, *, pictures: bool) -> dict[str, float]:
    """Stages of an evaluation and its report in their order, with the seconds that each takes about.

    Parameters
    ----------
    n_rows : int
        Test spectra.
    pictures : bool
        Whether the report is drawn.
    """
    seconds = {"evaluate": SECONDS_PER_ROW * n_rows, "intervals": INTERVALS[0] + INTERVALS[1] * n_rows}
    return seconds | ({"pictures": PICTURES} if pictures else {})


def write_report(
    evaluation: Evaluation,
    folder: str | Path,
    *,
    pictures: bool = True,
    overwrite: bool = False,
    judged: Mapping[str, Any] | None = None,
    progress: StageProgress | None = None,
) -> list[Path]:
    """Write the report to a folder, which is made if need be.

    report.json (the numbers), report.txt, predictions.h5 (every star, for `moefast compare`) and run.json (throughput,
    device, command); report.html (all figures and tables in one file), report.png (the main figures) and figures/
    (each by itself).

    Parameters
    ----------
    evaluation : Evaluation
    folder : path
    pictures : bool
        Whether to draw: the last three of `REPORT_FILES`. Drawing takes a few seconds.
    overwrite : bool
        Whether a report may be replaced; pictures of it that are not drawn again are removed.
    judged : mapping, optional
        What the evaluation says about the milestones, from `moefast.protocol.milestones.judge.judge_alone`: a table
        more in report.txt and report.html.
    progress : callable, optional
        Called with "pictures", those drawn and those in all.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    OutputError
        A report is there already, or the folder cannot be written.
    """
    check_report_folder(folder, overwrite)
    target = Path(folder)
    report, run = evaluation.report, evaluation.run
    data = report["data_set"]
    attrs = {
        "moefast_version": __version__,
        "subject": report["model"]["name"],
        "subject_sha256": report["model"]["sha256"],
        "input_sha256": data["fingerprint"],
        "data_set": data["name"],
        "noise": data["noise"],
        "noise_level": data["noise_level"],
        "noise_seed": data["noise_seed"],
        "expert_grid": report["routing"]["grid"] if report["routing"] else None,
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target}: cannot be made ({error.strerror})") from error
    # All of it or nothing: an old report must not stand beside new predictions.
    unfinished = partial_folder(target)
    try:
        write_kept(unfinished / "predictions.h5", evaluation.stars, attrs)
        write_atomically(unfinished / "report.txt", (format_text(report, run, judged) + "\n").encode())
        write_atomically(
            unfinished / "run.json", (json.dumps(run, indent=1, ensure_ascii=False) + "\n").encode()
        )
        write_json(report, unfinished / "report.json")
        if pictures:
            _draw(report, run, judged, unfinished, progress or (lambda *_: None))
        _publish(unfinished, target, overwrite)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        remove_quietly(unfinished)
    return [target / name for name in (REPORT_FILES if pictures else REPORT_FILES[:-_PICTURES])]


def _publish(partial: Path, target: Path, overwrite: bool) -> None:
    """Give a report its folder. What else lies there is kept, and then the files come one by one, report.json last."""
    check_report(target, overwrite)
    if not target.exists() or _holds_a_report_alone(target):
        publish_folder(partial, target, overwrite=True)
        return
    (target / "report.json").unlink(missing_ok=True)
    for name in REPORT_FILES:
        _remove(target / name)
    for item in sorted(partial.iterdir(), key=lambda item: item.name == "report.json"):
        if item.is_dir() and (target / item.name).exists():
            for picture in item.iterdir():
                picture.replace(target / item.name / picture.name)
        else:
            item.replace(target / item.name)
    synchronise_folder(target)


def _holds_a_report_alone(folder: Path) -> bool:
    from moefast.protocol.figures import FIGURES

    pictures = {f"{name}.png" for name in FIGURES}
    return all(
        item.name in REPORT_FILES
        and (not item.is_dir() or (item.name == "figures" and {p.name for p in item.iterdir()} <= pictures))
        for item in folder.iterdir()
    )


def _draw(
    report: Mapping[str, Any], run: Mapping[str, Any], judged: Mapping[str, Any] | None, target: Path,
    progress: StageProgress,
) -> None:  # fmt: skip
    from moefast.protocol.figures import FIGURES, overview, png
    from moefast.protocol.html import write_page

    try:
        (target / "figures").mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target / 'figures'}: cannot be made ({error.strerror})") from error
    names = [name for name, drawing in FIGURES.items() if drawing.exists(report)]
    # The page draws all of them again.
    n_steps = 2 * len(names) + 1
    for done, name in enumerate(names):
        progress("pictures", done, n_steps)
        png(report, name, target / "figures" / f"{name}.png")
    progress("pictures", len(names), n_steps)
    overview(report, target / "report.png")
    progress("pictures", len(names) + 1, n_steps)
    write_page(report, run, target / "report.html", judged)
    progress("pictures", n_steps, n_steps)


def _remove(path: Path) -> None:
    """Remove a picture, or the folder of them; only what a report holds."""
    from moefast.protocol.figures import FIGURES

    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for name in FIGURES:
        (path / f"{name}.png").unlink(missing_ok=True)
    if not any(path.iterdir()):
        path.rmdir()
