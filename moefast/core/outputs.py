"""Every output of a model, once: its name, unit, meaning, type, and how exactly ONNX must give it.

Design: tables, the ONNX graph, its parity check, the table that an evaluation keeps and the README read this schema, so
that a new output is a line here. Meanings are ASCII, because FITS headers hold nothing else. Labels are an axis: the
columns of any label follow from its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

__all__ = [
    "FILE",
    "HEADLINE",
    "INPUTS",
    "KEPT",
    "ONNX",
    "PREDICTIONS",
    "ROW",
    "Output",
    "by_name",
    "by_onnx",
    "kept_columns",
    "label_columns",
    "label_unit",
    "markdown",
    "prediction_columns",
]

Measure = Literal["absolute", "relative", "relative beyond 1"]


@dataclass(frozen=True)
class Output:
    """One output.

    Attributes
    ----------
    name : str
        Name of its column in a table; where there is one per expert, the number follows after an underscore.
    meaning : str
        What it is, in one sentence without a full stop.
    unit : str
        "" if it has none.
    dtype : str
        Type of the column.
    per_expert : bool
        Whether there is one per expert.
    in_tables : bool
        Whether tables of predictions have it.
    onnx : str
        Name in the ONNX graph, and field of a `Prediction`; "" if the graph does not give it.
    tolerance : float or None
        Largest difference of the ONNX graph from the model in float64.
    measure : str
        Whether differences are in the unit of the output, relative to its size, or relative where that is beyond 1.
    """

    name: str
    meaning: str
    unit: str = ""
    dtype: str = "float32"
    per_expert: bool = False
    in_tables: bool = True
    onnx: str = ""
    tolerance: float | None = None
    measure: Measure = "absolute"

    def __post_init__(self) -> None:
        if not self.meaning.isascii() or self.meaning.endswith("."):
            raise ValueError(
                f"output {self.name}: a meaning is ASCII without a full stop; found {self.meaning!r}"
            )
        if bool(self.onnx) != (self.tolerance is not None):
            raise ValueError(
                f"output {self.name}: what the ONNX graph gives has a tolerance, and nothing else has"
            )

    def names(self, n_experts: int) -> list[str]:
        """Names of its columns."""
        return [f"{self.name}_{k}" for k in range(n_experts)] if self.per_expert else [self.name]


HEADLINE = "log_g"
"""The label that every model predicts."""

FILE = Output("file", "index of the input file in the attribute inputs", dtype="int32")
ROW = Output("row", "row of the input file, from 0", dtype="int64")
INPUTS = (FILE, ROW)
"""Which input a row of a table belongs to; `file` only if there are several."""

PREDICTIONS = (
    Output(
        HEADLINE, "surface gravity, log10 of cm s^-2; clipped to the range of the training labels", "dex",
        onnx="log_g", tolerance=1e-4,
    ),
    Output(
        "log_g_err", "calibrated 1 sigma: chosen so that 1 sigma holds 68 % and 1.96 sigma holds 95 % of stars as "
        "nearly as one factor can", "dex", onnx="log_g_err", tolerance=1e-3, measure="relative",
    ),
    Output(
        "log_g_err_raw", "of templates the posterior's own 1 sigma, of linear experts the pixel noise propagated "
        "through them; not calibrated", "dex", onnx="log_g_err_raw", tolerance=1e-3, measure="relative",
    ),
    Output(
        "weight", "gate weight of an expert; those of a star add up to 1 (of templates: the probability of each bin)",
        per_expert=True, onnx="weights", tolerance=1e-4,
    ),
    Output(
        "expert_log_g", "log g of an expert at the star's noise level, not clipped", "dex", per_expert=True,
        in_tables=False, onnx="expert_log_g", tolerance=1e-4, measure="relative beyond 1",
    ),
    Output(
        "expert", "the expert with the largest weight, 3 i(T_eff) + i([M/H]) on the grid of the protocol; -1 without "
        "data", dtype="int16",
    ),
    Output("snr_norm", "norm of flux over norm of error, dominated by sky lines"),
    Output("snr_median", "median of flux over error"),
    Output(
        "chi2", "reduced chi square against the model's principal components: about 1 for spectra like the training "
        "set", onnx="chi2", tolerance=1e-3, measure="relative",
    ),
    Output(
        "log_level", "natural logarithm of the star's noise level over that of the training set", in_tables=False,
        onnx="log_level", tolerance=1e-4,
    ),
    Output("flag", "sum of the bits of the flags below; 0 is what you want", dtype="uint32"),
)  # fmt: skip
"""What a model says of a star, in the order of the table."""

ONNX = ("log_g", "log_g_err", "weights", "expert_log_g", "log_g_err_raw", "chi2", "log_level")
"""Outputs of the ONNX graph, in its order; other programs may count on it."""

_LABELS = {
    "T_eff": ("K", "effective temperature"),
    "log_g": ("dex", "surface gravity"),
    "M_H": ("dex", "metallicity [M/H]"),
    "a_M": ("dex", "alpha enhancement [a/M]"),
    "C_M": ("dex", "carbon abundance [C/M]"),
}

KEPT = (
    Output("log_g_true", "surface gravity, label of the test set", "dex", "float64"),
    Output("T_eff", "effective temperature, label of the test set", "K", "float64"),
    Output("M_H", "metallicity [M/H], label of the test set", "dex", "float64"),
)
"""Labels that an evaluation keeps beside its predictions."""


def by_name(name: str) -> Output:
    """The output with this name in tables."""
    return next(one for one in (*INPUTS, *PREDICTIONS) if one.name == name)


def by_onnx(name: str) -> Output:
    """The output with this name in the ONNX graph."""
    return next(one for one in PREDICTIONS if one.onnx == name)


def label_unit(label: str) -> str:
    """Unit of a label: K for the effective temperature, dex for all others."""
    return _LABELS.get(label, ("dex", ""))[0]


def label_columns(labels: Iterable[str]) -> list[Output]:
    """Value, calibrated error and correlation with log g of labels; log g itself has columns of its own.

    Parameters
    ----------
    labels : iterable of str
        Such as "T_eff" and "M_H".

    Returns
    -------
    list of Output
        For "T_eff": `T_eff` and `T_eff_err` [K], and `T_eff_log_g_corr`.
    """
    columns = []
    for label in labels:
        if label == HEADLINE:
            continue
        unit, words = _LABELS.get(label, ("dex", label))
        columns += [
            Output(label, words, unit),
            Output(f"{label}_err", f"calibrated 1 sigma of {label}", unit),
            Output(
                f"{label}_{HEADLINE}_corr", f"correlation of the errors of {label} and {HEADLINE}, -1 to 1"
            ),
        ]
    return columns


def prediction_columns(labels: Sequence[str] = ()) -> list[Output]:
    """What tables of predictions hold of each star, in order; further labels stand after log g and its errors."""
    columns = [one for one in PREDICTIONS if one.in_tables]
    after = 1 + max(i for i, one in enumerate(columns) if one.name.startswith(HEADLINE))
    return [*columns[:after], *label_columns(labels), *columns[after:]]


def kept_columns(n_experts: int, *, with_error: bool) -> list[tuple[str, Output]]:
    """Names and outputs of the table that an evaluation keeps, in order; it can be evaluated itself."""
    true, t_eff, m_h = KEPT
    log_g = replace(by_name(HEADLINE), meaning="prediction; NaN counts as the mean label", dtype="float64")
    error = [replace(by_name("log_g_err"), dtype="float64")] if with_error else []
    row = replace(ROW, meaning="row of the test set, from 0")
    ratios = [by_name("snr_norm"), by_name("snr_median")]
    outputs = [row, true, log_g, *error, t_eff, m_h, *ratios, by_name("weight")]
    return [(name, one) for one in outputs for name in one.names(n_experts)]


def markdown(outputs: Iterable[Output]) -> str:
    """The outputs as a table of a Markdown document."""
    lines = ["| column | unit | what it is |", "|---|---|---|"]
    for one in outputs:
        name = f"`{one.name}_0`, `{one.name}_1`, …" if one.per_expert else f"`{one.name}`"
        lines.append(f"| {name} | {one.unit} | {one.meaning} |")
    return "\n".join(lines)
