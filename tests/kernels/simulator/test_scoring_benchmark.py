"""The benchmark of scoring runs from end to end at tiny sizes, and tells what is wrong."""

import importlib.util
import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from made_clouds import mixture as posterior_mixture
from made_clouds import stars as posterior_stars
from plans import random_plans, spectra

from moefast.core.errors import BackendError
from moefast.kernels import project, soft_mix
from moefast.kernels.cuda import mix, scoring
from moefast.mixture import Prediction
from moefast.spectra.quality import Quality

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu_scoring.py"


@pytest.fixture
def script(monkeypatch, small_tiles):
    spec = importlib.util.spec_from_file_location("gpu_scoring", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for owner, name in ((scoring, "THREADS"), (scoring, "LANES"), (mix, "LANES")):
        monkeypatch.setattr(owner, name, 2)
    projection, mixing = random_plans(p=24, c=6, w=1)
    flux, error = spectra(3, projection)

    def score(flux, error, mask):
        seen = project(flux, error, mask, projection)
        mixed = soft_mix(seen, mixing)
        of_mixed = (getattr(mixed, one.name) for one in fields(Prediction)[:6])
        quality = Quality(seen.snr_norm, seen.snr_median, seen.n_good, seen.flag)
        return Prediction(*of_mixed, seen.log_level), quality

    # All that the benchmark asks of a mixture, in a size that the simulator manages.
    mixture = SimpleNamespace(
        reference=np.ones(24, np.float32),
        noise_shape=np.ones(24, np.float32),
        score=score,
        projection=projection,
        mixing=mixing,
        n_pixels=24,
        n_experts=3,
        experts=(),
        clouds=(None, ()),
        tower=None,
        predict=lambda flux, error: soft_mix(project(flux, error, None, projection), mixing),
    )
    truth = mixture.predict(flux, error).log_g + [0.01, -0.01, 0.02]

    def no_provider(*_):
        raise BackendError("this ONNX Runtime has no CUDAExecutionProvider")

    monkeypatch.setattr(module, "onnx_runtime", no_provider)
    monkeypatch.setattr(module, "of_few_stars", lambda: SimpleNamespace(mixture=mixture, hash="abc"))
    posterior = posterior_mixture(p=24, m=4, n=4, q=1)
    seen = posterior_stars(posterior, 3)
    of_posterior = SimpleNamespace(mixture=posterior, name="posterior", hash="def")
    monkeypatch.setattr(module.Model, "load", lambda name: of_posterior)
    answer = posterior.predict(*seen).log_g + [0.01, -0.01, 0.02]
    monkeypatch.setattr(
        module,
        "stars",
        lambda model, small: (*seen, answer) if model is of_posterior else (flux, error, truth),
    )
    monkeypatch.setattr(module, "SMALL_ROWS", 4)
    monkeypatch.setattr(module, "SMALL_LIBRARY", {"n": 3, "m": 5, "r": 2, "q": 1})
    monkeypatch.setattr(module, "SMALL_CLOUDS", {"small": {"n": 3, "m": 9, "r": 3, "t": 2}})
    return module


def run(script, out, *more):
    options = ["--small", "--samples", "1", "--posterior", "posterior", *more, "-o", str(out)]
    done = CliRunner().invoke(script.main, options)
    return done, json.loads(out.read_text())


def test_the_report(script, tmp_path):
    done, report = run(script, tmp_path / "report.json")
    assert done.exit_code == 0, done.output
    engines = report["scoring"]["engines"]
    names = ("moefast, project and mix", "moefast, with snr_median", "moefast, from host memory")
    for name in (*names, "moefast, project, 3 clouds, mix"):
        assert engines[name]["agrees"]
        assert engines[name]["r2"] < 1
        assert (engines[name]["r2"] > 0.5) == (name in names)
        assert len(engines[name]["seconds"]) == 1
        assert engines[name]["share"] > 0
    assert "CUDAExecutionProvider" in engines["ONNX Runtime, CUDA"]["error"]
    assert set(report["scoring"]["copies"]) == {"device copy", "pinned host to device"}
    library = report["template_posterior"]["engines"]
    assert library["moefast"]["agrees"]
    assert library["moefast, free scale"]["pairs_per_second"] > 0
    clouds = report["tangent_posterior"]["small"]["engines"]
    for name in ("moefast", "moefast, on the CPU"):
        assert clouds[name]["agrees"]
        assert clouds[name]["tflops"] > 0
    (posterior,) = report["posteriors"].values()
    for name in ("moefast, resident", "moefast, from host memory", "moefast, on the CPU"):
        assert posterior["engines"][name]["agrees"]
        assert posterior["engines"][name]["rows_per_second"] > 0
    steps = posterior["engines"]["moefast, resident"]["steps"]
    assert len(steps["clouds"]) == 1
    (velocities,) = report["velocities"].values()
    for name in ("scan", "step"):
        for way in ("resident", "from host memory", "on the CPU"):
            assert velocities["engines"][f"{name}, {way}"]["agrees"], (name, way)
    assert len(velocities["engines"]["scan, resident"]["steps"]["lines"]) == 1
    assert "spectra/s" in done.output


def test_wrong_numbers_are_a_failure(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "TOLERANCE", -1.0)
    done, _ = run(script, tmp_path / "report.json", "--part", "scoring")
    assert done.exit_code == 1
    assert "failed, or off by more than" in done.output
    assert "moefast, from host memory" in done.output.splitlines()[-1]
