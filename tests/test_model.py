"""Model folders: what is written is what is read, and what was altered is refused."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from small import same_rows

from moefast import model as module
from moefast.core.errors import ModelError, OutputError, WaveGridError
from moefast.model import MANIFEST, SHIPPED, Model, check_target, shipped_path
from moefast.predicting.files import predict

FILES = {"manifest.json", "model.onnx", "references.npz"}


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def _edit(folder, change, checksum=False):
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    if checksum:
        manifest["checksum"] = module._checksum(manifest)
    path.write_text(json.dumps(manifest))


# -- round trip ------------------------------------------------------------------------------------------------


def test_round_trip_is_bit_exact(model, stars_file, whole, tmp_path):
    again = model.save(tmp_path / "copy")
    assert again.path == tmp_path / "copy"
    same_rows(predict(stars_file, tmp_path / "copy").columns, whole.columns, but=())
    assert {k: v for k, v in again.manifest.items() if k not in ("files", "checksum")} == {
        k: v for k, v in model.manifest.items() if k not in ("files", "checksum")
    }
    assert again.references.keys() == model.references.keys()
    for name, form in model.references.items():
        other = again.references[name]
        assert form.clipped == other.clipped
        for array in ("weights", "intercepts", "levels"):
            assert getattr(form, array).tobytes() == getattr(other, array).tobytes()


def test_what_a_fit_gives_is_what_is_read_back(model, stars):
    """The fitted mixture and the one read from its ONNX file are one: arrays are equal, so predictions are."""
    unsaved = replace(model, path=None)
    assert unsaved.hash == ""
    assert "not saved" in unsaved.name
    found = model.mixture.predict(stars.noisy[:100], stars.error[:100])
    assert (found.log_g == unsaved.mixture.predict(stars.noisy[:100], stars.error[:100]).log_g).all()


def test_the_folder_holds_three_files_and_nothing_executable(model_folder, model):
    assert {item.name for item in model_folder.iterdir()} == FILES
    assert set(model.manifest["files"]) == FILES - {MANIFEST}
    with zipfile.ZipFile(model_folder / "references.npz") as archive:
        names = archive.namelist()
        assert names
        assert all(name.endswith(".npy") for name in names)
        for name in names:
            with archive.open(name) as file:
                assert np.lib.format.read_magic(file) == (1, 0)
                _, _, dtype = np.lib.format.read_array_header_1_0(file)
                assert not dtype.hasobject, name


def test_the_manifest_says_what_a_reader_needs(model):
    manifest = model.manifest
    assert manifest["recipe"] == "phys-moe"
    assert manifest["training"]["n_spectra"] == 1500
    assert len(manifest["training"]["fingerprint"]) == 64
    assert len(manifest["fit"]["bins"]) == 9
    assert all("alpha" in bin_ for bin_ in manifest["fit"]["bins"].values())
    assert manifest["wave"]["pixels"] == 1024
    assert {"numpy", "onnx"} <= manifest["packages"].keys()


def test_a_model_without_references(model, tmp_path):
    again = replace(model, references={}).save(tmp_path / "bare")
    assert again.references == {}
    assert {item.name for item in (tmp_path / "bare").iterdir()} == FILES - {"references.npz"}


# -- altered ---------------------------------------------------------------------------------------------------


def _flip(name, where):
    def change(folder):
        data = bytearray((folder / name).read_bytes())
        data[int(where * len(data))] ^= 0x10
        (folder / name).write_bytes(bytes(data))

    return change


def _truncate(name):
    def change(folder):
        with open(folder / name, "rb+") as file:
            file.truncate((folder / name).stat().st_size // 2)

    return change


def _manifest(change, checksum=False):
    return lambda folder: _edit(folder, change, checksum)


def _rename_file(to):
    def change(manifest):
        manifest["files"][to] = manifest["files"]["references.npz"]

    return _manifest(change, checksum=True)


def _put(*keys, value, checksum=False):
    def change(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return _manifest(change, checksum)


TAMPERINGS = {
    "a bit of the weights": (_flip("model.onnx", 0.5), "SHA-256 differs"),
    "the first bit of the weights": (_flip("model.onnx", 0), "SHA-256 differs"),
    "a bit of the references": (_flip("references.npz", 0.3), "SHA-256 differs"),
    "weights truncated": (_truncate("model.onnx"), r"bytes found, \d+ expected"),
    "references truncated": (_truncate("references.npz"), r"bytes found, \d+ expected"),
    "manifest truncated": (_truncate(MANIFEST), "not a manifest"),
    "manifest empty": (lambda f: (f / MANIFEST).write_bytes(b""), "not a manifest"),
    "manifest of bytes": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"), "not a manifest"),
    "manifest a list": (lambda f: (f / MANIFEST).write_text("[1, 2]"), "not a manifest"),
    "manifest nested": (lambda f: (f / MANIFEST).write_text("[" * 10**5), "not a manifest"),
    "manifest of a web page": (lambda f: (f / MANIFEST).write_text('{"name": "x"}'), "not a manifest"),
    "manifest missing": (lambda f: (f / MANIFEST).unlink(), "no manifest"),
    "weights missing": (lambda f: (f / "model.onnx").unlink(), "missing; the model folder is incomplete"),
    "references missing": (lambda f: (f / "references.npz").unlink(), "missing; the model folder"),
    "everything missing": (shutil.rmtree, "no manifest"),
    "recipe edited": (_put("recipe", value="better"), "checksum"),
    "limit edited": (_put("limits", "chi2", value=1e9), "checksum"),
    "checksum removed": (_manifest(lambda m: m.pop("checksum")), "checksum"),
    "hash edited": (_put("files", "model.onnx", "sha256", value="0" * 64, checksum=True), "SHA-256 differs"),
    "size edited": (_put("files", "model.onnx", "bytes", value=5, checksum=True), "5 expected"),
    "size not a number": (_put("files", "model.onnx", "bytes", value="x"), "not a manifest"),
    "file entry not a table": (_put("files", "model.onnx", value=3), "not a manifest"),
    "files a list": (_put("files", value=["model.onnx"]), "not a manifest"),
    "weights not listed": (_manifest(lambda m: m["files"].pop("model.onnx"), True), "is not listed"),
    "schema of tomorrow": (_put("schema", value=999), "schema 999 found, this moefast reads schema 2"),
    "file above": (_rename_file("../references.npz"), "points outside"),
    "file elsewhere": (_rename_file("/etc/hostname"), "points outside"),
    "wave grid altered": (_put("wave", "values", 7, value=7000.0, checksum=True), "wave grid was altered"),
    "wave grid shorter": (_put("wave", "values", value=[1.0], checksum=True), "wave grid was altered"),
    "grid not a grid": (_put("grid", value={}, checksum=True), "expected a grid"),
    "number beyond numbers": (_put("fit", value={"rows": float("inf")}, checksum=True), "is no number"),
    "sketch of the training set a number": (
        _put("training", "row_sketch", value=3, checksum=True),
        "row_sketch",
    ),
    "sketch of words": (_put("training", "row_sketch", value=["x"], checksum=True), "wrong type"),
    "ranges of labels no ranges": (
        _put("training", "labels", value={"log_g": 3}, checksum=True),
        "wrong type",
    ),
    "limits gone": (_manifest(lambda m: m.pop("limits"), True), "missing or of the wrong type"),
}


@pytest.mark.parametrize("kind", TAMPERINGS)
def test_tampering_is_refused(kind, folder):
    change, match = TAMPERINGS[kind]
    change(folder)
    with pytest.raises(ModelError, match=match) as caught:
        Model.load(folder)
    assert caught.value.exit_code == 6
    assert str(folder) in str(caught.value)


def test_a_large_manifest_is_not_parsed(folder, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_MANIFEST", 1000)
    with pytest.raises(ModelError, match="larger than 1000 bytes"):
        Model.load(folder)


def test_weights_of_another_wave_grid(folder):
    """Grid and its hash altered together, so that the manifest agrees with itself: the weights still know theirs."""

    def change(manifest):
        values = [value * 1.01 for value in manifest["wave"]["values"]]
        manifest["wave"]["values"] = values
        manifest["wave"]["sha256"] = module._wave_hash(np.array(values))

    _edit(folder, change, checksum=True)
    with pytest.raises(ModelError):
        Model.load(folder)


def test_pickled_references_are_refused(folder):
    array = np.array([{"a": 1}], dtype=object)
    np.savez(folder / "references.npz", **{"0.name": array}, allow_pickle=True)

    def change(manifest):
        path = folder / "references.npz"
        manifest["files"][path.name] = {"sha256": module._hash(path), "bytes": path.stat().st_size}

    _edit(folder, change, checksum=True)
    with pytest.raises(ModelError, match=r"references\.npz"):
        Model.load(folder)


def test_wave_of_spectra_is_checked(model):
    model.check_wave(model.mixture.wave + 1e-4, "here")
    with pytest.raises(WaveGridError, match=r"here: .*1023 pixels.*expected 1024 pixels"):
        model.check_wave(model.mixture.wave[1:], "here")


# -- writing ---------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_kept(model, folder):
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        model.save(folder)
    assert (folder / MANIFEST).read_bytes() == before
    model.save(folder, overwrite=True)
    assert {item.name for item in folder.iterdir()} == FILES
    assert [item.name for item in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("content", ["notes.txt", "manifest.json", "stray file in a model", "link", "file"])
def test_what_is_no_model_folder_is_never_replaced(content, model, folder):
    target = folder.parent / "target"
    if content == "file":
        target.write_text("precious")
    elif content == "link":
        target.symlink_to(folder)
    elif content == "stray file in a model":
        shutil.copytree(folder, target)
        (target / "thesis.tex").write_text("precious")
    else:
        target.mkdir()
        (target / content).write_text('{"name": "a web page"}')
    before = sorted(folder.parent.rglob("*"))
    for work in (lambda: check_target(target, True), lambda: model.save(target, overwrite=True)):
        with pytest.raises(OutputError, match="will not be replaced"):
            work()
    assert sorted(folder.parent.rglob("*")) == before


def test_an_empty_folder_may_be_replaced_when_asked(model, tmp_path):
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", True)
    with pytest.raises(OutputError, match="exists already"):
        check_target(tmp_path / "empty", False)


def test_no_parent(model, tmp_path):
    with pytest.raises(OutputError, match="does not exist; create it first"):
        model.save(tmp_path / "absent" / "model")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("step", ["_write_references", "_hash", "os.fsync", "rename"])
def test_an_interrupted_save_leaves_what_was_there(step, error, overwrite, model, folder, monkeypatch):
    if not overwrite:
        shutil.rmtree(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*")}

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        if step == "os.fsync":
            patch.setattr(os, "fsync", fail)
        elif step == "rename":
            # Where names cannot be swapped in one step, the old folder is put aside first.
            patch.setattr("moefast.core.atomic._exchange", lambda *_: False)
            rename = module.Path.rename
            patch.setattr(
                module.Path,
                "rename",
                lambda path, to: fail() if path.name.endswith(".partial") else rename(path, to),
            )
        else:
            patch.setattr(module, step, fail)
        with pytest.raises((KeyboardInterrupt, OutputError)):
            model.save(folder, overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in folder.glob("*")} == before
    assert [item.name for item in folder.parent.iterdir()] == ([folder.name] if overwrite else [])


def test_a_graph_that_differs_is_not_kept(model, tmp_path, monkeypatch):
    monkeypatch.setattr("moefast.export.parity.TOLERANCES", dict.fromkeys(
        ("log_g", "log_g_err", "weights", "expert_log_g", "log_g_err_raw", "chi2", "log_level"), 0.0
    ))  # fmt: skip
    with pytest.raises(ModelError, match="does not give the numbers"):
        model.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# -- the shipped model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "of_set", "rows"),
    [("observed", "library", 600_000), ("z0", "z0", 200_000), ("survey", "survey", 1_000_000)],
)
def test_the_shipped_models_load(name, of_set, rows):
    assert name in SHIPPED
    shipped = Model.load(name)
    assert shipped.name.endswith(f"({name}, shipped with moefast)")
    assert shipped.mixture.n_pixels == 4096
    assert shipped.manifest["training"]["files"] == [f"{of_set} train, rows 0:{rows}"]
    assert sum(file.stat().st_size for file in shipped.path.iterdir()) < 8e6


def test_without_a_name_it_is_the_first():
    assert Model.load().path == Model.load(SHIPPED[0]).path == shipped_path(SHIPPED[0])


def test_a_model_folder_of_that_name_is_meant_first(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "survey").mkdir()
    assert Model.load("survey").path == shipped_path("survey"), (
        "a folder that is no model, of reports perhaps"
    )
    with pytest.raises(ModelError, match="this is no model folder"):
        Model.load("survey/")
    (tmp_path / "survey").rmdir()
    model.save(tmp_path / "survey")
    assert Model.load("survey").mixture.n_pixels != 4096


def test_without_a_shipped_model_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "shipped_path", lambda *_: tmp_path)
    with pytest.raises(ModelError, match="make one with `moefast fit"):
        Model.load()
