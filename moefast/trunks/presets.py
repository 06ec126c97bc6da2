"""Sizes of networks: for a laptop (two cores, ten minutes) and for a GPU (twenty minutes)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from moefast.trunks.networks import Kind
from moefast.trunks.training import Schedule

__all__ = ["PRESETS", "SIZES", "Preset", "Size"]

Size = Literal["small", "base"]
SIZES = get_args(Size)


@dataclass(frozen=True)
class Preset:
    """Sizes of a `NetworkPlan`, and the schedule of its fit."""

    plan: Mapping[str, int]
    schedule: Schedule


PRESETS: dict[tuple[Kind, Size], Preset] = {
    ("pca-mlp", "small"): Preset({"width": 256, "depth": 2}, Schedule(8000, 512)),
    ("pca-mlp", "base"): Preset({"width": 512, "depth": 3}, Schedule(16_000, 4096)),
    ("cnn", "small"): Preset({"width": 128, "depth": 16}, Schedule(3000, 128)),
    ("cnn", "base"): Preset({"width": 512, "depth": 64}, Schedule(20_000, 1024, 1e-3)),
    ("vit", "small"): Preset({"width": 64, "depth": 2, "patch": 64}, Schedule(2000, 64, 3e-3)),
    ("vit", "base"): Preset({"width": 256, "depth": 6, "patch": 32}, Schedule(20_000, 512, 1e-3)),
}
