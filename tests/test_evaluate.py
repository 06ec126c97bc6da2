"""The protocol applied to a model: noise exactly once, the same stars for everyone, the same report twice."""

from __future__ import annotations

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest

from moefast.ceilings import ceiling
from moefast.core.errors import InputError, OutputError, WaveGridError
from moefast.core.metrics import r2
from moefast.core.random import NOISE_SEED, standard_normals
from moefast.core.records import sealed
from moefast.export import build, open_session
from moefast.predicting.files import predict
from moefast.protocol.evaluate import evaluate
from moefast.protocol.figures import FIGURES
from moefast.protocol.report_folder import REPORT_FILES, check_report_folder, write_report
from moefast.simulate import simulate_set
from moefast.spectra import open_spectra


@pytest.fixture(scope="module")
def few(stars):
    return stars.take(slice(0, 700))


@pytest.fixture(scope="module")
def clean_file(few, tmp_path_factory):
    return few.write(tmp_path_factory.mktemp("clean") / "clean.h5")


@pytest.fixture(scope="module")
def noisy_file(few, tmp_path_factory):
    return few.write(tmp_path_factory.mktemp("noisy") / "noisy.h5", arrays=("flux", "error", "noisy"))


@pytest.fixture(scope="module")
def drawn(clean_file, model):
    return evaluate(clean_file, model)


@pytest.fixture(scope="module")
def stored(noisy_file, model):
    return evaluate(noisy_file, model)


def _noise(evaluation):
    data_set = evaluation.report["data_set"]
    return data_set["noise_level"], data_set["noise_seed"]


# -- noise -----------------------------------------------------------------------------------------------------


def test_the_stored_noise_is_used(stored, noisy_file, model):
    np.testing.assert_array_equal(stored.predicted, predict(noisy_file, model).columns["log_g"])
    assert _noise(stored) == (1.0, None)


def test_noise_is_drawn_from_the_stored_seed(drawn, few, model):
    draw = standard_normals(NOISE_SEED, np.arange(len(few)), few.flux.shape[1])
    noisy = (few.flux + draw * few.error).astype(np.float32)
    expected = model.mixture.predict(noisy, few.error.astype(np.float32)).log_g
    np.testing.assert_allclose(drawn.predicted, expected, atol=1e-4)
    assert _noise(drawn) == (1.0, NOISE_SEED)


def test_the_same_report_twice(drawn, clean_file, model):
    again = evaluate(clean_file, model)
    assert json.dumps(again.report, allow_nan=False) == json.dumps(drawn.report, allow_nan=False)
    for name, values in again.stars.items():
        assert values.tobytes() == drawn.stars[name].tobytes(), name


def test_noise_belongs_to_the_star_not_to_the_block(drawn, clean_file, model, monkeypatch):
    monkeypatch.setattr("moefast.protocol.scorer.BLOCK_ROWS", 100)
    np.testing.assert_array_equal(evaluate(clean_file, model).predicted, drawn.predicted)


def test_more_noise_is_worse_and_none_is_better(drawn, stored, clean_file, noisy_file, model):
    louder = evaluate(noisy_file, model, noise_level=3.0)
    silent = evaluate(noisy_file, model, noise="none")
    r = {name: e.report["overall"]["r2"] for name, e in locals().items() if hasattr(e, "report")}
    assert r["louder"] < r["stored"] - 0.1
    assert r["silent"] > r["stored"] + 0.05
    assert abs(r["stored"] - r["drawn"]) < 0.08
    assert _noise(louder) == (3.0, NOISE_SEED)
    assert _noise(silent) == (None, None)
    # Stored noise fits level 1 only, so another level must not start from it.
    np.testing.assert_array_equal(louder.predicted, evaluate(clean_file, model, noise_level=3.0).predicted)


def test_drawing_can_be_asked_for(drawn, noisy_file, model):
    np.testing.assert_array_equal(evaluate(noisy_file, model, noise="draw").predicted, drawn.predicted)
    other = evaluate(noisy_file, model, noise="draw", noise_seed=1)
    assert np.abs(other.predicted - drawn.predicted).max() > 0.1


@pytest.mark.parametrize("level", [0.0, -1.0, np.nan])
def test_impossible_noise_levels(level, clean_file, model):
    with pytest.raises(InputError, match="noise level must be positive"):
        evaluate(clean_file, model, noise_level=level)


# -- numbers ---------------------------------------------------------------------------------------------------


def test_scores_are_of_the_predictions(stored, few):
    report = stored.report
    assert report["overall"]["r2"] == pytest.approx(r2(few.params["log_g"], stored.predicted), abs=1e-9)
    np.testing.assert_array_equal(stored.log_g, few.params["log_g"])
    assert report["overall"]["n"] == report["data_set"]["n"] == 700
    assert stored.run["spectra_per_second"] > 0
    assert stored.run["r2"] == report["overall"]["r2"]


def test_references_and_oracle_are_scored_on_the_same_stars(stored, model, few):
    references = stored.report["references"]
    assert set(references) == set(model.references) | {"oracle-ridge"}
    r = {name: entry["r2"] for name, entry in references.items()}
    assert r["published-ridge"] < r["global-ridge"] < stored.report["overall"]["r2"]
    assert r["oracle-ridge"] > r["global-ridge"]
    form = model.references["published-ridge"]
    assert form.clipped
    x = np.maximum(few.noisy, 0).astype(np.float64) - model.mixture.reference
    expected = np.clip(x @ form.weights[:, 0, 0] + form.intercepts[0, 0], *model.mixture.label_range)
    assert r["published-ridge"] == pytest.approx(r2(few.params["log_g"], expected), abs=1e-5)
    bins = model.grid.assign(few.params["T_eff"], few.params["M_H"])
    experts = model.mixture.predict_reference(few.noisy, few.error).expert_log_g
    oracle = np.clip(experts[np.arange(700), bins], *model.mixture.label_range)
    assert r["oracle-ridge"] == pytest.approx(r2(few.params["log_g"], oracle), abs=1e-5)


def test_a_global_model_has_no_oracle(labelled_file, noisy_file):
    from moefast.recipes import fit

    report = evaluate(noisy_file, fit(labelled_file, recipe="global-ridge", references=False)).report
    assert not any("oracle" in name and "average" not in name for name in report["references"])
    assert report["rho"] is None or report["rho"]["value"] is None
    assert report["overall"]["r2"] > 0.45


def test_rows_without_data_count_as_missing(few, model, tmp_path):
    some = few.take(slice(0, 200))
    some.flux[3] = np.nan
    some.error[50, :100] = np.inf
    found = evaluate(some.write(tmp_path / "x.h5"), model)
    assert np.flatnonzero(np.isnan(found.predicted)).tolist() == [3]
    assert found.report["overall"]["n_nan"] == 1


def test_three_engines_agree(noisy_file, model):
    """`predict` on the CPU, float64 NumPy, and ONNX Runtime with the exported graph."""
    found = predict(noisy_file, model).columns
    block = next(iter(open_spectra(noisy_file).blocks(1000, array="noisy")))
    reference = model.mixture.predict_reference(block.flux, block.error)
    session = open_session(build(model.mixture), "cpu")
    onnx = dict(zip(
        ("log_g", "log_g_err"),
        session.run(["log_g", "log_g_err"], {"flux": block.flux, "error": block.error}),
        strict=True,
    ))  # fmt: skip
    assert np.abs(found["log_g"] - reference.log_g).max() < 1e-4
    assert np.abs(onnx["log_g"] - reference.log_g).max() < 1e-4
    assert np.abs(found["log_g"] - onnx["log_g"]).max() < 1e-4
    np.testing.assert_allclose(found["log_g_err"], reference.log_g_err, rtol=1e-3)
    np.testing.assert_allclose(onnx["log_g_err"], reference.log_g_err, rtol=1e-3)


# -- the report folder -----------------------------------------------------------------------------------------


def test_a_report_folder(stored, tmp_path):
    folder = tmp_path / "deep" / "report"
    written = write_report(stored, folder)
    assert sorted(folder.iterdir()) == sorted(written)
    assert [path.name for path in written] == list(REPORT_FILES)
    assert json.loads((folder / "report.json").read_text()) == sealed(json.loads(json.dumps(stored.report)))
    assert json.loads((folder / "run.json").read_text()) == stored.run
    assert "R²" in (folder / "report.txt").read_text()
    assert "<!DOCTYPE html>" in (folder / "report.html").read_text()
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert {path.stem for path in (folder / "figures").iterdir()} == set(FIGURES)
    before = (folder / "report.json").read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        write_report(stored, folder)
    assert (folder / "report.json").read_bytes() == before


def test_a_report_replaced_without_pictures_keeps_no_old_ones(stored, tmp_path):
    folder = tmp_path / "report"
    (folder / "figures").mkdir(parents=True)
    for name in ("report.html", "report.png", "figures/r2-by-bin.png", "figures/mine.png", "notes.txt"):
        (folder / name).write_text("old")
    written = write_report(stored, folder, pictures=False, overwrite=True)
    assert [path.name for path in written] == list(REPORT_FILES[:4])
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert left == sorted([*REPORT_FILES[:4], "figures/mine.png", "notes.txt"])


def test_a_report_is_not_written_over_a_file(stored, tmp_path):
    (tmp_path / "report").write_text("precious")
    with pytest.raises(OutputError, match="is a file"):
        check_report_folder(tmp_path / "report", True)
    assert (tmp_path / "report").read_text() == "precious"


# -- reference sets and ceilings ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    path = tmp_path_factory.mktemp("z0") / "part.h5"
    simulate_set(path, "z0", "train", rows=(100, 160), noisy=True)
    return path


@pytest.fixture(scope="module")
def ceiling_file(simulated):
    path = simulated.with_name("ceiling.json")
    ceiling.write(ceiling.compute(simulated, method="fisher"), path)
    return path


def test_a_reference_set_is_known_by_its_content(simulated, tmp_path):
    renamed = tmp_path / "night.h5"
    renamed.write_bytes(simulated.read_bytes())
    data = evaluate(renamed).report["data_set"]
    assert data["name"] == "z0 train"
    assert data["reference_set"]["part"] == "train"
    assert evaluate(renamed, name="mine").report["data_set"]["name"] == "mine"
    with h5py.File(renamed, "r+") as file:
        file["dataset/arrays/flux/value"][0] *= 1.1
    assert evaluate(renamed).report["data_set"]["reference_set"] is None


def test_ceilings_of_the_set_and_its_groups(simulated, ceiling_file):
    found = evaluate(simulated, ceiling=ceiling_file)
    expected = ceiling.read(ceiling_file)
    assert {name: entry["r2"] for name, entry in found.report["ceilings"].items()} == pytest.approx(
        expected.r2()
    )
    for kind, entries in expected.summary["groups"].items():
        for group, entry in zip(found.report[kind]["groups"], entries, strict=True):
            assert group["name"] == entry["name"]
            assert group["n"] == entry["n"]
            assert group["ceilings"].get("fisher median") == pytest.approx(
                entry.get("fisher", {}).get("median")
            )
    assert evaluate(simulated, ceiling=expected).report == found.report
    assert evaluate(simulated).report["ceilings"] == {}
    assert found.run["command"].endswith(f"--ceiling {ceiling_file}")


def test_exact_posterior_means_of_the_ceiling_are_compared_with_star_by_star(simulated, ceiling_file):
    limits = ceiling.read(ceiling_file)
    log_g = limits.stars["log_g"]
    means = log_g + 0.3 * np.random.default_rng(5).standard_normal(log_g.size)
    groups = {
        kind: [entry | {"bayes": 0.9, "bayes_means": 0.8} for entry in entries]
        for kind, entries in limits.summary["groups"].items()
    }
    known = replace(
        limits,
        summary=limits.summary | {"bayes": {"r2": 0.95}, "groups": groups},
        stars=limits.stars | {"bayes": means},
    )
    found = evaluate(simulated, ceiling=known)
    both, own = found.record.posterior_means, found.record.overall.r2
    assert both.r2 == pytest.approx(r2(found.log_g, means))
    assert both.efficiency == pytest.approx(own / both.r2)
    assert found.record.ceilings["bayes"].efficiency == pytest.approx(own / 0.95)
    assert {group.ceilings["posterior means"] for group in found.record.snr_norm.groups} == {0.8}
    assert evaluate(simulated, ceiling=ceiling_file).record.posterior_means is None


def test_ceilings_of_other_stars_or_other_noise(simulated, ceiling_file, noisy_file, model, tmp_path):
    with pytest.raises(InputError, match="belongs to the set"):
        evaluate(noisy_file, model, ceiling=ceiling_file)
    for changes in ({"noise": "none"}, {"noise_level": 2.0}):
        with pytest.raises(InputError, match="holds for the noise of the files"):
            evaluate(simulated, ceiling=ceiling_file, **changes)
    with pytest.raises(InputError, match="no readable ceiling"):
        evaluate(simulated, ceiling=tmp_path / "absent.json")
    part = tmp_path / "part.json"
    ceiling.write(ceiling.compute(simulated, method="fisher", stars=20), part)
    found = evaluate(simulated, ceiling=part).report
    assert found["ceilings"]
    assert all(group["ceilings"] == {} for group in found["grid"]["groups"])


def test_tables_are_measured_beside_the_shipped_fits(simulated, tmp_path):
    own = evaluate(simulated, "z0")
    table = tmp_path / "t.csv"
    table.write_text("row,log_g\n" + "".join(f"{i},{v!r}\n" for i, v in enumerate(own.predicted.tolist())))
    report = evaluate(simulated, table).report
    assert report["model"]["references_of"] == "posterior-calibrated"
    for name, entry in report["references"].items():
        assert entry == own.report["references"][name]
    assert not any(name.startswith("oracle") for name in report["references"])
    assert report["rho"] is None


def test_a_peer_is_measured_on_the_same_noise(simulated, few, model, tmp_path):
    found = evaluate(simulated, peer="chi2")
    assert found.report["model"] | {"sha256": ""} == {
        "kind": "peer", "name": "chi2", "sha256": "", "references_of": "posterior-calibrated", "share_seen": None,
        "what": "full-spectrum fit of the emulator, five labels and a scale",
    }  # fmt: skip
    own = evaluate(simulated, "z0")
    assert (
        found.report["references"]["published-ridge"]["r2"]
        == own.report["references"]["published-ridge"]["r2"]
    )
    assert found.report["calibration"] is not None
    assert found.run["command"].endswith("--peer chi2")
    # The least squares of 60 stars, and not of others or without noise.
    error = np.abs(found.predicted - found.log_g)
    assert 0.1 < np.median(error) < 0.6
    assert 0.5 < (error < found.stars["log_g_err"]).mean() < 0.9
    with pytest.raises(InputError, match="a model or a peer"):
        evaluate(simulated, model, peer="chi2")
    with pytest.raises(InputError, match="choose one of chi2, cannon"):
        evaluate(simulated, peer="payne")
    with pytest.raises(WaveGridError, match="peer chi2 needs spectra on the simulator's wave grid"):
        evaluate(few.write(tmp_path / "binned.h5"), peer="chi2")


def test_flux_that_is_noisy_already_is_told(few, clean_file, noisy_file, model, tmp_path):
    """Noise would be added twice; said before the first row, in the report, and not where nothing is added."""
    observed = few.observed().write(tmp_path / "observed.h5")
    told = []
    found = evaluate(observed, model, tell=told.append)
    assert len(told) == 1
    assert "noisy already" in told[0]
    assert "use --noise none" in told[0]
    assert told[0] in found.run["notes"]
    for path, noise in ((observed, "none"), (clean_file, "auto"), (noisy_file, "auto"), (noisy_file, "draw")):
        evaluate(path, model, noise=noise, tell=told.append)
    assert len(told) == 1
