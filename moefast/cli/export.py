"""The command `moefast export`."""

from __future__ import annotations

from pathlib import Path

import click

from moefast.cli.messages import tell_result
from moefast.cli.options import EXPERT, OVERWRITE, talk
from moefast.cli.swapped import swapped_told
from moefast.core.atomic import refuse_taken
from moefast.core.progress import ProgressLine

__all__ = ["export"]


@click.command(short_help="Write a model as one ONNX file.")
@click.argument("model", metavar="MODEL")
@click.option("-o", "--out", required=True, type=click.Path(dir_okay=False), help="ONNX file to write.")
@click.option("--part", default="mixture", show_default=True, help="mixture, gate, or expert-0, expert-1, …")
@click.option(
    "--half", is_flag=True, help="Products of a network in half precision, for GPUs that are faster in it."
)
@EXPERT
@OVERWRITE
@talk
@swapped_told
def export(model: str, out: str, part: str, half: bool, overwrite: bool, quiet: bool) -> None:
    """Write a model folder, or a part of it, as one ONNX file, verified against the model first.

    \b
        moefast export observed -o log_g.onnx
        moefast export model/ -o gate.onnx --part gate

    Inputs flux and error (n, pixels) float32; outputs log_g, log_g_err, weights, expert_log_g and more. The file
    runs in plain ONNX Runtime. MODEL is a model folder, or a shipped model: observed, z0 or survey. What
    half precision costs in R² is measured by moefast evaluate TEST -m OUT.
    """
    from moefast.export import export_model
    from moefast.model import Model

    refuse_taken(out, overwrite=overwrite)
    chosen = Model.load(model)
    parts = ["mixture", "gate", *(f"expert-{k}" for k in range(chosen.mixture.n_experts))]
    if part not in parts:
        raise click.BadParameter(f"{part!r} is none of {', '.join(parts)}", param_hint="--part")
    with ProgressLine(quiet) as progress:
        progress.doing("export: building the graph and comparing it with the model")
        differences = export_model(
            chosen.mixture, out, part=part, metadata={"recipe": chosen.manifest["recipe"]}, half=half,
            overwrite=overwrite,
        )  # fmt: skip
    size = Path(out).stat().st_size / 1e6
    largest = ", ".join(
        f"{name} {value:.1e}" for name, value in differences.items() if isinstance(value, float)
    )
    tell_result(
        f"{out}: {part}, {size:.1f} MB; largest difference from the model in float64: {largest}", quiet=quiet
    )
