"""Frozen dataclasses as JSON holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

__all__ = ["as_entries"]


def as_entries(value: Any) -> Any:
    """Dataclasses as dicts in the order of their fields, tuples as lists, and everything in them likewise."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: as_entries(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_entries(item) for key, item in value.items()}
    return [as_entries(item) for item in value] if isinstance(value, list | tuple) else value
