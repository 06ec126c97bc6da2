"""A GPU that is wrong says so: devices that give the CPU's numbers, other ones, or none."""

from dataclasses import replace

import numpy as np
import pytest
from made_clouds import mixture as made_mixture
from plans import random_mixture

from moefast import doctor
from moefast.backend import Backend
from moefast.core.errors import BackendError, DisagreementError
from moefast.kernels import velocity_evidence, velocity_step
from moefast.posterior.library_stars import SNRS, library_stars
from moefast.posterior.velocities import VelocityFit
from moefast.predicting import agreement, engines
from moefast.predicting.agreement import N_STARS, require_agreement, stars_of
from moefast.predicting.decisions import decisions_on_model
from moefast.predicting.engines import CpuEngine, CudaEngine, open_engine

MIXTURES = {"posterior": made_mixture, "linear": random_mixture}


@pytest.fixture(scope="module", params=MIXTURES)
def mix(request):
    return MIXTURES[request.param]()


def device(mix, change):
    """A device that gives the CPU's numbers but for a change of its columns, which also counts the stars."""

    def score(flux, error, mask):
        prediction, quality = mix.score(flux, error, mask)
        changed = change(
            {name: value.copy() for name, value in vars(prediction).items() if value is not None}
        )
        return replace(prediction, **changed), quality

    return score


def test_a_device_that_is_right_is_told_how_close_it_is(mix):
    assert require_agreement(mix, mix.score) == "checked on 64 stars against the CPU: log g within 0 dex"

    def a_little_off(columns):
        columns["log_g"] += np.float32(1e-5)
        return columns

    # In single precision, 10⁻⁵ dex near 4 dex is 1.001 · 10⁻⁵.
    words = require_agreement(mix, device(mix, a_little_off))
    assert words in [f"checked on 64 stars against the CPU: log g within {x} dex" for x in ("1e-5", "2e-5")]


def shifted(name, by):
    def change(columns):
        columns[name][5] += np.asarray(by, columns[name].dtype)
        return columns

    return change


def scaled(name, by):
    def change(columns):
        columns[name][5] *= np.asarray(by, columns[name].dtype)
        return columns

    return change


def lost(columns):
    columns["log_g"][::2] = np.nan
    return columns


def everything_lost(columns):
    return {name: np.full_like(value, np.nan) for name, value in columns.items()}


WRONG = {
    "one star by a thousandth of a dex": (shifted("log_g", 1e-3), "1 of 64 stars.*log_g of star 5 "),
    "an error by a per cent": (scaled("log_g_err", 1.01), "1 of 64 stars.*log_g_err of star 5 "),
    "weights of experts": (shifted("weights", 0.01), "1 of 64 stars.*weights of star 5 "),
    "chi2": (scaled("chi2", 1.01), "chi2 of star 5 "),
    "no number for half of the stars": (lost, r"32 of 64 stars.*log_g of star 0 \(SNR 3\) is nan there"),
    "no numbers": (everything_lost, "64 of 64 stars.* is nan there"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_device_that_is_wrong_is_refused_with_the_difference(mix, wrong):
    change, words = WRONG[wrong]
    with pytest.raises(DisagreementError, match=words) as caught:
        require_agreement(mix, device(mix, change))
    assert "the GPU gives other numbers than the CPU" in str(caught.value)
    assert "use --backend cpu, and please report this line" in str(caught.value)
    assert caught.value.exit_code == BackendError.exit_code


def test_a_number_where_the_cpu_has_none_is_wrong_too(mix, monkeypatch):
    flux, error, mask = stars_of(mix)
    flux[7] = np.nan
    monkeypatch.setattr(agreement, "stars_of", lambda _: (flux, error, mask))
    assert np.isnan(mix.score(flux, error, mask)[1].snr_median[7])
    assert "log g within 0 dex" in require_agreement(mix, mix.score)

    def score(*spectra):
        prediction, quality = mix.score(*spectra)
        return prediction, replace(quality, snr_median=np.nan_to_num(quality.snr_median))

    with pytest.raises(
        DisagreementError, match=r"1 of 64 stars.*snr_median of star 7 .* is 0 there and nan on the"
    ):
        require_agreement(mix, score)


def test_a_kernel_that_mixes_up_clouds_is_seen():
    mix = made_mixture()
    order = np.arange(len(mix.keys))
    order[[10, 40]] = 40, 10
    for wrong in (replace(mix, labels=mix.labels[order]), replace(mix, tangents=mix.tangents[order])):
        with pytest.raises(DisagreementError):
            require_agreement(mix, wrong.score)


def test_stars_are_always_the_same_and_of_every_kind(mix):
    flux, error, mask = stars_of(mix)
    for again, first in zip(stars_of(mix), (flux, error, mask), strict=True):
        np.testing.assert_array_equal(again, first)
    bad = mask | ~np.isfinite(flux) | ~(error > 0)
    share = bad.mean(1).reshape(-1, 4, len(SNRS))
    assert (share[:, 0] == 0).all()
    assert (share[:, 1:3] > 0.15).all()
    assert (share[:, 3] > 0).all()
    assert (share[:, 3] < 0.05).all()
    _, quality = mix.score(flux, error, mask)
    snr = quality.snr_median.reshape(-1, len(SNRS))
    assert (np.diff(snr) > 0).all()


def test_stars_of_a_library_are_like_it():
    """Their labels are known: those of the clouds that they were made from."""
    mix = made_mixture(p=576, m=70, n=20, q=3)
    flux, error, mask = library_stars(mix, N_STARS)
    prediction, _ = mix.score(flux, error, mask)
    assert 0.7 < np.median(prediction.distance) < 1.3
    assert 0.8 < np.median(prediction.chi2) < 1.2
    cloud = np.linspace(0, len(mix.keys) - 1, N_STARS).round().astype(int)
    low, high = mix.label_range
    truth = np.clip(mix.labels[cloud, 0], low, high)
    bright = np.resize(SNRS, N_STARS) > 20
    assert np.corrcoef(prediction.log_g[bright], truth[bright])[0, 1] > 0.8


# -- in the engine -----------------------------------------------------------------------------------------------


class Scorer:
    """A stand-in for the scorers of both kinds of models; what it gives is what `score` makes of the spectra."""

    block_rows, slots = 64, 2
    score = None

    def __init__(self, *_):
        pass

    def __call__(self, flux, error, mask=None, slot=None):
        return flux, error, mask


@pytest.fixture
def gpu(monkeypatch):
    """Let a CUDA device be there that predicts as `gpu(change)` says."""
    kernels = pytest.importorskip("moefast.kernels.cuda")
    monkeypatch.setattr("moefast.backend.cuda_devices", lambda: (["Fake H200"], ""))
    monkeypatch.setattr("moefast.kernels.cuda.device.require_device", lambda: None)
    for name in ("CudaPosteriorScorer", "CudaScorer"):
        monkeypatch.setattr(kernels, name, Scorer, raising=False)

    def install(change):
        def score(engine, slot, flux, error, mask, first_row):
            return device(engine._mixture, change)(flux, error, mask)

        monkeypatch.setattr(CudaEngine, "_score", score)

    return install


def unchanged(columns):
    return columns


def test_an_engine_that_is_right_says_so(mix, gpu):
    gpu(unchanged)
    engine, where = open_engine(mix, "auto")
    assert isinstance(engine, CudaEngine)
    assert (where.name, where.reason) == ("cuda", "a CUDA device was found")
    assert engine.checked == "checked on 64 stars against the CPU: log g within 0 dex"


@pytest.mark.parametrize("change", [shifted("log_g", 1e-3), everything_lost])
def test_an_engine_that_is_wrong_is_none(mix, gpu, change):
    gpu(change)
    engine, where = open_engine(mix, "auto")
    assert isinstance(engine, CpuEngine)
    assert where.name == "cpu"
    assert where.reason.startswith(
        "Fake H200 was found but cannot be used: backend cuda: the GPU gives other numbers"
    )
    with pytest.raises(DisagreementError, match="please report this line"):
        open_engine(mix, "cuda")


def test_details_tell_of_the_check(model, gpu, monkeypatch):
    gpu(unchanged)
    engine, where = open_engine(model.mixture, "cuda")
    (line,) = [line for line in decisions_on_model(model, engine, where) if line.startswith("backend: ")]
    assert line.endswith("as asked; checked on 64 stars against the CPU: log g within 0 dex")
    on_cpu = decisions_on_model(model, CpuEngine(model.mixture), Backend("cpu", "EPYC", "as asked"))
    assert not any("checked" in line for line in on_cpu)
    assert engines.OnnxEngine.checked == ""


@pytest.mark.parametrize(
    ("change", "words", "wrong"),
    [
        (unchanged, "checked on 64 stars against the CPU: log g within 0 dex", False),
        (shifted("log_g", 1e-3), "backend cuda: the GPU gives other numbers than the CPU for 1 of 64", True),
    ],
)
def test_doctor_compares_every_shipped_model(gpu, monkeypatch, change, words, wrong):
    gpu(change)
    found, problems = doctor.compare_with_cpu({name: make() for name, make in MIXTURES.items()})
    assert found.keys() == MIXTURES.keys()
    assert all(line.startswith(words) for line in found.values())
    assert [problem.split(":")[0] for problem in problems] == [f"model {name}" for name in MIXTURES if wrong]
    facts = {
        "compared_with_cpu": found, "problems": problems, "cuda_devices": ["Fake H200"], "why_no_cuda_kernels": "",
        "memory_bytes": 0, "packages": {}, "families": [], "shipped_models": {}, "compiled_code": "here",
    } | {name: "x" for name in ("moefast", "python", "platform", "cpu", "cores")}  # fmt: skip
    facts |= {"backend": "cuda", "backend_device": "Fake H200", "backend_reason": "found"}
    text = doctor.format_text(facts)
    assert f"on GPU   linear: {words}" in text
    assert ("no problems found" in text) is not wrong


def test_doctor_says_why_a_model_is_not_compared(gpu, monkeypatch):
    def refuse(mixture, backend):
        raise BackendError("device memory: 1 GB are needed")

    monkeypatch.setattr(engines, "open_engine", refuse)
    found, problems = doctor.compare_with_cpu({"z0": None})
    assert found == {"z0": "not compared with the CPU: device memory: 1 GB are needed"}
    assert problems == []


# -- velocities --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fit():
    return VelocityFit(made_mixture(), 30.0)


def devices_of(fit, of_evidence=lambda e: e, of_step=lambda s: s):
    """Scan and step of a device that changes what the CPU gives."""

    def scan(*spectra):
        return of_evidence(velocity_evidence(*spectra, fit.templates))

    def step(*spectra):
        return of_step(velocity_step(*spectra, fit.space, fit.slopes))

    return scan, step


def test_a_device_that_compares_velocities_as_the_cpu_does(fit):
    fit._require_agreement(*devices_of(fit))
    fit._require_agreement(*devices_of(fit, lambda e: e * (1 + 1e-6)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"of_evidence": lambda e: e + 0.1 * (np.arange(len(e)) == 4)[:, None]},
            "1 of 16 .*: ln E of star 4",
        ),
        ({"of_evidence": lambda e: e * np.nan}, "16 of 16 .*: ln E of star 0 is nan there"),
        ({"of_step": lambda s: (s[0] + 0.01 * s[1], s[1])}, r"16 of 16 .*: the step \[km/s\] of star 0"),
        ({"of_step": lambda s: (s[0], 1.001 * s[1])}, r"16 of 16 .*: its error \[km/s\] of star 0"),
        (
            {"of_step": lambda s: (s[0], np.where(s[1] > 0, np.nan, s[1]))},
            r"its error \[km/s\] of star 0 is nan",
        ),
    ],
)
def test_a_device_that_compares_velocities_otherwise_is_refused(fit, changes, words):
    with pytest.raises(DisagreementError, match=words):
        fit._require_agreement(*devices_of(fit, **changes))


def test_a_fit_stays_on_the_cpu_where_the_device_is_wrong(fit, monkeypatch):
    scan, step = devices_of(fit, lambda e: -e)
    makers = {"CudaVelocityScan": lambda *_: scan, "CudaVelocityStep": lambda *_: step}
    monkeypatch.setattr("moefast.posterior.velocities.on_cuda", lambda name, backend: makers[name])
    with pytest.raises(DisagreementError, match="velocities on the GPU are not those of the CPU"):
        fit.use_device()
    assert fit.backend == "cpu"
    right, _ = devices_of(fit)
    makers["CudaVelocityScan"] = lambda *_: right
    fit.use_device()
    assert fit.backend == "cuda"
