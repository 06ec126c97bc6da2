"""Every output of a model, once: its name, unit, meaning, type, and how exactly ONNX must give it.

Design: tables, the ONNX graph, its parity check, the table that an evaluation keeps and docs/outputs.md read this
schema, so that a new output is a line here. Meanings are ASCII, because FITS headers hold nothing else. Labels are an
axis: the columns of any label follow from its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

__all__ = [
    "HEADLINE",
    "INPUTS",
    "KEPT",
    "LABELS",
    "ONNX",
    "POSTERIOR_ONNX",
    "PREDICTIONS",
    "ROW",
    "VELOCITY",
    "Output",
    "TableColumn",
    "by_name",
    "by_onnx",
    "kept_columns",
    "label_columns",
    "label_unit",
    "markdown",
    "prediction_columns",
    "words",
]

Per = Literal["star", "expert", "label"]


@dataclass(frozen=True)
class Output:
    """One output.

    Attributes
    ----------
    name : str
        Name of its column in a table. Where there is one per expert, the number follows after an underscore; where
        there is one per label, the label stands before.
    meaning : str
        What it is, in one sentence without a full stop.
    unit : str
        "" if it has none.
    dtype : str
        Type of the column.
    per : "star", "expert" or "label"
        Whether there is one per star, per expert, or per label other than log g.
    of_posteriors : bool
        Whether only posteriors at the star's own noise give it.
    in_tables : bool
        Whether tables of predictions have it.
    of_blends : bool
        Whether only models that know blends have it.
    onnx : str
        Name in the ONNX graph, and field of a `Prediction`; "" if the graph does not give it.
    tolerance : float or None
        Largest difference of the ONNX graph from the model in float64.
    relative_to : float or None
        Differences are relative to the size of the output, or to this where that is smaller; None if they are not
        relative.
    """

    name: str
    meaning: str
    unit: str = ""
    dtype: str = "float32"
    per: Per = "star"
    of_posteriors: bool = False
    of_blends: bool = False
    in_tables: bool = True
    onnx: str = ""
    tolerance: float | None = None
    relative_to: float | None = None

    def __post_init__(self) -> None:
        if not self.meaning.isascii() or self.meaning.endswith("."):
            raise ValueError(
                f"output {self.name}: a meaning is ASCII without a full stop; found {self.meaning!r}"
            )
        if bool(self.onnx) != (self.tolerance is not None):
            raise ValueError(
                f"output {self.name}: what the ONNX graph gives has a tolerance, and nothing else has"
            )


class TableColumn(NamedTuple):
    """A column of a table: its name, the output it is of, and which expert or label (0 where there is one per star)."""

    name: str
    output: Output
    number: int


HEADLINE = "log_g"
"""The label that every model predicts."""

FILE = Output("file", "index of the input file in the attribute inputs", dtype="int32")
ROW = Output("row", "row of the input file, from 0", dtype="int64")
INPUTS = (FILE, ROW)
"""Which input a row of a table belongs to; `file` only if there are several."""

VELOCITY = (
    Output(
        "v_los", "line-of-sight velocity that was removed, given or fitted, in the frame of the input's wavelengths",
        "km s-1",
    ),
    Output(
        "v_los_err", "1 sigma of the velocity: as given, or half the width of the interval around it that holds 68.3 % "
        "of the fitted posterior", "km s-1",
    ),
)  # fmt: skip
"""What was done about velocities; where they were given or fitted, the error if it is known."""

PREDICTIONS = (
    Output(
        HEADLINE, "surface gravity, log10 of cm s^-2; clipped to the range of the training labels", "dex",
        onnx="log_g", tolerance=1e-4,
    ),
    Output(
        "log_g_err", "calibrated 1 sigma: chosen so that 1 sigma holds 68 % and 1.96 sigma holds 95 % of stars as "
        "nearly as one factor can", "dex", onnx="log_g_err", tolerance=1e-3, relative_to=1e-6,
    ),
    Output(
        "log_g_err_raw", "of templates and posteriors the posterior's own 1 sigma, of linear experts the pixel noise "
        "propagated through them; not calibrated", "dex", onnx="log_g_err_raw", tolerance=1e-3, relative_to=1e-6,
    ),
    Output("", "another label", per="label", of_posteriors=True, onnx="labels", tolerance=1e-3),
    Output(
        "_err", "calibrated 1 sigma of another label", per="label", of_posteriors=True, onnx="label_errors",
        tolerance=1e-3, relative_to=1e-6,
    ),
    Output(
        "_corr", "correlation of the errors of another label and of log_g, -1 to 1", per="label", of_posteriors=True,
        onnx="label_correlations", tolerance=1e-3,
    ),
    Output(
        "scale", "flux over that of the training set", of_posteriors=True, onnx="scale", tolerance=1e-4,
        relative_to=0.0,
    ),
    Output(
        "foreign", "probability that the spectrum is that of no star", of_posteriors=True, onnx="foreign",
        tolerance=1e-4,
    ),
    Output(
        "blend", "probability that the spectrum is the light of two stars; log_g is that of the brighter one",
        of_posteriors=True, of_blends=True, onnx="blend", tolerance=1e-4,
    ),
    Output(
        "weight", "gate weight of an expert; those of a star add up to 1 (of templates: the probability of each bin; "
        "of posteriors the same, up to those of no star and of two)", per="expert", onnx="weights", tolerance=1e-4,
    ),
    Output(
        "expert_log_g", "log g of an expert at the star's noise level; not clipped but by posteriors", "dex",
        per="expert", in_tables=False, onnx="expert_log_g", tolerance=1e-4, relative_to=1.0,
    ),
    Output(
        "expert", "the expert with the largest weight, 3 i(T_eff) + i([M/H]) on the grid of the protocol; -1 without "
        "data", dtype="int16",
    ),
    Output("snr_norm", "norm of flux over norm of error, dominated by sky lines"),
    Output("snr_median", "median of flux over error"),
    Output(
        "chi2", "reduced chi square against the model's principal components (of posteriors: against its space of "
        "spectra and nuisances), about 1 for spectra like the training set", onnx="chi2", tolerance=1e-3,
        relative_to=1e-6,
    ),
    Output(
        "log_level", "natural logarithm of the star's noise level over that of the training set", in_tables=False,
        onnx="log_level", tolerance=1e-4,
    ),
    Output(
        "distance", "what the best point of the space of spectra gains over the best cloud, per coordinate",
        of_posteriors=True, in_tables=False, onnx="distance", tolerance=1e-3, relative_to=1.0,
    ),
    Output(
        "strength", "scale of the flux over its error", of_posteriors=True, in_tables=False, onnx="strength",
        tolerance=1e-4, relative_to=1e-6,
    ),
    Output("flag", "sum of the bits of the flags below; 0 is what you want", dtype="uint32"),
)  # fmt: skip
"""What a model says of a star, in the order of the table. Differences of labels are in units of their errors."""

ONNX = ("log_g", "log_g_err", "weights", "expert_log_g", "log_g_err_raw", "chi2", "log_level")
"""Outputs of the ONNX graph, in its order; other programs may count on it."""

POSTERIOR_ONNX = (
    "distance", "strength", "scale", "foreign", "blend", "labels", "label_errors", "label_correlations"
)  # fmt: skip
"""What the graph of a posterior gives after these; "blend" if it knows blends, the last three if several labels."""

LABELS = {
    "T_eff": ("K", "effective temperature"),
    "M_H": ("dex", "metallicity [M/H]"),
    "a_M": ("dex", "alpha enhancement [a/M]"),
    "C_M": ("dex", "carbon abundance [C/M]"),
}
"""Units and meanings of the labels besides log g."""

KEPT = (
    Output("log_g_true", "surface gravity, label of the test set", "dex", "float64"),
    Output("T_eff", "effective temperature, label of the test set", "K", "float64"),
    Output("M_H", "metallicity [M/H], label of the test set", "dex", "float64"),
)
"""Labels that an evaluation keeps beside its predictions."""


def by_name(name: str) -> Output:
    """The output with this name in tables."""
    return next(one for one in (*INPUTS, *VELOCITY, *PREDICTIONS) if one.name == name)


def by_onnx(name: str) -> Output:
    """The output with this name in the ONNX graph."""
    return next(one for one in PREDICTIONS if one.onnx == name)


def label_unit(label: str) -> str:
    """Unit of a label: K for the effective temperature, dex for all others."""
    return LABELS.get(label, ("dex", ""))[0]


def label_columns(labels: Iterable[str]) -> list[TableColumn]:
    """Value, calibrated error and correlation with log g of labels; log g itself has columns of its own.

    Parameters
    ----------
    labels : iterable of str
        Such as "T_eff" and "M_H".

    Returns
    -------
    list of TableColumn
        For "T_eff": `T_eff` and `T_eff_err` [K], and `T_eff_corr`.
    """
    others = [label for label in labels if label != HEADLINE]
    columns = []
    for number, label in enumerate(others):
        unit, meaning = LABELS.get(label, ("dex", label))
        for one in PREDICTIONS:
            if one.per == "label":
                said = one.meaning.replace("another label", label) if one.name else meaning
                own = replace(one, unit="" if one.name == "_corr" else unit, meaning=said)
                columns.append(TableColumn(f"{label}{one.name}", own, number))
    return columns


def prediction_columns(
    n_experts: int, labels: Sequence[str] | None = None, *, blends: bool = False
) -> list[TableColumn]:
    """What tables of predictions hold of each star, in order.

    Parameters
    ----------
    n_experts : int
    labels : sequence of str, optional
        Labels of a posterior at the star's own noise, log g among them or not; None for every other model.
    blends : bool
        Whether it knows blends.
    """
    columns: list[TableColumn] = []
    for one in PREDICTIONS:
        if not one.in_tables or (one.of_posteriors and labels is None) or (one.of_blends and not blends):
            continue
        if one.per == "label":
            # All columns of a label stand together: they come with the first.
            columns += [] if one.name else label_columns(labels or ())
        elif one.per == "expert":
            columns += [TableColumn(f"{one.name}_{k}", one, k) for k in range(n_experts)]
        else:
            columns.append(TableColumn(one.name, one, 0))
    return columns


def kept_columns(n_experts: int, *, with_error: bool) -> list[TableColumn]:
    """Columns of the table that an evaluation keeps, in order; it can be evaluated itself."""
    true, t_eff, m_h = KEPT
    log_g = replace(by_name(HEADLINE), meaning="prediction; NaN counts as the mean label", dtype="float64")
    error = [replace(by_name("log_g_err"), dtype="float64")] if with_error else []
    row = replace(ROW, meaning="row of the test set, from 0")
    outputs = [row, true, log_g, *error, t_eff, m_h, by_name("snr_norm"), by_name("snr_median")]
    weights = [column for column in prediction_columns(n_experts) if column.output.name == "weight"]
    return [TableColumn(one.name, one, 0) for one in outputs] + weights


def words(output: Output) -> str:
    """Meaning and unit of an output, for the description of a graph."""
    return f"{output.meaning}, {output.unit}" if output.unit else output.meaning


def markdown() -> str:
    """All columns of tables of predictions as a table of a Markdown document."""
    lines = ["| column | unit | what it is |", "|---|---|---|"]
    for one in (*INPUTS, *VELOCITY, *PREDICTIONS):
        if not one.in_tables:
            continue
        names, unit = [one.name], one.unit
        if one.per == "expert":
            names = [f"{one.name}_0", f"{one.name}_1", "…"]
        elif one.per == "label":
            names = [f"{label}{one.name}" for label in LABELS]
            unit = "" if one.name == "_corr" else ", ".join(dict.fromkeys(map(label_unit, LABELS)))
        said = f"{one.meaning}; of posteriors alone" if one.of_posteriors else one.meaning
        lines.append(
            f"| {', '.join(f'`{name}`' if name != '…' else name for name in names)} | {unit} | {said} |"
        )
    return "\n".join(lines)
