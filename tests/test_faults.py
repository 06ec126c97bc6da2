"""A few cases of every campaign of benchmarks/faults: all survive."""

import signal

import pytest

from moefast.benchmarks.faults.__main__ import format_table
from moefast.benchmarks.faults.campaigns import CAMPAIGNS, prepare
from moefast.benchmarks.faults.case import OUTCOMES, Case, Ended, judge


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_a_few_of_each_survive(name, ground):
    cases = list(CAMPAIGNS[name](ground, 6, 1))
    assert len(cases) == 6
    assert [(c.name, c.said) for c in cases if c.outcome not in OUTCOMES[:2]] == []


@pytest.mark.parametrize(
    ("ended", "there", "right", "outcome"),
    [
        (Ended(0, ""), True, True, "right"),
        (Ended(0, ""), True, False, "wrong"),
        (Ended(0, ""), False, False, "wrong"),
        (Ended(3, "moefast: error: no"), False, False, "refused"),
        (Ended(8, "moefast: error: no"), True, False, "wrong"),
        (Ended(1, "Traceback (most recent call last):"), False, False, "traceback"),
        (Ended(0, "Exception ignored in: <x>"), True, True, "traceback"),
        (Ended(-signal.SIGSEGV, ""), False, False, "crash"),
        (Ended(-signal.SIGKILL, ""), False, False, "refused"),
        (Ended(None, ""), False, False, "hang"),
    ],
)
def test_the_judge(ended, there, right, outcome):
    assert judge("c", "n", ended, lambda: there, lambda: right).outcome == outcome


def test_the_table_counts():
    cases = [Case("kills", "a", "right"), Case("kills", "b", "wrong"), Case("names", "c", "refused")]
    lines = [line.split() for line in format_table(cases).splitlines()]
    assert lines[1] == ["kills", "2", "1", "1", "0", "1", "0", "0", "0"]
    assert lines[-1] == ["all", "3", "2", "1", "1", "1", "0", "0", "0"]
