"""Records: as JSON holds them and back, and what is not of their types named with its entry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from moefast.core.errors import InputError
from moefast.core.records import as_entries, check_seal, entry, read_entries, sealed


@dataclass(frozen=True, kw_only=True)
class Part:
    n: int
    interval: tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A field of every kind; the last two came later."""

    words: str
    sure: bool
    everywhere: float = entry("global")
    parts: tuple[Part, ...]
    by_name: Mapping[str, Part | None]
    anything: Any
    later: Part | None = None
    latest: Mapping[str, float] = field(default_factory=dict)


PART = Part(n=3, interval=(None, 0.5))
WHOLE = Whole(
    words="a",
    sure=True,
    everywhere=1.5,
    parts=(PART,),
    by_name={"x": PART, "y": None},
    anything=[1, {"b": None}],
)
ENTRIES = {
    "words": "a",
    "sure": True,
    "global": 1.5,
    "parts": [{"n": 3, "interval": [None, 0.5]}],
    "by_name": {"x": {"n": 3, "interval": [None, 0.5]}, "y": None},
    "anything": [1, {"b": None}],
    "later": None,
    "latest": {},
}


def test_there_and_back():
    found = as_entries(WHOLE)
    assert found == ENTRIES
    assert list(found) == list(ENTRIES)
    assert read_entries(Whole, json.loads(json.dumps(found)), "a.json") == WHOLE


def test_entries_of_other_versions():
    """Those that a later version added are passed over, and those that an earlier one lacked have a default."""
    earlier = {key: value for key, value in ENTRIES.items() if key not in {"later", "latest"}}
    assert read_entries(Whole, earlier | {"new": 1}, "a.json") == WHOLE


def test_a_seal_shows_what_was_changed():
    written = json.dumps(sealed(ENTRIES))
    check_seal(Whole, json.loads(written), "a.json")
    check_seal(Whole, ENTRIES, "a.json")
    # Whatever comes first, and however it is indented.
    check_seal(Whole, dict(reversed(json.loads(written).items())), "a.json")
    for old, new in (
        ("1.5", "1.6"),
        ('"x"', '"z"'),
        ('"sha256"', '"sha257"'),
        ("null", "true"),
        ('"latest"', '"lbtest"'),
    ):
        assert old in written
        with pytest.raises(InputError, match=r"a\.json: its checksum does not fit"):
            check_seal(Whole, json.loads(written.replace(old, new)), "a.json")


def test_a_whole_number_is_a_number_and_stays_one():
    found = read_entries(Whole, ENTRIES | {"global": 2}, "a.json").everywhere
    assert isinstance(found, int)
    assert found == 2


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([1], r"a\.json: the content: expected an object, found \[1\]"),
        ({}, r"a\.json: expected an entry words, found none"),
        (ENTRIES | {"words": 1}, "entry words: expected a text, found 1"),
        (ENTRIES | {"sure": 1}, "entry sure: expected true or false, found 1"),
        (ENTRIES | {"global": "1.5"}, "entry global: expected a number, found '1.5'"),
        (ENTRIES | {"global": True}, "entry global: expected a number, found True"),
        (ENTRIES | {"global": None}, "entry global: expected a number, found None"),
        (ENTRIES | {"parts": {}}, "entry parts: expected a list, found {}"),
        (ENTRIES | {"parts": [{"interval": [0, 1]}]}, r"expected an entry parts\[0\]\.n, found none"),
        (
            ENTRIES | {"parts": [{"n": 1.5, "interval": [0, 1]}]},
            r"entry parts\[0\]\.n: expected an integer, found 1\.5",
        ),
        (ENTRIES | {"parts": [{"n": 1, "interval": [0]}]}, r"parts\[0\]\.interval: expected a list of 2"),
        (ENTRIES | {"by_name": {"x": 3}}, r"entry by_name\.x: expected an object, found 3"),
        (ENTRIES | {"by_name": 3}, "entry by_name: expected an object, found 3"),
        (ENTRIES | {"words": list(range(100))}, r"found \[0, 1, 2.*\.\.\.; make"),
    ],
)
def test_what_is_of_another_type_is_named(entries, message):
    with pytest.raises(InputError, match=message):
        read_entries(Whole, entries, "a.json")
