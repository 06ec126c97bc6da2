"""Rows shared out to the cores.

Design: Python threads that run compiled code without the interpreter's lock, one contiguous part of the rows each. A
parallel Numba kernel that alternates with a parallel matrix product costs twice as much, because each library's
threads wait actively for the other's; therefore BLAS is held to one thread where every core has one already.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from threadpoolctl import LibController, ThreadpoolController

__all__ = ["CORES", "in_threads", "map_in_order", "one_blas_thread"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def _quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Cores' worth of time that the control groups of this process may use; inf without a limit."""
    least = math.inf
    with contextlib.suppress(OSError):
        for line in own.read_text(encoding="utf-8").splitlines():
            number, controllers, place = line.split(":", 2)
            if number == "0":
                folder = root / place.lstrip("/")
            elif "cpu" in controllers.split(","):
                folder = root / "cpu" / place.lstrip("/")
            else:
                continue
            # A group can have no more than those that it is in. In a container the names may be those of the host.
            for group in (folder, *folder.parents, root, root / "cpu"):
                if group.is_relative_to(root):
                    least = min(least, _limit(group))
    return least


def _limit(group: Path) -> float:
    """What one control group may use, as version 2 of the kernel's interface says it, or version 1."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
            )
        return math.inf if quota == "max" or float(quota) <= 0 else float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def _cores() -> int:
    """Threads that are worth having: cores of this process, within the quota of its group and OMP_NUM_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (quota := _quota()) < cores:
        cores = max(1, math.ceil(quota))
    # A list says how many on each level of nested work.
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(cores, int(asked)) if asked.isdecimal() and int(asked) else cores


CORES = _cores()
"""Threads that share out rows."""
ROWS_PER_THREAD = 32
"""Fewer rows than this are not worth a thread: starting one takes as long as a few rows."""

_BLAS = ThreadpoolController()
_LOCK = threading.Lock()
_callers: set[object] = set()
_before: list[tuple[LibController, int]] = []


def in_threads(n: int, work: Callable[[int, int], Any], *, least: int = ROWS_PER_THREAD) -> None:
    """Do work(first, stop) on equal parts of n rows, one thread per core.

    Parameters
    ----------
    n : int
        How many rows there are.
    work : callable
        Gets the first row of its part and the one after the last; an exception of any part is raised here.
    least : int
        Rows that are worth a thread of their own.
    """
    parts = max(1, min(CORES, n // least))
    if parts == 1:
        work(0, n)
        return
    cuts = [n * i // parts for i in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(work, cuts[:-1], cuts[1:]))


def map_in_order(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int = CORES
) -> Iterator[Result]:
    """Results of work(item), in the order of the items, with several threads at work.

    An item is made (read from a file, say) by the thread that works on it, while its memory is still in that core's
    cache; items are made one at a time, in their order. Results wait for their turn, a few per thread.

    Parameters
    ----------
    work : callable
    items : iterable
        An exception that it raises, or `work`, is raised here, and all that is not done yet is given up. A generator
        is closed.
    workers : int
        Threads.
    """
    source, lock = enumerate(items), threading.Lock()

    def step() -> tuple[int, Result] | None:
        with lock:
            try:
                index, item = next(source)
            except StopIteration:
                return None
        return index, work(item)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="moefast-worker")
    try:
        waiting = collections.deque(pool.submit(step) for _ in range(2 * workers))
        done: dict[int, Result] = {}
        turn = 0
        while waiting:
            found = waiting.popleft().result()
            if found is None:
                continue
            waiting.append(pool.submit(step))
            done[found[0]] = found[1]
            while turn in done:
                yield done.pop(turn)
                turn += 1
    finally:
        pool.shutdown(cancel_futures=True)
        if isinstance(items, Generator):
            # An interrupt may have ended the waiting: a generator at work cannot be closed.
            with lock:
                items.close()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold NumPy's BLAS to one thread while any caller is inside.

    The setting belongs to the process: of two callers that each restored what they had found, the last to leave would
    restore what the other had set.
    """
    caller = object()
    with _LOCK:
        if not _callers:
            _before[:] = [
                (library, library.num_threads)
                for library in _BLAS.lib_controllers
                if library.user_api == "blas"
            ]
            for library, _ in _before:
                _set_threads(library, 1)
        _callers.add(caller)
    try:
        yield
    finally:
        with _LOCK:
            _callers.remove(caller)
            if not _callers:
                for library, number in _before:
                    _set_threads(library, number)


def _set_threads(library: LibController, number: int) -> None:
    """Give a library its number of threads, whichever thread asks.

    For OpenBLAS, threadpoolctl from 3.8 on heeds the first thread that asks and drops what others ask without a word;
    here the last caller to leave need not be the one that came first.
    """
    free = getattr(library, "clear_controlling_thread", lambda **_: None)
    free(force=True)
    library.set_num_threads(number)
    free(force=True)
