"""Parts of a job that a batch system numbers."""

import pytest
from click.testing import CliRunner

from moefast.cli import cli
from moefast.cluster.job_array import shard_of_task
from moefast.core.errors import InputError


def task(number, least, largest, count):
    names = ("ID", "MIN", "MAX", "COUNT")
    return {
        f"SLURM_ARRAY_TASK_{name}": str(v)
        for name, v in zip(names, (number, least, largest, count), strict=True)
    }


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (task(0, 0, 15, 16), (0, 16)),
        (task(16, 1, 16, 16), (15, 16)),
        (task(4, 0, 30, 16), (2, 16)),
        (task(7, 7, 7, 1), (0, 1)),
    ],
)
def test_arrays_may_begin_anywhere_and_step(environment, expected):
    assert shard_of_task(environment) == expected


@pytest.mark.parametrize("count_and_step", [(1, 1), (5, 1), (16, 3)])
def test_the_tasks_of_an_array_are_all_parts_once(count_and_step):
    count, step = count_and_step
    numbers = range(11, 11 + count * step, step)
    parts = [shard_of_task(task(number, numbers[0], numbers[-1], count)) for number in numbers]
    assert parts == [(i, count) for i in range(count)]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "SLURM_ARRAY_TASK_ID is not set"),
        ({"SLURM_ARRAY_TASK_ID": "3"}, "not understood"),
        (task("x", 0, 3, 4), "not understood"),
        (task(5, 1, 8, 3), "not evenly spaced"),
        (task(9, 0, 3, 4), "not evenly spaced"),
    ],
)
def test_what_tells_no_part_is_refused(environment, words):
    with pytest.raises(InputError, match=words):
        shard_of_task(environment)


def test_shard_without_a_value_is_for_tasks_of_an_array():
    result = CliRunner().invoke(
        cli, ["predict", "x.h5", "--shard"], env=task(2, 0, 3, 4) | {"SLURM_ARRAY_TASK_ID": None}
    )
    assert result.exit_code == 3
    assert "--shard i/N" in result.output
    result = CliRunner().invoke(cli, ["predict", "--shard", "x.h5"])
    assert result.exit_code == 2
    assert "comes last" in result.output
