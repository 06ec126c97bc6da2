"""Compiled code is never stale, and a cache that cannot be used costs time and nothing else."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from moefast.core import compiled
from moefast.core.compiled import cache_place, njit


@pytest.fixture
def package(tmp_path):
    """Two modules: a kernel, and a constant with a function that are compiled into it. Runs it and gives its answer."""
    folder = tmp_path / "stars"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "kernel.py").write_text(
        textwrap.dedent(
            """
            from moefast.core.compiled import njit
            from stars.quality import LIMIT, doubled

            @njit(cache=True)
            def answer(x):
                return doubled(x) + LIMIT

            @njit(cache=True)
            def above(x):
                return answer(x) + 1
            """
        )
    )

    def set_constants(limit, factor):
        (folder / "quality.py").write_text(
            textwrap.dedent(
                f"""
                from moefast.core.compiled import njit
                LIMIT = {limit}

                @njit(cache=True)
                def doubled(x):
                    return {factor} * x
                """
            )
        )

    # Code is kept beside its source, wherever those who run the tests keep theirs.
    surroundings = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}

    def run(**environment):
        code = "from stars.kernel import above, answer; print(answer(1), above(1))"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
            env={**surroundings, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    set_constants(10, 2)
    return folder, set_constants, run


def test_a_changed_constant_of_another_file_is_seen(package):
    folder, set_constants, run = package
    first, said = run()
    assert first == "12 13"
    assert said.count("compiling for this machine") == 1
    assert list((folder / "__pycache__").glob("*.nbi"))
    assert run() == ("12 13", "")
    set_constants(100, 2)
    assert run()[0] == "102 103"
    set_constants(100, 3)
    assert run()[0] == "103 104"


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_damaged_caches_are_compiled_again(damage, package):
    folder, _, run = package
    run()
    # The index of one function, the code of the others.
    for path in (folder / "__pycache__").glob("*.nb[ic]"):
        if (path.suffix == ".nbi") != path.name.startswith("kernel.above"):
            continue
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        if damage == "flipped":
            content[middle] ^= 0x10
        path.write_bytes({"empty": b"", "cut": content[:middle], "flipped": content}[damage])
    assert run()[0] == "12 13"
    # The second run has mended them.
    assert run() == ("12 13", "")


def add_a_half(x):
    return x + 0.5


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """Kernels of one function that share a cache, as several processes do."""
    monkeypatch.setattr(compiled.caching.config, "CACHE_DIR", str(tmp_path))
    return [njit(cache=True)(add_a_half) for _ in range(3)]


def test_code_of_two_processes_that_compile_at_once_is_not_confused(processes, monkeypatch):
    """Both find no index, give their code the same name, and the index of one stands beside the code of the other."""
    one, two, later = processes
    save_data, load_index = compiled._Files._save_data, compiled._Files._load_index

    def save_while_another_does(files, name, data):
        monkeypatch.setattr(compiled._Files, "_save_data", save_data)
        monkeypatch.setattr(compiled._Files, "_load_index", lambda _: {})
        assert two(1.25) == 1.75
        monkeypatch.setattr(compiled._Files, "_load_index", load_index)
        save_data(files, name, data)

    monkeypatch.setattr(compiled._Files, "_save_data", save_while_another_does)
    assert one(1) == 1.5
    assert later(1.25) == 1.75
    assert later(1) == 1.5
    assert not later.stats.cache_hits


def test_code_of_earlier_sources_is_not_taken_for_that_of_a_new_index(processes, monkeypatch):
    """Another process has written the index of changed sources, and is about to write the code."""
    one, two, later = processes
    one(1)

    def ended(*_):
        raise OSError("killed")

    for kernel in (two, later):
        kernel._cache._cache_file._source_stamp = "changed"
    with monkeypatch.context() as patch:
        patch.setattr(compiled._Files, "_save_data", ended)
        two(1)
    assert later(1) == 1.5
    assert not later.stats.cache_hits


def test_a_full_disk_under_the_cache_is_no_error(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "_told", set())
    kernel = njit(cache=True)(lambda x: x + 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiled._Files, "save", full)
    assert kernel(1) == 2
    assert kernel(1.5) == 2.5
    assert caplog.text.count("cannot be kept") == 1


@pytest.fixture
def no_home(monkeypatch, tmp_path):
    """Neither the package nor the home can be written, and there is no entry for the user."""
    for locator in (compiled.caching.UserProvidedCacheLocator, compiled.caching.InTreeCacheLocator):
        monkeypatch.setattr(locator, "from_function", classmethod(lambda *_: None))
    monkeypatch.setattr(compiled.caching.AppDirs, "user_cache_dir", "~/.cache/numba")
    monkeypatch.setattr(compiled.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setattr(compiled, "_told", set())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    return tmp_path


def test_without_a_home_temporary_files_do(no_home):
    def add(x):
        return x + 1

    kernel = njit(cache=True)(add)
    assert cache_place(kernel).startswith(str(no_home / "temporary"))
    assert kernel(np.int64(1)) == 2
    assert list((no_home / "temporary").rglob("*.nbc"))
    assert not (no_home / "~").exists()
    assert (no_home / "temporary" / os.listdir(no_home / "temporary")[0]).stat().st_mode & 0o077 == 0


def test_a_folder_that_others_can_write_is_not_trusted(no_home, caplog):
    folder = no_home / "temporary" / f"moefast-compiled-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)

    def add(x):
        return x + 1

    kernel = njit(cache=True)(add)
    assert cache_place(kernel) == ""
    assert kernel(np.int64(1)) == 2
    assert not list(folder.iterdir())
    assert "set NUMBA_CACHE_DIR" in caplog.text


PREDICT = """
import sys
import numpy as np
from moefast.model import Model
from moefast.simulate.source import SimulatedSpectra

spectra = SimulatedSpectra.of_set("z0", rows=(0, 40))
block = next(iter(spectra.blocks(40)))
flux = block.flux + block.error * np.random.default_rng(1).standard_normal(block.flux.shape).astype(np.float32)
found = Model.load("z0").mixture.predict(flux, block.error)
np.savez(sys.argv[1], log_g=found.log_g, chi2=found.chi2, scale=found.scale, labels=found.labels)
"""


def test_the_process_that_compiles_gives_the_bits_of_those_that_read_its_code(tmp_path):
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "code")}
    for name in ("first", "second"):
        subprocess.run([sys.executable, "-c", PREDICT, tmp_path / name], env=env, check=True)
    first, second = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("first", "second"))
    assert np.isfinite(first["log_g"]).all()
    for name, values in first.items():
        np.testing.assert_array_equal(second[name], values, err_msg=name)
