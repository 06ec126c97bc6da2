"""The one palette of all pictures: colours by their role. It needs no library, so that any command may read it."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["DARK", "LIGHT", "PAGE", "SERIES", "Palette"]

Palette = Mapping[str, str]

# After Okabe & Ito: told apart by every kind of colour vision. Never the only difference: markers differ, too.
LIGHT: Palette = {
    "ink": "#1c2127",
    "muted": "#5b6570",
    "grid": "#d5dae0",
    "surface": "#ffffff",
    "own": "#0b5ea8",
    "first": "#b35309",
    "second": "#0a7d5a",
    "third": "#a3397a",
    "ceiling": "#1c2127",
}
DARK: Palette = {
    "ink": "#e7eaee",
    "muted": "#a3adb8",
    "grid": "#3a434d",
    "surface": "#171b20",
    "own": "#6ab4f5",
    "first": "#f0a35c",
    "second": "#4fc79f",
    "third": "#e58abf",
    "ceiling": "#e7eaee",
}
PAGE: Palette = {role: f"#0102{number:02x}" for number, role in enumerate(LIGHT, 0xA0)}
"""Colours that stand for the roles until `moefast.pages.drawing.embedded` turns them into variables of the page."""

SERIES = (
    LIGHT["own"], LIGHT["first"], LIGHT["second"], LIGHT["third"],
    "#8a6d00", "#5a6fd0", "#a33b3b", "#2f9e8f", "#777777", "#1c2127",
)  # fmt: skip
"""Colours of many curves, the roles first."""
