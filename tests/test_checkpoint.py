"""A fit that is killed goes on where it stood, to the same bits; what is no checkpoint of it is refused or told."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moefast import checkpoint as module
from moefast.checkpoint import FILE, Checkpoint
from moefast.core import archives
from moefast.core.errors import InputError, OutputError
from moefast.experts import normal_equations
from moefast.experts.normal_equations import NormalEquations
from moefast.fitting import error_model, gate, linear_experts, training_set
from moefast.recipes import fit

ROWS = 2600

SCRIPT = """
import os, signal, sys
from moefast import checkpoint
from moefast.experts import normal_equations
from moefast.fitting import training_set
from moefast.recipes import fit

path, folder, stop, noise = sys.argv[1:]
checkpoint.SECONDS, checkpoint.SHARE, training_set.BLOCK_ROWS = 0.0, 1e9, 100
normal_equations.BUFFER_ROWS = 64

def progress(stage, done, total):
    if stage == "normal equations" and done >= int(stop):
        os.kill(os.getpid(), signal.SIGKILL)

fit(path, noise=noise, progress=progress, checkpoint=folder)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few iterations of the networks, whose quality is not the question, and buffers that a toy fills."""
    for room, name in ((gate, "fit_gate"), (error_model, "fit_error_model")):
        monkeypatch.setattr(room, name, functools.partial(getattr(room, name), hidden=4, steps=100))
    monkeypatch.setattr(normal_equations, "BUFFER_ROWS", 64)


@pytest.fixture(scope="module")
def toy_file(make_toy, tmp_path_factory):
    toy = make_toy(ROWS, 8)
    flux = toy.flux.copy()
    flux[77] = np.nan  # a row that is left out, and a pixel that is bad once
    flux[1234, 5] = np.nan
    return toy.write(tmp_path_factory.mktemp("toy") / "train.h5", arrays={"flux": flux})


@pytest.fixture(scope="module")
def undisturbed(toy_file):
    """The fit that nothing stops, made once for each way to treat noise."""
    return functools.cache(lambda noise: fit(toy_file, noise=noise))


def killed(path, folder, stop, noise="closed-form"):
    """Fit in another process that is killed for good after so many rows."""
    command = [sys.executable, "-c", SCRIPT, str(path), str(folder), str(stop), noise]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


class FirstPassDone(Exception):
    """Raised in the place of what follows the first pass."""


@pytest.fixture
def only_the_first_pass(monkeypatch):
    def stop(*_, **__):
        raise FirstPassDone

    monkeypatch.setattr(linear_experts, "principal_subspace", stop)


def stages(seen):
    def progress(stage, done, total):
        seen.setdefault(stage, []).append((done, total))

    return progress


def assert_same(one, two):
    assert one.manifest["fit"] == two.manifest["fit"]
    for name in ("reference", "noise_shape", "expert_weights", "expert_intercepts", "basis", "knots"):
        np.testing.assert_array_equal(getattr(one.mixture, name), getattr(two.mixture, name), err_msg=name)
    for name in ("gate", "error_model"):
        for a, b in zip(getattr(one.mixture, name), getattr(two.mixture, name), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
    assert list(one.references) == list(two.references)
    for name, form in one.references.items():
        np.testing.assert_array_equal(form.weights, two.references[name].weights, err_msg=name)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is of POSIX")
@pytest.mark.parametrize("noise", ["closed-form", "sampled"])
def test_a_killed_fit_goes_on_to_the_same_bits(toy_file, undisturbed, tmp_path, noise, caplog):
    folder = tmp_path / "so far"
    killed(toy_file, folder, 1000, noise)
    assert [item.name for item in folder.iterdir()] == [FILE]
    killed(toy_file, folder, 1900, noise)
    seen = {}
    model = fit(toy_file, noise=noise, progress=stages(seen), checkpoint=folder)
    # The checkpoint is written before a block is reported: the kill came right after.
    assert "1,900 spectra done; the fit goes on from there" in caplog.text
    assert "mean spectrum" not in seen
    assert seen["normal equations"][-1] == (ROWS, ROWS)
    assert seen["normal equations"][0] == (1900, ROWS)  # the stage begins where it stood
    assert min(done for done, _ in seen["normal equations"][1:]) > 1900
    assert model.manifest["fit"]["rows"] == {"used": ROWS - 1, "left_out": 1}
    assert_same(model, undisturbed(noise))
    assert not folder.exists()


def test_a_fit_that_fails_after_its_first_pass_has_that_pass_kept(
    toy_file, undisturbed, tmp_path, monkeypatch
):
    folder = tmp_path / "so far"
    with monkeypatch.context() as patch:
        patch.setattr(linear_experts, "principal_subspace", lambda *_, **__: np.linalg.inv(np.zeros((1, 1))))
        with pytest.raises(np.linalg.LinAlgError):
            fit(toy_file, checkpoint=folder)
    seen = {}
    model = fit(toy_file, progress=stages(seen), checkpoint=folder)
    assert seen["normal equations"] == [(ROWS, ROWS)]  # all of them were done before
    assert_same(model, undisturbed("closed-form"))


@pytest.fixture(scope="module")
def made_once(toy_file, tmp_path_factory):
    """A checkpoint of the fit of `toy_file`, taken after 1000 rows."""
    folder = tmp_path_factory.mktemp("made") / "once"
    killed(toy_file, folder, 1000)
    return folder


@pytest.fixture
def kept(made_once, tmp_path):
    """The same, for a test that may damage it."""
    return Path(shutil.copytree(made_once, tmp_path / "kept"))


def test_a_checkpoint_of_another_fit_is_refused_and_stays(toy_file, train_file, kept, monkeypatch):
    before = (kept / FILE).read_bytes()
    with pytest.raises(
        InputError, match=r"first-pass\.npz: the checkpoint is of another fit \(spectra was '"
    ):
        fit(train_file, checkpoint=kept)
    with pytest.raises(InputError, match=r"\(options\.seed was 0, is 3\)\. Repeat that fit"):
        fit(toy_file, seed=3, checkpoint=kept)
    with pytest.raises(
        InputError, match=r"options\.noise was 'closed-form', is 'sampled'; options\.references was"
    ):
        fit(toy_file, noise="sampled", references=False, checkpoint=kept)
    with pytest.raises(InputError, match=r"options\.grid\.t_eff_edges was"):
        fit(toy_file, recipe="global-ridge", checkpoint=kept)
    monkeypatch.setattr(module, "SCHEMA", 5)
    with pytest.raises(InputError, match="schema was 4, is 5"):
        fit(toy_file, checkpoint=kept)
    monkeypatch.undo()
    monkeypatch.setattr(module, "__version__", "9.9")
    with pytest.raises(InputError, match=r"version was '0\.\S+', is '9\.9'"):
        fit(toy_file, checkpoint=kept)
    assert (kept / FILE).read_bytes() == before


@pytest.mark.usefixtures("only_the_first_pass")
@pytest.mark.parametrize(
    "damage", ["cut", "empty", "flipped", "text", "foreign", "waiting", "rows", "edited"]
)
def test_a_damaged_checkpoint_is_told_and_the_fit_starts_anew(toy_file, kept, damage, caplog):
    path = kept / FILE
    content = bytearray(path.read_bytes())
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif damage == "text":
        path.write_text("hello")
    elif damage == "foreign":
        header = json.dumps({"what": "recipes for soup", "schema": 1, "key": {}, "rows": 3}).encode()
        np.savez(path, **(arrays | {"header": np.frombuffer(header, np.uint8)}))
    elif damage == "waiting":
        np.savez(path, **(arrays | {"equations/waiting": arrays["equations/waiting"] + 64}))
    elif damage == "edited":
        # Rows, too, so that nothing contradicts: by hand, with NumPy, as anybody might.
        header = json.loads(arrays["header"].tobytes())
        name = next(name for name in arrays if arrays[name].dtype.kind == "f" and arrays[name].size > 1)
        arrays[name].flat[0] += 1
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        np.savez(path, **arrays)
    else:
        np.savez(path, **(arrays | {"equations/count": arrays["equations/count"] + 1}))
    seen = {}
    with pytest.raises(FirstPassDone):
        fit(toy_file, progress=stages(seen), checkpoint=kept)
    assert "first-pass.npz: not a complete checkpoint (" in caplog.text
    assert "the fit starts from the beginning" in caplog.text
    assert seen["normal equations"][0][0] <= training_set.BLOCK_ROWS
    # The whole first pass is kept in its place.
    with np.load(path) as file:
        assert json.loads(file["header"].tobytes())["rows"] == ROWS
        assert file["equations/count"].sum() == ROWS - 1


@pytest.mark.parametrize("what", ["rows", "key", "checksum"])
def test_a_header_changed_by_hand_is_told(what, tmp_path):
    said = []
    kept = Checkpoint(tmp_path, tell=said.append)
    kept.begin({"spectra": "x"}, 100)
    kept.save(3, {"numbers": np.arange(3)})
    with np.load(kept.path) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(arrays["header"].tobytes())
    assert kept.load(lambda rows, read: (rows, read("numbers").tolist())) == (3, [0, 1, 2])
    header[what] = {"rows": 2, "key": {**header["key"], "more": 1}, "checksum": "0" * 64}[what]
    np.savez(kept.path, **(arrays | {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}))
    assert kept.load(lambda rows, read: (rows, read("numbers"))) is None
    assert "its header was changed" in said[-1]


def test_the_one_before_stays_until_the_next_is_complete(tmp_path, monkeypatch):
    said = []
    kept = Checkpoint(tmp_path / "a" / "b", tell=said.append)
    kept.begin({"spectra": "x"}, 100)
    kept.save(3, {"numbers": np.arange(3)})
    before = kept.path.read_bytes()
    (kept.folder / f".{FILE}.1.partial").write_bytes(b"of a fit that was killed while it wrote")
    original = archives._write_member

    def fail(*arguments):
        original(*arguments)
        assert kept.path.read_bytes() == before
        raise OSError("no space left on device")

    monkeypatch.setattr(archives, "_write_member", fail)
    kept.save(4, {"numbers": np.arange(4)})
    assert said == [
        f"{kept.path}: the checkpoint after 4 spectra could not be written (no space left on device)"
    ]
    assert kept.path.read_bytes() == before
    assert [item.name for item in kept.folder.iterdir()] == [FILE]
    assert kept.load(lambda rows, read: (rows, read("numbers").tolist())) == (3, [0, 1, 2])
    monkeypatch.undo()
    kept.save(5, {"numbers": np.arange(5)})
    assert kept.load(lambda rows, read: (rows, read("numbers").tolist())) == (5, [0, 1, 2, 3, 4])


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    kept = Checkpoint(tmp_path, tell=(said := []).append)
    kept.begin({"spectra": "x"}, 100)
    kept.save(3, {})
    header = np.load(kept.path)["header"]
    np.savez(kept.path, header=header, numbers=np.array([print], object))
    assert kept.load(lambda _, read: read("numbers")) is None
    assert "holds Python objects" in said[0]


def test_checkpoints_come_in_time_and_less_often_where_disks_are_slow(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    kept = Checkpoint(tmp_path / "so far")
    kept.begin({}, 10)
    clock[0] += module.SECONDS - 1
    assert not kept.due
    clock[0] += 1
    assert kept.due
    original = archives._write_member

    def slow(*arguments):
        clock[0] += 30
        return original(*arguments)

    monkeypatch.setattr(archives, "_write_member", slow)
    kept.save(1, {})
    clock[0] += module.SECONDS
    assert not kept.due
    clock[0] += 30 / module.SHARE - module.SECONDS
    assert kept.due


def test_a_disk_without_room_is_told_before_the_fit(toy_file, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    seen = {}
    with pytest.raises(
        OutputError, match=r"need 0\.\d GB, one being kept .* 0\.0 GB are free\. Name a folder"
    ):
        fit(toy_file, progress=stages(seen), checkpoint=tmp_path / "so far")
    assert seen == {}


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="the folder for checkpoints cannot be made"):
        Checkpoint(tmp_path / "file" / "so far")


def test_what_else_is_in_the_folder_stays(tmp_path):
    kept = Checkpoint(tmp_path)
    kept.begin({}, 10)
    kept.save(1, {})
    (tmp_path / "notes.txt").write_text("mine")
    kept.remove()
    kept.remove()
    assert [item.name for item in tmp_path.iterdir()] == ["notes.txt"]


def test_the_size_told_is_that_of_the_file(tmp_path, monkeypatch):
    p, bins, folds = 300, 3, 2
    totals = NormalEquations(np.zeros(p), bins, folds)
    rng = np.random.default_rng(0)
    for k in range(bins):
        for f in range(folds):
            n = normal_equations.BUFFER_ROWS - 1
            totals.add(rng.random((n, p), np.float32), np.ones(n), bins=np.full(n, k), folds=np.full(n, f))
    kept = Checkpoint(tmp_path)
    kept.begin({}, 10)
    kept.save(1, totals.state())
    size = Path(kept.path).stat().st_size
    assert 0.95 * size < NormalEquations.memory(p, bins, folds) < 1.05 * size


def test_notes_are_logged_unless_someone_listens(tmp_path, caplog):
    kept = Checkpoint(tmp_path)
    kept.begin({}, 10)
    kept.path.write_text("hello")
    assert kept.load(lambda *_: None) is None
    assert caplog.records[0].levelno == logging.WARNING
    assert caplog.records[0].name == "moefast.checkpoint"
