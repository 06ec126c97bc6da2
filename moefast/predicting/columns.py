"""Columns of a prediction table: which there are, and what is in them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moefast.core.outputs import INPUTS, ROW, VELOCITY, TableColumn, prediction_columns
from moefast.mixture import Prediction
from moefast.model import Model
from moefast.posterior.mixture import AnyMixture, PosteriorMixture
from moefast.posterior.velocities import VelocityFit
from moefast.predicting.flags import at_the_edge, unlike
from moefast.spectra.quality import Flag, Quality
from moefast.spectra.tables import Column
from moefast.spectra.velocities import Velocities

__all__ = ["KNOWN", "columns_of", "table_columns"]


KNOWN = {
    "catId": ("", "catalogue of the target"), "objId": ("", "object in its catalogue"),
    "tract": ("", "part of the sky"),
    "patch": ("", "part of the tract"), "ra": ("deg", "right ascension, ICRS"), "dec": ("deg", "declination, ICRS"),
    "targetType": ("", "1 science, 2 sky, 3 flux standard"), "fiberId": ("", "fibre of the (first) exposure"),
    "visit": ("", "exposure"), "nVisit": ("", "exposures that were coadded"),
    "pfsVisitHash": ("", "hash of these exposures, as in names of files"), "TARGETID": ("", "DESI target"),
    "OBJTYPE": ("", "DESI kind of target: TGT, SKY or none"),
}  # fmt: skip
"""Unit and meaning of columns that surveys give."""


def table_columns(
    mixture: AnyMixture,
    ids: Mapping[str, np.dtype],
    several: bool,
    velocity: Velocities | VelocityFit | None = None,
) -> list[Column]:
    """Columns of a prediction table, in order; with `velocity` those that tell what was removed."""
    columns = [Column.of(one) for one in (INPUTS if several else (ROW,))]
    columns += [
        Column(name, dtype, *KNOWN.get(name, ("", "carried along from the input")))
        for name, dtype in ids.items()
    ]
    if velocity is not None:
        known = isinstance(velocity, VelocityFit) or velocity.error is not None
        columns += [Column.of(one) for one in (VELOCITY if known else VELOCITY[:1])]
    bits = ", ".join(f"{flag.value} {flag.name}" for flag in Flag)
    meanings = {"flag": f"sum of {bits}; 0 is what you want"}
    return columns + [
        Column.of(output, name, meanings.get(name, "")) for name, output, _ in _predictions_of(mixture)
    ]


def columns_of(model: Model, result: Prediction, quality: Quality) -> dict[str, NDArray]:
    """Table columns of scored rows, flags included.

    Parameters
    ----------
    model : Model
    result : Prediction
    quality : Quality
    """
    limits = model.manifest["limits"]
    flag = quality.flag.copy()
    empty = (flag & np.uint32(Flag.NO_DATA)) != 0
    low, high = model.mixture.label_range
    # Numbers that overflowed to NaN compare false with everything: the flags say "not within", never "beyond".
    outside = ~((result.log_g > low) & (result.log_g < high))
    outside |= ~((result.log_level >= limits["log_level"][0]) & (result.log_level <= limits["log_level"][1]))
    outside |= at_the_edge(model, result)
    expert = result.weights.argmax(1).astype(np.int16)
    for bit, rows in (
        (Flag.OUT_OF_GRID, outside),
        (Flag.LOW_CONFIDENCE, ~(result.log_g_err <= limits["log_g_err"])),
        (Flag.UNLIKE_TRAINING, unlike(result, limits, quality)),
    ):
        flag[rows & ~empty] |= np.uint32(bit)
    others = {
        "expert": expert,
        "snr_norm": quality.snr_norm,
        "snr_median": quality.snr_median,
        "flag": flag,
    }
    columns: dict[str, NDArray] = {}
    for name, output, number in _predictions_of(model.mixture):
        values = getattr(result, output.onnx) if output.onnx else others[name]
        columns[name] = values if output.per == "star" else values[:, number]
    if empty.any():
        for name, column in columns.items():
            if column.dtype.kind == "f":
                columns[name] = np.where(empty, np.float32(np.nan), column)
        columns["expert"] = np.where(empty, np.int16(-1), expert)
    return columns


def _predictions_of(mixture: AnyMixture) -> list[TableColumn]:
    """What a table holds of each star."""
    if not isinstance(mixture, PosteriorMixture):
        return prediction_columns(mixture.n_experts)
    return prediction_columns(mixture.n_experts, mixture.label_names, blends=mixture.blends)
