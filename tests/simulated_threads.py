"""Threads of a simulated GPU that take turns.

Design: Numba's own simulator starts a thread of the operating system for each thread of a block, lets all of them run
at once, and asks them one after the other, without a pause, whether they have come to the barrier. Only one of them can
run at a time, so nine tenths of the time go into starting them and handing over. Here they are greenlets: each runs up
to the barrier, then the next one, in an order that is drawn anew (from a fixed seed) after each barrier. A value that a
thread reads before its neighbour has written it, for want of a barrier, is missed in half of the orders, as it is by
chance where all run at once.
"""

from __future__ import annotations

import random
import types

import numpy as np
from greenlet import greenlet
from numba.cuda.simulator import kernel, kernelapi

__all__ = ["TurnThread", "current_thread", "take_turns"]

_running: list[TurnThread] = []
"""The thread whose turn it is; one kernel runs at a time."""


def current_thread() -> TurnThread:
    """The thread of a kernel whose turn it is."""
    return _running[-1]


class TurnThread(kernel.BlockThread):
    """A thread of a block, which is none of the operating system."""

    def __init__(self, f, manager, block, point):
        # Not that of the base class, which makes a thread and locks.
        self._manager, self.blockIdx, self.threadIdx = manager, block, kernelapi.Dim3(*point)
        width, height, _ = manager._block_dim
        self.thread_id = point[0] + width * (point[1] + height * point[2])
        self._greenlet = greenlet(f)

    @property
    def ended(self) -> bool:
        return self._greenlet.dead

    def give(self, *args):
        """Let the thread run up to the next barrier, or to its end."""
        _running.append(self)
        try:
            self._greenlet.switch(*args)
        except Exception as error:
            point = f"tid={list(self.threadIdx)} ctaid={list(self.blockIdx)}"
            raise type(error)(f"{point}: {error}").with_traceback(error.__traceback__) from None
        finally:
            _running.pop()

    def abandon(self):
        """End a thread that waits at a barrier."""
        _running.append(self)
        self._greenlet.throw()
        _running.pop()

    def syncthreads(self):
        """Wait for the next turn."""
        self._greenlet.parent.switch()


def run_block(self, grid_point, *args):
    """In the place of `BlockManager.run`."""
    block = kernelapi.Dim3(*grid_point)
    threads = [TurnThread(self._f, self, block, point) for point in np.ndindex(*self._block_dim)]
    order = random.Random(len(threads))
    running, first = threads, args
    try:
        while running:
            for thread in order.sample(running, len(running)):
                thread.give(*first)
            running, first = [thread for thread in running if not thread.ended], ()
    finally:
        for thread in threads:
            thread.abandon()


def take_turns(monkeypatch):
    """Let simulated threads take turns from now on."""
    monkeypatch.setattr(kernel.BlockManager, "run", run_block)
    monkeypatch.setattr(kernelapi, "threading", types.SimpleNamespace(current_thread=current_thread))
