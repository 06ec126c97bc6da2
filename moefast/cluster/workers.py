"""The workers of a Dask cluster: connected, checked, given tasks, and given up when none is left.

Design: a task is a pure function of its arguments, begun again by another worker if its own is lost. What it gives is
small: nothing large moves through the scheduler.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moefast.core.errors import BackendError, InputError, ModelError, MoefastError
from moefast.core.threads import CORES
from moefast.core.version import __version__
from moefast.model import Model

if TYPE_CHECKING:
    from distributed import Client

__all__ = [
    "ALONE",
    "addresses_of",
    "check_workers",
    "connect",
    "gather_results",
    "results_in_order",
    "shared_name",
    "submit",
    "work_of",
    "workers_of",
]

RETRIES = 10
"""How often a task is begun again after its worker was lost."""
WORKER_TTL = "30 minutes"
"""A worker that gives no sign of life for so long is ended and replaced; while it compiles code it may be silent."""
QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "2s",
}
"""Dask looks at itself less often on this machine: by default a scheduler and two idle workers take 8 % of a core."""
PATIENCE = 300.0
"""Seconds without any worker after which a job is given up."""
ALONE = threading.Lock()
"""Tasks have all cores of their process: of a worker with several threads one computes at a time."""


def workers_of(scheduler: str) -> int | None:
    """Number of workers of ``local`` or ``local:N``; None for an address.

    Raises
    ------
    InputError
        N is no number above 0.
    """
    if scheduler != "local" and not scheduler.startswith("local:"):
        return None
    count = scheduler.removeprefix("local").removeprefix(":") or str(CORES)
    if not count.isdecimal() or not int(count):
        raise InputError(
            f"--scheduler {scheduler}: expected local:N with N workers, such as local:4, or an address"
        )
    return int(count)


@contextmanager
def connect(scheduler: str) -> Generator[Client, None, None]:
    """A client of the scheduler at an address, or of workers on this machine.

    Parameters
    ----------
    scheduler : str
        ``tcp://host:8786``, ``local`` (a worker per core) or ``local:N``. Workers on this machine share its cores.

    Raises
    ------
    BackendError
        Dask is not installed, or nothing answers at the address.
    """
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise BackendError(f'--scheduler needs Dask ({error}): pip install "moefast[dask]"') from error
    count = workers_of(scheduler)
    if count is None:
        try:
            client = Client(scheduler, timeout=20, set_as_default=False)
        except (OSError, ValueError) as error:
            raise BackendError(
                f"--scheduler {scheduler}: no Dask scheduler answers there ({error})"
            ) from error
        with client:
            yield client
        return
    threads = str(max(1, CORES // count))
    alone = {
        "OMP_NUM_THREADS": threads,
        "NUMBA_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    settings = {
        "distributed.nanny.pre-spawn-environ": alone,
        "distributed.scheduler.allowed-failures": RETRIES,
        "distributed.scheduler.worker-ttl": WORKER_TTL,
        # Tasks keep nothing that could be moved to the disk, and a worker that pauses until it has less waits for ever.
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        **QUIET,
    }
    with (
        dask.config.set(settings),
        LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False, direct_to_workers=True) as client,
    ):
        if devices := devices_of(os.environ):
            client.register_plugin(_device_plugin(devices))
        yield client


def addresses_of(client: Client) -> list[str]:
    """Addresses of the workers that the scheduler has.

    Not by `Client.scheduler_info`, which gives none whenever the client has just asked for something else.
    """
    scheduler: Any = client.scheduler
    return list(client.sync(scheduler.identity, n_workers=-1)["workers"])


def devices_of(environment: Mapping[str, str]) -> list[str]:
    """Numbers of the GPUs that workers of this machine share out; none without a driver."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return [str(number) for number in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]


def _device_plugin(devices: Sequence[str]) -> Any:
    """What gives each worker a GPU of its own, also those that take the place of lost ones."""
    from distributed import WorkerPlugin

    class OneDevice(WorkerPlugin):
        name = "moefast-device"

        def setup(self, worker: Any) -> None:
            # Workers of this machine are called by their numbers. No driver has been started yet.
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(worker.name) % len(devices)]

    return OneDevice()


def shared_name(model: str | Path) -> str:
    """Name under which a worker elsewhere finds the model: that of a shipped one, else the whole path."""
    return os.path.abspath(model) if os.path.lexists(model) else str(model)


def submit(client: Client, work: Callable[..., Any], *arguments: Any) -> Any:
    """A task that is begun again if its worker is lost."""
    name = f"{work.__name__.strip('_')}-{uuid.uuid4()}"
    return client.submit(_done_by_worker, work, *arguments, retries=RETRIES, key=name)


def work_of(key: Any) -> str:
    """Name of the function that a task of `submit` does, from the task's key."""
    work, *_of_uuid = str(key).rsplit("-", 5)
    return work


def _done_by_worker(work: Callable[..., Any], *arguments: Any) -> Any:
    """What a task gives; a worker without the memory for it ends, and the task is left to another."""
    from distributed import get_worker

    try:
        return work(*arguments)
    except MemoryError as error:
        worker = get_worker()
        words = f"worker {worker.address} is out of memory ({error})"
        if worker.nanny is None:
            # Nothing would start it anew.
            raise MemoryError(words) from error
        print(f"moefast: {words} and ends", file=sys.stderr, flush=True)
        os._exit(1)


def _result(task: Any) -> Any:
    """What a task gives, or why the cluster could not do it."""
    from distributed import CancelledError, KilledWorker

    try:
        return task.result()
    except KilledWorker as error:
        raise BackendError(
            f"{error.allowed_failures + 1} workers ended while they did the same task, the last one "
            f"{error.last_worker.address}: {_MORE_MEMORY}"
        ) from error
    except MemoryError as error:
        raise BackendError(f"{error}: {_MORE_MEMORY}") from error
    except CancelledError as error:
        raise BackendError(
            f"the scheduler was lost or gave the job up ({error}); repeat the command, which goes on with what is done"
        ) from error


_MORE_MEMORY = (
    "if they had too little memory (their logs say so), give each worker more or start fewer, then repeat the command, "
    "which goes on with what is done"
)


def gather_results(
    client: Client, tasks: list[Any], n_rows: int = 0, progress: Callable[[int, int], None] | None = None
) -> None:
    """Wait for tasks; what one of them raises is raised here. All are cancelled then, and if this is interrupted.

    Tasks that give rows tell `progress` of them, out of `n_rows`.
    """
    from distributed import as_completed

    done = 0
    try:
        with _watched(client, tasks):
            for task in as_completed(tasks, loop=client.loop):
                # Raises what the task raised.
                result = _result(task)
                if progress is not None:
                    done += result
                    progress(min(done, n_rows), n_rows)
    except BaseException:
        client.cancel(tasks)
        raise


def results_in_order(client: Client, tasks: list[Any]) -> Generator[Any, None, None]:
    """The result of each task, which is let go then; those that are left are cancelled if this ends early."""
    tasks.reverse()
    try:
        with _watched(client, tasks):
            while tasks:
                # Raises what the task raised.
                result = _result(tasks[-1])
                tasks.pop()
                yield result
    finally:
        client.cancel(tasks)


@contextmanager
def _watched(client: Client, tasks: list[Any]) -> Generator[None, None, None]:
    """Give tasks up when no worker has been there for long: Dask would wait for ever.

    A nanny whose worker dies while it starts ends itself, so that all workers may be gone for good.
    """
    ended, deserted = threading.Event(), threading.Event()

    def watch() -> None:
        last = time.monotonic()
        while not ended.wait(PATIENCE / 20):
            try:
                workers = addresses_of(client)
            except Exception:  # no answer is not "none"; a scheduler that is lost is told by the tasks
                continue
            if workers:
                last = time.monotonic()
            elif time.monotonic() - last > PATIENCE:
                deserted.set()
                client.cancel(list(tasks))
                return

    thread = threading.Thread(target=watch, name="moefast-watch", daemon=True)
    thread.start()
    try:
        yield
    except BackendError as error:
        if not deserted.is_set():
            raise
        raise BackendError(f"the scheduler has had no workers for {PATIENCE:g} s: {_MORE_MEMORY}") from error
    finally:
        ended.set()
        thread.join()


def _seen_by_worker(files: Sequence[str], model: str | None, with_model: bool) -> dict[str, Any]:
    """What a worker has of a job, told by itself."""
    found: dict[str, Any] = {"version": __version__}
    found["missing"] = [path for path in files if not os.access(path, os.R_OK)]
    if not with_model:
        return found
    try:
        found["model"] = Model.load(model).hash
    except MoefastError as error:
        found["error"] = str(error)
    return found


def check_workers(
    client: Client, files: Sequence[str], model: str | None = None, expected: str | None = None
) -> list[str]:
    """Addresses of the workers, if each has all files, this version and this model.

    Parameters
    ----------
    client : distributed.Client
    files : sequence of str
    model : str, optional
        Folder or name of the model; the default model if None.
    expected : str, optional
        Hash of the model; if None, the job needs no model.

    Raises
    ------
    BackendError, InputError, ModelError
        A worker has not; it is named.
    """
    for _ in range(1 + RETRIES):
        answers = client.run(_seen_by_worker, files, model, expected is not None, on_error="return")
        # Those that are lost meanwhile say nothing, and may be replaced.
        found = {worker: facts for worker, facts in answers.items() if not isinstance(facts, OSError)}
        if found or not answers:
            break
        with suppress(TimeoutError):
            client.wait_for_workers(1, timeout=30)
    if not found:
        raise BackendError("the scheduler has no workers; start some, then repeat the command")
    for worker, facts in found.items():
        if isinstance(facts, ModuleNotFoundError):
            raise BackendError(f"worker {worker} has no moefast ({facts}); install it there") from facts
        if isinstance(facts, Exception):
            raise facts
        if facts["version"] != __version__:
            raise BackendError(f"worker {worker} has moefast {facts['version']}, this is {__version__}")
        if facts["missing"]:
            path, more = facts["missing"][0], len(facts["missing"]) - 1
            others = f" and {more} more" if more else ""
            raise InputError(
                f"worker {worker} does not see {path}{others}; use a disk that all workers share"
            )
        if "error" in facts:
            raise ModelError(f"worker {worker}: {facts['error']}")
        if expected is not None and facts["model"] != expected:
            raise ModelError(
                f"worker {worker} has another model under this name (sha256 {facts['model'][:12]}, expected "
                f"{expected[:12]})"
            )
    return list(found)
