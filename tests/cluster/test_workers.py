"""Shards on the workers of a Dask cluster: the bits of one machine, whatever happens to a worker."""

import gc
import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from moefast.cli import cli
from moefast.cluster import predict_on_workers, workers
from moefast.core.errors import BackendError, InputError, LabelError, ModelError, OutputError
from moefast.predicting.files import predict
from moefast.spectra.tables import read_table

distributed = pytest.importorskip("distributed")
# Sockets and loops of Dask's that are closed late are not ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed"),
]


@pytest.fixture(scope="module")
def client():
    with workers.connect("local:2") as found:
        yield found
    # What is closed late is collected here, where warnings of it are not heeded, not during a test of another file.
    gc.collect()


@pytest.fixture(scope="module")
def source(stars, tmp_path_factory):
    return stars.take(slice(0, 400)).write(tmp_path_factory.mktemp("dask") / "x.h5")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return model.save(tmp_path_factory.mktemp("dask") / "model").path


@pytest.fixture(scope="module")
def reference(source, model):
    return predict(source, model)


def same(path, reference):
    columns = read_table(path)[0]
    assert list(columns) == list(reference.columns)
    for name, values in reference.columns.items():
        np.testing.assert_array_equal(columns[name], values, err_msg=name)


def test_the_table_is_that_of_one_machine(client, source, saved, reference, tmp_path):
    out, seen = tmp_path / "t.fits", []
    merged = predict_on_workers.predict_on(
        client, [source], saved, out, options={}, rows_per_task=37, progress=lambda *step: seen.append(step)
    )
    same(out, reference)
    assert (merged.n_rows, merged.n_parts) == (400, 11)
    assert merged.r2 == pytest.approx(reference.r2, abs=1e-12)
    assert seen[-1] == (400, 400)
    assert [path.name for path in tmp_path.iterdir()] == ["t.fits"]
    with pytest.raises(OutputError, match="exists already"):
        predict_on_workers.predict_on(client, [source], saved, out, options={})


def test_a_worker_that_is_killed_loses_nothing(client, source, saved, reference, tmp_path):
    pids = list(client.run(os.getpid).values())
    killed = []

    def progress(done, total):
        if done > total // 4 and not killed:
            killed.append(done)
            os.kill(pids[0], signal.SIGKILL)

    for round_ in range(3):
        out = tmp_path / f"{round_}.h5"
        predict_on_workers.predict_on(
            client, [source], saved, out, options={}, rows_per_task=10, progress=progress
        )
        same(out, reference)
    assert killed[0] < len(reference.columns["log_g"])
    # The scheduler may count the lost one for a while, and another takes its place.
    deadline = time.monotonic() + 300
    while len(there := client.run(os.getpid, on_error="ignore")) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(there) == 2
    assert pids[0] not in there.values()


def test_shards_that_are_there_are_not_made_again(client, source, saved, reference, tmp_path, monkeypatch):
    out = tmp_path / "t.h5"

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict_on_workers, "merge_tables", stopped)
        with pytest.raises(KeyboardInterrupt):
            predict_on_workers.predict_on(client, [source], saved, out, options={}, rows_per_task=100)
    (folder,) = tmp_path.iterdir()
    tables = sorted(folder.glob("*.parquet"))
    assert len(tables) == 4
    times = [table.stat().st_mtime_ns for table in tables]
    # One that was cut off is made again.
    tables[2].write_bytes(tables[2].read_bytes()[:1000])
    made = []
    with monkeypatch.context() as patch:
        merge = predict_on_workers.merge_tables
        patch.setattr(
            predict_on_workers,
            "merge_tables",
            lambda parts, *a, **k: made.extend(p.stat().st_mtime_ns for p in parts) or merge(parts, *a, **k),
        )
        predict_on_workers.predict_on(client, [source], saved, out, options={}, rows_per_task=100)
    assert [a == b for a, b in zip(times, made, strict=True)] == [True, True, False, True]
    same(out, reference)
    assert not folder.exists()


def test_the_key_of_a_task_tells_what_it_does(client):
    task = workers.submit(client, len, "four")
    assert task.result() == 4
    assert workers.work_of(task.key) == "len"


def test_what_a_worker_lacks_is_told_with_its_name(client, source, saved, tmp_path, monkeypatch):
    address = workers.addresses_of(client)[0]

    def told(**facts):
        full = {"version": workers.__version__, "missing": [], "model": "0" * 64} | facts
        monkeypatch.setattr(client, "run", lambda *_, **__: {address: full})
        predict_on_workers.predict_on(client, [source], saved, tmp_path / "t.h5", options={})

    with pytest.raises(InputError, match=rf"worker {address} does not see {source}"):
        told(missing=[str(source)])
    with pytest.raises(BackendError, match=r"has moefast 0\.0\.1"):
        told(version="0.0.1")
    with pytest.raises(ModelError, match="has another model under this name"):
        told()
    with pytest.raises(ModelError, match="no manifest"):
        told(error="no manifest.json here")
    monkeypatch.setattr(client, "run", lambda *_, **__: {})
    with pytest.raises(BackendError, match="no workers"):
        predict_on_workers.predict_on(client, [source], saved, tmp_path / "t.h5", options={})
    assert not (tmp_path / "t.h5").exists()


def test_errors_of_a_task_are_ours(client, source, saved, tmp_path):
    with pytest.raises(InputError, match="--select"):
        predict_on_workers.predict_on(
            client, [source], saved, tmp_path / "t.h5", options={"select": "nothing == 1"}
        )
    with pytest.raises((InputError, LabelError), match="no such file"):
        predict_on_workers.predict_on(client, [tmp_path / "absent.h5"], saved, tmp_path / "t.h5", options={})


def test_names_of_schedulers():
    assert workers.workers_of("tcp://10.0.0.1:8786") is None
    assert workers.workers_of("local:3") == 3
    assert workers.workers_of("local") == workers.CORES
    for wrong in ("local:0", "local:x", "local:-1"):
        with pytest.raises(InputError, match="expected local:N"):
            workers.workers_of(wrong)


def test_workers_of_this_machine_share_out_its_gpus():
    assert workers.devices_of({"CUDA_VISIBLE_DEVICES": "2,5"}) == ["2", "5"]
    assert workers.devices_of({"CUDA_VISIBLE_DEVICES": ""}) == []
    plugin = workers._device_plugin(["2", "5"])
    with pytest.MonkeyPatch.context() as patch:
        for name, device in (("0", "2"), (1, "5"), (2, "2")):
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            plugin.setup(SimpleNamespace(name=name))
            assert os.environ["CUDA_VISIBLE_DEVICES"] == device


def test_options_that_a_cluster_does_not_take():
    result = CliRunner().invoke(cli, ["predict", "x.h5", "--scheduler", "local:2", "--shard", "0/2"])
    assert result.exit_code == 2
    assert "leave out --rows" in result.output


def test_a_worker_without_memory_ends_and_leaves_its_task_to_another(tmp_path, monkeypatch):
    # A function of its own travels whole: workers need not find the folder of tests.
    def run_out(marks):
        if os.path.exists(marks):
            return 7
        with open(marks, "x"):
            raise MemoryError("not 9 bytes")

    # Without workers for so long, the job is given up with an error.
    monkeypatch.setattr(workers, "PATIENCE", 300)
    with workers.connect("local:2") as client:
        pids = set(client.run(os.getpid).values())
        assert len(pids) == 2
        task = workers.submit(client, run_out, str(tmp_path / "tried"))
        assert list(workers.results_in_order(client, [task])) == [7]
        client.wait_for_workers(2, timeout=300)
        assert len(pids & set(client.run(os.getpid, on_error="ignore").values())) == 1


class Task:
    """One whose result is an error of Dask's."""

    def __init__(self, error):
        self.error = error

    def result(self):
        raise self.error


def test_what_a_cluster_cannot_do_is_told_in_one_line():
    last = SimpleNamespace(address="tcp://10.0.0.7:8")
    for error, words in (
        (distributed.KilledWorker("predict-1", last, 10), r"11 workers ended .* tcp://10\.0\.0\.7:8: .*each .* more"),
        (MemoryError("worker tcp://10.0.0.7:8 is out of memory"), "tcp://10.0.0.7:8 is out of memory: .*start fewer"),
        (distributed.CancelledError("scheduler-connection-lost"), "scheduler was lost.*repeat the command"),
    ):  # fmt: skip
        with pytest.raises(BackendError, match=words) as told:
            workers._result(Task(error))
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("workers_left", [{}, {"tcp://10.0.0.7:8": {}}, None])
def test_a_job_without_workers_is_given_up(monkeypatch, workers_left):
    """And none whose scheduler does not answer for a while: that is not the same."""
    monkeypatch.setattr(workers, "PATIENCE", 0.05)
    cancelled = threading.Event()

    def answer(*_, **__):
        if workers_left is None:
            raise TimeoutError
        return {"workers": workers_left}

    client = SimpleNamespace(
        sync=answer, scheduler=SimpleNamespace(identity=None), cancel=lambda tasks: cancelled.set()
    )
    if workers_left is None or workers_left:
        with workers._watched(client, []):
            assert not cancelled.wait(0.3)
        return

    def wait():
        with workers._watched(client, []):
            assert cancelled.wait(300)
            workers._result(Task(distributed.CancelledError("x")))

    with pytest.raises(BackendError, match=r"no workers for 0\.05 s"):
        wait()


def test_workers_that_are_lost_while_they_are_asked_are_not_counted(
    client, source, saved, reference, tmp_path, monkeypatch
):
    ask, asked = client.run, []

    def lose_one(*arguments, **options):
        found = ask(*arguments, **options)
        asked.append(len(found))
        lost = list(found) if len(asked) == 1 else list(found)[:1]
        return {**found, **dict.fromkeys(lost, distributed.comm.core.CommClosedError("closed"))}

    monkeypatch.setattr(client, "run", lose_one)
    predict_on_workers.predict_on(client, [source], saved, tmp_path / "t.h5", options={}, rows_per_task=200)
    same(tmp_path / "t.h5", reference)
    assert len(asked) == 2
