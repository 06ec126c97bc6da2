"""A file is complete under its name, or absent."""

import json
import os
import stat

import pytest

from moefast.core.atomic import atomic_file, write_atomically, write_json
from moefast.core.errors import OutputError


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "report.txt"
    write_atomically(path, b"one")
    write_atomically(str(path), b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["report.txt"]


def test_a_result_is_as_readable_as_any_file(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "report.txt", b"")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "report.txt").stat().st_mode) == 0o640


def test_refusals_name_the_file(tmp_path):
    with pytest.raises(OutputError, match=r"report\.txt: .*does not exist"):
        write_atomically(tmp_path / "absent" / "report.txt", b"")
    with pytest.raises(OutputError, match="is a folder"):
        write_atomically(tmp_path, b"")


@pytest.mark.parametrize("step", ["pathlib.Path.write_bytes", "os.replace", "os.fsync"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "report.txt"
    write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(OutputError, match=r"report\.txt: .*No space left"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["report.txt"]


def test_a_block_that_fails_leaves_no_file(tmp_path):
    def fail():
        with atomic_file(tmp_path / "model.npz") as partial:
            partial.write_bytes(b"half")
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert os.listdir(tmp_path) == []


def test_a_file_that_exists_is_kept_unless_it_may_be_replaced(tmp_path):
    path = tmp_path / "spectra.png"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match="exists already"), atomic_file(path, overwrite=False):
        pass
    with atomic_file(path) as partial:
        partial.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_json_is_readable_and_refuses_what_json_has_not(tmp_path):
    write_json({"unit": "Å", "values": [1.5, None]}, tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "Å" in text
    assert json.loads(text) == {"unit": "Å", "values": [1.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json({"value": float("nan")}, tmp_path / "b.json")
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".report.txt.999999999.partial").write_bytes(b"half")
    write_atomically(tmp_path / "report.txt", b"whole")
    assert os.listdir(tmp_path) == ["report.txt"]
