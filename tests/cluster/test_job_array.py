"""A job array without SLURM: what its tasks are told, and that its judge can say no."""

import os

import pytest

from moefast.benchmarks import cluster, cluster_faults
from moefast.benchmarks.faults import job_array
from moefast.cluster.shards import shard_of_task
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
        {"fault": "worker, fit", "at_work": True, "problem": ""},
        {"fault": "worker, fit", "at_work": False, "problem": ""},
        {"fault": "shard, predict", "at_work": True, "problem": "other bits"},
    ]
    lines = [line.split() for line in cluster_faults.table_of(cases).splitlines()]
    assert lines[1:] == [["worker,", "fit", "2", "1", "2"], ["shard,", "predict", "1", "1", "0"]]
