"""The folder of an evaluation: its report as numbers, text, pages and pictures, complete or absent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moefast.core.atomic import (
    partial_folder,
    publish_folder,
    recover_folder,
    refuse_impossible,
    remove_quietly,
    synchronise_folder,
    write_atomically,
    write_json,
)
from moefast.core.errors import OutputError
from moefast.core.progress import StageProgress
from moefast.core.records import as_entries, sealed
from moefast.core.version import __version__
from moefast.protocol.evaluate import Evaluation
from moefast.protocol.milestones.verdicts import Judgement
from moefast.protocol.predictions import write_kept
from moefast.protocol.report_parts import Report
from moefast.protocol.report_text import format_text

__all__ = ["REPORT_FILES", "check_report", "check_report_folder", "write_report"]


REPORT_FILES = (
    "report.json",
    "report.txt",
    "predictions.h5",
    "run.json",
    "report.html",
    "report.png",
    "figures",
)
"""What a report folder holds; the last three are pictures."""

_PICTURES = 3


def check_report_folder(folder: str | Path, overwrite: bool) -> None:
    """Refuse a folder that holds a report already: known before the evaluation, not after.

    Raises
    ------
    OutputError
    """
    refuse_impossible(Path(folder))
    recover_folder(Path(folder))
    check_report(Path(folder), overwrite)


def check_report(target: Path, overwrite: bool) -> None:
    """Refuse a folder that holds a report which is not to be replaced.

    Raises
    ------
    OutputError
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file; name a folder for the report")
    there = [name for name in REPORT_FILES if (target / name).exists()]
    if there and not overwrite:
        raise OutputError(f"{target / there[0]}: exists already; choose another folder or use --overwrite")


def write_report(
    evaluation: Evaluation,
    folder: str | Path,
    *,
    pictures: bool = True,
    overwrite: bool = False,
    judged: Judgement | None = None,
    progress: StageProgress | None = None,
) -> list[Path]:
    """Write the report to a folder, which is made if need be.

    report.json (the numbers), report.txt, predictions.h5 (every star, for `moefast compare`) and run.json (throughput,
    device, command); report.html (all figures and tables in one file), report.png (the main figures) and figures/
    (each by itself).

    Parameters
    ----------
    evaluation : Evaluation
    folder : path
    pictures : bool
        Whether to draw: the last three of `REPORT_FILES`. Drawing takes a few seconds.
    overwrite : bool
        Whether a report may be replaced; pictures of it that are not drawn again are removed.
    judged : Judgement, optional
        What the evaluation says about the milestones, from `moefast.protocol.milestones.judge.judge_alone`: a table
        more in report.txt and report.html.
    progress : callable, optional
        Called with "pictures", those drawn and those in all.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    OutputError
        A report is there already, or the folder cannot be written.
    """
    check_report_folder(folder, overwrite)
    target = Path(folder)
    report, run = evaluation.record, evaluation.run
    data = report.data_set
    attrs = {
        "moefast_version": __version__,
        "subject": report.model["name"],
        "subject_sha256": report.model["sha256"],
        "input_sha256": data.fingerprint,
        "data_set": data.name,
        "noise": data.noise,
        "noise_level": data.noise_level,
        "noise_seed": data.noise_seed,
        "expert_grid": as_entries(report.routing.grid) if report.routing else None,
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target}: cannot be made ({error.strerror})") from error
    # All of it or nothing: an old report must not stand beside new predictions.
    partial = partial_folder(target)
    try:
        write_kept(partial / "predictions.h5", evaluation.stars, attrs)
        write_atomically(partial / "report.txt", (format_text(report, run, judged) + "\n").encode())
        write_atomically(
            partial / "run.json", (json.dumps(run, indent=1, ensure_ascii=False) + "\n").encode()
        )
        write_json(sealed(as_entries(report)), partial / "report.json")
        if pictures:
            _draw(report, run, judged, partial, progress or (lambda *_: None))
        _publish(partial, target, overwrite)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        remove_quietly(partial)
    return [target / name for name in (REPORT_FILES if pictures else REPORT_FILES[:-_PICTURES])]


def _publish(partial: Path, target: Path, overwrite: bool) -> None:
    """Give a report its folder. What else lies there is kept, and then the files come one by one, report.json last."""
    check_report(target, overwrite)
    if not target.exists() or _holds_a_report_alone(target):
        publish_folder(partial, target, overwrite=True)
        return
    (target / "report.json").unlink(missing_ok=True)
    for name in REPORT_FILES:
        _remove(target / name)
    for item in sorted(partial.iterdir(), key=lambda item: item.name == "report.json"):
        if item.is_dir() and (target / item.name).exists():
            for picture in item.iterdir():
                picture.replace(target / item.name / picture.name)
        else:
            item.replace(target / item.name)
    synchronise_folder(target)


def _holds_a_report_alone(folder: Path) -> bool:
    from moefast.protocol.figures import FIGURES

    pictures = {f"{name}.png" for name in FIGURES}
    return all(
        item.name in REPORT_FILES
        and (not item.is_dir() or (item.name == "figures" and {p.name for p in item.iterdir()} <= pictures))
        for item in folder.iterdir()
    )


def _draw(
    report: Report, run: Mapping[str, Any], judged: Judgement | None, target: Path,
    progress: StageProgress,
) -> None:  # fmt: skip
    from moefast.protocol.figures import FIGURES, overview, png
    from moefast.protocol.html import write_page

    try:
        (target / "figures").mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target / 'figures'}: cannot be made ({error.strerror})") from error
    names = [name for name, drawing in FIGURES.items() if drawing.exists(report)]
    # The page draws all of them again.
    n_steps = 2 * len(names) + 1
    for done, name in enumerate(names):
        progress("pictures", done, n_steps)
        png(report, name, target / "figures" / f"{name}.png")
    progress("pictures", len(names), n_steps)
    overview(report, target / "report.png")
    progress("pictures", len(names) + 1, n_steps)
    write_page(report, run, target / "report.html", judged)
    progress("pictures", n_steps, n_steps)


def _remove(path: Path) -> None:
    """Remove a picture, or the folder of them; only what a report holds."""
    from moefast.protocol.figures import FIGURES

    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for name in FIGURES:
        (path / f"{name}.png").unlink(missing_ok=True)
    if not any(path.iterdir()):
        path.rmdir()
