"""Everything that moefast writes: how each is written, and whether a file or folder is what it should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from moefast.benchmarks.faults.ground import SUFFIXES, Ground
from moefast.checkpoint import Checkpoint
from moefast.cluster.catalogue import write_catalogue
from moefast.cluster.fit_parts import FitPlan, TrainingSpectra, gather_to_file, read_header, statistics_of
from moefast.cluster.merge import merge_tables
from moefast.core.atomic import write_json
from moefast.core.errors import MoefastError, OutputError
from moefast.export import build, save
from moefast.model import Model
from moefast.predicting.files import predict
from moefast.protocol.report_folder import write_report
from moefast.simulate import simulate_file
from moefast.spectra.spectrum_set import open_spectra
from moefast.spectra.tables import Column, open_table, read_table
from moefast.spectra.writer import SpectrumWriter

__all__ = ["Product", "products", "same_part"]

_ROWS = 1000
_TRAINING_ROWS = 200
_COLUMNS = [Column(f"c{k}", np.dtype("float32"), "dex", "a column") for k in range(12)]


@dataclass(frozen=True)
class Product:
    """Something that is written.

    Attributes
    ----------
    target : str
        Name of the file or folder.
    write : callable
        Writes it under a path; the second argument says whether what is there may be replaced.
    is_right : callable
        Whether what lies under a path is what was to be written.
    share : float
        How often it is chosen, relative to others: what takes long is chosen less often.
    """

    target: str
    write: Callable[[Path, bool], object]
    is_right: Callable[[Path], bool]
    share: float = 1.0


def products(ground: Ground) -> dict[str, Product]:
    """All of them, by name."""
    found = {
        "report": Product("report.json", _write_report, _right_report),
        "spectra": Product("spectra.h5", _write_spectra, _right_spectra, 2.0),
        "checkpoint": Product("checkpoint", _write_checkpoint, _right_checkpoint),
    }
    for suffix in SUFFIXES:
        found[f"table{suffix}"] = Product(f"table{suffix}", _write_table, _right_table, 1.5)

        def run_predict(path: Path, overwrite: bool) -> object:
            return predict(ground.spectra, ground.model, path, backend="cpu", overwrite=overwrite)

        found[f"predict{suffix}"] = Product(f"t{suffix}", run_predict, ground.is_right, 0.2)
    right = ground.folder / "simulated.h5"
    if not right.exists():
        simulate_file(right, 4, seed=5)

    def run_simulate(path: Path, overwrite: bool) -> None:
        simulate_file(path, 4, seed=5, overwrite=overwrite)

    found["simulate"] = Product("s.h5", run_simulate, partial(_same_spectra, right), 0.2)
    graph = build(ground.small.mixture)
    content = graph.SerializeToString(deterministic=True)

    def write_graph(path: Path, overwrite: bool) -> None:
        save(graph, path, overwrite=overwrite)

    found["export"] = Product("m.onnx", write_graph, lambda path: path.read_bytes() == content)

    def write_model(path: Path, overwrite: bool) -> object:
        return ground.small.save(path, overwrite=overwrite)

    found["model"] = Product("model", write_model, partial(_right_model, ground.small), 0.03)

    def write_evaluation(path: Path, overwrite: bool) -> object:
        return write_report(ground.evaluation, path, pictures=False, overwrite=overwrite)

    found["evaluation"] = Product("evaluation", write_evaluation, partial(_right_evaluation, ground), 0.15)
    found["part.npz"] = _part_of_fit(ground)
    found["catalogue"], found["merged"] = _of_tables(ground)
    return found


def _part_of_fit(ground: Ground) -> Product:
    """Statistics of the first half of a small fit."""
    spectra, right = ground.folder / "training.h5", ground.folder / "right.npz"
    if not spectra.exists():
        _write_training(spectra)
    plan = FitPlan(TrainingSpectra.of_files([spectra]), {"recipe": "global-ridge", "references": False})
    prepared = plan.prepare()

    def write(path: Path, overwrite: bool) -> object:
        return gather_to_file(path, plan, prepared, (0, _TRAINING_ROWS), shard=(0, 1))

    if not right.exists():
        write(right, False)
    return Product("part.npz", write, partial(same_part, right))


def same_part(right: Path, path: Path) -> bool:
    """Whether two files of statistics say the same of the same."""
    try:
        first, second = statistics_of(right).arrays(), statistics_of(path).arrays()
        alike = read_header(right) == read_header(path)
    except MoefastError:
        return False
    return alike and list(first) == list(second) and all(np.array_equal(first[n], second[n]) for n in first)


def _of_tables(ground: Ground) -> tuple[Product, Product]:
    """Two tables as a catalogue, and as one table."""
    shards = [ground.folder / f"shard-{index}.parquet" for index in range(2)]
    for index, path in enumerate(shards):
        if not path.exists():
            predict(ground.spectra, ground.model, path, backend="cpu", shard=(index, 2))
    rng, n = np.random.default_rng(2), 200
    values = {
        "row": np.arange(n), "ra": rng.uniform(0, 360, n), "dec": rng.uniform(-90, 90, n), "log_g": rng.normal(size=n),
    }  # fmt: skip
    stars = ground.folder / "stars.parquet"
    if not stars.exists():
        with open_table(stars, n, [Column(k, v.dtype, "", k) for k, v in values.items()], {}) as table:
            table.write(0, values)

    def write_sky(path: Path, overwrite: bool) -> object:
        return write_catalogue([stars], path, order=0, overwrite=overwrite)

    def write_merged(path: Path, overwrite: bool) -> object:
        return merge_tables(shards, path, overwrite=overwrite)

    return (
        Product("catalogue", write_sky, partial(_right_catalogue, values), 0.5),
        Product("merged.h5", write_merged, ground.is_right),
    )


def _right_catalogue(values: dict[str, np.ndarray], path: Path) -> bool:
    """Whether all stars are there, once, in the files that the catalogue's own lists name."""
    import pyarrow.dataset as ds

    try:
        table = ds.dataset(path / "dataset", format="parquet", partitioning="hive").to_table().sort_by("row")
        listed = (path / "partition_info.csv").read_text(encoding="ascii").splitlines()[1:]
        said = (path / "hats.properties").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    files = {int(file.stem.removeprefix("Npix=")) for file in path.rglob("Npix=*.parquet")}
    return (
        all(np.array_equal(table[name].to_numpy(), column) for name, column in values.items())
        and {f"0,{pixel}" for pixel in files} == set(listed)
        and f"hats_nrows={len(values['row'])}" in said
        and (path / "dataset" / "_common_metadata").is_file()
        and not (path / "waiting").exists()
    )


def _write_training(path: Path) -> None:
    """A few stars of low rank, with labels."""
    rng, n, pixels = np.random.default_rng(3), _TRAINING_ROWS, 640
    labels = {
        "T_eff": rng.uniform(3750, 6000, n),
        "log_g": rng.uniform(1, 5, n),
        "M_H": rng.uniform(-2.5, 0.75, n),
    }
    edges = np.linspace(7100, 8850, pixels + 1)
    shapes = np.sin(2 * np.pi * np.outer(np.arange(2, 5), np.linspace(0, 1, pixels)))
    terms = np.column_stack([(values - values.mean()) / np.ptp(values) for values in labels.values()])
    with SpectrumWriter(
        path, n_rows=n, wave=edges[:-1], wave_edges=edges, params=dict.fromkeys(labels, "f8")
    ) as writer:
        flux = (1 + 0.05 * terms @ shapes).astype(np.float32)
        writer.write(0, params=labels, flux=flux, error=np.full_like(flux, 0.1))


def _numbers() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {column.name: rng.normal(size=_ROWS).astype(np.float32) for column in _COLUMNS}


def _write_table(path: Path, overwrite: bool) -> None:
    values = _numbers()
    with open_table(path, _ROWS, _COLUMNS, {"model": "m"}, overwrite=overwrite) as table:
        for start in range(0, _ROWS, 250):
            table.write(start, {name: array[start : start + 250] for name, array in values.items()})
        table.attrs["r2"] = 0.5


def _right_table(path: Path) -> bool:
    try:
        columns, attrs = read_table(path)
    except MoefastError:
        return False
    return attrs["r2"] == 0.5 and all(np.array_equal(columns[n], v) for n, v in _numbers().items())


def _flux() -> np.ndarray:
    return np.arange(60 * 300, dtype=np.float32).reshape(60, 300)


def _write_spectra(path: Path, overwrite: bool) -> None:
    edges = np.linspace(7100, 8850, 301)
    with SpectrumWriter(
        path, n_rows=60, wave=edges[:-1], wave_edges=edges, params={"log_g": "f8"}, overwrite=overwrite
    ) as writer:
        for start in (0, 30):
            rows = slice(start, start + 30)
            writer.write(
                start, params={"log_g": np.arange(30.0)}, flux=_flux()[rows], error=1 + _flux()[rows]
            )


def _right_spectra(path: Path) -> bool:
    (block,) = open_spectra(path).blocks(60, params=["log_g"], prefetch=False)
    return (
        np.array_equal(block.flux, _flux())
        and np.array_equal(block.error, 1 + _flux())
        and np.array_equal(block.params["log_g"], np.tile(np.arange(30.0), 2))
    )


def _same_spectra(right: Path, path: Path) -> bool:
    first, second = (
        next(iter(open_spectra(p).blocks(100, params=["log_g"], prefetch=False))) for p in (right, path)
    )
    return (
        np.array_equal(first.flux, second.flux)
        and np.array_equal(first.error, second.error)
        and np.array_equal(first.params["log_g"], second.params["log_g"])
    )


_REPORT = {"values": list(range(3000)), "name": "é"}


def _write_report(path: Path, overwrite: bool) -> None:
    write_json(_REPORT, path, overwrite=overwrite)


def _right_report(path: Path) -> bool:
    return bool(json.loads(path.read_text(encoding="utf-8")) == _REPORT)


def _refuse(text: str) -> None:
    raise OutputError(text)


def _write_checkpoint(path: Path, overwrite: bool) -> None:
    checkpoint = Checkpoint(path, tell=_refuse)
    checkpoint.begin({"spectra": "x"}, 0)
    checkpoint.save(7, {"total": np.arange(5000.0)})


def _right_checkpoint(path: Path) -> bool:
    told: list[str] = []
    checkpoint = Checkpoint(path, tell=told.append)
    checkpoint.begin({"spectra": "x"}, 0)
    found = checkpoint.load(lambda rows, read: (rows, read("total")))
    if found is None:
        # The folder may be there without a checkpoint: nothing was promised.
        return not told
    return found[0] == 7 and np.array_equal(found[1], np.arange(5000.0))


def _right_model(expected: Model, path: Path) -> bool:
    try:
        found = Model.load(path)
    except MoefastError:
        return False
    same = {"files", "checksum", "packages", "moefast_version"}
    return {k: v for k, v in found.manifest.items() if k not in same} == {
        k: v for k, v in expected.manifest.items() if k not in same
    }


def _right_evaluation(ground: Ground, path: Path) -> bool:
    try:
        stars, _ = read_table(path / "predictions.h5")
        report = json.loads((path / "report.json").read_text(encoding="utf-8"))
    except (MoefastError, OSError, ValueError):
        return False
    return (
        np.array_equal(stars["log_g"], ground.evaluation.stars["log_g"])
        and report["overall"] == json.loads(json.dumps(ground.evaluation.report["overall"]))
        and (path / "report.txt").is_file()
        and (path / "run.json").is_file()
    )
