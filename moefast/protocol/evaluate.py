"""Evaluate anything that predicts log g on labelled spectra, by the frozen protocol.

Design: one way to make a number. `Scorer` scores the rows, here or elsewhere; what it finds of the labelled stars is
measured by `evaluate_predictions`. What a clock measured is kept apart from the report, so that evaluating twice gives
the same report.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moefast.ceilings.ceiling import Ceiling, known, read
from moefast.core.errors import InputError
from moefast.core.progress import RowProgress, StageProgress, stage_progress
from moefast.core.random import NOISE_SEED
from moefast.core.records import as_entries
from moefast.core.sketches import share_seen
from moefast.core.version import __version__
from moefast.model import Model
from moefast.protocol.comparisons import MEANS, Comparisons
from moefast.protocol.report import DataSet, Predictions, Stars, evaluate_predictions
from moefast.protocol.report_parts import Report
from moefast.protocol.scorer import Scored, Scorer, oracle_name
from moefast.protocol.subject import ModelSubject, Subject
from moefast.simulate.sets import name_of_set
from moefast.spectra.oddities import noisy_already
from moefast.spectra.sampling import take_sample

__all__ = ["Evaluation", "evaluate", "expected_stages"]

_LOG = logging.getLogger(__name__)

# Seconds on two cores, by which the stages of an evaluation are weighed.
SECONDS_PER_ROW = 7e-4
INTERVALS = (1.0, 4e-4)
PICTURES = 8.0


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
    scorer = Scorer(
        [paths] if isinstance(paths, str | Path) else list(paths),
        model,
        peer=peer,
        noise=noise,
        noise_level=noise_level,
        noise_seed=noise_seed,
        backend=backend,
    )
    odd = noisy_already(take_sample(scorer.spectra, array="flux"), "use --noise none") if scorer.drawn else []
    for each in odd:
        if tell is not None:
            tell(each.words)
    limits = _ceilings(ceiling, scorer)
    _log(scorer, limits)
    n_rows = scorer.spectra.n_rows
    with stage_progress(progress, partial(expected_stages, pictures=False)) as told:
        of_rows = partial(told, "evaluate")
        of_rows(0, n_rows)
        blocks = scorer.score((0, n_rows), of_rows) if spread is None else spread(scorer, of_rows)
        scored = Scored.joined(blocks)
        measured = scored.of(scorer.labelled)
        stars = _stars(scorer, measured.columns)
        record = _measure(scorer, stars, measured.references, limits, name, partial(told, "intervals"))
    command = _command(scorer.arguments, ceiling, name)
    notes = [*(each.words for each in odd), *scorer.spectra.label_notes()]
    return Evaluation(record, stars, _run(scorer, record, scored.seconds, notes, command))


def _log(scorer: Scorer, limits: _Limits) -> None:
    _LOG.info(
        "%s: %d spectra, %d with labels; noise: %s", scorer.spectra.shards[0].path, scorer.spectra.n_rows,
        scorer.labelled.sum(), scorer.about_noise["noise"],
    )  # fmt: skip
    _LOG.info(
        "subject %s; simpler fits beside it are those of %s; ceilings: %s", scorer.subject.about["name"],
        _name(scorer.beside) or "no model", ", ".join(limits.r2) or "none known of this set",
    )  # fmt: skip


def _stars(scorer: Scorer, columns: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """The table of the labelled stars; see `Evaluation.stars`."""
    labels = {key: values[scorer.labelled] for key, values in scorer.labels.items()}
    n_experts = sum(key.startswith("weight_") for key in columns)
    return {
        "row": np.flatnonzero(scorer.labelled).astype(np.int64),
        "log_g_true": labels["log_g"],
        **{key: columns[key].astype(np.float64) for key in ("log_g", "log_g_err") if key in columns},
        "T_eff": labels["T_eff"],
        "M_H": labels["M_H"],
        "snr_norm": columns["snr_norm"],
        "snr_median": columns["snr_median"],
        **{f"weight_{k}": columns[f"weight_{k}"] for k in range(n_experts)},
    }


def _measure(
    scorer: Scorer,
    stars: Mapping[str, NDArray],
    references: Mapping[str, NDArray[np.float64]],
    limits: _Limits,
    name: str | None,
    progress: RowProgress,
) -> Report:
    """The numbers of the labelled stars."""
    subject, labelled, identity = scorer.subject, scorer.labelled, scorer.identity
    if not labelled.all():
        # They are those of all stars.
        limits = _NO_LIMITS
    weights = [values for key, values in stars.items() if key.startswith("weight_")]
    several = len(weights) > 1
    oracle = None
    if several and isinstance(subject, ModelSubject):
        oracle = oracle_name(subject.model.mixture)
    labels = {"log_g": stars["log_g_true"], "T_eff": stars["T_eff"], "M_H": stars["M_H"]}
    return evaluate_predictions(
        Stars(stars["log_g_true"], stars["T_eff"], stars["M_H"], stars["snr_norm"], stars["snr_median"]),
        Predictions(
            stars["log_g"],
            stars.get("log_g_err"),
            weights=np.column_stack(weights) if several else None,
            expert_grid=subject.expert_grid if several else None,
        ),
        DataSet(
            name or name_of_set(scorer.spectra, identity),
            scorer.spectra.fingerprint(),
            n_unlabelled=int((~labelled).sum()),
            reference_set=None if identity is None else identity._asdict(),
            **scorer.about_noise,
        ),
        comparisons=Comparisons(
            references=references,
            oracle_reference=oracle,
            ceilings=limits.r2,
            group_ceilings=limits.of_groups,
            posterior_means=limits.posterior_means,
        ),
        model={
            **subject.about,
            "references_of": _name(scorer.beside),
            "share_seen": _share_seen(subject, labels),
        },
        progress=progress,
    )


def _run(
    scorer: Scorer, record: Report, seconds: float, notes: list[str], command: str | None
) -> dict[str, Any]:
    """See `Evaluation.run`."""
    where = scorer.subject.where
    return {
        "moefast_version": __version__,
        "r2": record.overall.r2,
        "spectra_per_second": scorer.spectra.n_rows / seconds if where else None,
        "what": "scoring alone, spectra in memory" if where else "computed elsewhere",
        "backend": where.name if where else None,
        "device": where.device if where else None,
        "notes": notes,
        "command": command,
    }


def _share_seen(subject: Subject, labels: Mapping[str, NDArray]) -> float | None:
    """Estimated share of the test stars that the model was fitted on; None where the model does not tell."""
    if subject.model is None:
        return None
    known = subject.model.manifest.get("training", {}).get("row_sketch")
    return None if known is None else share_seen(known, labels)


def _name(beside: Model | None) -> str | None:
    return None if beside is None or not beside.references else str(beside.manifest["recipe"])


class _Limits(NamedTuple):
    """R² ceilings of the whole set; of its groups, and the exact posterior mean of each star, if of all stars."""

    r2: Mapping[str, float]
    of_groups: Mapping[str, list[dict[str, float]]] | None = None
    posterior_means: NDArray[np.float64] | None = None


_NO_LIMITS = _Limits({})


def _ceilings(ceiling: Ceiling | str | Path | None, scorer: Scorer) -> _Limits:
    """Ceilings of a test set."""
    shipped, noise = ceiling is None, scorer.about_noise
    if ceiling is None:
        # That of a reference set comes with the package; it is for the noise stored with the set.
        ceiling = known(scorer.identity) if noise["noise"] == "stored" else None
        if ceiling is None:
            return _NO_LIMITS
    where = "the ceiling"
    if isinstance(ceiling, str | Path):
        where, ceiling = str(ceiling), read(ceiling)
    data = ceiling.summary["data_set"]
    # A shipped one was found by what the file holds; other machines may write other last bits.
    if not shipped and data["fingerprint"] != scorer.spectra.fingerprint():
        raise InputError(
            f"{where}: belongs to the set {data['name']} (fingerprint {data['fingerprint'][:12]}); the test set has "
            f"{scorer.spectra.fingerprint()[:12]}; compute its own with moefast ceiling"
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


def _command(arguments: Mapping[str, Any], ceiling: Any, name: str | None) -> str | None:
    """The command line that gives this report again; None where there is none (a model that was never saved).

    Parameters
    ----------
    arguments : mapping
        Of a `Scorer`.
    """
    words = ["moefast", "evaluate", *(str(path) for path in arguments["paths"])]
    model = arguments["model"]
    folder = model.path if isinstance(model, Model) else model
    if (isinstance(model, Model) and folder is None) or arguments["noise_seed"] != NOISE_SEED:
        return None
    if folder is not None:
        words += ["-m", str(folder)]
    if arguments["peer"] is not None:
        words += ["--peer", arguments["peer"]]
    if arguments["noise"] != "auto":
        words += ["--noise", arguments["noise"]]
    if arguments["noise_level"] != 1.0:
        words += ["--noise-level", f"{arguments['noise_level']:g}"]
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
