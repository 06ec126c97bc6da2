"""A benchmark for people: a table with R² in every row that has an answer, and a picture."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from moefast.pages.palette import DARK, LIGHT, SERIES

__all__ = ["format_text", "picture"]

_TASKS = {
    "score": "score: flux and error to log g",
    "fit": "fit: nine ridges, three penalties, three folds, hold-out errors",
}
_SHORT = {"score": "score: flux and error to log g", "fit": "fit: nine ridges, path, folds"}
_OWN, _OTHER, _FLOOR, _INK, _FAINT = (
    LIGHT["own"], DARK["muted"], LIGHT["grid"], LIGHT["ink"], LIGHT["muted"],
)  # fmt: skip


def measured(result: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """Rows of a task that have a time and a right answer, fastest first."""
    rows = [
        row for row in result["results"] if row["task"] == task and "seconds" in row and "wrong" not in row
    ]
    return sorted(rows, key=lambda row: -row["spectra_per_second"])


def tasks_of(result: Mapping[str, Any]) -> list[str]:
    """Tasks that the result has rows of, in the order of the tables."""
    return [task for task in _TASKS if any(row["task"] == task for row in result["results"])]


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def format_text(result: Mapping[str, Any]) -> str:
    """The table.

    Parameters
    ----------
    result : mapping
        From `moefast.benchmarks.run.benchmark`.
    """
    environment = result["environment"]
    lines = [
        f"moefast {environment['moefast']}, {environment['cpu']}, {environment['cores']} cores"
        + "".join(f", {device}" for device in environment["cuda_devices"])
        + f", {environment['date']}; model {result['model_sha256'][:12]}"
    ]
    if environment["load_before"] and environment["load_before"] > 0.5:
        lines.append(f"the machine was not idle: load {environment['load_before']:g} before the first run")
    lines.append("floors: " + ", ".join(_floors(result)))
    for task in tasks_of(result):
        lines += ["", *_table(result, task)]
    if result["growth"]:
        lines += ["", *_growth(result)]
    return "\n".join(lines)


def _floors(result: Mapping[str, Any]) -> Iterator[str]:
    for name, floor in result["floors"].items():
        if "rate" in floor:
            scale, unit = (1e9, "GB/s") if floor["unit"] == "B/s" else (1e9, "GFLOP/s")
            yield f"{name} {floor['rate'] / scale:.3g} {unit}"


def _table(result: Mapping[str, Any], task: str) -> Iterator[str]:
    rows = measured(result, task)
    everything = [row for row in result["results"] if row["task"] == task]
    titles = {
        row["engine"]: row["title"] if row["n"] == result["n"] else f"{row['title']}, {row['n']:,} of them"
        for row in everything
    }
    width = max(map(len, titles.values()))
    yield f"{_TASKS[task]}; n = {result['n']:,}"
    yield (
        f"{'engine':<{width}}  {'spectra/s':>10}  {'median':>10}  {'R²':>6}  {'peak memory':>11}  "
        f"{'beyond data':>11}  of its floor"
    )
    for row in rows:
        r2 = "" if row["r2"] is None else f"{row['r2']:.3f}"
        share = f"{row['fraction_of_floor']:.2f} of {row['floor']}" if "floor" in row else ""
        yield (
            f"{titles[row['engine']]:<{width}}  {row['spectra_per_second']:>10,.0f}  "
            f"{row['spectra_per_second_median']:>10,.0f}  {r2:>6}  {size(row['peak_bytes']):>11}  "
            f"{size(row['working_bytes']):>11}  {share}"
        ).rstrip()
    for row in everything:
        if "wrong" in row:
            yield f"{row['title']:<{width}}  WRONG ANSWER, not timed: {row['wrong']}"
    for row in everything:
        if "unavailable" in row:
            yield f"{row['title']:<{width}}  not measured: {row['unavailable']}"
    if task == "score":
        yield "Of the engines in memory, moefast and ONNX Runtime give errors and χ² too; others that do say so."


def _growth(result: Mapping[str, Any]) -> Iterator[str]:
    width = max(len(name) for name in result["growth"])
    yield "growth: seconds at n; time ~ n^a, memory beyond the data ~ n^b; with ~ it is extrapolated, not measured"
    for name, curve in result["growth"].items():
        points = [f"{row['n']:,}: {min(row['seconds']):.3g}" for row in curve["rows"]]
        points += [f"{point['n']:,}: ~{point['seconds']:.3g}" for point in curve["extrapolated"]]
        exponents = [
            f"{letter} = {curve[key]:.2f}"
            for letter, key in (("a", "time_exponent"), ("b", "memory_exponent"))
            if curve[key] is not None
        ]
        yield f"{name:<{width}}  {', '.join([*points, *exponents])}"
    reasons: dict[str, list[str]] = {}
    for name, curve in result["growth"].items():
        for number, reason in curve["not_measured"].items():
            reasons.setdefault(f"{int(number):,} not measured: {reason}", []).append(name)
    for reason, names in reasons.items():
        yield f"{reason} ({', '.join(names)})"


def picture(result: Mapping[str, Any]) -> bytes:
    """Throughput with R² beside, and growth curves, as PNG.

    Parameters
    ----------
    result : mapping
        From `moefast.benchmarks.run.benchmark`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = [task for task in tasks_of(result) if measured(result, task)]
    columns = 2 if result["growth"] else 1
    heights = [1.2 + 0.3 * len(measured(result, task)) for task in tasks] or [1.0]
    heights = [max(3.2, height) for height in heights] if result["growth"] else heights
    figure = Figure(figsize=(7.4 * columns - 0.6 * (columns - 1), sum(heights) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(max(1, len(tasks)), columns, height_ratios=heights)
    for line, task in enumerate(tasks):
        _bars(figure.add_subplot(grid[line, 0]), result, task)
        if result["growth"]:
            _curves(figure.add_subplot(grid[line, 1]), result, task)
    environment = result["environment"]
    machine = ", ".join([f"{environment['cpu']}, {environment['cores']} cores", *environment["cuda_devices"]])
    figure.suptitle(
        f"moefast {environment['moefast']} on {machine}, {environment['date']}", fontsize=9, color=_FAINT, x=0.01,
        ha="left",
    )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _bars(axes: Any, result: Mapping[str, Any], task: str) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Patch

    rows = measured(result, task)[::-1]
    rates = [row["spectra_per_second"] for row in rows]
    for place, row in enumerate(rows):
        own = row["engine"].startswith(("moefast", "predict"))
        colour = _FLOOR if row["r2"] is None else _OWN if own else _OTHER
        rate = row["spectra_per_second"]
        axes.barh(place, rate, color=colour, height=0.72)
        samples = [row["n"] / second for second in row["seconds"]]
        axes.plot([statistics.median(samples)], [place], "|", color=_INK, markersize=9, markeredgewidth=1.2)
        text = f" {rate:,.0f}"
        axes.text(rate, place, text, va="center", ha="left", fontsize=8, color=_INK)
        r2 = "no log g" if row["r2"] is None else f"{row['r2']:.3f}"
        axes.text(
            1.01, place, r2, va="center", ha="left", fontsize=8, transform=axes.get_yaxis_transform(),
            color=_FAINT if row["r2"] is None else _INK, fontweight="bold" if own and row["r2"] is not None else None,
        )  # fmt: skip
    axes.text(
        1.01,
        1.0,
        "R²",
        transform=axes.transAxes,
        fontsize=9,
        color=_INK,
        va="bottom",
        ha="left",
        fontweight="bold",
    )
    scale = ""
    if max(rates) < 50 * min(rates):
        axes.set_xlim(0, 1.18 * max(rates))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    else:
        scale = ", logarithmic"
        axes.set_xscale("log")
        axes.set_xlim(min(rates) / 2.5, max(rates) * 6)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(f"spectra per second{scale} (bar: best, tick: median)", fontsize=8)
    axes.set_title(f"{_SHORT[task]}, n = {result['n']:,}", fontsize=10, loc="left", color=_INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="#eeeeee")
    kinds = {"moefast": _OWN, "others": _OTHER, "floors, without log g": _FLOOR}
    shown = {tuple(bar.get_facecolor()) for bar in axes.patches}
    axes.legend(
        handles=[Patch(color=colour, label=name) for name, colour in kinds.items() if to_rgba(colour) in shown],
        loc="lower right", fontsize=8, frameon=False,
    )  # fmt: skip


def _curves(axes: Any, result: Mapping[str, Any], task: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    sizes: set[int] = set()
    titles = {(row["task"], row["engine"]): row for row in result["results"]}
    ends = []
    place = 0
    for name, curve in result["growth"].items():
        its_task, engine = name.split(" ", 1)
        if its_task != task or not curve["rows"]:
            continue
        row = titles[its_task, engine]
        colour, place = SERIES[place % len(SERIES)], place + 1
        n = [point["n"] for point in curve["rows"]]
        seconds = [min(point["seconds"]) for point in curve["rows"]]
        own = engine.startswith(("moefast", "predict"))
        sizes.update(n, (point["n"] for point in curve["extrapolated"]))
        axes.plot(n, seconds, "o-", color=colour, markersize=3.5, linewidth=2.0 if own else 1.0)
        beyond = [(point["n"], point["seconds"]) for point in curve["extrapolated"]]
        if beyond:
            xs, ys = zip((n[-1], seconds[-1]), *beyond, strict=True)
            axes.plot(xs, ys, ":", color=colour, linewidth=1.2)
            axes.plot(xs[1:], ys[1:], "o", color=colour, markersize=3.5, markerfacecolor="white")
        last = beyond[-1][1] if beyond else seconds[-1]
        exponent = "" if curve["time_exponent"] is None else f", n^{curve['time_exponent']:.2f}"
        ends.append((last, f"{row['title']}{exponent}", colour))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(sizes)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("spectra n (open circles: extrapolated)", fontsize=8)
    axes.set_ylabel("seconds", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_title("growth", fontsize=10, loc="left", color=_INK)
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    # Names in the order of the lines' ends, so that each is found beside its line.
    for place, (_, text, colour) in enumerate(sorted(ends, reverse=True)):
        axes.text(
            1.02, 0.97 - place / max(11, len(ends)), text, transform=axes.transAxes, fontsize=8, color=colour,
            va="top", ha="left",
        )  # fmt: skip
