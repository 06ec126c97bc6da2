"""Clusters for commands: connected, and told of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moefast.core.progress import ProgressLine
from moefast.core.text import counted

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["connected", "spread_over"]


@contextmanager
def connected(scheduler: str, progress: ProgressLine) -> Iterator[tuple[Client, int]]:
    """A client of the scheduler and the number of its workers; says these, and where the dashboard is."""
    from moefast.cluster.workers import addresses_of, connect

    with connect(scheduler) as client:
        workers = len(addresses_of(client))
        progress.note(f"{counted(workers, 'worker')}; dashboard {client.dashboard_link}")
        yield client, workers


@contextmanager
def spread_over(
    scheduler: str | None, name: str, progress: ProgressLine
) -> Iterator[Callable[..., Any] | None]:
    """A function of `moefast.cluster.rows_on_workers` on a client of the scheduler; None without one."""
    if scheduler is None:
        yield None
        return
    from moefast.cluster import rows_on_workers

    with connected(scheduler, progress) as (client, _):
        yield functools.partial(getattr(rows_on_workers, name), client)
