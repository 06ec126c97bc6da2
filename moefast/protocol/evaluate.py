"""Evaluate anything that predicts log g on labelled spectra, by the frozen protocol.

Design: one way to make a number. Test spectra carry noise exactly once: `noisy` where a file has it, otherwise a draw
from the stored seed that belongs to the row, so that every model meets the same noisy stars. The simpler fits that a
model folder carries are scored on the same stars in the same pass; the oracle is the model's experts with true bins.
What a clock measured is kept apart from the report, so that evaluating twice gives the same report.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moefast.ceilings.ceiling import Ceiling, known, read
from moefast.core.errors import InputError
from moefast.core.grids import Grid, SnrGrid, assign_snr_bins
from moefast.core.progress import RowProgress, StageProgress, stage_progress
from moefast.core.random import NOISE_SEED, standard_normals
from moefast.core.records import as_entries
from moefast.core.sketches import share_seen
from moefast.core.threads import one_blas_thread
from moefast.core.version import __version__
from moefast.experts.linear_form import LinearForm
from moefast.experts.template import TemplateMeans
from moefast.mixture import hat_weights
from moefast.model import SHIPPED, Model, shipped_path
from moefast.posterior.mixture import AnyMixture, PosteriorMixture
from moefast.protocol.comparisons import BAYES_GATE, MEANS, ORACLE, SNR_ORACLE, Comparisons
from moefast.protocol.report import DataSet, Predictions, Stars, evaluate_predictions
from moefast.protocol.report_parts import Report
from moefast.protocol.subject import ModelSubject, PeerSubject, Subject, open_subject
from moefast.simulate.sets import Identity, identify
from moefast.spectra.guard import noisy_already, take
from moefast.spectra.quality import assess, good_pixels
from moefast.spectra.source import Block
from moefast.spectra.spectrum_set import SpectrumSet, open_spectra
from moefast.spectra.wave import same_wave

__all__ = ["BLOCK_ROWS", "Evaluation", "Scored", "Scorer", "evaluate", "expected_stages"]

Scored = tuple[dict[str, NDArray], dict[str, NDArray[np.float64]], float]
"""Of a block: columns of the stars, predictions of simpler fits, and seconds of scoring."""

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
    record : Report
        The numbers, as `moefast.protocol.report.evaluate_predictions` gives them: the same for the same model and
        stars.
    stars : dict of str to array of shape (n,)
        row; log_g_true, log_g, log_g_err [dex] (if errors are claimed); T_eff [K], M_H [dex]; snr_norm, snr_median;
        weight_k (if there is a gate).
    run : dict
        What belongs to this run alone: throughput with R² beside it, backend, device, versions, the command, notes on
        the labels.
    """

    record: Report
    stars: dict[str, NDArray]
    run: dict[str, Any]

    @property
    def report(self) -> dict[str, Any]:
        """The numbers as report.json holds them."""
        entries: dict[str, Any] = as_entries(self.record)
        return entries

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
    peer: str | None = None,
    noise: Literal["auto", "draw", "none"] = "auto",
    noise_level: float = 1.0,
    noise_seed: int = NOISE_SEED,
    ceiling: Ceiling | str | Path | None = None,
    backend: str = "auto",
    name: str | None = None,
    progress: StageProgress | Literal[False] | None = None,
    tell: Callable[[str], None] | None = None,
    spread: Callable[[Scorer, RowProgress], Iterator[Scored]] | None = None,
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
    peer : str, optional
        Evaluate this method of others instead of a model: see `moefast.peers.choose.PEERS`.
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
    spread : callable, optional
        Has the rows scored elsewhere: called with a `Scorer` and `progress`.

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
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    scorer = Scorer(
        given,
        model,
        peer=peer,
        noise=noise,
        noise_level=noise_level,
        noise_seed=noise_seed,
        backend=backend,
    )
    spectra, subject, beside, about_noise = scorer.spectra, scorer.subject, scorer.beside, scorer.about_noise
    odd = noisy_already(take(spectra, array="flux"), "use --noise none") if scorer.drawn else []
    for each in odd:
        if tell is not None:
            tell(each.words)
    labels, labelled = scorer.labels, scorer.labelled
    identity = scorer.identity
    limits = _ceilings(ceiling, spectra, about_noise)
    _LOG.info(
        "%s: %d spectra, %d with labels; noise: %s", spectra.shards[0].path, spectra.n_rows, labelled.sum(),
        about_noise["noise"],
    )  # fmt: skip
    _LOG.info(
        "subject %s; simpler fits beside it are those of %s; ceilings: %s", subject.about["name"],
        _name(beside) or "no model", ", ".join(limits.r2) or "none known of this set",
    )  # fmt: skip
    found: dict[str, list[NDArray]] = {}
    references: dict[str, list[NDArray]] = {}
    scoring = 0.0
    with stage_progress(progress, partial(expected_stages, pictures=False)) as told:
        of_rows = partial(told, "evaluate")
        of_rows(0, spectra.n_rows)
        scored = scorer.score((0, spectra.n_rows), of_rows) if spread is None else spread(scorer, of_rows)
        for columns, others, seconds in scored:
            for key, values in columns.items():
                found.setdefault(key, []).append(values)
            for key, values in others.items():
                references.setdefault(key, []).append(values)
            scoring += seconds
        table = {key: np.concatenate(parts)[labelled] for key, parts in found.items()}
        labels = {key: values[labelled] for key, values in labels.items()}
        if not labelled.all():
            # They are those of all stars.
            limits = _NO_LIMITS
        n_experts = sum(key.startswith("weight_") for key in table)
        several = n_experts > 1
        own = isinstance(subject, ModelSubject)
        record = evaluate_predictions(
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
                ceilings=limits.r2,
                group_ceilings=limits.of_groups,
                posterior_means=limits.posterior_means,
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
        "r2": record.overall.r2,
        "spectra_per_second": spectra.n_rows / scoring if subject.where else None,
        "what": "scoring alone, spectra in memory" if subject.where else "computed elsewhere",
        "backend": subject.where.name if subject.where else None,
        "device": subject.where.device if subject.where else None,
        "notes": [*(each.words for each in odd), *spectra.label_notes()],
        "command": _command(
            given,
            model,
            peer=peer,
            noise=noise,
            noise_level=noise_level,
            noise_seed=noise_seed,
            ceiling=ceiling,
            name=name,
        ),
    }
    return Evaluation(record, stars, run)


class Scorer:
    """What scores the stars of a test set, block by block; parameters, attributes and errors are those of `evaluate`.

    Attributes
    ----------
    arguments : dict
        What makes another one, elsewhere.
    drawn : bool
        Whether noise is added.
    block_rows : int
        Rows of a block.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        model: Model | str | Path | None,
        *,
        peer: str | None,
        noise: str,
        noise_level: float,
        noise_seed: int,
        backend: str,
    ) -> None:
        if peer is not None and model is not None:
            raise InputError("a model or a peer is evaluated, not both; leave one out")
        if not noise_level > 0:
            raise InputError(f"the noise level must be positive, found {noise_level}")
        self.arguments = {
            "paths": paths, "model": model, "peer": peer, "noise": noise, "noise_level": noise_level,
            "noise_seed": noise_seed, "backend": backend,
        }  # fmt: skip
        spectra = self.spectra = open_spectra(paths)
        self.stored = (
            noise == "auto" and noise_level == 1.0 and all("noisy" in s.arrays for s in spectra.shards)
        )
        self.drawn = noise != "none" and not self.stored
        self.noise_level, self.noise_seed = noise_level, noise_seed
        self.about_noise: dict[str, Any] = {
            "noise": "stored" if self.stored else "drawn" if self.drawn else "none",
            "noise_level": None if noise == "none" else noise_level,
            "noise_seed": noise_seed if self.drawn else None,
        }
        labels = self.labels = spectra.labels(("T_eff", "log_g", "M_H"), partial=True)
        labelled = self.labelled = np.isfinite(np.sum([*labels.values()], axis=0))
        self.identity = identify(spectra.shards[0]) if len(spectra.shards) == 1 else None
        self.subject: Subject
        if peer is not None:
            name = "z0" if self.identity is None else self.identity.reference_set
            self.subject = PeerSubject.open(peer, spectra, name)
        else:
            self.subject = open_subject(model, spectra, backend=backend, noise=self.about_noise)
        self.block_rows = BLOCK_ROWS if self.subject.rows_at_once is None else self.subject.rows_at_once
        self.beside = _references_of(self.subject, spectra, self.identity)
        self.grid = self.beside.grid if self.beside else None
        self.bins = np.zeros(spectra.n_rows, np.int16)
        if isinstance(self.grid, Grid):
            # Stars without labels are predicted and not measured; any bin will do.
            self.bins[labelled] = self.grid.assign(labels["T_eff"][labelled], labels["M_H"][labelled])

    def score(self, rows: tuple[int, int], report: RowProgress) -> Iterator[Scored]:
        """What is found of each block of some rows, in order."""
        spectra = self.spectra
        for block in spectra.blocks(self.block_rows, array="noisy" if self.stored else "flux", rows=rows):
            here = np.arange(block.first_row, block.first_row + len(block))
            if self.noise_level != 1.0:
                block.error *= np.float32(self.noise_level)
            if self.drawn:
                draw = standard_normals(self.noise_seed, here, spectra.n_pixels)
                draw *= block.error
                block.flux += draw
            good = good_pixels(block.flux, block.error, block.mask)
            quality = assess(block.flux, block.error, good, block.mask)
            begin = time.perf_counter()
            columns = self.subject.predict(block, good, int(spectra.first_rows[block.shard]))
            seconds = time.perf_counter() - begin
            columns |= {"snr_norm": quality.snr_norm, "snr_median": quality.snr_median}
            if isinstance(self.grid, SnrGrid):
                self.bins[here] = self.grid.assign(np.nan_to_num(quality.snr_norm))
            others: dict[str, NDArray[np.float64]] = {}
            if self.beside is not None:
                # The bits of a product may depend on the number of threads.
                with one_blas_thread():
                    others = _reference_predictions(
                        self.beside, self.subject, block, good, self.bins[here], quality.snr_norm
                    )
            yield columns, others, seconds
            report(int(here[-1]) + 1 - rows[0], rows[1] - rows[0])


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
    snr_norm: NDArray,
) -> dict[str, NDArray[np.float64]]:
    """Simpler fits on the same noisy stars; for a model of moefast also its own experts with true bins."""
    log_level, experts = _experts(beside.mixture, block)
    own, by_snr = beside is subject.model, assign_snr_bins(np.nan_to_num(snr_norm))
    out = {
        key: _linear(form, beside, block, good, log_level, by_snr if key == SNR_ORACLE else bins)
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
        out |= _other_gate(beside.mixture, block)
    return out


def _other_gate(mixture: AnyMixture, block: Block) -> dict[str, NDArray[np.float64]]:
    """The same experts mixed by Bayes' rule, where there is a library and the gate is not just that."""
    if isinstance(mixture, PosteriorMixture) or (
        not np.any(mixture.gate[2]) and mixture.place(TemplateMeans) is None
    ):
        return {}
    found = mixture.by_evidence(block.flux, block.error, block.mask)
    return {} if found is None else {BAYES_GATE: found}


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
    """Predictions of a reference fit for a block, each star by the expert of its bin where there are several."""
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


class _Limits(NamedTuple):
    """R² ceilings of the whole set; of its groups, and the exact posterior mean of each star, if of all stars."""

    r2: Mapping[str, float]
    of_groups: Mapping[str, list[dict[str, float]]] | None = None
    posterior_means: NDArray[np.float64] | None = None


_NO_LIMITS = _Limits({})


def _ceilings(
    ceiling: Ceiling | str | Path | None, spectra: SpectrumSet, noise: Mapping[str, Any]
) -> _Limits:
    """Ceilings of a test set."""
    shipped = ceiling is None
    if ceiling is None:
        # That of a reference set comes with the package; it is for the noise stored with the set.
        ceiling = known(spectra) if noise["noise"] == "stored" else None
        if ceiling is None:
            return _NO_LIMITS
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
        return _Limits(ceiling.r2())
    groups = {
        kind: [_group_ceilings(entry) for entry in entries]
        for kind, entries in ceiling.summary["groups"].items()
    }
    return _Limits(ceiling.r2(), groups, ceiling.stars.get("bayes"))


def _group_ceilings(entry: Mapping[str, Any]) -> dict[str, float]:
    found = {"bayes": entry["bayes"], MEANS: entry["bayes_means"]} if "bayes" in entry else {}
    return found | {f"fisher {key}": value for key, value in entry.get("fisher", {}).items()}


def _command(
    paths: Sequence[str | Path],
    model: Model | str | Path | None,
    *,
    peer: str | None,
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
    if peer is not None:
        words += ["--peer", peer]
    if noise != "auto":
        words += ["--noise", noise]
    if noise_level != 1.0:
        words += ["--noise-level", f"{noise_level:g}"]
    if isinstance(ceiling, str | Path):
        words += ["--ceiling", str(ceiling)]
    if name:
        words += ["--name", name]
    return shlex.join(words)


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
