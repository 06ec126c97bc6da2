"""A job array without SLURM, and strikes on processes: what they are told, and that their judges can say no."""

import functools
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from moefast.benchmarks import cluster, cluster_faults, strikes
from moefast.benchmarks.faults import job_array
from moefast.cluster.job_array import shard_of_task
from moefast.core.errors import BenchmarkError
from moefast.experts import normal_equations
from moefast.fitting import error_model, gate, linear_experts, sample, statistics

pytestmark = pytest.mark.skipif(
    not hasattr(os, "pidfd_open"), reason="processes are forked and watched as Linux does"
)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """What the benchmark makes small in its own process, put back afterwards."""
    for room, names in (
        (normal_equations, ("BUFFER_ROWS",)), (statistics, ("UNIT_ROWS",)), (sample, ("NOISY_ROWS",)),
        (linear_experts, ("RANK_STEP", "ALPHAS")), (gate, ("fit_gate",)), (error_model, ("fit_error_model",)),
    ):  # fmt: skip
        for name in names:
            monkeypatch.setattr(room, name, getattr(room, name))


def test_tasks_are_the_parts_of_an_array():
    for count in (1, 2, 16):
        told = [shard_of_task(job_array.variables(index, count)) for index in range(count)]
        assert told == [(index, count) for index in range(count)]


def test_an_array_gives_the_bits_of_one_process(tmp_path):
    found = job_array.run_array(tmp_path, 2, 1, n_kills=1)
    for one in found.values():
        assert one["same_bits"]
        assert one["left_behind"] == []
        assert one["processes"] == one["tasks"] + one["killed"]
    # The judge can say no.
    whole, half = tmp_path / "whole.parquet", tmp_path / "parts-predict" / "part-0.parquet"
    assert cluster.same_table(whole, whole)
    assert not cluster.same_table(whole, half)


def test_a_command_that_fails_is_told(tmp_path):
    with pytest.raises(BenchmarkError, match=r"moefast predict .*absent\.h5.* exit code 3: .*absent\.h5"):
        job_array.moefast(
            tmp_path / "log", *job_array.PREDICT, tmp_path / "absent.h5", "-o", tmp_path / "t.h5"
        )


def test_the_table_of_faults_counts():
    cases = [
        {"fault": "worker, fit", "at_work": True, "where": "join", "problem": ""},
        {"fault": "worker, fit", "at_work": True, "where": "gather_part", "problem": ""},
        {"fault": "worker, fit", "at_work": False, "where": "", "problem": ""},
        {"fault": "shard, predict", "at_work": True, "where": "a part", "problem": "other bits"},
    ]
    lines = [line.split(maxsplit=4) for line in cluster_faults.table_of(cases).splitlines()]
    assert lines[1:] == [
        ["worker,", "fit", "2", "3", "gather_part 1, join 1"],
        ["shard,", "predict", "1", "0", "a part 1"],
    ]


def test_spectra_may_have_several_names(tmp_path, monkeypatch):
    made = []

    def simulate(path, *_, rows):
        made.append(rows)
        path.write_text(f"{rows}")

    monkeypatch.setattr(cluster, "simulate_set", simulate)
    monkeypatch.setattr(cluster, "FILE_ROWS", 4)
    for _ in range(2):
        files = cluster.spectra_of(tmp_path, "z0", 18, 3)
        assert [path.read_text() for path in files] == ["(0, 4)", "(4, 6)"] * 3
    assert made == [(0, 4), (4, 6)]
    assert len({path.stat().st_ino for path in files}) == 2
    with pytest.raises(BenchmarkError, match="17 spectra in 3 copies"):
        cluster.spectra_of(tmp_path, "z0", 17, 3)


def spend(seconds):
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        pass


def two_stages(say, seconds):
    for stage in ("one", "two"):
        say(stage)
        spend(seconds)


def write_and_rename(say, folder, count):
    for index in range(count):
        say(f"file {index}")
        partial = folder / f"{index}.partial"
        partial.write_text("x")
        partial.rename(folder / f"{index}")
        # Elsewhere: does not count.
        Path(os.devnull).write_text("x")


def fail(say):
    say("the worst")
    os._exit(3)


def test_a_process_is_struck_at_a_share_of_its_work(tmp_path):
    context = multiprocessing.get_context("fork")
    run = functools.partial(strikes.run_struck, context)
    usual = run(two_stages, 0.3, folder=tmp_path).took
    # The system tells user and system time in whole ticks.
    assert usual.seconds > 0.6 - 2 / os.sysconf("SC_CLK_TCK")
    assert usual.operations == 0
    for share, stage in ((0.2, "one"), (0.8, "two")):
        strike = strikes.Strike("computing", share)
        # Whoever strikes needs a core in time, which a busy machine may not give: a miss is told as one, and repeated.
        outcomes = (run(two_stages, 0.3, folder=tmp_path, strike=strike, usual=usual) for _ in range(5))
        assert (True, stage, None) in outcomes
    # Half as much work as is expected: a miss, and told as one.
    missed = run(two_stages, 0.1, folder=tmp_path, strike=strikes.Strike("computing", 0.9), usual=usual)
    assert not missed.killed
    assert missed.took.seconds < usual.seconds

    usual = run(write_and_rename, tmp_path, 4, folder=tmp_path).took
    assert usual.operations == 8
    for index, (share, names) in enumerate(
        ((0.0, []), (0.4, ["0", "1.partial"]), (0.99, ["0", "1", "2", "3.partial"]))
    ):
        folder = tmp_path / f"case-{index}"
        folder.mkdir()
        strike = strikes.Strike("writing", share)
        struck = run(write_and_rename, folder, 4, folder=folder, strike=strike, usual=usual)
        assert struck.killed
        assert sorted(path.name for path in folder.iterdir()) == names
    with pytest.raises(BenchmarkError, match="fail ended with exit code 3 after the worst"):
        run(fail, folder=tmp_path)
