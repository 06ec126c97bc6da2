"""What a table says of itself: attributes as text, and their checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moefast.core.errors import InputError

__all__ = ["CHECKSUM", "as_kept", "as_plain", "compare_digest", "digest_of", "from_text", "to_json"]

CHECKSUM = "attributes_sha256"


def as_plain(value: Any) -> str | bool | int | float | None:
    """The value, if it is a number or text; None if it must become JSON."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value if isinstance(value, str | bool | int | float) else None


def to_json(value: Any) -> str:
    """What is no number or text, as JSON."""

    def other(item: Any) -> Any:
        if isinstance(item, np.generic):
            return item.item()
        return item.tolist() if isinstance(item, np.ndarray) else str(item)

    return json.dumps(value, default=other)


def as_kept(value: Any) -> str | bool | int | float:
    """The value as an attribute in HDF5: texts there hold no NUL, and look like JSON only if they are."""
    plain = as_plain(value)
    if plain is None or (isinstance(plain, str) and ("\0" in plain or plain[:1] == '"')):
        return to_json(value if plain is None else plain)
    return plain


def from_text(text: str) -> Any:
    """What `to_json` was given, if the text is such, else the text."""
    if text[:1] in {"[", "{", '"'} or text == "null":
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return text


def digest_of(n_rows: int, columns: Sequence[Sequence[str]], attributes: Mapping[str, Any]) -> str:
    """SHA-256 of what a table says of itself: rows, columns with types, units and meanings, attributes as stored."""
    said = json.dumps([n_rows, [list(column) for column in columns], sorted(attributes.items())])
    return hashlib.sha256(said.encode()).hexdigest()


def compare_digest(path: Path, kept: Any, found: str) -> None:
    """Refuse a table whose own words are not those that were written."""
    if kept != found:
        raise InputError(
            f"{path}: attributes or columns are not those that were written ({CHECKSUM} is {kept}, expected {found} "
            "by what the file says): damaged, or changed by another program; copy or produce it again"
        )
