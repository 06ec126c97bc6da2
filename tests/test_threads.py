"""Rows are shared out whole, and the setting of BLAS comes back."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

from moefast.threads import _BLAS, in_threads, one_blas_thread


@pytest.mark.parametrize("cores", [1, 2, 7])
@pytest.mark.parametrize("n", [0, 1, 31, 32, 64, 97, 1000])
def test_every_row_is_done_once(monkeypatch, cores, n):
    monkeypatch.setattr("moefast.threads.CORES", cores)
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


def blas_threads():
    # NumPy's; SciPy may have loaded another since.
    return {library["num_threads"] for library in _BLAS.info() if library["user_api"] == "blas"}


def test_blas_is_held_to_one_thread_until_the_last_has_left():
    before = blas_threads()
    assert before
    both = Barrier(2)

    def enter(_):
        with one_blas_thread():
            both.wait(10)
            inside = blas_threads()
        both.wait(10)
        return inside

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(enter, range(2))) == [{1}, {1}]
    with one_blas_thread(), one_blas_thread():
        pass
    with pytest.raises(KeyError), one_blas_thread():
        raise KeyError
    assert blas_threads() == before
