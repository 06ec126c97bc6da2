"""What `gpu_scoring.py` measured, as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

__all__ = ["failed_engines", "show"]


def show(report: Mapping[str, Any]) -> None:
    """Print a report."""
    click.echo(f"{report['device']}, {report['scoring']['pixels']} pixels")
    _show_scoring(report["scoring"])
    _show_templates(report["template_posterior"])
    for clouds in report["tangent_posterior"].values():
        _show_clouds(clouds)
    for name, posterior in report["posteriors"].items():
        _show_posterior(name, posterior)
    for name, velocities in report["velocities"].items():
        _show_velocities(name, velocities)


def failed_engines(report: Mapping[str, Any]) -> list[str]:
    """Engines that failed, or whose answers differ too much."""
    engines = {
        **report["scoring"]["engines"],
        **report["template_posterior"]["engines"],
        **_of_parts("clouds of", report["tangent_posterior"]),
        **_of_parts("posteriors of", report["posteriors"]),
        **_of_parts("velocities of", report["velocities"]),
    }
    return [name for name, entry in engines.items() if entry.get("failed") or not entry.get("agrees", True)]


def _of_parts(what: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{what} {part}, {name}": engine
        for part, found in parts.items()
        for name, engine in found["engines"].items()
    }


def _show_engine(name: str, engine: Mapping[str, Any], text: str) -> None:
    click.echo(f"  {name:<40}{engine.get('error') or text}")
    for step, seconds in engine.get("steps", {}).items():
        click.echo(f"    {step:<38}{1e6 * min(seconds) / engine['rows']:>12.3f} µs a star")


def _show_scoring(scoring: Mapping[str, Any]) -> None:
    for name, copy in scoring["copies"].items():
        click.echo(f"  {name:<40}{copy['gb_per_second']:>12,.1f} GB/s")
    for name, engine in scoring["engines"].items():
        text = ""
        if "error" not in engine:
            text = f"{engine['rows_per_second']:>12,.0f} spectra/s, {engine['share']:.2f} of {engine['of']}"
        if "r2" in engine:
            text += f", R² {engine['r2']:.3f}, off by {engine['difference']:.1e} dex"
        _show_engine(name, engine, text)


def _show_templates(library: Mapping[str, Any]) -> None:
    if library["engines"]:
        sizes = f"{library['m']} templates of {library['r']} coordinates"
        click.echo(f"posteriors of {library['n']} stars over {sizes}")
    for name, engine in library["engines"].items():
        text = "" if "error" in engine else f"{engine['pairs_per_second'] / 1e9:>12,.2f} pairs/ns"
        _show_engine(name, engine, text)


def _show_clouds(clouds: Mapping[str, Any]) -> None:
    click.echo(f"posteriors over {clouds['m']} clouds of {clouds['t']} tangents in {clouds['r']} coordinates")
    for name, engine in clouds["engines"].items():
        text = ""
        if "error" not in engine:
            text = f"{engine['rows_per_second']:>12,.0f} stars/s, {engine['tflops']:.2f} TFLOP/s, off by "
            text += f"{engine['difference']:.1e} dex"
        _show_engine(name, engine, text)


def _show_posterior(which: str, posterior: Mapping[str, Any]) -> None:
    sizes = f"{posterior['clouds']} clouds in {posterior['coordinates']} coordinates"
    click.echo(f"{which}: {sizes}, each star its own noise")
    for name, engine in posterior["engines"].items():
        text = ""
        if "error" not in engine:
            text = f"{engine['rows_per_second']:>12,.0f} stars/s, R² {engine['r2']:.3f}, off by "
            text += f"{engine['difference']:.1e} dex"
        _show_engine(name, engine, text)


def _show_velocities(which: str, velocities: Mapping[str, Any]) -> None:
    click.echo(
        f"{which}: {velocities['velocities']} velocities, {velocities['components']} components of lines, "
        f"{velocities['templates']} templates, {velocities['directions']} directions"
    )
    for name, engine in velocities["engines"].items():
        text = "" if "error" in engine else f"{engine['rows_per_second']:>12,.0f} stars/s"
        if "of_tolerance" in engine:
            text += f", off by {engine['of_tolerance']:.1e} of the tolerance"
        if "flags_alike" in engine:
            text += f", v_los off by {engine['off_in_errors']:.1e} σ, flags alike {engine['flags_alike']:.4f}"
        _show_engine(name, engine, text)
