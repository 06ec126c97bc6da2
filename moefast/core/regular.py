"""Inputs that are no regular files: whoever opens a pipe waits for somebody to write into it."""

from __future__ import annotations

import os
from pathlib import Path

from moefast.core.errors import InputError

__all__ = ["refuse_special"]


def refuse_special(path: str | Path) -> None:
    """Refuse a pipe, a socket or a device; files, folders and what is not there are left to those who open them.

    Raises
    ------
    InputError
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InputError(
            f"{path}: is a pipe or device; write what comes out of it to a file on a disk, and name that"
        )
