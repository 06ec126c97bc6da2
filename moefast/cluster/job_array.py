"""Which part of a job this process does, told by the batch system."""

from __future__ import annotations

from collections.abc import Mapping

from moefast.core.errors import InputError

__all__ = ["shard_of_task"]

_NAMES = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")


def shard_of_task(environment: Mapping[str, str]) -> tuple[int, int]:
    """Part i of N of a task of a SLURM job array.

    An array such as ``--array=1-16``, ``0-15%4`` or ``0-30:2`` counts its tasks from any number in steps of any size;
    parts count from 0 in steps of one.

    Parameters
    ----------
    environment : mapping of str to str
        Environment variables: SLURM_ARRAY_TASK_ID, _MIN, _MAX and _COUNT.

    Returns
    -------
    tuple of int
        (i, N).

    Raises
    ------
    InputError
        This process is no task of a job array, or its numbers are not evenly spaced, so that they tell no part.

    Notes
    -----
    Source: SLURM, Job Array Support, https://slurm.schedmd.com/job_array.html
    """
    if "SLURM_ARRAY_TASK_ID" not in environment:
        raise InputError(
            "--shard without a value is for tasks of a SLURM job array, and SLURM_ARRAY_TASK_ID is not set; "
            "say --shard i/N, for example --shard 0/8"
        )
    try:
        task, least, largest, count = (int(environment[name]) for name in _NAMES)
    except (KeyError, ValueError):
        found = ", ".join(f"{name}={environment.get(name, '(not set)')}" for name in _NAMES)
        raise InputError(f"--shard: the job array is not understood ({found}); say --shard i/N") from None
    step, uneven = divmod(largest - least, count - 1) if count > 1 else (1, 0)
    if uneven or step < 1 or not least <= task <= largest or (task - least) % step:
        raise InputError(
            f"--shard: {count} tasks from {least} to {largest} with task {task} are not evenly spaced, so that their "
            "numbers tell no part; use an array such as 0-15, or say --shard i/N"
        )
    return (task - least) // step, count
