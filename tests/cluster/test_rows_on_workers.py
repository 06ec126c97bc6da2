"""Evaluations, ceilings and simulations on a Dask cluster: what one process finds, whoever computes it."""

import functools
import gc

import numpy as np
import pytest
from click.testing import CliRunner

from moefast.ceilings import ceiling, star_bounds
from moefast.cli import cli
from moefast.cluster import rows_on_workers, workers
from moefast.cluster.rows_on_workers import ceilings_on, scores_on, simulate_on
from moefast.core.errors import InputError, OutputError
from moefast.model import Model
from moefast.protocol import scorer
from moefast.protocol.evaluate import evaluate
from moefast.simulate import Settings, simulate_file
from moefast.spectra.spectrum_set import open_spectra

distributed = pytest.importorskip("distributed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed"),
]


@pytest.fixture(scope="module")
def client():
    """Two workers in this process."""
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as found,
    ):
        yield found
    # What is closed late is collected here, where warnings of it are not heeded, not during a test of another file.
    gc.collect()


def same(one, two):
    assert list(one) == list(two)
    for name, values in one.items():
        np.testing.assert_array_equal(values, two[name], err_msg=name)


def without_seconds(summary):
    return {
        name: {key: value for key, value in part.items() if key != "seconds"} if isinstance(part, dict) else part
        for name, part in summary.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def stars_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("stars") / "x.h5"
    simulate_file(path, 100, seed=5)
    return path


def test_an_evaluation_is_that_of_one_process(client, stars_file, monkeypatch):
    monkeypatch.setattr(scorer, "BLOCK_ROWS", 16)
    whole, seen = evaluate(stars_file, "z0", progress=False), []
    spread = functools.partial(scores_on, client)
    found = evaluate(stars_file, "z0", spread=spread, progress=lambda *step: seen.append(step))
    same(found.stars, whole.stars)
    assert found.report == whole.report
    rows = [step for stage, *step in seen if stage == "evaluate"]
    assert rows[-1] == [len(whole.log_g), len(whole.log_g)]
    assert len(rows) > 2


def test_ceilings_are_those_of_one_process(client, tmp_path, monkeypatch):
    path = tmp_path / "x.h5"
    simulate_file(path, 40, seed=5)
    monkeypatch.setattr(star_bounds, "BLOCK_ROWS", 16)
    monkeypatch.setattr(rows_on_workers, "CEILING_ROWS", 16)
    whole = ceiling.compute(path, method="fisher")
    found = ceiling.compute(path, method="fisher", spread=functools.partial(ceilings_on, client))
    same(found.stars, whole.stars)
    assert without_seconds(found.summary) == without_seconds(whole.summary)


def test_a_simulation_has_the_rows_of_one_file(client, tmp_path):
    whole, folder = tmp_path / "whole.h5", tmp_path / "parts"
    settings = Settings(noise_level=2.0)
    simulate_file(whole, 50, seed=7, settings=settings, first_row=10)
    seen = []
    paths = simulate_on(
        client, folder, (10, 60), seed=7, settings=settings, rows_per_file=20,
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    assert [path.name for path in paths] == ["rows-10-26.h5", "rows-26-43.h5", "rows-43-60.h5"]
    assert seen[-1] == (50, 50)
    (one,), several = open_spectra(whole).blocks(100), list(open_spectra(folder).blocks(100))
    for name in ("flux", "error"):
        parts = np.concatenate([getattr(block, name) for block in several])
        np.testing.assert_array_equal(parts, getattr(one, name), err_msg=name)
    times = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    again = simulate_on(client, folder, (10, 60), seed=7, settings=settings, rows_per_file=20)
    kept = [path.stat().st_mtime_ns == time for path, time in zip(again, times, strict=True)]
    assert kept == [True, False, True]
    with pytest.raises(OutputError, match="exists already"):
        simulate_on(client, folder, (10, 60), seed=8, settings=settings, rows_per_file=20)


def test_what_workers_cannot_do_is_said(client, stars_file, monkeypatch):
    with pytest.raises(InputError, match="give the folder"):
        evaluate(stars_file, Model.load("z0"), spread=functools.partial(scores_on, client))
    address = workers.addresses_of(client)[0]
    facts = {"version": rows_on_workers.__version__, "missing": [str(stars_file)]}
    monkeypatch.setattr(client, "run", lambda *_, **__: {address: facts})
    with pytest.raises(InputError, match=rf"worker {address} does not see {stars_file}"):
        evaluate(stars_file, spread=functools.partial(scores_on, client))


def test_parts_of_a_fixed_size_are_one_file():
    done = CliRunner().invoke(
        cli, ["simulate", "out", "--set", "z0", "--part", "test_10k", "--scheduler", "local:2"]
    )
    assert done.exit_code == 2
    assert "is one file" in done.output
