"""The simulator, faster: threads that take turns, and shared arrays that are known by their line."""

import sys

import numpy as np
import pytest
from numba.core import types
from numba.cuda.simulator.kernelapi import FakeCUDAShared
from numba.np.numpy_support import as_dtype
from simulated_threads import take_turns


@pytest.fixture(autouse=True, scope="session")
def threads_that_take_turns():
    """Greenlets, one of which runs at a time; of the whole session, as tests undo what is set for one of them."""
    with pytest.MonkeyPatch.context() as patch:
        take_turns(patch)
        yield


@pytest.fixture(autouse=True, scope="session")
def shared_arrays_known_by_their_line():
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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeCUDAShared, "array", array)
        yield


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
    few = {"MEDIAN_THREADS": 2, "LANES": 2, "UNIT_THREADS": 3, "CLOUDS": 4, "MOST_STARS": 2, "THREADS": 16}
    for name, value in few.items():
        monkeypatch.setattr(clouds, name, value)
    few = {"STEP": 4, "READ_THREADS": 2, "LANES": 2, "VELOCITIES": 4, "TEMPLATES": 2}
    few |= {"TILE": 16, "HALF": 8, "PADDED": 20, "PRODUCT_THREADS": 4, "LOADS": 32}
    few |= {"WARP_ROWS": 2, "WARP_COLUMNS": 2, "WARPS_BESIDE": 1}
    for name, value in few.items():
        monkeypatch.setattr(velocity, name, value)
    for name, value in {"READ_THREADS": 2, "LEAST_BLOCKS": 3, "MOST_BLOCKS": 3}.items():
        monkeypatch.setattr(space, name, value)


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
