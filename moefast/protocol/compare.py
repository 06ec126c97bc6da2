"""Is one model better than another? Paired differences of two or more evaluations on the same stars.

Design: the first evaluation is the baseline, the others are compared with it. Every resample draws the same stars for
both, so what stars have in common (a hard one is hard for all) cancels. Evaluations of other stars or other noise are
refused: their difference would say nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.core import metrics
from moefast.core.errors import InputError
from moefast.core.groups import Group, groups_of
from moefast.core.records import as_entries, check_seal, read_entries
from moefast.core.text import bracket, counted, number, table
from moefast.protocol.report import SCHEMA_VERSION as REPORT_SCHEMA
from moefast.protocol.report_parts import Report
from moefast.spectra.tables import read_table

__all__ = ["SCHEMA_VERSION", "Kept", "compare", "format_text", "read_evaluation", "verdict_of"]

SCHEMA_VERSION = 1

LEAST_DIFFERENCE = 1e-4
"""Of R², or in dex: the agreement that is asked of two engines of one model. Less is rounding, however sure."""

STATISTICS = ("r2", "mae", "rmse")
"""What is compared over all stars; the groups are compared by R² alone."""

_TITLES = {
    "snr_norm": "By snr_norm",
    "snr_median": "By snr_median",
    "grid": "By T_eff × [M/H]",
    "metallicity": "By metallicity",
}
_SAME = 1e-9
_SAME_SNR = 1e-3


@dataclass(frozen=True)
class Kept:
    """An evaluation as `moefast evaluate -o` keeps it: its folder, report, and columns of shape (n,) per star."""

    path: Path
    report: Report
    stars: dict[str, NDArray]

    @property
    def name(self) -> str:
        """Folder and model."""
        return f"{self.path} ({self.report.model.get('name', 'unnamed')})"


def read_evaluation(folder: str | Path) -> Kept:
    """Read a folder that `moefast evaluate -o` wrote.

    Raises
    ------
    InputError
        It is no such folder, of another schema, or its predictions do not give its R².
    """
    path = Path(folder)
    if path.name == "report.json":
        path = path.parent
    try:
        entries = json.loads((path / "report.json").read_text(encoding="utf-8"))
        version = entries["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: no evaluation ({error}); name folders that moefast evaluate -o wrote"
        ) from error
    if version != REPORT_SCHEMA:
        raise InputError(
            f"{path}: report of schema {version} found, {REPORT_SCHEMA} expected; evaluate the model again"
        )
    check_seal(Report, entries, str(path / "report.json"))
    report = read_entries(Report, entries, str(path / "report.json"))
    if not (path / "predictions.h5").is_file():
        raise InputError(f"{path}: predictions.h5 is missing; evaluate the model again")
    stars, _ = read_table(path / "predictions.h5")
    needed = {"row", "log_g_true", "log_g", "T_eff", "M_H", "snr_norm", "snr_median"}
    if lacking := sorted(needed - stars.keys()):
        raise InputError(f"{path / 'predictions.h5'}: lacks {', '.join(lacking)}; evaluate the model again")
    found, told = metrics.r2(stars["log_g_true"], stars["log_g"]), report.overall.r2
    same = math.isnan(found) if told is None else abs(found - told) <= _SAME * max(1.0, abs(told))
    if not same:
        raise InputError(
            f"{path}: predictions.h5 gives R² {found:.6f}, report.json says {told}: they are of different "
            "evaluations; evaluate the model again"
        )
    return Kept(path, report, stars)


def _check_same(first: Kept, other: Kept) -> None:
    a, b = first.report.data_set, other.report.data_set
    for what, mine, theirs in (
        ("test sets", a.fingerprint, b.fingerprint),
        ("numbers of stars", a.n, b.n),
        ("kinds of noise", a.noise, b.noise),
        ("noise levels", a.noise_level, b.noise_level),
        ("noise seeds", a.noise_seed, b.noise_seed),
    ):
        if mine != theirs:
            raise InputError(
                f"{first.path} and {other.path}: different {what}, {mine} and {theirs}; compare evaluations of the "
                "same stars and the same noise"
            )
    for column in ("row", "log_g_true", "T_eff", "M_H"):
        if not np.array_equal(first.stars[column], other.stars[column]):
            differs = np.flatnonzero(first.stars[column] != other.stars[column])
            raise InputError(
                f"{first.path} and {other.path}: {column} differs in {counted(differs.size, 'row')}, first in row "
                f"{differs[0]}; "
                "compare evaluations of the same stars"
            )
    for column in ("snr_norm", "snr_median"):
        # The SNR is that of the noisy flux: other noise would show.
        if not np.allclose(
            first.stars[column], other.stars[column], rtol=_SAME_SNR, atol=_SAME_SNR, equal_nan=True
        ):
            raise InputError(
                f"{first.path} and {other.path}: {column} differs, so the noise was not the same; evaluate both again"
            )


def compare(
    evaluations: Sequence[Kept | str | Path],
    *,
    n_resamples: int = metrics.N_RESAMPLES,
    seed: int = metrics.SEED,
) -> dict[str, Any]:
    """Paired bootstrap differences of evaluations to the first of them.

    Parameters
    ----------
    evaluations : sequence of Kept or path
        Two or more, of the same stars and the same noise.
    n_resamples, seed
        Of the bootstrap.

    Returns
    -------
    dict
        JSON-ready: data_set, protocol, evaluations (name, model, overall R² with interval, n_nan), and per further
        evaluation a comparison: overall (r2, mae, rmse) and groups (R²), each with the value of the first (`from`), of
        the other (`to`), difference (to − from), interval and verdict: "better" or "worse" where the interval leaves
        out zero and the difference is no rounding, else "no difference"; "undefined" where a value does not exist.

    Raises
    ------
    InputError
        Fewer than two, not the same stars, not the same noise, or not readable.
    """
    kept = [item if isinstance(item, Kept) else read_evaluation(item) for item in evaluations]
    if len(kept) < 2:
        raise InputError(f"two or more evaluations are needed for a comparison; found {len(kept)}")
    first = kept[0]
    for other in kept[1:]:
        _check_same(first, other)
    truth = first.stars["log_g_true"]
    filled = [metrics.fill_missing(truth, item.stars["log_g"])[0] for item in kept]
    groups = groups_of(*(first.stars[name] for name in ("T_eff", "M_H", "snr_norm", "snr_median")))
    everyone = np.ones(truth.size, dtype=bool)

    def versus(i: int, members: NDArray[np.bool_], statistic: str) -> dict[str, Any]:
        y, a, b = truth[members], filled[0][members], filled[i][members]
        paired = metrics.bootstrap_difference(y, b, a, statistic, n_resamples=n_resamples, seed=seed)
        score = getattr(metrics, statistic)
        values = (paired.value, paired.low, paired.high)
        difference, low, high = (_ready(value) for value in values)
        return {
            "n": int(members.sum()),
            "from": _ready(score(y, a)),
            "to": _ready(score(y, b)),
            "difference": difference,
            "interval": [low, high],
            "verdict": verdict_of(difference, low, high, higher_is_better=statistic == "r2"),
        }

    def of_kind(i: int, members_of: Sequence[Group]) -> list[dict[str, Any]]:
        return [{"name": name, **versus(i, members, "r2")} for name, members in members_of]

    return {
        "schema_version": SCHEMA_VERSION,
        "data_set": as_entries(first.report.data_set),
        "protocol": {
            "n_resamples": n_resamples,
            "seed": seed,
            "level": metrics.LEVEL,
            "least_difference": LEAST_DIFFERENCE,
        },
        "evaluations": [
            {
                "path": str(item.path),
                "model": item.report.model,
                "r2": item.report.overall.r2,
                "r2_interval": list(item.report.overall.r2_interval),
                "n_nan": item.report.overall.n_nan,
            }
            for item in kept
        ],
        "comparisons": [
            {
                "from": 0,
                "to": i,
                "overall": {statistic: versus(i, everyone, statistic) for statistic in STATISTICS},
                "groups": {kind: of_kind(i, members_of) for kind, members_of in groups.items()},
            }
            for i in range(1, len(kept))
        ],
    }


def _ready(value: float) -> float | None:
    """Rounded as in reports: the last bits of a sum must not decide a verdict."""
    if not math.isfinite(value):
        return None
    return 0.0 if abs(value) < 1e-12 else float(f"{value:.10g}")


def verdict_of(
    difference: float | None, low: float | None, high: float | None, *, higher_is_better: bool
) -> str:
    """Verdict on a difference with its interval, in the words of `compare`."""
    if difference is None or low is None or high is None:
        return "undefined"
    if abs(difference) < LEAST_DIFFERENCE or low <= 0 <= high:
        return "no difference"
    return "better" if (low > 0) == higher_is_better else "worse"


def format_text(comparison: dict[str, Any]) -> str:
    """Plain text for a terminal, without a final newline.

    Parameters
    ----------
    comparison : dict
        From `compare`, or read back from its JSON.
    """
    data, evaluations = comparison["data_set"], comparison["evaluations"]
    level = 100 * comparison["protocol"]["level"]
    lines = [
        f"log g on {data['name']}: {counted(data['n'], 'star')}, file fingerprint {data['fingerprint']}",
        "",
    ]
    rows = [
        (
            chr(ord("A") + i) if i < 26 else str(i + 1),
            item["path"],
            str(item["model"].get("name", "")),
            number(item["r2"], 4),
            bracket(item["r2_interval"], 4),
            f"{item['n_nan']} without prediction" if item["n_nan"] else "",
        )
        for i, item in enumerate(evaluations)
    ]
    lines += table(("", "evaluation", "model", "R²", "interval", ""), rows, left=3)
    for item in comparison["comparisons"]:
        a, b = rows[item["from"]][0], rows[item["to"]][0]
        lines += ["", f"{b} against {a}: {b} is {_sentence(item['overall']['r2'], a)}", ""]
        body: list[tuple[str, ...]] = []
        titles = {}
        for statistic, entry in item["overall"].items():
            name = "R², all stars" if statistic == "r2" else f"{statistic.upper()} [dex]"
            body.append((name, *_cells(entry)))
        for kind, title in _TITLES.items():
            titles[len(body)] = f"{title}, R²"
            body += [(entry["name"], *_cells(entry)) for entry in item["groups"][kind]]
        head, *text = table(("", "n", a, b, f"{b} − {a}", "interval", "verdict"), body)
        lines.append(head)
        for i, line in enumerate(text):
            lines += ["", titles[i], line] if i in titles else [line]
        tested = [
            entry for kind in _TITLES for entry in item["groups"][kind] if entry["verdict"] != "undefined"
        ]
        called = sum(entry["verdict"] != "no difference" for entry in tested)
        lines += [
            "",
            f"  {called} of {counted(len(tested), 'group')} {'is' if called == 1 else 'are'} called different; about "
            f"{(1 - comparison['protocol']['level']) * len(tested):.1f} would be by chance if there were no difference",
        ]
    lines += [
        "",
        f"  (brackets: {level:g} % bootstrap intervals, for differences paired over the same stars, "
        f"{comparison['protocol']['n_resamples']} resamples;",
        f"   better or worse: the interval leaves out zero and the difference is at least {LEAST_DIFFERENCE:g})",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cells(entry: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(entry["n"]),
        number(entry["from"]),
        number(entry["to"]),
        number(entry["difference"], 4, True),
        bracket(entry["interval"], 4, True),
        entry["verdict"],
    )


def _sentence(entry: dict[str, Any], a: str) -> str:
    if entry["verdict"] == "undefined":
        return f"not comparable with {a}: an R² does not exist"
    by = f"{number(entry['difference'], 4, True)} {bracket(entry['interval'], 4, True)} of R²"
    if entry["verdict"] == "no difference":
        return f"neither better nor worse ({by})"
    return f"{entry['verdict']} by {by}"
