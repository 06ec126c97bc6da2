"""The simulator, with threads that take turns.

Numba's own lets all threads of a block run at once, and asks them one after the other, without a pause, whether they
have come to the barrier. Only one of them can run at a time, so nine tenths of the time go into handing over. Here each
runs up to the barrier, then the next one, in an order that is drawn anew (from a fixed seed) after each barrier: a
value that a thread reads before its neighbour has written it, for want of a barrier, is missed in half of the orders,
as it is by chance where all run at once.
"""

import random
import sys
import threading

import numpy as np
import pytest
from numba.core import types
from numba.cuda.simulator.kernel import BlockManager, BlockThread
from numba.cuda.simulator.kernelapi import FakeCUDAShared
from numba.np.numpy_support import as_dtype


class Turns:
    """Who runs: the thread whose `go` is released, until it releases `back`. Both are locks that begin locked."""

    def __init__(self):
        self.go, self.back = threading.Lock(), threading.Lock()
        self.go.acquire()
        self.back.acquire()
        self.ended = False

    def give(self):
        """Let the thread run up to the next barrier, or to its end."""
        self.go.release()
        self.back.acquire()

    def hand_back(self):
        """Wait for the next turn."""
        self.back.release()
        self.go.acquire()


def run_block(self, grid_point, *args):
    """In the place of `BlockManager.run`."""
    threads = [
        BlockThread(lambda: self._f(*args), self, grid_point, point, self._debug)
        for point in np.ndindex(*self._block_dim)
    ]
    for thread in threads:
        thread.turns = Turns()
        thread.start()
    order = random.Random(len(threads))
    try:
        running = threads
        while running:
            for thread in order.sample(running, len(running)):
                thread.turns.give()
                if thread.exception:
                    raise thread.exception[0].with_traceback(thread.exception[1])
            running = [thread for thread in running if not thread.turns.ended]
    finally:
        for thread in threads:
            if not thread.turns.ended:
                thread.abort = True
                thread.turns.give()
            thread.join()


def run_thread(self, plain=BlockThread.run):
    """In the place of `BlockThread.run`."""
    self.turns.go.acquire()
    try:
        if not self.abort:
            plain(self)
    finally:
        self.turns.ended = True
        self.turns.back.release()


def wait_for_all(self):
    """In the place of `BlockThread.syncthreads`."""
    self.turns.hand_back()
    if self.abort:
        raise RuntimeError("another thread of the block has failed")


@pytest.fixture(autouse=True)
def threads_that_take_turns(monkeypatch):
    """See above."""
    monkeypatch.setattr(BlockManager, "run", run_block)
    monkeypatch.setattr(BlockThread, "run", run_thread)
    monkeypatch.setattr(BlockThread, "syncthreads", wait_for_all)


@pytest.fixture(autouse=True)
def shared_arrays_known_by_their_line(monkeypatch):
    """The simulator formats the whole stack of callers to know a shared array again."""
    plain = FakeCUDAShared.array

    def array(self, shape, dtype, alignment=None):
        if shape == 0:
            return plain(self, shape, dtype, alignment)
        caller = sys._getframe(1)
        place = caller.f_code.co_filename, caller.f_lineno
        found = self._allocations.get(place)
        if found is None:
            dtype = as_dtype(dtype) if isinstance(dtype, types.Type) else dtype
            found = self._allocations[place] = np.empty(shape, dtype)
        return found

    monkeypatch.setattr(FakeCUDAShared, "array", array)


@pytest.fixture(autouse=True)
def few_stars_to_compare(monkeypatch):
    """Engines compare a device with the CPU when they are made: two stars are enough of a simulated one."""
    monkeypatch.setattr("moefast.predicting.agreement.N_STARS", 2)
    monkeypatch.setattr("moefast.posterior.velocities.N_CHECKED", 2)


@pytest.fixture
def small_tiles(monkeypatch):
    """Of the posterior: a simulated thread takes a millisecond to start. Three blocks share the roots of all stars."""
    from moefast.kernels.cuda import clouds, information, space, velocity

    few = {"STEP": 4, "SOLVE_THREADS": 4, "TILE_ROWS": 16, "TILE_COLUMNS": 16, "PART_TERMS": 24}
    few |= {"PRODUCT_THREADS": 8, "LEFT": 16, "RIGHT": 16}
    for name, value in few.items():
        monkeypatch.setattr(information, name, value)
    few = {"MEDIAN_THREADS": 2, "LANES": 2, "CLOUDS": 4, "MOST_STARS": 2, "THREADS": 16}
    few |= {"LEAST_BLOCKS": 3, "MOST_BLOCKS": 3}
    for name, value in few.items():
        monkeypatch.setattr(clouds, name, value)
    few = {
        "STEP": 4,
        "READ_THREADS": 2,
        "LANES": 2,
        "VELOCITIES": 4,
        "TEMPLATES": 2,
        "LEAST_BLOCKS": 3,
        "MOST_BLOCKS": 3,
    }
    few |= {"TILE": 16, "HALF": 8, "PADDED": 20, "PRODUCT_THREADS": 4, "LOADS": 32}
    few |= {"WARP_ROWS": 2, "WARP_COLUMNS": 2, "WARPS_BESIDE": 1}
    for name, value in few.items():
        monkeypatch.setattr(velocity, name, value)
    monkeypatch.setattr(space, "READ_THREADS", 2)


class NumpyProducts:
    """Σxxᵀ without the 256 threads of a tile in each group: the kernels of products have tests of their own."""

    name = "numba"

    def __init__(self, rows, p, n_groups):
        self.upper = np.triu_indices(p)

    def add(self, x, order, offsets, bounds, totals, stream):
        np.testing.assert_array_equal(offsets._ary, bounds)
        for group, total in enumerate(totals._ary):
            here = x._ary[order._ary[bounds[group] : bounds[group + 1]]]
            total += (here.T @ here)[self.upper]


@pytest.fixture
def numpy_products(monkeypatch):
    """`NumpyProducts` in the place of our own."""
    from moefast.kernels.cuda import products

    monkeypatch.setitem(products.METHODS, "numba", NumpyProducts)
