"""The campaigns: each makes its cases from a seed and judges them.

Design: right is what the undisturbed work gives, bit for bit in the columns of a table. The model is loaded once,
before the processes of the cases are forked; damaged models are loaded in their own. Damage that turns a file into
another valid one cannot be told by anybody: so values themselves are left alone where their format has no checksum, and
a model that was changed together with its checksums counts as another model.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from moefast.benchmarks.faults.case import Case, Ended, command, judge, run
from moefast.benchmarks.faults.disk import ERRORS, Failing, full
from moefast.benchmarks.faults.ground import SUFFIXES, Ground, options_of
from moefast.benchmarks.faults.products import Product, products, same_part
from moefast.cluster.fit_parts import statistics_of
from moefast.core.errors import InputError, ModelError, OutputError
from moefast.model import MANIFEST, ONNX, REFERENCES, _checksum, _hash, shipped_path
from moefast.predicting.files import predict
from moefast.protocol.evaluate import evaluate
from moefast.protocol.milestones.evaluations import read_reports
from moefast.spectra.tables import read_table

__all__ = ["CAMPAIGNS"]

_INTERRUPTED = {signal.SIGTERM: 143, signal.SIGINT: 130}


def _listing(place: Path, *known: Path) -> list[str]:
    """What lies in the folder of a case besides its result and what it was made of."""
    return sorted({path.name for path in place.iterdir()} - {path.name for path in known})


def _is_done(ended: Ended) -> bool:
    return ended.code == 0


def _says_right(ended: Ended) -> bool:
    return "right" in ended.said


def _chosen(made: dict[str, Product], n: int, rng: np.random.Generator) -> Iterator[tuple[str, Product]]:
    names = list(made)
    shares = np.array([made[name].share for name in names])
    for index in rng.choice(len(names), size=n, p=shares / shares.sum()):
        yield names[index], made[names[index]]


def failed_writes(ground: Ground, n: int, seed: int) -> Iterator[Case]:
    """One call of any writer that fails (write, fsync, rename, …), or all from one on, or a disk full at a byte."""
    rng = np.random.default_rng(seed)
    made = products(ground)
    calls: dict[str, int] = {}
    for name, product in _chosen(made, n, rng):
        place = ground.fresh()
        target = place / product.target
        if rng.random() < 0.1:
            size = int(rng.uniform(0, 1) * _size_of(ground, name, product))
            what, first = f"full at byte {size}", full(size)
        else:
            if name not in calls:
                calls[name] = _count(ground, product, ground.fresh() / product.target)
                place = ground.fresh()
            position = int(rng.integers(1, calls[name] + 1))
            number, lasting, short = (
                int(rng.choice(ERRORS)),
                bool(rng.random() < 0.5),
                bool(rng.random() < 0.3),
            )
            what = f"call {position} of {calls[name]}: {os.strerror(number)}{', lasting' * lasting}{', short' * short}"
            first = Failing(position, number, lasting=lasting, short=short)
        ended = run(partial(product.write, target, False), ground.log, first=first)
        yield judge(
            "failed writes", f"{name}, {what}", ended, partial(os.path.lexists, target),
            partial(product.is_right, target), codes={OutputError.exit_code},
            leftovers=partial(_listing, place, target),
        )  # fmt: skip


def _count(ground: Ground, product: Product, target: Path) -> int:
    """Calls of the file layer that a writer makes."""
    layer = Failing(0)

    def work() -> None:
        product.write(target, False)
        print(f"calls {layer.made}")

    ended = run(work, ground.log, first=layer)
    return int(ended.said.rsplit("calls ", 1)[1])


def _size_of(ground: Ground, name: str, product: Product) -> int:
    """Bytes of a product; of a folder, of its largest file."""
    whole = ground.folder / "whole" / name / product.target
    if not whole.exists():
        whole.parent.mkdir(parents=True)
        product.write(whole, False)
    files = [whole] if whole.is_file() else [path for path in whole.rglob("*") if path.is_file()]
    return max(path.stat().st_size for path in files)


def kills(ground: Ground, n: int, seed: int) -> Iterator[Case]:
    """SIGKILL at any moment of any writer; the same work must succeed afterwards and clear up."""
    rng = np.random.default_rng(seed)
    made = products(ground)
    seconds: dict[str, float] = {}
    for name, product in _chosen(made, n, rng):
        if name not in seconds:
            ended = run(partial(product.write, ground.fresh() / product.target, False), ground.log)
            seconds[name] = ended.seconds
        place = ground.fresh()
        target = place / product.target
        before = rng.random() < 0.3
        if before:
            run(partial(product.write, target, False), ground.log)
        moment = float(rng.uniform(0, 1.1 * seconds[name]))
        ended = run(partial(product.write, target, before), ground.log, kill=(moment, signal.SIGKILL))
        what = f"{name} after {moment:.4f} s{', replacing' * before}"
        there, right = partial(os.path.lexists, target), partial(product.is_right, target)
        case = judge("kills", what, ended, there, right)
        if case.survived:
            again = run(partial(product.write, target, True), ground.log)
            left = _listing(place, target)
            if again.code != 0 or not right():
                case = Case("kills", what, "wrong", f"afterwards: code {again.code}: {again.said[-500:]}")
            elif left:
                case = Case("kills", what, "left behind", f"afterwards: {left}")
        yield case


def interrupts(ground: Ground, n: int, seed: int) -> Iterator[Case]:
    """SIGTERM or SIGINT at any moment of a command: one message, its exit code, nothing left."""
    rng = np.random.default_rng(seed)
    made = products(ground)
    seconds: dict[str, float] = {}
    for k in range(n):
        place = ground.fresh()
        name = ("predict", "simulate", "export")[int(rng.choice(3, p=(0.6, 0.2, 0.2)))]
        suffix = SUFFIXES[k % len(SUFFIXES)]
        target = place / {"predict": f"t{suffix}", "simulate": "s.h5", "export": "m.onnx"}[name]
        arguments: dict[str, list[str | Path]] = {
            "predict": ["predict", ground.spectra, "-q", "-o", target, "--backend", "cpu"],
            "simulate": ["simulate", target, "-n", "4", "--seed", "5", "-q"],
            "export": ["export", "z0", "-o", target],
        }
        if name not in seconds:
            seconds[name] = run(command(*arguments[name]), ground.log).seconds
            target.unlink()
        number = (signal.SIGTERM, signal.SIGINT)[int(rng.integers(2))]
        moment = float(rng.uniform(0, 1.05 * seconds[name]))
        ended = run(command(*arguments[name]), ground.log, kill=(moment, number))
        what = f"{number.name} after {moment:.3f} s of {name} {target.suffix}"
        right: Callable[[], bool] = partial(_is_command_right, ground, made, name, target)
        there = partial(os.path.lexists, target)
        # Before the command has begun a signal ends the process by itself.
        not_begun = ended.code == -number or "<frozen" in ended.said or "case.py" in ended.said
        if not_begun and not there():
            yield Case("interrupts", what, "refused")
            continue
        case = judge(
            "interrupts", what, ended, there, right, codes={_INTERRUPTED[number]},
            leftovers=partial(_listing, place, target),
        )  # fmt: skip
        if case.survived and ended.code == _INTERRUPTED[number] and ended.said.count("moefast: ") != 1:
            case = Case("interrupts", what, "misleading", ended.said)
        yield case


def _is_command_right(ground: Ground, made: dict[str, Product], name: str, target: Path) -> bool:
    if name == "predict":
        return ground.is_right(target)
    if name == "simulate":
        return made["simulate"].is_right(target)
    import onnx

    onnx.checker.check_model(str(target))
    return True


# -- damaged input -----------------------------------------------------------------------------------------------------


def damaged_files(ground: Ground, n: int, seed: int) -> Iterator[Case]:
    """Flipped, zeroed or lost bytes of spectra, in HDF5 (plain, compressed) and FITS (DESI, PFS)."""
    rng = np.random.default_rng(seed)
    contents = {name: path.read_bytes() for name, path in ground.variants.items()}
    allowed = {name: _without_checksum(path, contents[name]) for name, path in ground.variants.items()}
    variants = list(contents)
    for _ in range(n):
        variant = variants[int(rng.integers(len(variants)))]
        place = ground.fresh()
        path, out = place / ground.variants[variant].name, place / "t.h5"
        content, what = _damaged(contents[variant], allowed[variant], rng)
        path.write_bytes(content)
        ended = run(partial(predict, path, ground.model, out, backend="cpu", **options_of(path)), ground.log)
        yield judge(
            "damaged spectra", f"{variant}: {what}", ended, out.exists,
            partial(ground.is_right_or_marked, out, variant), codes={3, 4},
            leftovers=partial(_listing, place, out, path),
        )  # fmt: skip


def _damaged(content: bytes, allowed: np.ndarray, rng: np.random.Generator) -> tuple[bytes, str]:
    """A file with one kind of damage, and what it is."""
    damaged = bytearray(content)
    kind = str(rng.choice(["flip", "zero", "cut", "random"], p=[0.5, 0.15, 0.2, 0.15]))
    start = int(rng.choice(allowed))
    if kind == "flip":
        damaged[start] ^= 1 << int(rng.integers(8))
    elif kind == "cut":
        start = int(rng.integers(len(content)))
        del damaged[start:]
    else:
        places = allowed[(allowed >= start) & (allowed < start + 16)]
        damaged_bytes = np.frombuffer(damaged, np.uint8).copy()
        damaged_bytes[places] = 0 if kind == "zero" else rng.integers(0, 256, len(places))
        damaged = bytearray(damaged_bytes.tobytes())
    return bytes(damaged), f"{kind} at byte {start}"


def _without_checksum(path: Path, content: bytes) -> np.ndarray:
    """Bytes of a file in which damage can be told: no values, unless they are compressed."""
    return _structure(content) if content[:6] == b"SIMPLE" else _metadata_bytes(path, len(content))


def _structure(content: bytes) -> np.ndarray:
    """Bytes of the cards of a FITS file that say how it is built."""
    words = (
        b"SIMPLE", b"XTENSION", b"BITPIX", b"NAXIS", b"PCOUNT", b"GCOUNT", b"TFIELDS", b"TFORM", b"TTYPE", b"EXTNAME",
        b"EXTEND", b"END",
    )  # fmt: skip
    places: list[int] = []
    for start in range(0, len(content), 80):
        card = content[start : start + 80]
        # A pfsObject without its table is a valid one: its images hold the same spectrum, rounded otherwise.
        if b"FLUX_TABLE" in card:
            continue
        if card.startswith(words) and (card[8:10] == b"= " or card.strip() == b"END"):
            places.extend(range(start, start + 30))
    return np.array(places)


def _metadata_bytes(path: Path, size: int) -> np.ndarray:
    """Bytes of an HDF5 file that hold no values, or compressed ones."""
    values = np.zeros(size, bool)

    def note(_: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.chunks is None:
            if (offset := node.id.get_offset()) is not None:
                values[offset : offset + node.id.get_storage_size()] = True
        elif isinstance(node, h5py.Dataset) and node.compression is None:
            for k in range(node.id.get_num_chunks()):
                chunk = node.id.get_chunk_info(k)
                values[chunk.byte_offset : chunk.byte_offset + chunk.size] = True

    with h5py.File(path, "r") as file:
        file.visititems(note)
    return np.flatnonzero(~values)


def damaged_tables(ground: Ground, n: int, seed: int) -> Iterator[Case]:
    """Flipped, zeroed or lost bytes of what moefast itself reads again: tables, checkpoints, parts of fits, reports."""
    rng = np.random.default_rng(seed)
    made = products(ground)
    contents: dict[str, bytes] = {}
    for name, (file, _) in _READ_AGAIN.items():
        _size_of(ground, name, made[name])
        contents[name] = (ground.folder / "whole" / name / made[name].target / file).read_bytes()
    everything = {name: np.arange(len(content)) for name, content in contents.items()}
    names = list(contents)
    for _ in range(n):
        name = names[int(rng.integers(len(names)))]
        file, read = _READ_AGAIN[name]
        path = ground.fresh() / made[name].target / file
        path.parent.mkdir(exist_ok=True)
        content, what = _damaged(contents[name], everything[name], rng)
        path.write_bytes(content)
        ended = run(
            partial(read, ground.folder / "whole" / name / made[name].target / file, path), ground.log
        )
        yield judge(
            "damaged tables", f"{name}: {what}", ended, partial(_is_done, ended), partial(_says_right, ended),
            codes={InputError.exit_code},
        )  # fmt: skip


def _read_damaged_table(whole: Path, path: Path) -> None:
    columns, attrs = read_table(path)
    expected, attributes = read_table(whole)
    same = list(columns) == list(expected) and all(np.array_equal(columns[n], expected[n]) for n in columns)
    print("right" if same and attrs == attributes else f"other: {attrs} {list(columns)}")


def _read_part(whole: Path, path: Path) -> None:
    # Not same_part: that takes a refusal for a difference.
    statistics_of(path)
    print("right" if same_part(whole, path) else "other")


def _read_report(whole: Path, path: Path) -> None:
    (found,), (expected,) = read_reports([path]), read_reports([whole])
    print("right" if found.report == expected.report else "other")


def _read_checkpoint(_: Path, path: Path) -> None:
    from moefast.checkpoint import Checkpoint

    told: list[str] = []
    checkpoint = Checkpoint(path.parent, tell=told.append)
    checkpoint.begin({"spectra": "x"}, 0)
    found = checkpoint.load(lambda rows, read: (rows, read("total")))
    if found is None:
        print("right" if told else "silent")
    else:
        print("right" if found[0] == 7 and np.array_equal(found[1], np.arange(5000.0)) else "other")


_READ_AGAIN: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "table.h5": ("", _read_damaged_table),
    "table.parquet": ("", _read_damaged_table),
    "table.fits": ("", _read_damaged_table),
    "checkpoint": ("first-pass.npz", _read_checkpoint),
    "part.npz": ("", _read_part),
    "evaluation": ("report.json", _read_report),
}
"""Products whose damage must be told: the file in their folder, and what reads it beside the whole one."""


_STRANGE: list[Any] = [
    None, True, "", "x" * 5000, -1, 0, 1e308, 10**400, [], {}, [[]], "../../x", "\0", 1.5, [1] * 1000, {"": ""},
    float("inf"), "é", 2**63, [None], -0.0,
]  # fmt: skip


def damaged_models(ground: Ground, n: int, seed: int) -> Iterator[Case]:
    """Model folders that are damaged, or changed with checksums that fit; ONNX files without any."""
    rng = np.random.default_rng(seed)
    good = shipped_path("z0")
    for _ in range(n):
        place = ground.fresh()
        folder, out = place / "model", place / "t.h5"
        kind = str(
            rng.choice(
                ["flip", "cut", "manifest", "archive", "graph", "foreign"], p=[0.2, 0.1, 0.3, 0.2, 0.1, 0.1]
            )
        )
        shutil.copytree(good, folder)
        # Models that were changed together with their checksums are other models.
        another = kind not in {"flip", "cut"}
        if not another:
            path = folder / str(rng.choice([MANIFEST, ONNX, REFERENCES]))
            changed = bytearray(path.read_bytes())
            at = int(rng.integers(len(changed)))
            if kind == "flip":
                changed[at] ^= 1 << int(rng.integers(8))
            else:
                del changed[at:]
            path.write_bytes(changed)
            what = f"{kind} of {path.name} at byte {at}"
        elif kind in {"graph", "foreign"}:
            content, what = _damaged(
                (folder / ONNX).read_bytes(), np.arange((folder / ONNX).stat().st_size), rng
            )
            (folder / ONNX).write_bytes(content)
            what = f"{kind}: {what}"
            if kind == "foreign":
                ended = run(partial(_evaluate_foreign, ground, folder / ONNX), ground.log)
                yield judge(
                    "damaged models", what, ended, partial(_is_done, ended), partial(bool, True), codes={3, 6}
                )
                continue
            _refit(folder, ONNX)
        elif kind == "manifest":
            manifest = json.loads((folder / MANIFEST).read_text())
            holder, key = _somewhere(manifest, rng)
            holder[key] = _STRANGE[int(rng.integers(len(_STRANGE)))]
            what = (
                f"manifest: {key!r} is {str(holder[key])[:20]!r}"
                if not isinstance(holder[key], int)
                else f"manifest: {key!r} is a number"
            )
            manifest["checksum"] = _checksum(manifest)
            (folder / MANIFEST).write_text(json.dumps(manifest))
        else:
            what = _spoil_archive(folder / REFERENCES, rng)
            _refit(folder, REFERENCES)
        ended = run(
            partial(predict, ground.spectra, str(folder), out, backend="cpu"),
            ground.log,
        )
        yield judge(
            "damaged models",
            what,
            ended,
            out.exists,
            partial(bool, another),
            codes={ModelError.exit_code},
        )


def _evaluate_foreign(ground: Ground, path: Path) -> None:
    evaluate(ground.spectra, path, backend="cpu")


def _refit(folder: Path, name: str) -> None:
    """Make the checksums of a manifest fit a file that was changed."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"sha256": _hash(folder / name), "bytes": (folder / name).stat().st_size}
    manifest["checksum"] = _checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


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


# -- names -------------------------------------------------------------------------------------------------------------

_LETTERS = [*"aé星 $_%{}[]*?'\"\\\n-~#;&|<>!`", "..", "\x07", "\udc80", "\u202e", "ｅ"]


def names(ground: Ground, n: int, seed: int) -> Iterator[Case]:
    """Names of files that are strange, too long, or look like something else."""
    rng = np.random.default_rng(seed)
    made = products(ground)
    for _ in range(n):
        place = ground.fresh()
        length = int(rng.choice([1, 2, 5, 20, 80, 240, 251, 260]))
        stem = "".join(_LETTERS[int(i)] for i in rng.integers(len(_LETTERS), size=length)).lstrip("-") or "x"
        source = place / f"{stem}.h5"
        kind = int(rng.choice(4, p=(0.55, 0.15, 0.15, 0.15)))
        suffix = SUFFIXES[int(rng.integers(3))] if kind == 0 else (".h5", ".onnx", ".json")[kind - 1]
        out = place / f"{stem}.out{suffix}"
        try:
            os.link(ground.spectra, source)
        except OSError:
            source = ground.spectra
        commands: list[list[str | Path]] = [
            ["predict", source, "-q", "-o", out, "--backend", "cpu"],
            ["simulate", out, "-n", "4", "--seed", "5", "-q"],
            ["export", "z0", "-o", out],
            ["inspect", source],
        ]
        work = commands[kind]
        ended = run(command(*work), ground.log)
        judges: list[Callable[[], bool]] = [
            partial(ground.is_right, out),
            partial(made["simulate"].is_right, out),
            out.exists,
            partial(bool, True),
        ]
        right = judges[kind]
        is_there = partial(_is_done, ended) if kind == 3 else partial(_is_there, out)
        yield judge(
            "names", f"{work[0]} {stem!r}"[:60], ended, is_there, right, codes={2, 3, 8},
            leftovers=partial(_listing, place, out, source),
        )  # fmt: skip


def _is_there(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):
        return False


CAMPAIGNS: dict[str, tuple[Callable[[Ground, int, int], Iterator[Case]], float]] = {
    "failed writes": (failed_writes, 0.3),
    "kills": (kills, 0.15),
    "interrupts": (interrupts, 0.05),
    "damaged spectra": (damaged_files, 0.2),
    "damaged tables": (damaged_tables, 0.15),
    "damaged models": (damaged_models, 0.1),
    "names": (names, 0.05),
}
"""Campaigns, and the share of all cases that each has."""
