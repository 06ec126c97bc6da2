"""Fits on the workers of a Dask cluster: the model of one process, bit for bit, whoever is killed."""

import functools
import gc
import os
import signal
import sys
import threading

import cloudpickle
import numpy as np
import pytest

from moefast.cluster import fit_on_workers, workers
from moefast.cluster.fit_on_workers import fit_on
from moefast.cluster.fit_parts import FitPlan, TrainingSpectra
from moefast.core.errors import InputError
from moefast.experts import normal_equations
from moefast.fitting import error_model, gate, linear_experts, sample, statistics, training_set
from moefast.recipes import fit
from moefast.simulate import SimulatedSpectra

distributed = pytest.importorskip("distributed")
# Sockets and loops of Dask's that are closed late are not ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed"),
]
ROWS = 960


def make_small():
    """Units of a few rows, small samples and few choices, in this process."""
    normal_equations.BUFFER_ROWS, statistics.UNIT_ROWS = 32, 64
    linear_experts.RANK_STEP, linear_experts.ALPHAS = 200, (0.0, 0.1)
    sample.NOISY_ROWS = 2000


class Small(distributed.WorkerPlugin):
    """The same in the workers, also in those that take the place of lost ones."""

    def setup(self, worker):
        make_small()


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        for room, name in ((gate, "fit_gate"), (error_model, "fit_error_model")):
            patch.setattr(room, name, functools.partial(getattr(room, name), steps=60))
        for room, names in (
            (normal_equations, ("BUFFER_ROWS",)), (statistics, ("UNIT_ROWS",)),
            (linear_experts, ("RANK_STEP", "ALPHAS")), (sample, ("NOISY_ROWS",)),
        ):  # fmt: skip
            for name in names:
                patch.setattr(room, name, getattr(room, name))
        make_small()
        yield


@pytest.fixture(scope="module")
def client():
    # Workers have no folder of tests.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with workers.connect("local:2") as found:
        found.register_plugin(Small())
        yield found
    # What is closed late is collected here, where warnings of it are not heeded, not during a test of another file.
    gc.collect()


@pytest.fixture(scope="module")
def source(make_toy, tmp_path_factory):
    return make_toy(ROWS, 8).write(tmp_path_factory.mktemp("toy") / "train.h5")


@pytest.fixture(scope="module")
def plan(source):
    return FitPlan(TrainingSpectra.of_files([source]), {"recipe": "phys-moe"})


@pytest.fixture(scope="module")
def whole(source):
    return fit(source, recipe="phys-moe")


def assert_same(one, two):
    assert one.manifest["fit"] == two.manifest["fit"]
    for name in ("reference", "noise_shape", "expert_weights", "expert_intercepts", "basis", "knots"):
        np.testing.assert_array_equal(getattr(one.mixture, name), getattr(two.mixture, name), err_msg=name)
    for name in ("gate", "error_model"):
        for a, b in zip(getattr(one.mixture, name), getattr(two.mixture, name), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
    for name, form in one.references.items():
        np.testing.assert_array_equal(form.weights, two.references[name].weights, err_msg=name)


def test_the_model_is_that_of_one_process(client, plan, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_on_workers, "FAN_IN", 3)
    seen = {}
    model = fit_on(
        client, plan, plan.prepare(), tmp_path / "model", n_parts=11,
        progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)),
    )  # fmt: skip
    assert_same(model, whole)
    assert seen["normal equations"][-1] == (ROWS, ROWS)
    assert seen["gate sample"][-1][0] == seen["gate sample"][-1][1]
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_is_killed_loses_nothing(client, plan, whole, tmp_path):
    killed = threading.Event()

    def progress(stage, done, _):
        if stage == "normal equations" and done > ROWS // 3 and not killed.is_set():
            killed.set()
            pid = next(iter(client.run(os.getpid, on_error="ignore").values()))
            os.kill(pid, signal.SIGKILL)

    threads = []

    def later(*step):
        # Called by a thread of the client's, which must not wait for itself.
        threads.append(threading.Thread(target=progress, args=step))
        threads[-1].start()

    assert_same(fit_on(client, plan, plan.prepare(), tmp_path / "m", n_parts=8, progress=later), whole)
    for thread in threads:
        thread.join()
    assert killed.is_set()


def test_a_client_that_is_stopped_goes_on(client, plan, whole, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit_on_workers, "complete", stopped)
        with pytest.raises(KeyboardInterrupt):
            fit_on(client, plan, plan.prepare(), tmp_path / "m", n_parts=4)
    (folder,) = tmp_path.iterdir()
    parts = sorted(folder.glob("*.npz"))
    assert len(parts) == 4
    times = {part: part.stat().st_mtime_ns for part in parts}
    content = bytearray(parts[1].read_bytes())
    # As a power failure may leave it: the file is there, and something in it is not.
    content[len(content) // 2] ^= 1
    parts[1].write_bytes(content)
    kept = {}
    with monkeypatch.context() as patch:
        complete = fit_on_workers.complete
        patch.setattr(
            fit_on_workers,
            "complete",
            lambda *a: kept.update({part: part.stat().st_mtime_ns for part in parts}) or complete(*a),
        )
        # The number of parts is that of the first attempt.
        assert_same(fit_on(client, plan, plan.prepare(), tmp_path / "m", n_parts=7), whole)
    assert [kept[part] == times[part] for part in parts] == [True, False, True, True]
    assert not folder.exists()


def test_parts_are_kept_until_the_model_is_saved(client, plan, whole, tmp_path):
    def stopped(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_on(client, plan, plan.prepare(), tmp_path / "m", n_parts=4, save=stopped)
    (folder,) = tmp_path.iterdir()
    times = {part: part.stat().st_mtime_ns for part in folder.glob("*.npz")}
    assert len(times) == 4

    def save(model):
        assert {part: part.stat().st_mtime_ns for part in folder.glob("*.npz")} == times
        return model.save(tmp_path / "m")

    assert_same(fit_on(client, plan, plan.prepare(), tmp_path / "m", save=save), whole)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_workers_have_equal_shares(monkeypatch):
    """Of 200,000 spectra one of two workers had 131,072; each part costs as much as half a unit."""
    monkeypatch.setattr(statistics, "UNIT_ROWS", 65_536)

    def shares(rows, n_workers):
        count = fit_on_workers.n_parts_of(rows, n_workers)
        return [b - a for a, b in (statistics.rows_of_part(rows, index, count) for index in range(count))]

    assert shares(200_000, 2) == [100_000, 100_000]
    assert shares(10**6, 2) == [250_000] * 4
    assert shares(1000, 4) == [1000]
    many = shares(10**9, 1000)
    assert (len(many), sum(many)) == (2000, 10**9)
    assert max(many) - min(many) <= 65_536


def test_what_a_worker_does_not_see_is_named(client, plan, tmp_path, monkeypatch):
    address = workers.addresses_of(client)[0]
    facts = {"version": workers.__version__, "missing": [plan.source.files[0]]}
    monkeypatch.setattr(client, "run", lambda *_, **__: {address: facts})
    with pytest.raises(InputError, match=rf"worker {address} does not see .*train\.h5"):
        fit_on(client, plan, plan.prepare(), tmp_path / "m")


def test_tasks_have_the_blocks_of_one_process(make_toy, tmp_path, monkeypatch):
    """Stretches of a second file were cut elsewhere: products of other shapes, other last bits, another gate."""
    for room in (fit_on_workers, training_set):
        monkeypatch.setattr(room, "BLOCK_ROWS", 64)
    files = [make_toy(n, n).write(tmp_path / f"{n}.h5") for n in (150, 70, 100)]
    plan = FitPlan(TrainingSpectra.of_files(files), {"recipe": "global-ridge", "references": False})
    prepared = plan.prepare()
    data = training_set.TrainingSet(prepared.spectra, prepared.options, lambda *_: None)
    data.find_reference()
    for stretch in ((0, 320), (10, 20), (140, 300), (63, 65), (150, 220), (219, 221)):
        here = [(rows.start, rows.stop) for rows, *_ in data.blocks("x", [stretch])]
        pieces = fit_on_workers.blocks_of(prepared.spectra, *stretch)
        assert pieces == here
        # And a worker that is given a piece reads it as one block.
        assert [(rows.start, rows.stop) for rows, *_ in data.blocks("x", pieces)] == here
    simulated = SimulatedSpectra.of_set("z0", rows=(0, 200))
    assert fit_on_workers.blocks_of(simulated, 50, 200) == [(50, 64), (64, 128), (128, 192), (192, 200)]
