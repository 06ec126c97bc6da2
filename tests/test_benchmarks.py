"""The benchmark: every engine gives the reference's answer, one that does not is caught, what is missing is named."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from moefast.benchmarks import fit, report, score
from moefast.benchmarks import measure as measuring
from moefast.benchmarks import run as running
from moefast.benchmarks.adapter import Engine, Work, why_not
from moefast.benchmarks.engines import ENGINES, choose
from moefast.benchmarks.floors import FLOORS, forget_peak, memory_in_use, peak_memory, per_spectrum
from moefast.benchmarks.measure import Spec, measure_engine
from moefast.cli import cli
from moefast.core.errors import BackendError, InputError, WaveGridError
from moefast.model import Model
from moefast.recipes import fit as fit_model
from moefast.simulate.source import SimulatedSpectra

N = 400
EVERY = [pytest.param(e, id=f"{e.task}-{e.name}") for task in ENGINES.values() for e in task.values()]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """Templates at the mean noise, which every engine knows; posteriors are for our kernels and ONNX alone."""
    path = tmp_path_factory.mktemp("model") / "model"
    spectra = SimulatedSpectra.of_set("z0", rows=(0, 3000))
    return str(fit_model(spectra, recipe="template", references=False).save(path).path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_path):
    """Data of both tasks; the rows of `fit` are every 64th pixel, so that systems are small."""
    path = tmp_path_factory.mktemp("bench")
    running.prepare(path, N, ["score", "fit"], Model.load(model_path), lambda _: None)
    rows = np.load(path / "x.npy")[:, ::64]
    np.save(path / "x.npy", rows)
    (path / "model.txt").write_text(model_path)
    return path


@pytest.fixture(scope="module")
def fit_r2(folder):
    stored = np.load(folder / "labels.npz")
    problem = fit.FitProblem.of(folder / "x.npy", N, stored["log_g"], stored["bins"])
    return problem.r2(fit.reference_answer(problem))


def spec(engine, folder, n=N, **changes):
    model_path = (folder / "model.txt").read_text()
    return Spec(engine.task, engine.name, str(folder), n, 1, 600.0, **({"model_path": model_path} | changes))


@pytest.mark.parametrize("engine", EVERY)
def test_every_engine_gives_the_answer_of_the_reference(engine, folder, fit_r2, monkeypatch):
    # Trees enough to be run, not to be good.
    monkeypatch.setattr(score, "LIGHTGBM_ROWS", 200)
    monkeypatch.setattr(score, "LIGHTGBM_TREES", 3)
    # A fit star by star takes its time.
    rows = N if engine.most_rows is None else 40
    row = measure_engine(engine, spec(engine, folder, n=rows))
    assert "wrong" not in row
    if "unavailable" in row:
        assert len(row["unavailable"]) > 10
        pytest.skip(row["unavailable"])
    assert len(row["seconds"]) == 1
    assert row["seconds"][0] > 0
    if engine.is_floor:
        assert row["r2"] is None
    elif engine.same:
        tolerance = {"score": score.TOLERANCE, "fit": fit.TOLERANCE}[engine.task]
        assert row["difference"] <= tolerance
        if engine.task == "score":
            # A benchmark of a bad answer proves nothing.
            assert row["r2"] > 0.6
        else:
            assert row["r2"] == pytest.approx(fit_r2, abs=tolerance)
    # The kernel counts pages per core and adds them up now and then.
    assert row["peak_bytes"] + (2 << 20) >= row["base_bytes"] > 0


@pytest.mark.parametrize("engine", EVERY)
def test_registered_engines_are_complete(engine):
    assert engine.title
    assert engine.is_floor or engine.floor in FLOORS or engine.floor in ENGINES[engine.task]
    assert (engine.device == "cuda") == ("GPU" in engine.title)
    assert sum(engine.title == other.title for other in ENGINES[engine.task].values()) == 1


def test_what_is_installed_for_the_tests_is_measured(folder):
    assert [why_not(ENGINES[task][name]) for task in ENGINES for name in ("moefast", "numpy", "sklearn")] == [
        ""
    ] * 6


def test_what_is_missing_is_named():
    engine = replace(ENGINES["score"]["numpy"], needs=("no_such_module_anywhere",))
    assert why_not(engine) == "no_such_module_anywhere is not installed"
    assert "parent_of_nothing.child" in why_not(replace(engine, needs=("parent_of_nothing.child",)))


def test_an_engine_that_gives_up_is_unavailable_with_its_reason(folder):
    def make(_):
        raise BackendError("this machine has no abacus")

    engine = Engine("abacus", "abacus", "score", make)
    assert measure_engine(engine, spec(engine, folder))["unavailable"] == "this machine has no abacus"


def _shifted(by):
    def make(problem):
        work = score._numpy(problem)
        return Work(work.run, lambda log_g: log_g + by)

    return make


@pytest.mark.parametrize("by", [np.float32(1e-3), np.float32(np.nan)])
def test_a_wrong_score_is_caught_and_not_timed(folder, by):
    engine = Engine("off", "off", "score", _shifted(by))
    row = measure_engine(engine, spec(engine, folder))
    assert "differs by" in row["wrong"]
    assert "seconds" not in row


def test_a_missing_row_is_caught(folder):
    engine = Engine(
        "short", "short", "score", lambda problem: Work(lambda: problem.log_g[:-1].astype(np.float32))
    )
    assert "400 values" in measure_engine(engine, spec(engine, folder))["wrong"]


@pytest.mark.parametrize("what", ["errors", "weights", "intercepts"])
def test_a_wrong_fit_is_caught_and_not_timed(folder, what):
    def make(problem):
        right = fit._numpy(problem)
        return Work(right.run, lambda answer: replace(answer, **{what: 1.01 * getattr(answer, what) + 0.001}))

    engine = Engine("off", "off", "fit", make)
    row = measure_engine(engine, spec(engine, folder))
    assert "differs by" in row["wrong"]
    assert "seconds" not in row


def test_a_fit_that_is_wrong_at_full_size_alone_is_caught():
    rows = [
        {"task": "fit", "title": "first", "r2": 0.60, "seconds": [1.0]},
        {"task": "fit", "title": "same", "r2": 0.6005, "seconds": [1.0]},
        {"task": "fit", "title": "other", "r2": 0.61, "seconds": [1.0]},
    ]
    running._compare_fits(rows)
    assert ["wrong" in row for row in rows] == [False, False, True]


@pytest.fixture(scope="module")
def small_problem():
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((900, 12)) @ rng.standard_normal((12, 40))).astype(np.float32)
    bins = rng.integers(0, 9, 900)
    y = x[:, :4].sum(1) + bins + rng.standard_normal(900)
    problem = fit.FitProblem.of(None, 900, y, bins)
    problem.x = x
    return problem


def test_the_reference_of_fit_is_what_scikit_learn_finds(small_problem):
    linear_model = pytest.importorskip("sklearn.linear_model")
    p = small_problem
    found = fit.reference_answer(p)
    k, a = 4, 2
    alpha, errors = p.penalties[a] * (p.bins == k).sum(), []
    for f in range(3):
        train, held = (p.bins == k) & (p.folds != f), (p.bins == k) & (p.folds == f)
        judge = linear_model.Ridge(alpha=alpha).fit(p.x[train].astype(float), p.y[train])
        errors.append(
            ((p.y[held] - judge.predict(p.x[held].astype(float))) ** 2).mean() + judge.coef_ @ judge.coef_
        )
    assert found.errors[k, a] == pytest.approx(np.mean(errors), rel=1e-8)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_both_ways_through_normal_equations_agree(small_problem, library, few, monkeypatch):
    pytest.importorskip(library)
    monkeypatch.setattr(fit, "_few_rows", lambda _: few)
    work = ENGINES["fit"][library].make(small_problem)
    expected = fit.reference_answer(small_problem)
    assert fit.compare(small_problem, work.run(), expected) < 1e-4


def test_expected_noise_is_the_mean_over_noise(small_problem):
    p, rng = small_problem, np.random.default_rng(6)
    weights = rng.standard_normal(40) * 0.1
    draws = [np.mean((p.y - (p.x + rng.standard_normal(p.x.shape)) @ weights) ** 2) for _ in range(100)]
    closed = np.mean((p.y - p.x @ weights) ** 2) + weights @ weights
    assert np.mean(draws) == pytest.approx(closed, rel=0.01)


def test_cold_means_not_in_memory(folder):
    path = folder / "spectra.h5"
    path.read_bytes()
    try:
        assert score._share_in_memory(path) > 0.9
        score.drop_cache(path)
    except BackendError as error:
        pytest.skip(str(error))
    assert score._share_in_memory(path) <= 0.01


def test_peak_memory_sees_what_was_used_and_forgets():
    forget_peak()
    before = peak_memory()
    block = np.ones(8_000_000)
    assert peak_memory() >= before + 0.9 * block.nbytes
    size = block.nbytes
    del block
    forget_peak()
    assert peak_memory() < before + 0.5 * size
    assert peak_memory() >= memory_in_use() > 0


def test_growth_exponent_is_the_slope():
    sizes = [100, 1000, 10000]
    assert running.growth_exponent(sizes, [3e-3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert running.growth_exponent([100], [1.0]) is None


def test_what_does_not_fit_is_extrapolated_and_says_so():
    def one(size):
        if size == 4000:
            return {"n": size, "unavailable": "stopped after 9 s"}
        return {"n": size, "seconds": [size * 1e-3], "working_bytes": 5 << 20}

    curve = running._grow([1000, 2000, 4000, 8000, 50_000], one(1000), 20.0, {8000: "no room"}, one)
    assert [row["n"] for row in curve["rows"]] == [1000, 2000]
    assert curve["not_measured"]["4000"] == "stopped after 9 s"
    assert curve["not_measured"]["8000"] == "no room"
    # No process is started for what would take more than half of the limit.
    assert "is expected" in curve["not_measured"]["50000"]
    assert curve["time_exponent"] == pytest.approx(1)
    assert curve["memory_exponent"] == pytest.approx(0)
    assert [point["n"] for point in curve["extrapolated"]] == [4000, 8000, 50_000]
    assert [point["seconds"] for point in curve["extrapolated"]] == pytest.approx([4, 8, 50])


def test_a_size_that_was_measured_is_not_expected_to_be_too_slow():
    def one(size):
        return {"n": size, "seconds": [size * 1e-3], "working_bytes": 0}

    curve = running._grow([1000, 5000], one(5000), 3.0, {}, one)
    assert [row["n"] for row in curve["rows"]] == [1000, 5000]
    assert curve["not_measured"] == {}


def test_nothing_is_extrapolated_to_be_faster_than_linear():
    def one(size):
        return {"n": size, "seconds": [1 + size * 1e-6], "working_bytes": 0}

    curve = running._grow([1000, 2000, 4000], one(1000), 20.0, {4000: "no room"}, one)
    assert curve["time_exponent"] < 0.01
    assert curve["extrapolated"][0]["seconds"] == pytest.approx(2 * 1.002)


def test_floors_per_spectrum():
    assert per_spectrum("memory read", 4096) == 2 * 4 * 4096
    assert per_spectrum("ssyrk", 4096) == 4096 * 4097


def test_a_model_of_another_wave_grid_is_refused(tmp_path):
    other = SimpleNamespace(mixture=SimpleNamespace(wave=np.linspace(7100, 8850, 640), n_pixels=640))
    with pytest.raises(WaveGridError, match=r"has 640 pixels, .* name a model for that grid"):
        running.prepare(tmp_path, 300, ["score"], other, lambda _: None)


def test_unknown_engines_and_tiny_sizes_are_refused():
    with pytest.raises(InputError, match="abacus is unknown to score; choose of "):
        choose(["score"], ["abacus"])
    with pytest.raises(InputError, match="200 at least"):
        running.benchmark(n=10)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_path):
    """The command, with processes of their own, at a small size."""
    folder = tmp_path_factory.mktemp("command")
    names = "read-file,predict,numpy,moefast-cuda"
    command = [
        "bench",
        "-m",
        model_path,
        "-n",
        "300",
        "--samples",
        "2",
        "--engines",
        names,
        "--growth",
        "300,600,1000000000",
        "-q",
    ]
    out, png = folder / "result.json", folder / "bench.png"
    done = CliRunner().invoke(
        cli, [*command, "-o", str(out), "--picture", str(png), "--scratch", str(folder)]
    )
    return done, out, png, command


def test_the_command_reports_throughput_and_r2(finished):
    done, out, png, _ = finished
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert result["schema"] == running.SCHEMA
    assert result["environment"]["blas"]
    assert set(result["floors"]) == set(FLOORS)
    rows = {row["engine"]: row for row in result["results"]}
    assert set(rows) == {"read-file", "predict", "numpy", "moefast-cuda"}
    scores = [rows[name]["r2"] for name in ("predict", "numpy")]
    assert max(scores) - min(scores) < 1e-5
    assert min(scores) > 0.6
    for name in ("predict", "numpy"):
        assert len(rows[name]["seconds"]) == 2
        assert rows[name]["spectra_per_second"] == pytest.approx(300 / min(rows[name]["seconds"]))
        assert 0 < rows[name]["fraction_of_floor"] < 2
        line = next(line for line in done.output.splitlines() if line.startswith(rows[name]["title"] + " "))
        assert f"{rows[name]['r2']:.3f}" in line
    assert rows["predict"]["floor"] == "read-file"
    curve = result["growth"]["score numpy"]
    assert [row["n"] for row in curve["rows"]] == [300, 600]
    assert "GiB" in curve["not_measured"]["1000000000"]
    assert curve["extrapolated"][0]["n"] == 1_000_000_000
    assert png.read_bytes().startswith(b"\x89PNG")
    assert not [path for path in out.parent.iterdir() if path.name.startswith("moefast-bench-")]


def test_engines_that_cannot_run_are_listed_with_the_reason(finished):
    done, out, _, _ = finished
    row = next(row for row in json.loads(out.read_text())["results"] if row["engine"] == "moefast-cuda")
    if "seconds" in row:
        pytest.skip("this machine has a GPU")
    assert f"not measured: {row['unavailable']}" in done.output
    listed = CliRunner().invoke(cli, ["bench", "--list", "--task", "all"])
    assert listed.exit_code == 0
    assert len(listed.output.splitlines()) == sum(len(task) for task in ENGINES.values())
    assert row["unavailable"] in listed.output


def test_an_existing_result_is_not_replaced_unasked(finished):
    _, out, _, command = finished
    again = CliRunner().invoke(cli, [*command, "-o", str(out)])
    assert again.exit_code == 8
    assert "--overwrite" in again.output


def test_a_wrong_answer_ends_the_command_with_its_exit_code(monkeypatch, tmp_path, model_path):
    wrong = replace(ENGINES["score"]["numpy"], make=_shifted(np.float32(0.5)))
    monkeypatch.setitem(ENGINES["score"], "numpy", wrong)
    inside = replace_measure(monkeypatch)
    out = tmp_path / "result.json"
    command = ["bench", "-m", model_path, "-n", "200", "--samples", "1", "--engines", "numpy", "-q"]
    done = CliRunner().invoke(cli, [*command, "-o", str(out)])
    assert inside, "the engine was not measured in this process"
    assert done.exit_code == 9
    assert "WRONG ANSWER" in done.output
    # What was found is kept.
    assert "differs by 5.0e-01" in json.loads(out.read_text())["results"][0]["wrong"]


def replace_measure(monkeypatch):
    """Measure in this process, so that a registry changed by a test is the one that counts."""
    called = []

    def child(spec, environment, limit):
        if spec.task == "floors":
            return {"memory read": {"unit": "B/s", "rate": 1e9, "samples": [1e9]}}
        called.append(spec.engine)
        return measuring.measure(spec)

    monkeypatch.setattr(running, "_child", child)
    return called


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--engines", "abacus"], 3),
        (["-n", "5"], 3),
        (["--growth", "ten"], 2),
        (["--growth", "0"], 2),
        (["-m", "no/such/model"], 6),
    ],
)
def test_mistakes_have_their_exit_codes(arguments, code):
    done = CliRunner().invoke(cli, ["bench", "-q", *arguments])
    assert done.exit_code == code, done.output


def test_a_process_that_fails_is_a_reason_not_an_end(folder):
    engine = ENGINES["score"]["numpy"]
    row = running.in_own_process(engine, replace(spec(engine, folder), n=10**6), 600.0)
    assert row["unavailable"].startswith("failed: ")


def test_a_process_that_takes_too_long_is_stopped(folder):
    engine = ENGINES["score"]["numpy"]
    row = running.in_own_process(engine, spec(engine, folder), 0.01)
    assert row["unavailable"] == "stopped after 0 s at n = 400"


def test_the_picture_holds_both_tasks():
    from matplotlib.image import imread

    def row(task, engine, r2, seconds):
        row = {"task": task, "engine": engine, "title": engine, "n": 300, "seconds": seconds, "r2": r2}
        return running.finish(row | {"peak_bytes": 1 << 30, "working_bytes": 1 << 20})

    rows = [
        row("score", "moefast", 0.7, [0.1, 0.2]),
        row("score", "read-file", None, [0.01]),
        row("fit", "torch", 0.6, [9.0]),
    ]
    environment = {
        "moefast": "0",
        "cpu": "c",
        "cores": 2,
        "cuda_devices": ["g"],
        "date": "d",
        "load_before": 2.0,
    }
    result = {
        "environment": environment, "results": rows, "growth": {}, "floors": {}, "model_sha256": "ab", "n": 300,
    }  # fmt: skip
    plain = imread(io.BytesIO(report.picture(result)))
    curve = {
        "rows": [rows[0]], "extrapolated": [{"n": 10**6, "seconds": 9.0}], "time_exponent": 1.0,
        "memory_exponent": None, "not_measured": {"1000000": "too large"},
    }  # fmt: skip
    grown = imread(io.BytesIO(report.picture(result | {"growth": {"score moefast": curve}})))
    assert grown.shape[1] > 1.5 * plain.shape[1]
    text = report.format_text(result | {"growth": {"score moefast": curve}})
    assert "1,000,000: ~9" in text
    assert "1,000,000 not measured: too large" in text
    assert "not idle" in text
