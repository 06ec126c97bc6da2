"""Every write, fsync and rename of every writer fails once: an error, and never a wrong file under the final name."""

import errno
import gc
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from moefast.core import atomic
from moefast.core.atomic import (
    partial_folder,
    publish,
    publish_folder,
    recover_folder,
    remove_quietly,
    write_atomically,
)
from moefast.core.errors import OutputError
from moefast.core.watched import WatchedFile
from moefast.spectra.spectrum_set import open_spectra
from moefast.spectra.tables import WRITERS, Column, open_table, read_table
from moefast.spectra.writer import SpectrumWriter

CALLS = ("write", "fsync", "replace", "link", "close")
ROWS = 3000
COLUMNS = [Column(f"c{k}", np.dtype("float32"), "dex", "a column") for k in range(12)] + [
    Column("name", np.dtype("U7"))
]


@pytest.fixture
def lost(monkeypatch):
    """Exceptions that Python printed and forgot."""
    found = []
    monkeypatch.setattr(sys, "unraisablehook", found.append)
    # Collecting is asked for after every case: what other tests left alive need not be looked at each time.
    gc.freeze()
    yield found
    gc.unfreeze()


def table_values():
    rng = np.random.default_rng(0)
    values = {f"c{k}": rng.normal(size=ROWS).astype(np.float32) for k in range(12)}
    return values | {"name": np.array([f"star{i % 999}" for i in range(ROWS)])}


def write_table(path):
    values = table_values()
    with open_table(path, ROWS, COLUMNS, {"model": "m"}) as table:
        for start in range(0, ROWS, 1000):
            table.write(start, {name: array[start : start + 1000] for name, array in values.items()})
        table.attrs["r2"] = 0.5


def right_table(path):
    columns, attrs = read_table(path)
    return attrs["r2"] == 0.5 and all(np.array_equal(columns[n], v) for n, v in table_values().items())


def write_spectra(path):
    wave = np.linspace(7100, 8850, 300)
    flux = np.arange(200 * 300, dtype=np.float32).reshape(200, 300)
    with SpectrumWriter(
        path, n_rows=200, wave=wave, wave_edges=np.linspace(7097, 8853, 301), params={"log_g": "f8"}
    ) as writer:
        for start in (0, 100):
            rows = slice(start, start + 100)
            writer.write(start, params={"log_g": np.arange(100.0)}, flux=flux[rows], error=flux[rows])


def right_spectra(path):
    (block,) = open_spectra(path).blocks(200, params=["log_g"])
    flux = np.arange(200 * 300, dtype=np.float32).reshape(200, 300)
    return np.array_equal(block.flux, flux) and np.array_equal(
        block.params["log_g"], np.tile(np.arange(100.0), 2)
    )


def write_text(path):
    write_atomically(path, b"report" * 1000)


def right_text(path):
    return path.read_bytes() == b"report" * 1000


PRODUCTS = {
    "table.h5": (write_table, right_table),
    "table.fits": (write_table, right_table),
    "table.parquet": (write_table, right_table),
    "spectra.h5": (write_spectra, right_spectra),
    "report.json": (write_text, right_text),
}


def outcome(path, write, right, lost):
    """ "refused" with nothing under the name, or "written" and right."""
    try:
        write(path)
        told = False
    except OutputError:
        told = True
    gc.collect()
    assert not lost
    assert told == (not path.exists()) or right(path)
    assert not list(path.parent.glob(".*"))
    if not told:
        assert right(path)
    return "refused" if told else "written"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_write_that_fails_is_an_error(name, number, tmp_path, monkeypatch, lost):
    write, right = PRODUCTS[name]
    real = {call: getattr(os, call) for call in CALLS}
    calls, limit = [], None

    def failing(call):
        def run(*args, **kwargs):
            calls.append(call)
            if limit is not None and len(calls) == limit:
                if call == "close":
                    real[call](*args)
                raise OSError(number, os.strerror(number))
            return real[call](*args, **kwargs)

        return run

    for call in CALLS:
        monkeypatch.setattr(os, call, failing(call))
    write(tmp_path / name)
    n_calls = len(calls)
    assert right(tmp_path / name)
    outcomes = []
    for position in range(1, n_calls + 1):
        calls.clear()
        limit = position
        folder = tmp_path / str(position)
        folder.mkdir()
        outcomes.append(outcome(folder / name, write, right, lost))
    # A missing hard link is replaced by other means, and what comes after the rename does no harm: the folder.
    assert outcomes.count("written") <= 3
    assert outcomes.count("refused") >= 1


@pytest.mark.parametrize("name", [f"table{suffix}" for suffix in WRITERS] + ["spectra.h5", "report.json"])
def test_a_full_disk_is_an_error(name, tmp_path, lost):
    # A limit on the size of files is a disk that is full at that byte, for libraries in C, too.
    write, right = PRODUCTS.get(name, (write_table, right_table))
    write(tmp_path / name)
    size = (tmp_path / name).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for share in (0, 0.01, 0.2, 0.5, 0.9, 0.999):
            folder = tmp_path / str(share)
            folder.mkdir()
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), hard))
            assert outcome(folder / name, write, right, lost) == "refused"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_an_interrupt_inside_hdf5_is_not_swallowed(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    table = open_table(tmp_path / "t.h5", ROWS, COLUMNS)
    monkeypatch.setattr(os, "write", interrupted)

    def write():
        with table:
            table.write(0, table_values())

    with pytest.raises(KeyboardInterrupt):
        write()
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["seek", "tell", "write", "readinto", "truncate", "flush"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["table.h5", "spectra.h5"])
def test_a_signal_waits_until_hdf5_has_returned(name, number, call, tmp_path, monkeypatch):
    """Raised in any function that the library calls, it would look like a failure of the file to the library."""

    class Ended(BaseException):
        pass

    def end(*_):
        raise Ended

    real, calls = getattr(WatchedFile, call), []

    def strike(self, *arguments):
        calls.append(call)
        if len(calls) == at:
            signal.raise_signal(number)
        return real(self, *arguments)

    monkeypatch.setattr(WatchedFile, call, strike)
    before = signal.signal(number, end)
    try:
        at = 0
        PRODUCTS[name][0](tmp_path / f"whole-{name}")
        n_calls, outcomes = len(calls), set()
        for at in range(1, n_calls + 1, max(1, n_calls // 6)):
            calls.clear()
            folder = tmp_path / str(at)
            folder.mkdir()
            with pytest.raises(Ended):
                PRODUCTS[name][0](folder / name)
            outcomes.add((folder / name).exists())
            assert not list(folder.glob(".*"))
        assert True not in outcomes
        assert outcomes or not n_calls
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, before)


def test_a_name_taken_meanwhile_is_left_alone(tmp_path):
    path = tmp_path / "log_g.h5"
    table = open_table(path, ROWS, COLUMNS)
    table.write(0, table_values())
    path.write_text("the other half of the night")
    with pytest.raises(OutputError, match="during this run"):
        table.close()
    assert path.read_text() == "the other half of the night"
    assert [p.name for p in tmp_path.iterdir()] == ["log_g.h5"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_name_is_taken_once_without_hard_links_too(hard_links, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, "no hard links here")

    if not hard_links:
        monkeypatch.setattr(os, "link", refused)
    (tmp_path / "partial").write_text("new")
    publish(tmp_path / "partial", tmp_path / "name", overwrite=False)
    assert (tmp_path / "name").read_text() == "new"
    assert not (tmp_path / "partial").exists()
    (tmp_path / "partial").write_text("newer")
    with pytest.raises(OutputError, match="left as it is"):
        publish(tmp_path / "partial", tmp_path / "name", overwrite=False)
    assert (tmp_path / "name").read_text() == "new"


def test_a_folder_that_cannot_be_synchronised_is_no_error(tmp_path, monkeypatch):
    real = os.fsync

    def as_cifs(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", as_cifs)
    write_table(tmp_path / "t.h5")
    assert right_table(tmp_path / "t.h5")


def test_the_first_failure_is_kept_and_nothing_is_written_after_it(tmp_path, monkeypatch):
    file = WatchedFile(tmp_path / "f")
    file.write(b"before")
    real, codes = os.write, [errno.ENOSPC, errno.EIO]

    def failing(*_):
        raise OSError(codes.pop(0), "disk")

    monkeypatch.setattr(os, "write", failing)
    assert file.write(b"lost") == 4
    monkeypatch.setattr(os, "write", real)
    assert file.write(b"late") == 4
    with pytest.raises(OSError, match="disk") as caught:
        file.check()
    assert caught.value.errno == errno.ENOSPC
    file.close()
    assert (tmp_path / "f").read_bytes() == b"before"


@pytest.mark.parametrize("name", ["a" * 230 + ".h5", "b" * 252 + ".h5"])
def test_long_names_can_be_written(name, tmp_path):
    write_table(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["c" * 300 + ".h5", "nul\0.h5", "no/such/folder.h5"])
def test_impossible_names_are_an_error(name, tmp_path):
    with pytest.raises(OutputError):
        open_table(tmp_path / name, ROWS, COLUMNS)


# -- folders -----------------------------------------------------------------------------------------------------------


def fill(folder, text):
    (folder / "inner").mkdir()
    (folder / "a").write_text(text)
    (folder / "inner" / "b").write_text(text)


def held(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("in_one_step", [True, False])
@pytest.mark.parametrize("call", [None, "fsync", "rename"])
def test_folders_are_replaced_as_a_whole_or_not_at_all(in_one_step, call, tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    fill(target, "old")
    if not in_one_step:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    partial = partial_folder(target)
    fill(partial, "new")
    if call is None:
        publish_folder(partial, target, overwrite=True)
        assert set(held(target).values()) == {"new"}
    else:
        calls, real = [], getattr(os, call)

        def failing(*args, **kwargs):
            calls.append(call)
            # Putting the old one aside succeeds, the new one does not come.
            if call == "fsync" or len(calls) == 2:
                raise OSError(errno.EIO, "disk")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, failing)
        if call == "rename" and in_one_step:
            publish_folder(partial, target, overwrite=True)
            assert set(held(target).values()) == {"new"}
        else:
            with pytest.raises(OSError, match="disk"):
                publish_folder(partial, target, overwrite=True)
            assert set(held(target).values()) == {"old"}
        monkeypatch.undo()
    remove_quietly(partial)
    recover_folder(target)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_cleared_or_put_back(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    target = tmp_path / "model"
    for ending, text in (("old", "old"), ("partial", "half")):
        machine, boot = atomic._machine()
        folder = tmp_path / f".model.{machine}-{boot}-{ended.pid}-1-0.{ending}"
        folder.mkdir()
        fill(folder, text)
    recover_folder(target)
    assert set(held(target).values()) == {"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_has_come_to_be_is_left_alone(tmp_path):
    target = tmp_path / "model"
    partial = partial_folder(target)
    fill(partial, "mine")
    target.mkdir()
    fill(target, "theirs")
    with pytest.raises(OutputError, match="somebody else"):
        publish_folder(partial, target, overwrite=False)
    assert set(held(target).values()) == {"theirs"}
