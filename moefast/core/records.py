"""Frozen dataclasses as JSON holds them, and back.

Design: fields are entries, in their order and under their names, or under the name that `entry` gives. What is read is
checked against the annotations of the fields, so that whoever uses a record need not ask what is in it.
"""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from moefast.core.errors import InputError

__all__ = ["as_entries", "check_seal", "entry", "read_entries", "sealed"]

Record = TypeVar("Record")

_WORDS = {float: "a number", int: "an integer", str: "a text", bool: "true or false"}


def entry(name: str) -> Any:
    """Field of a dataclass whose entry has another name, such as a word that Python keeps for itself."""
    return field(metadata={"entry": name})


def as_entries(value: Any) -> Any:
    """Dataclasses as dicts in the order of their fields, tuples as lists, and everything in them likewise."""
    if is_dataclass(value) and not isinstance(value, type):
        return {_name(item): as_entries(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_entries(item) for key, item in value.items()}
    return [as_entries(item) for item in value] if isinstance(value, list | tuple) else value


def read_entries(kind: type[Record], entries: Any, where: str) -> Record:
    """Inverse of `as_entries`: entries, as read from JSON, as a dataclass.

    Entries that the dataclass does not have are passed over: a later version may have written them.

    Parameters
    ----------
    kind : type
        A dataclass. Its fields are numbers, texts, tuples, mappings with texts as keys, dataclasses, or `Any`, and
        may be None.
    entries : mapping
    where : str
        The file, for messages.

    Raises
    ------
    InputError
        An entry is missing or of another type.
    """
    return cast(Record, _read(kind, entries, where, ""))


_SEAL = "sha256"


def sealed(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries with one more, `sha256`: the SHA-256 of all that the others say."""
    return {**entries, _SEAL: _digest(json.loads(json.dumps(entries)))}


def check_seal(kind: type, entries: Mapping[str, Any], where: str) -> None:
    """Refuse entries that are not those which `sealed` was given, if it was given them.

    Entries without a seal are of an earlier version, unless there are some that no earlier version wrote.

    Raises
    ------
    InputError
    """
    said = {name: value for name, value in entries.items() if name != _SEAL}
    if _SEAL in entries:
        whole = entries[_SEAL] == _digest(said)
    else:
        whole = said.keys() <= {_name(item) for item in fields(kind)}
    if not whole:
        raise InputError(
            f"{where}: its checksum does not fit: it was damaged or changed after it was written; copy or make it again"
        )


def _digest(entries: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _name(item: Field[Any]) -> str:
    name: str = item.metadata.get("entry", item.name)
    return name


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _read(kind: Any, value: Any, where: str, path: str) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        (known,) = (part for part in parts if part is not type(None))
        return None if value is None else _read(known, value, where, path)
    if is_dataclass(kind):
        return _read_record(cast(type, kind), value, where, path)
    if origin is tuple:
        several = len(parts) == 2 and parts[1] is Ellipsis
        if not isinstance(value, list | tuple) or not (several or len(value) == len(parts)):
            raise _wrong(where, path, "a list" if several else f"a list of {len(parts)}", value)
        each = [parts[0]] * len(value) if several else parts
        return tuple(
            _read(part, item, where, f"{path}[{k}]")
            for k, (part, item) in enumerate(zip(each, value, strict=True))
        )
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise _wrong(where, path, "an object", value)
        return {key: _read(parts[1], item, where, _below(path, key)) for key, item in value.items()}
    # A truth value is an integer to Python, and a whole number of JSON is a number.
    fits = isinstance(value, int | float if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise _wrong(where, path, _WORDS[kind], value)
    return value


def _read_record(kind: type, value: Any, where: str, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(where, path, "an object", value)
    found = {}
    for item in fields(kind):
        name = _name(item)
        if name in value:
            found[item.name] = _read(_hints(kind)[item.name], value[name], where, _below(path, name))
        elif item.default is MISSING and item.default_factory is MISSING:
            raise InputError(
                f"{where}: expected an entry {_below(path, name)}, found none; make the file again"
            )
    return kind(**found)


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _wrong(where: str, path: str, expected: str, value: Any) -> InputError:
    what = f"entry {path}" if path else "the content"
    found = repr(value)
    found = found if len(found) <= 60 else f"{found[:57]}..."
    return InputError(f"{where}: {what}: expected {expected}, found {found}; make the file again")
