"""A family of experts of one's own, in this one file: fitted, saved, read back, evaluated, exported; or refused."""

import sys
from dataclasses import dataclass, replace
from importlib import metadata
from typing import ClassVar

import numpy as np
import pytest
from click.testing import CliRunner
from one_expert import inputs, model_of, run
from plans import random_mixture
from tolerances import assert_close

import moefast
from moefast.cli import cli
from moefast.core.errors import InputError, ModelError
from moefast.experts import protocol
from moefast.experts.protocol import ENTRY_POINTS, ExpertValues, Place, family
from moefast.export import build, open_session, read_mixture, verify
from moefast.fitting import Options
from moefast.predicting.files import predict
from moefast.protocol.evaluate import evaluate
from moefast.recipes import fit


@moefast.expert
@dataclass(frozen=True)
class Quadratic(moefast.Expert):
    """Log g as a quadratic function of the first components: b + w·φ, φ = (z_1 …, z_1² …), a ridge."""

    weights: np.ndarray
    intercept: np.ndarray

    family: ClassVar[str] = "quadratic"
    leading: ClassVar[int] = 6

    def describe(self, op, seen):
        z = op.part(seen["z"], 1, 0, self.leading)
        features = op.joined([z, op.multiply(z, z)], 1)
        return ExpertValues(op.affine(features, op.number("weights"), op.number("intercept")))

    @classmethod
    def fit(cls, inputs, y, *, seed):
        z = inputs.z[:, : cls.leading].astype(np.float64)
        features = np.column_stack([np.ones(len(z)), z, z * z])
        gram = features.T @ features
        w = np.linalg.solve(gram + 1e-3 * np.diag(np.diag(gram)), features.T @ y)
        return cls(w[1:, None].astype(np.float32), w[:1].astype(np.float32))


@moefast.expert
@dataclass(frozen=True)
class Opaque(moefast.Expert):
    """Something that runs, and does not say how it is exported."""

    scale: np.ndarray

    family: ClassVar[str] = "opaque"

    def describe(self, op, seen):
        return ExpertValues(op.step([seen["z"]], lambda z: 3 + self.scale * np.sin(z[:, :1]), None))


def quadratic(seed=0):
    rng = np.random.default_rng(seed)
    weights = 0.02 * rng.standard_normal((2 * Quadratic.leading, 1))
    return Quadratic(weights.astype(np.float32), np.array([3], np.float32))


@pytest.fixture(scope="module")
def fitted(labelled_file):
    return fit(labelled_file, families=("linear", "quadratic"), references=False)


def test_what_it_computes_in_float32_float64_and_onnx():
    expert, seen = quadratic(), inputs(131)
    z = seen.z[:, :6].astype(np.float64)
    expected = 3 + np.concatenate([z, z * z], 1) @ expert.weights[:, 0].astype(np.float64)
    assert_close(expert.predict_reference(seen), expected)
    assert expert.predict(seen).dtype == np.float32
    assert_close(expert.predict(seen), expected, made_in=np.float32)
    assert_close(run(open_session(model_of(expert)), seen), expected, made_in=np.float32)


def test_a_star_does_not_know_its_neighbours():
    expert, seen = quadratic(), inputs(200)
    whole = expert.predict(seen)
    for few in (slice(0, 1), slice(64, 128), slice(199, 200)):
        alone = expert.predict(type(seen)(*(None if a is None else a[few] for a in seen)))
        np.testing.assert_array_equal(alone, whole[few])


def test_a_mixture_with_it_is_exported_and_read_back():
    mixture = random_mixture().with_expert(quadratic(), 1).with_expert(quadratic(1), 4)
    model = build(mixture)
    assert verify(model, mixture)
    assert verify(build(mixture, "expert-1"), mixture)
    back = read_mixture(model, mixture.wave)
    assert [(place.expert.family, place.bins) for place in back.experts] == [
        ("quadratic", (1,)), ("quadratic", (4,)),
    ]  # fmt: skip
    for mine, theirs in zip(back.experts, mixture.experts, strict=True):
        np.testing.assert_array_equal(mine.expert.weights, theirs.expert.weights)


def test_it_may_also_stand_everywhere_or_beside_another():
    mixture = random_mixture().with_expert(quadratic()).with_expert(quadratic(1), 2, added=True)
    assert verify(build(mixture), mixture)
    rng = np.random.default_rng(0)
    spectra = (
        mixture.reference + rng.normal(0, 0.1, (40, 512)).astype(np.float32),
        np.full((40, 512), 0.1, "f4"),
    )
    found, expected = mixture.predict(*spectra), mixture.predict_reference(*spectra)
    assert_close(found.expert_log_g, expected.expert_log_g, made_in=np.float32)
    assert np.ptp(found.expert_log_g[:, [0, 1, 3, 4]], axis=1).max() == 0


def test_it_is_fitted_saved_evaluated_and_exported(fitted, tmp_path, stars):
    said = fitted.manifest["fit"]["families"]
    assert all("quadratic" in entry["gain"] for entry in said.values())
    # Which bins take it is up to the stars; here one has it whatever they say.
    mixture = fitted.mixture
    if "quadratic" not in mixture.families:
        mixture = mixture.with_expert(quadratic(), 0)
    model = replace(fitted, mixture=mixture).save(tmp_path / "model")
    assert "quadratic" in model.mixture.families
    test = stars.take(slice(0, 300))
    table = predict(test.observed().write(tmp_path / "noisy.h5"), tmp_path / "model").columns
    expected = mixture.predict(test.noisy.astype(np.float32), test.error.astype(np.float32))
    np.testing.assert_array_equal(table["log_g"], expected.log_g)
    report = evaluate(test.write(tmp_path / "test.h5", arrays=("flux", "error", "noisy")), tmp_path / "model")
    assert "oracle-hybrid" in report.report["references"]
    log_g = open_session(tmp_path / "model" / "model.onnx").run(
        ["log_g"], {"flux": test.noisy.astype(np.float32), "error": test.error.astype(np.float32)}
    )[0]
    np.testing.assert_allclose(log_g, expected.log_g, atol=1e-4)


def test_what_does_not_say_how_it_is_exported_runs_and_is_not_saved(fitted, tmp_path):
    model = replace(fitted, mixture=fitted.mixture.with_expert(Opaque(np.ones(1, np.float32)), 3))
    flux = model.mixture.reference[None] + np.zeros((3, 1), np.float32)
    assert np.isfinite(model.mixture.predict(flux, np.full_like(flux, 0.1)).log_g).all()
    with pytest.raises(
        ModelError, match=r"experts of the family opaque: a step of experts\.3 does not say how"
    ):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_of_a_family_that_is_not_here_is_refused(monkeypatch):
    model = build(random_mixture().with_expert(quadratic(), 1))
    monkeypatch.delitem(protocol._FAMILIES, "quadratic")
    with pytest.raises(ModelError, match="'quadratic' are unknown here; import the module that defines them"):
        read_mixture(model, random_mixture().wave)


def test_an_installed_package_names_its_families_by_entry_points(monkeypatch):
    monkeypatch.delitem(protocol._FAMILIES, "quadratic")
    point = metadata.EntryPoint("quadratic", f"{__name__}:Quadratic", ENTRY_POINTS)

    def points(*, group, name=None):
        return [point] if (group, name or "quadratic") == (ENTRY_POINTS, "quadratic") else []

    monkeypatch.setattr(type(point), "load", lambda _: Quadratic)
    monkeypatch.setattr(protocol.metadata, "entry_points", points)
    assert family("quadratic") is Quadratic
    assert "quadratic" in protocol.fitted_in_bins()


def test_names_are_taken_once_and_only_by_experts():
    with pytest.raises(InputError, match=r"'trees' is that of moefast\.experts\.trees\.Trees already"):
        moefast.expert(type("Own", (moefast.Expert,), {"family": "trees"}))
    with pytest.raises(InputError, match="must derive from"):
        moefast.expert(type("Own", (), {"family": "own"}))
    with pytest.raises(InputError, match="must derive from"):
        moefast.expert(type("Own", (moefast.Expert,), {}))


def test_families_that_cannot_be_fitted_bin_by_bin_are_refused_before_a_row_is_read():
    for families in (("linear", "opaque"), ("quadratic",), ("linear", "nothing"), ("linear", "heads")):
        with pytest.raises(InputError, match=r"expected linear, alone or with any of .*quadratic"):
            Options(families=families)
    assert Options(families=("linear", "quadratic")).families == ("linear", "quadratic")


@pytest.mark.parametrize(
    ("expert", "bins", "added"),
    [(quadratic(), (1, 1), False), (quadratic(), (), False), (quadratic(), (1, 2), True)],
)
def test_places_that_make_no_sense_are_refused(expert, bins, added):
    with pytest.raises(ValueError, match="an expert stands in one bin or several"):
        Place(expert, bins, added)


def test_a_bin_has_one_expert_and_one_residual():
    mixture = random_mixture()
    for places in (
        (Place(quadratic(), (1,)), Place(quadratic(), (0, 1))),
        (Place(quadratic(), (1,), added=True),) * 2,
        (Place(quadratic(), (5,)),),
    ):
        with pytest.raises(ValueError, match="can be replaced once"):
            replace(mixture, experts=places)


# -- at the command line ---------------------------------------------------------------------------------------

FILE = """
import dataclasses, typing
import numpy as np
import moefast
from moefast.experts.protocol import ExpertValues

@moefast.expert
@dataclasses.dataclass(frozen=True)
class Mean(moefast.Expert):
    intercept: np.ndarray
    family: typing.ClassVar[str] = "mean"

    def describe(self, op, seen):
        nothing = op.multiply(op.part(seen["z"], 1, 0, 1), op.constant(0.0))
        return ExpertValues(op.add(nothing, op.number("intercept")))

    @classmethod
    def fit(cls, inputs, y, *, seed):
        return cls(np.array([y.mean()], np.float32))
"""


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "_FAMILIES", dict(protocol._FAMILIES))
    path = tmp_path / "mean.py"
    path.write_text(FILE)
    yield path
    sys.modules.pop(str(path), None)


def command(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_a_family_in_a_file_is_fitted_by_the_command(own_file, labelled_file, tmp_path):
    model = tmp_path / "model"
    command("fit", labelled_file, "-o", model, "--expert", own_file, "--families", "linear,mean",
            "--no-references", "--seed", 1, "-q")  # fmt: skip
    fitted = moefast.load(model)
    assert all("mean" in entry["gain"] for entry in fitted.manifest["fit"]["families"].values())
    assert "mean" in command("doctor").stdout
    # No bin keeps it; a model in which one has it needs the file.
    mean = family("mean")(np.array([3], np.float32))
    replace(fitted, mixture=fitted.mixture.with_expert(mean, 0)).save(tmp_path / "with")
    del protocol._FAMILIES["mean"], sys.modules[str(own_file)]
    night = labelled_file
    refused = command("predict", night, "-m", tmp_path / "with", "-o", tmp_path / "no.h5", code=6).stderr
    assert "--expert" in refused
    assert "'mean' are unknown here" in refused
    command("predict", night, "-m", tmp_path / "with", "-o", tmp_path / "t.h5", "--expert", own_file, "-q")
    assert (tmp_path / "t.h5").is_file()


def test_unknown_families_are_told_with_those_that_are_known(labelled_file, tmp_path):
    said = command("fit", labelled_file, "-o", tmp_path / "m", "--families", "linear,treees", code=2).stderr
    assert "'treees'; known families are linear, template, heads, posterior, " in " ".join(said.split())
    assert "trees" in said.split("known families")[1]
    assert not (tmp_path / "m").exists()


def test_files_without_experts_are_refused(labelled_file, tmp_path):
    (tmp_path / "empty.py").write_text("x = 1")
    (tmp_path / "wrong.py").write_text("import nothing_of_that_name")
    for name, words in (
        ("empty.py", "defines no family of experts"),
        ("wrong.py", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("absent.py", "FileNotFoundError"),
        ("no_such_module", "No module named 'no_such_module'"),
    ):
        source = tmp_path / name if name.endswith(".py") else name
        said = command("fit", labelled_file, "-o", tmp_path / "m", "--expert", source, code=2).stderr
        assert words in " ".join(said.split())
