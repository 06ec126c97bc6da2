"""Every recipe from files to tables: fitted, saved, read back to the last bit, scored, evaluated, exported."""

import dataclasses
import itertools

import numpy as np
import pytest

from moefast.core.errors import BackendError, InputError
from moefast.core.progress import Whole
from moefast.export import build, open_session
from moefast.fitting import expected_stages
from moefast.model import Model
from moefast.predicting.engines import CudaEngine
from moefast.predicting.files import predict
from moefast.protocol.evaluate import evaluate
from moefast.recipes import FOCUSED, RECIPES, STRONG, fit, focused, options_of, prepare

ALL_RECIPES = [
    pytest.param(name, marks=pytest.mark.torch) if recipe.options.get("families") == ("heads",) else name
    for name, recipe in RECIPES.items()
]


@pytest.fixture(scope="module")
def fitted(labelled_file, tmp_path_factory):
    """Each recipe fitted once, when it is first asked for."""
    made, folder, stages = {}, tmp_path_factory.mktemp("recipes"), {}

    def get(recipe):
        if recipe not in made:
            # These stars are binned, hence bright: with their own noise the faintest bin of snr-moe would be empty.
            noise_level = 2.0 if recipe == "snr-moe" else 1.0
            references = recipe == "hybrid-moe"
            stages[recipe] = []
            made[recipe] = fit(
                labelled_file, recipe=recipe, references=references, noise_level=noise_level, steps=60,
                progress=lambda *report: stages[recipe].append(report),
            )  # fmt: skip
            made[recipe].save(folder / recipe)
        return made[recipe], folder / recipe

    get.stages = stages
    return get


@pytest.fixture(scope="module")
def observed_file(stars, tmp_path_factory):
    """Stars whose flux is noisy already."""
    return stars.take(slice(0, 600)).observed().write(tmp_path_factory.mktemp("observed") / "observed.h5")


@pytest.mark.parametrize("recipe", ALL_RECIPES)
def test_a_fit_goes_through_the_stages_that_are_expected_of_it(fitted, recipe):
    model, _ = fitted(recipe)
    reports = fitted.stages[recipe]
    stages = [stage for stage, _ in itertools.groupby(reports, key=lambda report: report[0])]
    options = options_of(recipe, references=recipe == "hybrid-moe", steps=60)
    expected = expected_stages(options, model.manifest["training"]["n_spectra"])
    if recipe == "conditional-moe":
        # These stars are bright: a tower for the faint ones has nothing to learn from.
        del expected["tower"]
    assert stages == list(expected)
    assert min(expected.values()) > 0
    whole, shares = Whole(expected), [0.0]
    for stage, done, total in reports:
        whole.report(stage, done, total)
        assert whole.share >= shares[-1]
        shares.append(whole.share)
    # A network that no longer learns stops early.
    assert shares[-1] == pytest.approx(1)
    for stage in stages:
        assert next(done for name, done, _ in reports if name == stage) <= 1, f"{stage} begins in silence"


@pytest.mark.parametrize("recipe", ALL_RECIPES)
def test_a_folder_gives_the_numbers_of_the_fit(fitted, recipe, stars):
    before, folder = fitted(recipe)
    after = Model.load(folder)
    assert after.manifest["recipe"] == recipe
    found, expected = (m.mixture.score(stars.noisy[:40], stars.error[:40])[0] for m in (after, before))
    for item in dataclasses.fields(found):
        np.testing.assert_array_equal(
            getattr(found, item.name), getattr(expected, item.name), err_msg=item.name
        )


@pytest.mark.parametrize("recipe", ALL_RECIPES)
def test_a_table_has_a_number_for_every_star_whatever_its_neighbours_are(fitted, recipe, stars, tmp_path):
    _, folder = fitted(recipe)
    clean = stars.take(slice(0, 300))
    spoilt = stars.take(slice(0, 300))
    spoilt.noisy[7, :] = np.nan
    spoilt.noisy[200, 5] = 1e30
    tables = [
        predict(s.observed().write(tmp_path / name), folder).columns
        for s, name in ((clean, "clean.h5"), (spoilt, "spoilt.h5"))
    ]
    assert np.isfinite(tables[0]["log_g"]).all()
    assert tables[1]["flag"][7] & 1
    assert tables[1]["flag"][200] != 0
    others = np.setdiff1d(np.arange(300), (7, 200))
    for name in tables[0]:
        np.testing.assert_array_equal(tables[1][name][others], tables[0][name][others], err_msg=name)


@pytest.mark.parametrize("recipe", ALL_RECIPES)
def test_the_onnx_graph_gives_the_numbers_of_the_table(fitted, recipe, stars):
    model, _ = fitted(recipe)
    flux, error = stars.noisy[:100], stars.error[:100].astype(np.float32)
    found = open_session(build(model.mixture)).run(["log_g", "weights"], {"flux": flux, "error": error})
    expected = model.mixture.predict(flux, error)
    apart = np.abs(found[0] - expected.log_g)
    # A forest may send a star whose component lies on a threshold to another leaf.
    assert np.mean(apart < 1e-3) > 0.97
    assert apart.max() < 0.1
    np.testing.assert_allclose(found[1], expected.weights, atol=2e-3)


@pytest.mark.parametrize("recipe", ["template", "hybrid-moe", "hybrid-regression"])
def test_the_oracle_is_that_of_the_experts_and_the_ridges_stand_beside_it(fitted, recipe, stars, tmp_path):
    model, folder = fitted(recipe)
    few = stars.take(slice(0, 700))
    report = evaluate(few.write(tmp_path / "test.h5", arrays=("flux", "error", "noisy")), folder).report
    names = set(report["references"])
    assert {"oracle-hybrid", "oracle-ridge"} <= names
    assert ("oracle-ridge, sampled" in names) == (recipe == "hybrid-moe")
    assert report["rho"]["oracle"] == "oracle-hybrid"
    assert ("bayes-gate" in names) == (report["rho_bayes"] is not None) == bool(np.any(model.mixture.gate[2]))
    if report["rho_bayes"] is not None:
        wrong = model.mixture.by_evidence(few.noisy, few.error) - few.params["log_g"]
        r2 = 1 - (wrong @ wrong) / (700 * few.params["log_g"].var())
        assert report["references"]["bayes-gate"]["r2"] == pytest.approx(r2, abs=1e-5)
        low, high = (report["references"][name]["r2"] for name in ("global-ridge", "oracle-hybrid"))
        assert report["rho_bayes"]["value"] == pytest.approx((r2 - low) / (high - low), abs=1e-4)
    prepared = model.mixture.prepare(few.noisy, few.error)
    bins = model.grid.assign(few.params["T_eff"], few.params["M_H"])
    here = np.arange(700), bins
    for name, values in (
        ("oracle-hybrid", prepared.expert_log_g),
        ("oracle-ridge", prepared.linear_log_g),
    ):
        wrong = np.clip(values[here], *model.mixture.label_range) - few.params["log_g"]
        expected = 1 - (wrong @ wrong) / (700 * few.params["log_g"].var())
        assert report["references"][name]["r2"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("strong", STRONG)
@pytest.mark.parametrize("recipe", ["residual-moe", "residual-metal-poor"])
def test_residuals_stand_on_the_recipe_that_is_named(recipe, strong):
    own, base, found = options_of(recipe), options_of(strong), options_of(recipe, strong=strong)
    changed = {"residuals": own.residuals, "residual_focus": own.residual_focus}
    assert found == dataclasses.replace(base, **changed)
    assert own == options_of(recipe, strong="heads")


def test_what_residuals_cannot_stand_on_is_refused():
    for recipe, strong in (("phys-moe", "heads"), ("residual-moe", "phys-moe")):
        with pytest.raises(
            InputError, match="residuals stand on one of template, heads, heads-cnn, heads-vit"
        ):
            options_of(recipe, strong=strong)


def test_a_focus_is_a_recipe_of_its_own():
    assert focused("phys-moe", None) == "phys-moe"
    assert focused("hybrid-moe", "metal-poor") == "hybrid-metal-poor"
    assert set(FOCUSED.values()) <= set(RECIPES)
    for base, focus in FOCUSED:
        own, other = options_of(base), options_of(focused(base, focus))
        assert own.families == other.families
        assert own != other
    with pytest.raises(InputError, match="no focus 'metal-poor'; there is metal-poor of hybrid-moe"):
        focused("phys-moe", "metal-poor")


def test_libraries_need_clean_spectra(labelled_file):
    with pytest.raises(InputError, match="clean training spectra"):
        fit(labelled_file, recipe="template", noise="observed")


@pytest.mark.parametrize(
    "recipe", ["posterior", "posterior-calibrated", "posterior-linear", "template", "hybrid-moe"]
)
def test_what_needs_clean_spectra_refuses_flux_that_is_noisy_already(recipe, observed_file, tmp_path):
    def never(*_):
        raise AssertionError("no row may be read for the fit")

    with pytest.raises(InputError, match=r"needs clean training spectra; found .* noisy already") as caught:
        fit(observed_file, recipe=recipe, progress=never)
    assert str(observed_file) in str(caught.value)
    assert "--recipe phys-moe --noise observed" in str(caught.value)


def test_flux_that_is_clean_is_not_refused(labelled_file):
    assert not prepare(labelled_file, recipe="posterior").notes


@pytest.mark.torch
@pytest.mark.parametrize(
    ("recipe", "trunk"), [("heads", "pca-mlp"), ("heads-cnn", "cnn"), ("heads-vit", "vit")]
)
def test_a_fit_tells_how_its_network_was_fitted(fitted, recipe, trunk):
    told = fitted(recipe)[0].manifest["fit"]["heads"]
    assert told["trunk"] == trunk
    # Fewer than 60 if the last looks brought nothing.
    assert 0 < told["curve"][-1]["step"] <= 60
    assert told["r2_held_out"] == max(look["r2"] for look in told["curve"])


def test_a_gpu_refuses_families_that_it_does_not_know(fitted):
    model, _ = fitted("hybrid-moe")
    mixture = model.mixture
    if "trees" not in mixture.families:
        from plans import random_trees

        mixture = mixture.with_expert(random_trees(10 + mixture.n_basis), 0)
    with pytest.raises(BackendError, match="no kernels for experts of the family trees; use backend cpu"):
        CudaEngine(mixture)


def test_a_gpu_refuses_residuals(fitted):
    from plans import random_ridge

    mixture = fitted("template")[0].mixture
    mixture = mixture.with_expert(random_ridge(9 + mixture.n_basis), 2, added=True)
    with pytest.raises(BackendError, match="no kernels for residuals of experts; use backend cpu"):
        CudaEngine(mixture)


@pytest.mark.torch
def test_the_manifest_of_a_residual_mixture_says_what_was_kept(fitted):
    model, _ = fitted("residual-moe")
    said = model.manifest["fit"]["residuals"]
    assert set(said) == {"kept", "dropped", "all", "regions"}
    kept = {model.grid.names.index(name): entry["residual"] for name, entry in said["kept"].items()}
    assert kept == {
        place.bins[0]: place.expert.family.removesuffix(" residual")
        for place in model.mixture.experts
        if place.added
    }


def test_a_fit_to_flux_that_is_noisy_already_says_so(stars, observed_file, tmp_path):
    few = stars.take(slice(0, 600))
    told = []
    common = {"recipe": "global-ridge", "references": False, "tell": told.append}
    model = fit(observed_file, **common)
    assert len(told) == 1
    assert "fit them with --noise observed" in told[0]
    assert told[0] in model.manifest["training"]["notes"]
    fit(observed_file, noise="observed", **common)
    fit(few.write(tmp_path / "clean.h5"), **common)
    assert len(told) == 1
