"""A report of made-up stars, for what is drawn and written of it."""

from __future__ import annotations

import json

import numpy as np

from moefast.core import grids
from moefast.core.groups import groups_of
from moefast.core.records import as_entries, read_entries
from moefast.protocol.comparisons import Comparisons
from moefast.protocol.group_scores import Bootstrap
from moefast.protocol.report import DataSet, Predictions, Stars, evaluate_predictions
from moefast.protocol.report_parts import Report


def evaluated(y, yhat, err, *, t_eff, m_h, snr_norm, snr_median, data_set, fingerprint, model=None, **more):
    """A report of columns and options that tests change one by one."""
    names = {kind: kind.__dataclass_fields__ for kind in (Predictions, DataSet, Comparisons, Bootstrap)}
    unknown = set(more) - {name for fields in names.values() for name in fields}
    assert not unknown, unknown
    of = {kind: {name: more[name] for name in fields if name in more} for kind, fields in names.items()}
    return evaluate_predictions(
        Stars(y, t_eff, m_h, snr_norm, snr_median),
        Predictions(yhat, err, **of[Predictions]),
        DataSet(data_set, fingerprint, **of[DataSet]),
        comparisons=Comparisons(**of[Comparisons]),
        model=model,
        bootstrap=Bootstrap(**of[Bootstrap]),
    )


def report(n=1201, *, n_resamples=40, **changes):
    """1201 stars whose scatter falls with SNR; three have no prediction. Bayes ceilings of the groups are 0.9."""
    rng = np.random.default_rng(4)
    y = rng.uniform(1, 5, n)
    snr = np.exp(rng.normal(2.1, 0.4, n))
    yhat = y + rng.normal(0, 3 / snr)
    yhat[:3] = np.nan
    labels = {
        "t_eff": rng.uniform(3750, 6000, n),
        "m_h": rng.uniform(-2.5, 0.75, n),
        "snr_norm": 0.4 * snr,
        "snr_median": snr,
    }
    groups = groups_of(*labels.values())
    arguments = {
        "y": y,
        "yhat": yhat,
        "err": 3 / snr,
        "data_set": "fake",
        "fingerprint": "0123456789abcdef",
        "weights": rng.dirichlet(np.ones(9), n),
        "expert_grid": grids.PHYSICAL_GRID,
        "references": {
            "published-ridge": y + rng.normal(0, 0.9, n),
            "global-ridge": y + rng.normal(0, 0.7, n),
            "oracle-ridge": y + rng.normal(0, 0.3, n),
        },
        "ceilings": {"bayes": 0.9, "fisher median": 0.93},
        "group_ceilings": {
            kind: [{"bayes": 0.9, "fisher median": 0.93} for _ in members] for kind, members in groups.items()
        },
        "noise": "stored",
        "noise_level": 1.0,
        "model": {"kind": "model", "name": "phys-moe", "sha256": "aa", "references_of": "phys-moe"},
    }
    return evaluated(**(arguments | labels | changes), n_resamples=n_resamples)


def read_back(report, *without):
    """The report that is read from the JSON of another, perhaps without some of its entries."""
    entries = json.loads(json.dumps(as_entries(report), allow_nan=False))
    kept = {key: value for key, value in entries.items() if key not in without}
    return read_entries(Report, kept, "report.json")


RUN = {
    "spectra_per_second": 12345.6,
    "device": "a CPU",
    "backend": "cpu",
    "what": "scoring alone",
    "command": "moefast evaluate test.h5 -m model",
    "moefast_version": "9.9",
}
