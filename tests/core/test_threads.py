"""Rows are shared out whole, and the setting of BLAS comes back."""

import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from moefast.core import threads
from moefast.core.threads import _quota, in_threads, map_in_order


@pytest.mark.parametrize("cores", [1, 2, 7])
@pytest.mark.parametrize("n", [0, 1, 31, 32, 64, 97, 1000])
def test_every_row_is_done_once(monkeypatch, cores, n):
    monkeypatch.setattr("moefast.core.threads.CORES", cores)
    done = np.zeros(n, int)
    parts = []

    def work(first, stop):
        parts.append((first, stop))
        done[first:stop] += 1

    in_threads(n, work)
    assert (done == 1).all()
    assert 1 <= len(parts) <= min(cores, max(1, n // 32))


def test_an_exception_of_a_part_is_raised():
    def work(first, stop):
        raise ValueError(f"rows {first}")

    with pytest.raises(ValueError, match="rows 0"):
        in_threads(1000, work, least=1)


ENTERED_AND_LEFT = """
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy

from moefast.core.threads import _BLAS, one_blas_thread


def blas_threads():
    return {library["num_threads"] for library in _BLAS.info() if library["user_api"] == "blas"}


def enter(_):
    with one_blas_thread():
        both.wait(300)
        inside = blas_threads()
    both.wait(300)
    return inside


both = threading.Barrier(2)
before = blas_threads()
assert before
with ThreadPoolExecutor(2) as pool:
    inside = list(pool.map(enter, range(2)))
assert inside == [{1}, {1}], inside
with one_blas_thread(), one_blas_thread():
    pass
try:
    with one_blas_thread():
        raise KeyError
except KeyError:
    pass
assert blas_threads() == before, blas_threads()
"""


def test_blas_is_held_to_one_thread_until_the_last_has_left():
    # The setting belongs to a process, where threads of other tests may still be at work.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    command = [sys.executable, "-c", ENTERED_AND_LEFT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


def test_results_come_in_the_order_of_the_items():
    barrier = threading.Barrier(2, timeout=300)

    def work(i):
        if i < 2:
            # Both threads are at work, and the second may well be done first.
            barrier.wait()
        return 10 * i

    assert list(map_in_order(work, range(50), workers=2)) == [10 * i for i in range(50)]
    assert list(map_in_order(work, [], workers=2)) == []


def test_items_are_made_one_at_a_time_and_not_far_ahead():
    making, made = threading.Lock(), []

    def items():
        for i in range(40):
            assert making.acquire(blocking=False)
            made.append(i)
            making.release()
            yield i

    results = map_in_order(lambda i: i, items(), workers=3)
    assert next(results) == 0
    results.close()
    assert len(made) <= 14


@pytest.mark.parametrize("where", ["item", "work"])
def test_what_a_worker_raises_is_raised(where):
    def items():
        yield 1
        if where == "item":
            raise OSError("no more")
        yield 2

    def work(i):
        if where == "work" and i == 2:
            raise OSError("no more")
        return i

    with pytest.raises(OSError, match="no more"):
        list(map_in_order(work, items(), workers=2))


# -- how many ------------------------------------------------------------------------------------------------------


def groups(folder, own, **limits):
    """A control-group file system with the limits of some groups, and what a process says of its own group."""
    for name, text in limits.items():
        file = folder / "groups" / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        kind, _, value = text.partition("=")
        if kind == "max":
            (file / "cpu.max").parent.mkdir(exist_ok=True)
            (file / "cpu.max").write_text(value + "\n")
        else:
            file.mkdir(exist_ok=True)
            (file / "cpu.cfs_quota_us").write_text(value.split()[0] + "\n")
            (file / "cpu.cfs_period_us").write_text(value.split()[1] + "\n")
    (folder / "own").write_text(own)
    return folder / "groups", folder / "own"


@pytest.mark.parametrize(
    ("own", "limits", "quota"),
    [
        ("0::/job\n", {"job": "max=150000 100000"}, 1.5),
        ("0::/job\n", {"job": "max=max 100000"}, math.inf),
        ("0::/job/step\n", {"job": "max=200000 100000", "job__step": "max=max 100000"}, 2.0),
        ("0::/job/step\n", {"job": "max=400000 100000", "job__step": "max=50000 100000"}, 0.5),
        ("4:cpu,cpuacct:/job\n1:memory:/x\n", {"cpu__job": "cfs=300000 100000"}, 3.0),
        ("4:cpu,cpuacct:/job\n", {"cpu__job": "cfs=-1 100000"}, math.inf),
        # In a container the name is that of the host, and the limit lies at the root.
        ("0::/docker/17ab\n", {".": "max=100000 100000"}, 1.0),
        ("", {}, math.inf),
        ("0::/job\n", {"job": "max=nonsense"}, math.inf),
    ],
)
def test_the_quota_of_a_control_group(own, limits, quota, tmp_path):
    assert _quota(*groups(tmp_path, own, **limits)) == quota


@pytest.mark.parametrize(
    ("quota", "asked", "expected"),
    [
        (math.inf, None, 8),
        (2.0, None, 2),
        (2.5, None, 3),
        (0.1, None, 1),
        (64.0, None, 8),
        (math.inf, "3", 3),
        (math.inf, "3,2", 3),
        (math.inf, "100", 8),
        (2.0, "3", 2),
        (math.inf, "", 8),
        (math.inf, "0", 8),
        (math.inf, "all", 8),
    ],
)
def test_affinity_quota_and_environment_limit_the_threads(quota, asked, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(threads, "_quota", lambda: quota)
    if asked is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads._cores() == expected
