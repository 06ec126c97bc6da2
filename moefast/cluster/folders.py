"""Folders beside an output, in which the parts of a job lie until it is complete.

Design: a folder is named after its output and what the job is, so that the same command goes on with what is there. It
says whose it is: those of other jobs for the same output are removed once their process is gone.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moefast.core.atomic import owner_has_ended, owner_token, write_atomically
from moefast.core.errors import OutputError

__all__ = ["OWNER", "digest_of", "working_folder"]

OWNER = ".owner"
"""File that says which process a folder belongs to."""


def digest_of(record: Mapping[str, Any]) -> str:
    """SHA-256, as hex digits, of what a job is made of."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def working_folder(out: Path, digest: str) -> Path:
    """The folder of a job, made if it is not there; those of ended jobs for the same output are removed.

    Parameters
    ----------
    out : Path
        Table or folder that the job will write.
    digest : str
        Of what the job is made of.

    Raises
    ------
    OutputError
        It cannot be made.
    """
    folder = out.with_name(f".{out.name}.parts-{digest[:16]}")
    try:
        for other in out.parent.glob(f".{glob.escape(out.name)}.parts-*"):
            if other != folder and _is_abandoned(other):
                shutil.rmtree(other, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        write_atomically(folder / OWNER, owner_token().encode())
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error}") from error
    return folder


def _is_abandoned(folder: Path) -> bool:
    with suppress(OSError):
        return owner_has_ended((folder / OWNER).read_text(encoding="ascii", errors="replace"), folder)
    return False
