"""The frozen protocol: the document is what the code says, the hash holds all of it, others can check the gauge."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import mean_absolute_error, r2_score

from moefast.core import grids, groups, metrics
from moefast.protocol import frozen, group_scores
from moefast.simulate import sets

DOCUMENT = Path(__file__).parents[2] / "docs" / "eval_protocol_frozen.md"
VERSION, SHA256 = 1, "87441f28babb71f0fe1292303b98e853be4aed97ba713c288c9a5332d41e356e"
ADDITIONS = "1779122af24a3b4472c42e180315fffd6690f85e890019f8e01d09944773f453"
CHANGED = """the frozen protocol is no longer what it was. If that was not meant, find what changed (compare
moefast.protocol.frozen.canonical() before and after). If it was meant, results before and after cannot be compared:
raise VERSION in moefast/protocol/frozen.py, write the document anew, say so in the changelog, and put version and
hash here"""


@pytest.fixture(scope="module")
def found():
    return frozen.collect()


def test_nothing_frozen_has_changed(found):
    assert (frozen.VERSION, frozen.sha256(found)) == (VERSION, SHA256), CHANGED


def test_nothing_added_has_changed():
    assert frozen.sha256(frozen.collect_additions()) == ADDITIONS, CHANGED


def test_every_set_is_frozen_once(found):
    added = frozen.collect_additions()
    names = [*found["reference_sets"], *added["reference_sets"]]
    assert names == list(sets.REFERENCE_SETS)
    text = frozen.document(found)
    for one in added["reference_sets"].values():
        for part in one["parts"].values():
            assert part["fingerprint"] is None or part["fingerprint"] in text


def test_the_document_is_what_the_code_says(found):
    assert DOCUMENT.read_text(encoding="utf-8") == frozen.document(found), (
        "write it anew: python -m moefast.protocol.frozen docs/eval_protocol_frozen.md"
    )


def test_the_document_names_every_constant(found):
    text = frozen.document(found)
    for name, one in found["reference_sets"].items():
        assert f"`{name}`" in text
        for part in one["parts"].values():
            assert str(part["seed"]) in text
            assert part["fingerprint"] is None or part["fingerprint"] in text
    for rule in found["rules"].values():
        assert " ".join(rule.split()) in " ".join(text.split())
    for number in (metrics.N_RESAMPLES, metrics.SEED, found["noise"]["drawn_seed"], 0.4957, "8 hot-rich"):
        assert str(number) in text
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    assert max(len(line) for line in prose) <= 120


def test_canonical_json_is_strict_sorted_and_complete(found):
    text = frozen.canonical(found)
    assert json.loads(text) == found
    assert text == frozen.canonical(dict(reversed(found.items())))
    assert text.isascii()
    assert not re.search(r"NaN|Infinity", text)


def test_the_hash_is_not_moved_by_last_bits(found, monkeypatch):
    exact = frozen.gauge_stars()
    rng = np.random.default_rng(0)
    # Labels, bins and predictions as another mathematical library might give them.
    nudged = {
        name: values * (1 + rng.choice([-1e-14, 0, 1e-14], values.size)) for name, values in exact.items()
    }
    monkeypatch.setattr(frozen, "gauge_stars", lambda: nudged)
    assert frozen.gauge() == found["gauge"]


def filled_with_zero(y, yhat):
    filled = np.where(np.isfinite(yhat), yhat, 0.0)
    return filled, ~np.isfinite(yhat)


def clipped(y, yhat, honest=metrics.fill_missing):
    filled, missing = honest(y, yhat)
    return np.clip(filled, 1, 5), missing


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (grids, "METAL_POOR", -1.5),
        (groups, "METAL_POOR", -1.5),
        (group_scores, "LOW_SNR_NORM", 3.0),
        (metrics, "SEED", 1),
        (metrics, "fill_missing", filled_with_zero),
        (metrics, "fill_missing", clipped),
        (groups, "assign_snr_bins", lambda norm: grids.assign_snr_bins(norm, (2.5, 4.0, 7.0))),
        (groups, "PHYSICAL_GRID", grids.Grid((3750.0, 4400.0, 5250.0, 6000.0))),
        (sets, "REFERENCE_SETS", {}),
        (frozen, "MILESTONES", ()),
    ],
)
def test_a_change_of_constant_or_code_changes_the_hash(found, monkeypatch, owner, name, value):
    monkeypatch.setattr(owner, name, value)
    if hasattr(frozen, name):
        monkeypatch.setattr(frozen, name, value)
    assert frozen.sha256() != frozen.sha256(found)


def test_the_gauge_by_another_judge(found):
    """scikit-learn and resamples written out in full give what the document prints."""
    gauge, stars = found["gauge"], frozen.gauge_stars()
    y, model = stars["log_g"], stars["model"].copy()
    assert np.isnan(model).tolist() == [True] + [False] * (len(y) - 1)
    assert model[1] == 7
    model[0] = y.mean()
    predicted = {"r2": model, **{name: stars[name] for name in stars if name.endswith("-ridge")}}
    draws = np.random.default_rng(metrics.SEED).integers(0, len(y), (metrics.N_RESAMPLES, len(y)))
    samples = {}
    for name, values in predicted.items():
        scatter = ((y[draws] - y[draws].mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
        samples[name] = 1 - ((y - values)[draws] ** 2).sum(axis=1) / scatter
        expected = [r2_score(y, values), *np.quantile(samples[name], [0.025, 0.975])]
        np.testing.assert_allclose(gauge[name], expected, rtol=1e-5)
    assert gauge["mae"][0] == pytest.approx(mean_absolute_error(y, model), rel=1e-5)

    r2 = {name: np.append(gauge[name][0], values) for name, values in samples.items()}
    rho = (r2["r2"] - r2["global-ridge"]) / (r2["oracle-ridge"] - r2["global-ridge"])
    gap = (r2["r2"] - r2["published-ridge"]) / (frozen.GAUGE_CEILING - r2["published-ridge"])
    for name, values in (("rho", rho), ("gap_closed", gap)):
        np.testing.assert_allclose(
            gauge[name], [values[0], *np.quantile(values[1:], [0.025, 0.975])], rtol=1e-4
        )
    assert gauge["efficiency"] == pytest.approx(gauge["r2"][0] / frozen.GAUGE_CEILING, rel=1e-5)

    inside = (
        (stars["t_eff"] >= 3750) & (stars["t_eff"] <= 6000) & (stars["m_h"] >= -2) & (stars["m_h"] <= 0.5)
    )
    assert gauge["covered"] == [inside.sum(), pytest.approx(r2_score(y[inside], model[inside]), rel=1e-5)]
    faint, poor = stars["snr_norm"] <= 2, stars["m_h"] < -1
    hot_rich = (stars["t_eff"] >= 5250) & (stars["m_h"] >= 0)
    # The sample does what it is for: some stars lie outside the grid on every side.
    assert (stars["t_eff"] < 3750).any()
    assert (stars["t_eff"] > 6000).any()
    assert (stars["m_h"] < -2).any()
    assert (stars["m_h"] > 0.5).any()
    for name, members in (("X", faint), ("[M/H] < -1", poor), ("hot-rich", hot_rich)):
        assert gauge["groups"][name] == [
            members.sum(),
            pytest.approx(r2_score(y[members], model[members]), rel=1e-5),
        ]


def test_generator(tmp_path, capsys, found):
    path = tmp_path / "protocol.md"
    frozen.main([str(path)])
    assert path.read_text(encoding="utf-8") == frozen.document(found)
    assert frozen.sha256(found) in capsys.readouterr().out
