"""A file is complete under its name, or absent."""

import json
import os
import stat
import subprocess
import sys
import time

import pytest

from moefast.core import atomic
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


# -- what others left ---------------------------------------------------------------------------------------


@pytest.fixture
def ended():
    """Number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_by(folder, name="report.txt", *, machine=None, boot=None, pid=None, began=None, ending="partial"):
    """A file as a process leaves it: of this machine, boot and process unless another is given."""
    writer = f"{machine or atomic._machine()[0]}-{boot or atomic._machine()[1]}-{pid or os.getpid()}"
    path = folder / f".{name}.{writer}-{atomic._began(os.getpid()) if began is None else began}-99.{ending}"
    path.write_bytes(b"half")
    return path


def test_what_a_killed_process_left_is_removed(tmp_path, ended):
    left_by(tmp_path, pid=ended)
    left_by(tmp_path, pid=ended, ending="partial.wide")
    write_atomically(tmp_path / "report.txt", b"whole")
    assert os.listdir(tmp_path) == ["report.txt"]


def test_a_number_of_a_process_that_was_given_again_is_not_the_process(tmp_path):
    assert atomic._began(os.getpid()) > 0
    same = left_by(tmp_path)
    other = left_by(tmp_path, began=atomic._began(os.getpid()) - 1)
    write_atomically(tmp_path / "report.txt", b"whole")
    assert same.exists()
    assert not other.exists()


def test_what_lived_before_the_machine_was_started_again_has_ended(tmp_path):
    left_by(tmp_path, boot="0" * 8)
    write_atomically(tmp_path / "report.txt", b"whole")
    assert os.listdir(tmp_path) == ["report.txt"]


def test_what_another_machine_writes_is_left_alone_for_a_week(tmp_path, ended):
    new, old = (left_by(tmp_path, machine=8 * digit, pid=ended) for digit in "01")
    eight_days_ago = time.time() - 8 * 86400
    os.utime(old, (eight_days_ago, eight_days_ago))
    write_atomically(tmp_path / "report.txt", b"whole")
    assert new.exists()
    assert not old.exists()


def test_two_threads_may_write_the_same_name(tmp_path):
    """Neither takes the other's unfinished file for one that was left."""
    path = tmp_path / "report.txt"
    with atomic_file(path) as first:
        first.write_bytes(b"one")
        with atomic_file(path) as second:
            second.write_bytes(b"two")
        assert first.exists()
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["report.txt"]


def test_what_was_begun_can_be_removed_at_once(tmp_path):
    """As a command does that was interrupted when nobody was there yet to clear up."""
    atomic.partial_path(tmp_path / "a.h5", overwrite=False).write_bytes(b"half")
    (atomic.partial_folder(tmp_path / "model") / "model.onnx").write_bytes(b"half")
    assert len(os.listdir(tmp_path)) == 2
    atomic.remove_unfinished()
    assert not os.listdir(tmp_path)


def test_what_a_parent_has_begun_is_not_the_childs_to_remove(tmp_path):
    with atomic_file(tmp_path / "a.txt") as partial:
        partial.write_bytes(b"half")
        child = os.fork()
        if child == 0:
            atomic.remove_unfinished()
            os._exit(0)
        os.waitpid(child, 0)
        assert partial.exists()
