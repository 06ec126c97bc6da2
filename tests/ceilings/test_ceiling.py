"""Ceilings of files: what is computed, stored, printed, and refused."""

import json
from importlib.resources import as_file, files

import h5py
import numpy as np
import pytest
from sklearn.metrics import r2_score

from moefast.ceilings import bayes, ceiling, star_bounds, summary
from moefast.core import metrics
from moefast.core.errors import InputError
from moefast.protocol.ceiling_report import figure, format_text
from moefast.simulate import Settings, simulate_file
from moefast.simulate.forward import ForwardModel
from moefast.simulate.sets import FINGERPRINTS, REFERENCE_SETS, identify, simulate_set
from moefast.spectra.spectrum_set import open_spectra

N = 24


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("ceiling") / "test.h5"
    simulate_file(path, N, seed=3)
    return path


@pytest.fixture(scope="module")
def reports():
    return []


@pytest.fixture(scope="module")
def found(file, reports):
    return ceiling.compute(file, name="toy", progress=lambda *report: reports.append(report))


def test_every_star_is_reported(found, reports):
    assert reports[0] == ("ceiling", 0, N)
    assert [done for stage, done, _ in reports if stage == "ceiling"][-N - 1 :] == [*range(1, N + 1), N]


def test_summary(found):
    bayes, stars = found.summary["bayes"], found.stars
    assert found.summary["data_set"]["n"] == N
    expected = 1 - (stars["bayes_sd"] ** 2).mean() / stars["log_g"].var()
    assert bayes["r2"] == pytest.approx(expected)
    assert bayes["r2_of_posterior_means"] == pytest.approx(metrics.r2(stars["log_g"], stars["bayes"]))
    assert bayes["effective_sample_size"]["share_of_stars_at_least_200"] == 1
    assert sum(bayes["ranks"]["log_g"]["histogram"]) == N
    assert set(bayes["ranks"]) == {"T_eff", "log_g", "M_H", "a_M", "C_M"}
    assert (stars["crlb_prior"] < stars["crlb"]).all()
    r2 = found.r2()
    assert r2["bayes"] == bayes["r2"]
    assert r2["fisher mean"] <= r2["fisher median"]
    assert r2["fisher mean"] <= r2["fisher mean, with prior"]
    magnitudes = [row["median"] for row in found.summary["fisher"]["by_magnitude"]]
    assert magnitudes == sorted(magnitudes, reverse=True)
    assert sum(group["n"] for group in found.summary["groups"]["grid"]) == N


def test_resamples_of_one_star_alone_are_left_out_of_the_interval():
    # Of three stars every ninth resample is one of them three times: it has no variance that could be explained.
    low, high = summary._r2_interval(np.array([1.0, 2.0, 4.0]), np.array([0.1, 0.1, 0.1]))
    # Two stars and the third one twice: variances are 2/9 at the least and 2 at the most.
    assert 1 - 0.01 * 9 / 2 - 1e-12 <= low < high <= 1 - 0.01 / 2 + 1e-12


def test_posterior_means_are_better_than_the_prior(found):
    """Most stars must be closer to the truth than the middle of the box is, or nothing was learned."""
    assert found.summary["bayes"]["r2_of_posterior_means"] > 0.4
    r2 = r2_score(found.stars["log_g"], found.stars["bayes"])
    assert r2 == pytest.approx(found.summary["bayes"]["r2_of_posterior_means"])
    assert found.summary["bayes"]["error_coverage"]["n"] == N


def test_the_same_stars_the_same_numbers(file, found):
    again = ceiling.compute(file, stars=10, threads=1)
    for key in ("bayes", "bayes_sd", "ess", "rank"):
        np.testing.assert_array_equal(again.stars[key], found.stars[key][:10])
    # The derivatives come in blocks, whose size a matrix product's rounding may depend on.
    np.testing.assert_allclose(again.stars["crlb"], found.stars["crlb"][:10], rtol=1e-6)


@pytest.mark.parametrize("name", ["ceiling.json", "ceiling.json.gz"])
def test_written_and_read_back(found, tmp_path, name):
    ceiling.write(found, tmp_path / name)
    again = ceiling.read(tmp_path / name)
    assert again.r2() == found.r2()
    for key, values in found.stars.items():
        np.testing.assert_allclose(again.stars[key], values, rtol=1e-4)
    first = (tmp_path / name).read_bytes()
    ceiling.write(found, tmp_path / name)
    assert (tmp_path / name).read_bytes() == first


def test_text_and_picture(found, tmp_path):
    text = format_text(found.summary)
    assert all(len(line) <= 100 for line in text.splitlines())
    for piece in ("Bayes", "Fisher", "ranks of the truth", "HSC i", "cool-poor"):
        assert piece in text
    figure(found.summary, tmp_path / "ceiling.png")
    assert (tmp_path / "ceiling.png").read_bytes()[:4] == b"\x89PNG"


def test_one_method_alone(file, tmp_path):
    fisher_only = ceiling.compute(file, method="fisher", stars=8)
    assert fisher_only.summary["bayes"] is None
    assert "fisher mean" in fisher_only.r2()
    assert "bayes" not in fisher_only.stars
    bayes_only = ceiling.compute(file, method="bayes", stars=8)
    assert bayes_only.summary["fisher"] is None
    assert set(bayes_only.r2()) == {"bayes"}
    for one in (fisher_only, bayes_only):
        format_text(one.summary)
        figure(one.summary, tmp_path / "one.png")


def without(file, tmp_path, change):
    """A copy of the file with a change."""
    path = tmp_path / "changed.h5"
    path.write_bytes(file.read_bytes())
    with h5py.File(path, "r+") as h5:
        change(h5)
    return path


def test_a_file_that_does_not_say_how_it_was_made(file, tmp_path):
    path = without(file, tmp_path, lambda h5: h5.attrs.__delitem__("settings"))
    assert ceiling.compute(path, stars=8).summary["bayes"] is None
    with pytest.raises(InputError, match=r"changed\.h5: has no attribute settings"):
        ceiling.compute(path, method="bayes")


def test_errors_of_another_simulator_are_refused(file, tmp_path):
    def louder(h5):
        h5["dataset/arrays/error/value"][...] *= 1.05

    with pytest.raises(InputError, match=r"its errors are 1\.0500"):
        ceiling.compute(without(file, tmp_path, louder), stars=8)


def test_another_wave_grid_is_refused(file, tmp_path):
    def shifted(h5):
        h5["spectrumdataset/wave"][...] += 5

    with pytest.raises(InputError, match="wave grid"):
        ceiling.compute(without(file, tmp_path, shifted), stars=8)


def test_a_file_without_noisy_gets_the_noise_of_every_evaluation(tmp_path):
    path = tmp_path / "clean.h5"
    simulate_file(path, 8, seed=3, noisy=False)
    found = ceiling.compute(path)
    assert found.summary["data_set"]["noise_seed"] is not None
    assert np.isfinite(found.stars["bayes"]).all()


def test_bad_pixels_and_rows(file, tmp_path):
    def spoil(h5):
        h5["dataset/arrays/noisy/value"][2, 100:200] = np.nan
        h5["dataset/arrays/error/value"][3, 7] = 0.0

    found = ceiling.compute(without(file, tmp_path, spoil), stars=6)
    assert all(np.isfinite(found.stars[key]).all() for key in ("crlb", "bayes", "bayes_sd"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no json", "no readable ceiling"),
        (b"{}", "expected a ceiling of schema"),
        (None, "no readable ceiling"),
    ],
)
def test_what_is_no_ceiling(tmp_path, content, message):
    path = tmp_path / "c.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        ceiling.read(path)


def test_settings_travel_in_the_file(found):
    assert Settings.from_json(json.dumps(found.summary["data_set"]["settings"])) == Settings()


def test_a_ceiling_of_wild(tmp_path, monkeypatch):
    # A library an eighth as large is where the sampler starts from, and takes a few seconds.
    few = bayes.TemplateLibrary.draw(ForwardModel(REFERENCE_SETS["wild"].settings), size=8192)
    monkeypatch.setattr(star_bounds, "_library", lambda settings: few)
    simulate_set(tmp_path / "wild.h5", "wild", "validation", rows=(0, 8))
    found = ceiling.compute(tmp_path / "wild.h5")
    stars = found.stars
    assert (stars["ess"] >= 200).all()
    assert (np.abs(stars["bayes"] - stars["log_g"]) < 4 * stars["bayes_sd"]).all()
    # More is unknown than of the same stars of z0, and some pixels are lost.
    simulate_set(tmp_path / "z0.h5", "z0", "validation", rows=(0, 8))
    plain = ceiling.compute(tmp_path / "z0.h5", method="fisher").stars
    assert (stars["crlb_prior"] > plain["crlb_prior"]).all()


@pytest.mark.parametrize(("name", "part"), [key for key in FINGERPRINTS if key != ("wild", "test_10k")])
def test_shipped_ceilings_are_those_of_the_frozen_sets(name, part):
    path = files("moefast.ceilings") / "data" / f"{name}-{part}.json.gz"
    with as_file(path) as file:
        shipped = ceiling.read(file)
    data, bayes, stars = shipped.summary["data_set"], shipped.summary["bayes"], shipped.stars
    assert data["reference_set"]["fingerprint"] == FINGERPRINTS[name, part]
    assert data["n"] == data["n_rows"] == REFERENCE_SETS[name].parts[part].n_rows == len(stars["bayes"])
    assert bayes["effective_sample_size"]["share_of_stars_at_least_200"] >= 0.99
    assert (stars["ess"] >= 200).mean() >= 0.99
    assert bayes["r2"] == pytest.approx(1 - (stars["bayes_sd"] ** 2).mean() / stars["log_g"].var(), abs=1e-4)


def test_a_reference_set_finds_its_ceiling(tmp_path):
    path = tmp_path / "test_1k.h5"
    simulate_set(path, "z0", "test_1k")
    found = ceiling.known(identify(path))
    assert found is not None
    labels = open_spectra(path).labels(("log_g",))["log_g"]
    np.testing.assert_allclose(found.stars["log_g"], labels, rtol=1e-4)
    # A star of it, computed here, is the one that is shipped: same posterior within its Monte Carlo error.
    few = ceiling.compute(path, method="bayes", stars=6)
    error = np.hypot(few.stars["monte_carlo_error"], found.stars["monte_carlo_error"][:6])
    assert (np.abs(few.stars["bayes"] - found.stars["bayes"][:6]) < 5 * error).all()


def test_other_files_have_no_shipped_ceiling(file):
    assert ceiling.known(identify(file)) is None
