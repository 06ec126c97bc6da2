"""The campaigns: each makes its cases from a seed and judges them.

Design: every campaign works on a hundred simulated spectra and the shipped model. Right is what the undisturbed command
gives, bit for bit in the columns of the table.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from moefast.benchmarks.faults.case import Case, judge, run_command
from moefast.core import watched
from moefast.core.errors import MoefastError
from moefast.model import shipped_path
from moefast.scoring import predict
from moefast.simulate import simulate_file
from moefast.spectra.tables import read_table

__all__ = ["CAMPAIGNS", "Ground", "prepare"]

N_SPECTRA = 100
SUFFIXES = (".h5", ".parquet", ".fits")


@dataclass(frozen=True)
class Ground:
    """What all campaigns need: a folder, a file of spectra, and the table that is right for it."""

    folder: Path
    spectra: Path
    table: dict[str, np.ndarray]

    def fresh(self) -> Path:
        """An empty folder for one case."""
        place = self.folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place

    def is_right(self, path: Path) -> bool:
        """Whether a table is the right one."""
        try:
            columns, _ = read_table(path)
        except MoefastError:
            return False
        return columns.keys() == self.table.keys() and all(
            np.array_equal(columns[name], values, equal_nan=values.dtype.kind == "f")
            for name, values in self.table.items()
        )


def prepare(folder: Path) -> Ground:
    """Simulate the spectra, predict them undisturbed, and load all code that the cases will need."""
    spectra = folder / "spectra.h5"
    simulate_file(spectra, N_SPECTRA, seed=1)
    for suffix in SUFFIXES:
        predict(spectra, None, folder / f"right{suffix}", backend="cpu")
    return Ground(folder, spectra, read_table(folder / "right.h5")[0])


def failed_writes(ground: Ground, n: int, seed: int) -> Iterator[Case]:
    """EIO or ENOSPC at one write, fsync, rename, link or close of `predict`, or a disk that is full at one byte."""
    rng = np.random.default_rng(seed)
    calls = ("write", "fsync", "replace", "link", "close")
    for k in range(n):
        place, suffix = ground.fresh(), SUFFIXES[k % len(SUFFIXES)]
        out = place / f"t{suffix}"
        number = int(rng.choice([errno.EIO, errno.ENOSPC]))
        if suffix == ".h5":
            position = int(rng.integers(1, 60))
            name, first = (
                f"call {position} of {suffix}: {errno.errorcode[number]}",
                _failing(calls, position, number),
            )
        else:
            share = float(rng.uniform(0, 1))
            size = int(share * (ground.folder / f"right{suffix}").stat().st_size)
            name, first = f"{suffix} full at byte {size}", _full(size)
        ended = run_command(
            ["predict", str(ground.spectra), "-q", "-o", str(out), "--backend", "cpu"],
            place / "log",
            first=first,
        )
        yield judge("failed writes", name, ended, out.exists, partial(ground.is_right, out))


def _failing(calls: tuple[str, ...], position: int, number: int) -> Callable[[], None]:
    """Make one call of the file layer fail, in the process that calls this."""

    def arrange() -> None:
        made = [0]

        def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                made[0] += 1
                if made[0] == position:
                    if name == "close":
                        real(*arguments)
                    raise OSError(number, os.strerror(number))
                return real(*arguments, **named)

            return call

        for name in calls:
            setattr(watched.os, name, wrap(name, getattr(os, name)))

    return arrange


def _full(size: int) -> Callable[[], None]:
    def arrange() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        # The log is short; what does not fit in it is not needed.

    return arrange


def kills(ground: Ground, n: int, seed: int) -> Iterator[Case]:
    """SIGKILL or SIGTERM at any moment of `predict`; the same command must succeed afterwards and clear up."""
    rng = np.random.default_rng(seed)
    for k in range(n):
        place = ground.fresh()
        suffix = SUFFIXES[k % len(SUFFIXES)]
        out = place / f"t{suffix}"
        number = signal.SIGKILL if k % 2 else signal.SIGTERM
        moment = float(rng.uniform(0.0, 0.6))
        command = ["predict", str(ground.spectra), "-q", "-o", str(out), "--backend", "cpu"]
        log = ground.folder / "log"
        ended = run_command(command, log, kill=(moment, number))
        name = f"{signal.Signals(number).name} after {moment:.3f} s, {suffix}"
        case = judge("kills", name, ended, out.exists, partial(ground.is_right, out))
        if case.outcome in {"right", "refused"}:
            again = run_command([*command, "--overwrite"], log)
            left = sorted(p.name for p in place.iterdir())
            if again.code != 0 or not ground.is_right(out) or left != [out.name]:
                case = Case(
                    "kills", name, "wrong", f"afterwards: code {again.code}, left {left}: {again.said[-500:]}"
                )
        yield case


def damaged_files(ground: Ground, n: int, seed: int) -> Iterator[Case]:
    """Flipped, zeroed or lost bytes of a file of spectra, outside the values themselves."""
    rng = np.random.default_rng(seed)
    content = ground.spectra.read_bytes()
    allowed = _metadata_bytes(ground.spectra, len(content))
    for _ in range(n):
        place = ground.fresh()
        path, out = place / "spectra.h5", place / "t.h5"
        damaged = bytearray(content)
        kind = str(rng.choice(["flip", "zero", "cut"], p=[0.6, 0.2, 0.2]))
        start = int(rng.choice(allowed))
        if kind == "flip":
            damaged[start] ^= 1 << int(rng.integers(8))
        elif kind == "zero":
            damaged[start : start + 16] = bytes(len(damaged[start : start + 16]))
        else:
            start = int(rng.integers(len(content)))
            del damaged[start:]
        path.write_bytes(damaged)
        ended = run_command(
            ["predict", str(path), "-q", "-o", str(out), "--backend", "cpu"], ground.folder / "log"
        )
        yield judge("damaged files", f"{kind} at byte {start}", ended, out.exists,
                    partial(ground.is_right, out))  # fmt: skip


def _metadata_bytes(path: Path, size: int) -> np.ndarray:
    """Bytes of a file that hold no values: damage there cannot be told from other spectra."""
    values = np.zeros(size, bool)

    def note(_: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.chunks is None:
            if (offset := node.id.get_offset()) is not None:
                values[offset : offset + node.id.get_storage_size()] = True
        elif isinstance(node, h5py.Dataset):
            for k in range(node.id.get_num_chunks()):
                chunk = node.id.get_chunk_info(k)
                values[chunk.byte_offset : chunk.byte_offset + chunk.size] = True

    with h5py.File(path, "r") as file:
        file.visititems(note)
    return np.flatnonzero(~values)


_STRANGE: list[Any] = [
    None, True, "", "x" * 5000, -1, 0, 1e308, 10**400, [], {}, [[]], "../../x", "\0", 1.5, [1] * 1000, {"": ""},
]  # fmt: skip


def damaged_models(ground: Ground, n: int, seed: int) -> Iterator[Case]:
    """Model folders that are damaged, or changed with checksums that fit."""
    from moefast.model import MANIFEST, ONNX, REFERENCES, _checksum, _hash

    rng = np.random.default_rng(seed)
    good = ground.folder / "model"
    if not good.exists():
        shutil.copytree(shipped_path(), good)
    for _ in range(n):
        place = ground.fresh()
        folder, out = place / "model", place / "t.h5"
        shutil.copytree(good, folder)
        kind = str(rng.choice(["flip", "cut", "manifest", "archive"]))
        manifest = json.loads((folder / MANIFEST).read_text())
        what = kind
        if kind in {"flip", "cut"}:
            path = folder / str(rng.choice([MANIFEST, ONNX, REFERENCES]))
            content = bytearray(path.read_bytes())
            at = int(rng.integers(len(content)))
            if kind == "flip":
                content[at] ^= 1 << int(rng.integers(8))
            else:
                del content[at:]
            path.write_bytes(content)
            what = f"{kind} of {path.name} at byte {at}"
        else:
            if kind == "manifest":
                holder, key = _somewhere(manifest, rng)
                holder[key] = _STRANGE[int(rng.integers(len(_STRANGE)))]
                what = f"manifest: {key!r} is {str(holder[key])[:20]!r}"
            else:
                what = _spoil_archive(folder / REFERENCES, rng)
                manifest["files"][REFERENCES] = {
                    "sha256": _hash(folder / REFERENCES), "bytes": (folder / REFERENCES).stat().st_size,
                }  # fmt: skip
            manifest["checksum"] = _checksum(manifest)
            (folder / MANIFEST).write_text(json.dumps(manifest))
        command = [
            "predict",
            str(ground.spectra),
            "-m",
            str(folder),
            "-q",
            "-o",
            str(out),
            "--backend",
            "cpu",
        ]
        ended = run_command(command, ground.folder / "log")
        # What no number depends on may be changed; flags hang on limits.
        right = ground.is_right(out) if out.exists() else False
        changed = kind == "manifest" and out.exists()
        yield judge("damaged models", what, ended, out.exists, partial(bool, right or changed))


def _somewhere(manifest: dict[str, Any], rng: np.random.Generator) -> tuple[Any, Any]:
    """A place in a manifest: what holds it, and its key."""
    holder: Any = manifest
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(min(len(holder), 50)))
        key = keys[int(rng.integers(len(keys)))]
        inner = holder[key]
        if isinstance(inner, dict | list) and len(inner) and rng.random() < 0.7:
            holder = inner
        else:
            return holder, key


def _spoil_archive(path: Path, rng: np.random.Generator) -> str:
    kind = str(rng.choice(["bomb", "shape", "object", "foreign", "flip"]))
    if kind == "flip":
        content = bytearray(path.read_bytes())
        for at in rng.integers(0, len(content), 3):
            content[int(at)] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
    elif kind == "bomb":
        np.savez_compressed(path, **{"0.name": np.zeros(1, np.uint8), "0.weights": np.zeros((1 << 22,))})  # type: ignore[arg-type]
    elif kind == "object":
        np.savez(path, **{"0.name": np.array([{}], dtype=object)})  # type: ignore[arg-type]
    elif kind == "foreign":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../0.name.npy", b"no array")
    else:
        head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999, 99999), }"
        magic = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("0.name.npy", magic + head)
    return f"references: {kind}"


def names(ground: Ground, n: int, seed: int) -> Iterator[Case]:
    """Names of files that are strange, too long, or look like something else."""
    rng = np.random.default_rng(seed)
    letters = [
        "a",
        "é",
        "星",
        " ",
        "$",
        "_",
        "%",
        "{",
        "}",
        "[",
        "]",
        "*",
        "?",
        "'",
        '"',
        "\\",
        "\n",
        "-",
        "~",
        "#",
        ";",
    ]
    for _ in range(n):
        place = ground.fresh()
        length = int(rng.choice([1, 2, 5, 20, 80, 240, 251, 260]))
        stem = "".join(letters[int(i)] for i in rng.integers(len(letters), size=length)).lstrip("-") or "x"
        source = place / f"{stem}.h5"
        out = place / f"{stem}.log_g{SUFFIXES[int(rng.integers(3))]}"
        try:
            os.link(ground.spectra, source)
        except OSError:
            source = ground.spectra
        command = ["predict", str(source), "-q", "-o", str(out), "--backend", "cpu"]
        ended = run_command(command, ground.folder / "log")

        def there(out: Path = out) -> bool:
            return os.path.lexists(out) if len(os.fsencode(out.name)) <= 255 else False

        yield judge("names", repr(stem)[:40], ended, there, partial(ground.is_right, out))


CAMPAIGNS: dict[str, Callable[[Ground, int, int], Iterator[Case]]] = {
    "failed writes": failed_writes,
    "kills": kills,
    "damaged files": damaged_files,
    "damaged models": damaged_models,
    "names": names,
}
