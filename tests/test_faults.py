"""A hundred seeded cases of the campaigns of benchmarks/faults survive, and what judges them can say otherwise."""

import errno
import faulthandler
import itertools
import os
import signal
import time
from functools import partial

import pytest

from moefast.benchmarks.faults.__main__ import format_table
from moefast.benchmarks.faults.campaigns import CAMPAIGNS
from moefast.benchmarks.faults.case import OUTCOMES, Case, Ended, judge, run
from moefast.benchmarks.faults.disk import Failing
from moefast.benchmarks.faults.ground import prepare
from moefast.core.errors import OutputError

pytestmark = pytest.mark.skipif(
    not hasattr(os, "pidfd_open"), reason="processes are forked and watched as Linux does"
)
CASES = {
    "failed writes": 35, "kills": 12, "interrupts": 4, "damaged spectra": 20, "damaged tables": 20,
    "damaged models": 5, "names": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_some_of_each_survive(name, ground):
    campaign, share = CAMPAIGNS[name]
    cases = list(campaign(ground, CASES[name], 1))
    assert len(cases) == CASES[name]
    assert 0 < share < 1
    assert [(c.name, c.outcome, c.said) for c in cases if not c.survived] == []


def test_the_ground_knows_right_from_wrong(ground):
    """A campaign that took anything for right would find nothing."""
    right = ground.folder / "right.h5"
    assert ground.is_right(right)
    assert not ground.is_right(ground.folder / "right-coadd-1.h5")
    assert not ground.is_right(ground.spectra)


def test_a_disk_fails_where_it_is_told_to(tmp_path):
    def write():
        with open(tmp_path / "a", "wb") as file:
            file.write(b"x" * 100)
        os.mkdir(tmp_path / "b")

    for position, number in ((1, errno.EIO), (2, errno.ENOSPC)):
        ended = run(write, tmp_path / "log", first=Failing(position, number))
        assert ended.code == 1
        assert os.strerror(number) in ended.said
    assert run(write, tmp_path / "log", first=Failing(3)).code == 0


def test_what_hangs_is_stopped_and_what_crashes_is_seen(tmp_path):
    assert run(lambda: time.sleep(60), tmp_path / "log", limit=0.2).code is None
    # Who computes without end is stopped by that, however busy the machine is.
    assert run(partial(sum, itertools.count()), tmp_path / "log", cpu_limit=1).code is None
    # pytest would have the dump of a crash printed.
    assert run(os.abort, tmp_path / "log", first=faulthandler.disable).code == -signal.SIGABRT
    assert run(lambda: time.sleep(60), tmp_path / "log", kill=(0.1, signal.SIGKILL)).code == -signal.SIGKILL

    def refuse():
        raise OutputError("no")

    ended = run(refuse, tmp_path / "log")
    assert (ended.code, ended.said) == (8, "moefast: error: no\n")


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
        (Ended(3, ""), False, False, "misleading"),
        (Ended(8, "moefast: error: no"), True, True, "right"),
        (Ended(-signal.SIGSEGV, ""), False, False, "crash"),
        (Ended(-signal.SIGKILL, ""), False, False, "refused"),
        (Ended(None, ""), False, False, "hang"),
    ],
)
def test_the_judge(ended, there, right, outcome):
    assert judge("c", "n", ended, lambda: there, lambda: right).outcome == outcome


def test_the_judge_of_codes_and_leftovers():
    def judged(ended, **told):
        return judge("c", "n", ended, lambda: False, lambda: False, **told).outcome

    refused = Ended(8, "moefast: error: no")
    assert judged(refused, codes={8}) == "refused"
    assert judged(refused, codes={3}) == "misleading"
    assert judged(refused, leftovers=lambda: [".t.partial"]) == "left behind"
    # Who was killed for good cannot clear up.
    assert judged(Ended(-signal.SIGKILL, ""), leftovers=lambda: [".t.partial"]) == "refused"


def test_the_table_counts():
    cases = [Case("kills", "a", "right"), Case("kills", "b", "wrong"), Case("names", "c", "refused")]
    lines = [line.split() for line in format_table(cases).splitlines()]
    assert lines[1] == ["kills", "2", "1", "1", "0", "1", *"00000"]
    assert lines[-1] == ["all", "3", "2", "1", "1", "1", *"00000"]
    assert lines[0][:3] == ["campaign", "tried", "survived"]
    assert OUTCOMES[-1] == "hang"
