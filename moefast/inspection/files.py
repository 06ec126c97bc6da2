"""What is in files of spectra: numbers and words for `moefast inspect`.

Design: one pass over the data, block by block, keeping a few numbers per spectrum; whatever is wrong is counted
and its first rows are named, so that a file can be judged before anything is fitted to or predicted from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefast.core.errors import InputError
from moefast.core.text import counted
from moefast.spectra.oddities import find_oddities
from moefast.spectra.prepared import PreparedShard
from moefast.spectra.quality import Flag, assess, good_pixels
from moefast.spectra.sampling import take_sample
from moefast.spectra.source import Block
from moefast.spectra.spectrum_set import SpectrumSet

__all__ = ["BLOCK_ROWS", "format_text", "spread_runs", "summarise"]

PERCENTILES = (5, 25, 50, 75, 95)
BLOCK_ROWS = 2048
"""Spectra that are looked at together."""
FLAGS = tuple(str(flag.name) for flag in (Flag.NO_DATA, Flag.FEW_GOOD_PIXELS, Flag.BAD_ERROR))
"""Flags that are counted: those that a spectrum has before any model sees it."""
_FIRST_BAD = 10
_MOST_FILES = 12
_NORMALISED = (0.8, 1.25)
_LABELS = {"T_eff": "K", "log_g": "dex", "M_H": "dex", "a_M": "dex", "C_M": "dex"}


def _median_of(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def _percentiles(values: np.ndarray) -> dict[str, float] | None:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    return {str(p): float(v) for p, v in zip(PERCENTILES, np.percentile(finite, PERCENTILES), strict=True)}


def _files(spectra: SpectrumSet) -> list[dict[str, Any]]:
    files = []
    for shard in spectra.shards:
        ranges: dict[str, Any] = {}
        problem = ""
        params: dict[str, np.ndarray] = {}
        try:
            params = shard.params()
        except InputError as error:
            problem = str(error)
        shard.close()
        for name, values in params.items():
            if values.dtype.kind not in "iuf":
                continue
            finite = values[np.isfinite(values)]
            ranges[name] = {
                "unit": _LABELS.get(name, ""),
                # Whole numbers as they are: identifiers are longer than what a real number holds.
                "minimum": finite.min().item() if len(finite) else None,
                "maximum": finite.max().item() if len(finite) else None,
                "not_finite": int(len(values) - len(finite)),
            }
        files.append(
            {
                "path": str(shard.path),
                "rows": shard.n_rows,
                "arrays": {
                    name: {"dtype": str(shard.dtypes[name]), "layout": shard.layout[name]}
                    for name in shard.arrays
                },
                "columns": list(shard.columns),
                "unreadable_columns": dict(shard.unreadable),
                "ranges": ranges,
                "problem": problem,
                "attributes": {name: _native(value) for name, value in shard.attrs.items()},
            }
        )
    return files


def _native(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def summarise(
    spectra: SpectrumSet, *, max_rows: int | None = None, reference: NDArray | None = None
) -> dict[str, Any]:
    """Describe a set of spectra.

    Parameters
    ----------
    spectra : SpectrumSet
        The spectra.
    max_rows : int, optional
        Look at the flux of that many rows at most, taken in runs spread evenly over the set.
    reference : array of shape (p,), optional
        Typical spectrum of what a model was fitted on, on the grid of the set; without it slopes are not looked at.

    Returns
    -------
    dict
        Plain Python values that JSON can hold:

        - ``files``: per file its rows, arrays with dtype and layout, columns and their ranges, and the
          ``problem`` with reading them ("" if none);
        - ``rows``, ``rows_examined``, ``rows_unreadable``;
        - ``wave``: ``pixels``, ``first``, ``last`` and ``step`` in Å;
        - ``snr_norm``, ``snr_median``: percentiles 5, 25, 50, 75, 95, or None;
        - ``flags``: rows with each flag;
        - ``bad_rows``: the first rows that carry a flag, with its names;
        - ``masked_fraction``, ``bad_fraction``: share of pixels masked, and not good for any reason;
        - ``flux_median``: median over the rows of the median flux (1 for normalised flux), ``error_median``
          likewise;
        - ``oddities``: what is odd about the spectra as a whole, in words (`moefast.spectra.oddities`);
        - ``failures``: what could not be read.
    """
    n_failures = len(spectra.failures)
    counts = _Counts()
    for run in spread_runs(spectra.n_rows, max_rows):
        for block in spectra.blocks(BLOCK_ROWS, rows=run, on_error="skip"):
            counts.add(block, spectra)
    pixels = max(1, counts.n_rows * spectra.n_pixels)
    wave = spectra.wave
    scored = "noisy" if all("noisy" in shard.arrays for shard in spectra.shards) else "flux"
    # Stars of surveys move.
    at_rest = not any(isinstance(shard, PreparedShard) and shard.observed for shard in spectra.shards)
    oddities = find_oddities(take_sample(spectra), reference, array=scored, at_rest=at_rest)
    return {
        "files": _files(spectra),
        "rows": spectra.n_rows,
        "rows_examined": counts.n_rows,
        "rows_unreadable": sum(f.rows[1] - f.rows[0] for f in spectra.failures[n_failures:] if f.rows),
        "wave": {
            "pixels": len(wave),
            "first": float(wave[0]),
            "last": float(wave[-1]),
            "step": float((wave[-1] - wave[0]) / max(1, len(wave) - 1)),
        },
        "snr_norm": _percentiles(np.concatenate(counts.snr_norm or [np.empty(0)])),
        "snr_median": _percentiles(np.concatenate(counts.snr_median or [np.empty(0)])),
        "flags": counts.flags,
        "bad_rows": counts.bad_rows,
        "masked_fraction": counts.n_masked / pixels,
        "bad_fraction": 1 - counts.n_good / pixels if counts.n_rows else 0.0,
        "flux_median": _median_of(np.array(counts.flux_level)),
        "error_median": _median_of(np.array(counts.error_level)),
        "oddities": [odd.words for odd in oddities],
        "failures": [
            {"path": str(failure.path), "rows": failure.rows, "message": str(failure.error)}
            for failure in spectra.failures
        ],
    }


@dataclass
class _Counts:
    """What is counted of the spectra that are looked at: per row, per flag, and medians of some rows of each block."""

    snr_norm: list[NDArray] = field(default_factory=list)
    snr_median: list[NDArray] = field(default_factory=list)
    flux_level: list[float] = field(default_factory=list)
    error_level: list[float] = field(default_factory=list)
    flags: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FLAGS, 0))
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    n_rows: int = 0
    n_good: int = 0
    n_masked: int = 0

    def add(self, block: Block, spectra: SpectrumSet) -> None:
        """Count a block of the spectra."""
        quality = assess(
            block.flux, block.error, good_pixels(block.flux, block.error, block.mask), block.mask
        )
        self.snr_norm.append(quality.snr_norm)
        self.snr_median.append(quality.snr_median)
        self.n_good += int(quality.n_good.sum())
        self.n_rows += len(block)
        self.n_masked += 0 if block.mask is None else int(block.mask.sum())
        for flag in FLAGS:
            self.flags[flag] += int(np.count_nonzero(quality.flag & np.uint32(Flag[flag])))
        path = str(spectra.shards[block.shard].path)
        first_row = block.first_row - int(spectra.first_rows[block.shard])
        for i in np.flatnonzero(quality.flag)[: _FIRST_BAD - len(self.bad_rows)]:
            names = [name for name in FLAGS if quality.flag[i] & np.uint32(Flag[name])]
            self.bad_rows.append({"file": path, "row": int(first_row + i), "flags": names})
        some = slice(None, None, max(1, len(block) // 64))
        for array, levels in ((block.flux, self.flux_level), (block.error, self.error_level)):
            for row in array[some]:
                median = _median_of(row)
                levels.append(np.nan if median is None else median)


def spread_runs(n_rows: int, max_rows: int | None) -> list[tuple[int, int]]:
    """Runs of rows to look at: all, or up to 16 of equal length."""
    if max_rows is None or max_rows >= n_rows:
        return [(0, n_rows)]
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, found {max_rows}")
    n_runs = min(16, max_rows)
    length = max_rows // n_runs
    starts = np.linspace(0, n_rows - length, n_runs).astype(int)
    return [(int(start), int(start) + length) for start in starts]


def format_text(facts: Mapping[str, Any]) -> str:
    """What `summarise` returns, for people."""
    files, wave = facts["files"], facts["wave"]
    several = len(files) > 1
    lines = [
        f"{counted(facts['rows'], 'spectrum')} in {counted(len(files), 'file')}, {wave['pixels']} pixels "
        f"{wave['first']:.3f}-{wave['last']:.3f} Å, mean step {wave['step']:.5f} Å"
    ]
    if facts["rows_examined"] != facts["rows"]:
        lines[0] += f"; looked at {facts['rows_examined']:,} of them"
    lines += _format_files(files) + _format_ranges(files)
    lines += ["", "  signal to noise  " + "".join(f"{p:>7} %" for p in PERCENTILES)]
    for name in ("snr_norm", "snr_median"):
        values = facts[name]
        row = "".join(f"{values[str(p)]:>9.2f}" for p in PERCENTILES) if values else "  no good pixel"
        lines.append(f"  {name:<17}{row}")
    bad = ", ".join(f"{name} {count:,}" for name, count in facts["flags"].items() if count)
    lines += ["", f"  bad rows         {bad or 'none'}"]
    for row in facts["bad_rows"]:
        where = f"{row['file']} " if several else ""
        lines.append(f"    {where}row {row['row']}: {', '.join(row['flags'])}")
    if facts["bad_rows"] and len(facts["bad_rows"]) >= _FIRST_BAD:
        lines.append("    … the first of them")
    share = f"{_share(facts['bad_fraction'])} not usable, {_share(facts['masked_fraction'])} masked"
    lines.append(f"  pixels           {share}")
    flux, error = facts["flux_median"], facts["error_median"]
    if flux is not None:
        level = "" if error is None else f", median error {error:.4g}"
        lines.append(f"  level            median flux {flux:.4g}{level}")
        if not _NORMALISED[0] <= flux <= _NORMALISED[1]:
            lines.append(
                "  note             flux is not normalised to a median near 1, which only posteriors allow: divide "
                "flux and error of each spectrum by its median"
            )
    for words in facts["oddities"]:
        lines += wrap(words, 118, initial_indent="  odd              ", subsequent_indent=19 * " ")
    for failure in facts["failures"]:
        rows = f"rows {failure['rows'][0]} to {failure['rows'][1] - 1}: " if failure["rows"] else ""
        lines.append(f"  cannot be read   {rows}{failure['message']}")
    return "\n".join(lines)


def _share(fraction: float) -> str:
    return "none" if fraction == 0 else "all" if fraction == 1 else f"{100 * fraction:.2g} %"


def _format_files(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """Paths with rows, and the arrays: once where all files store them alike."""
    kinds = [_format_arrays(file["arrays"]) for file in files]
    alike = len(set(kinds)) == 1
    shown = files[:_MOST_FILES]
    width = max(len(f"{file['rows']:,}") for file in shown)
    lines = []
    for file, kind in zip(shown, kinds, strict=False):
        lines.append(f"  {file['rows']:>{width},} in {file['path']}" + ("" if alike else f": {kind}"))
        if file["problem"]:
            lines.append(f"    params cannot be read: {file['problem']}")
        lines += [f"    column {name} {why}" for name, why in file["unreadable_columns"].items()]
    if len(files) > len(shown):
        lines.append(f"  … and {counted(len(files) - len(shown), 'more file')}")
    if alike:
        lines.append(f"  arrays           {kinds[0]}")
    return lines


def _format_arrays(arrays: Mapping[str, Mapping[str, str]]) -> str:
    """`flux, error (float32, contiguous); mask (uint8, chunked)`."""
    groups: dict[str, list[str]] = {}
    for name, array in arrays.items():
        groups.setdefault(f"({array['dtype']}, {array['layout']})", []).append(name)
    return "; ".join(f"{', '.join(names)} {kind}" for kind, names in groups.items())


def _format_ranges(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """Least and largest value of each column over all files; text columns by name."""
    merged: dict[str, list[Mapping[str, Any]]] = {}
    for file in files:
        for name, values in file["ranges"].items():
            merged.setdefault(name, []).append(values)
    texts = dict.fromkeys(name for file in files for name in file["columns"] if name not in merged)
    if not merged and not texts:
        return ["  params           none, so no labels"]
    rows = []
    for name, parts in merged.items():
        lows = [part["minimum"] for part in parts if part["minimum"] is not None]
        highs = [part["maximum"] for part in parts if part["maximum"] is not None]
        broken = sum(part["not_finite"] for part in parts)
        notes = [f"{broken:,} not finite"] if broken else []
        if len(parts) < len(files):
            notes.append(f"in {len(parts)} of {len(files)} files")
        low, high = (_in_words(min(lows)), _in_words(max(highs))) if lows else ("-", "-")
        rows.append((name, low, high, parts[0]["unit"], "; ".join(notes)))
    width = max(15, *(len(name) for name, *_ in rows)) if rows else 15
    of_numbers = (
        max(12, *(len(number) + 2 for _, low, high, *_ in rows for number in (low, high))) if rows else 12
    )
    lines = ["", f"  {'params':<{width}}  {'least':>{of_numbers}}{'largest':>{of_numbers}}"] if rows else []
    for name, low, high, unit, note in rows:
        lines.append(f"  {name:<{width}}  {low:>{of_numbers}}{high:>{of_numbers}} {unit:<3} {note}".rstrip())
    if texts:
        lines.append(f"  {'text':<{width}}  {', '.join(texts)}")
    return lines


def _in_words(number: float) -> str:
    """A whole number with all its digits, a real one with six."""
    return str(number) if isinstance(number, int) else f"{number:.6g}"
