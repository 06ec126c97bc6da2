"""What commands meet around them: disks that are full, signals, forks, threads, odd environments and names."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from small import same_rows

from moefast.benchmarks.faults.case import command, run
from moefast.benchmarks.faults.disk import full
from moefast.cli import cli
from moefast.predicting.files import predict
from moefast.protocol.evaluate import evaluate
from moefast.spectra import read_table

pytestmark = pytest.mark.skipif(
    not hasattr(os, "pidfd_open"), reason="processes are forked and watched as Linux does"
)


@pytest.fixture
def few(stars, tmp_path):
    return stars.take(slice(0, 40)).write(tmp_path / "few.h5", arrays=("flux", "error", "noisy"))


@pytest.fixture
def place(tmp_path):
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


# -- full disks ----------------------------------------------------------------------------------------------------

COMMANDS = {
    "predict .h5": ("predict", "FEW", "-m", "MODEL", "-q", "-o", "PLACE/t.h5"),
    "predict .fits": ("predict", "FEW", "-m", "MODEL", "-q", "-o", "PLACE/t.fits"),
    "predict .parquet": ("predict", "FEW", "-m", "MODEL", "-q", "-o", "PLACE/t.parquet"),
    "simulate": ("simulate", "PLACE/s.h5", "-n", "3", "--seed", "1", "-q"),
    "evaluate": ("evaluate", "FEW", "-m", "MODEL", "-q", "-o", "PLACE/report"),
    "export": ("export", "MODEL", "-o", "PLACE/m.onnx"),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("size", [0, 6000])
def test_a_full_disk_is_one_line_and_its_exit_code(name, size, few, model_folder, place):
    words = {"FEW": str(few), "MODEL": str(model_folder)}
    arguments = [words.get(word, word.replace("PLACE", str(place))) for word in COMMANDS[name]]
    # What it says goes to a pipe in reality; here to a file, which must have room.
    ended = run(command(*arguments), place.parent / "log", first=full(size or 1000))
    assert ended.code == 8, ended.said
    assert len([line for line in ended.said.splitlines() if line]) == 1, ended.said
    assert "moefast: error: " in ended.said
    assert list(place.iterdir()) == []


def test_a_fit_on_a_full_disk(train_file, place):
    arguments = (
        "fit",
        train_file,
        "--recipe",
        "global-ridge",
        "--no-references",
        "-q",
        "-o",
        place / "model",
    )
    ended = run(command(*arguments), place.parent / "log", first=full(6000))
    assert ended.code == 8, ended.said
    assert ended.said.count("moefast: error: ") == 1
    assert "Traceback" not in ended.said
    assert list(place.iterdir()) == []


# -- names that are taken meanwhile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["simulate", "export", "inspect --picture", "predict --report"])
def test_a_name_taken_meanwhile_is_left_alone(name, few, model, model_folder, place, monkeypatch):
    """Somebody else writes under the name when the result is complete and about to get it."""
    target = (
        place
        / {
            "simulate": "s.h5",
            "export": "m.onnx",
            "inspect --picture": "p.png",
            "predict --report": "p.html",
        }[name]
    )
    predict(few, model, place.parent / "t.h5")
    arguments = {
        "simulate": ["simulate", target, "-n", "3", "--seed", "1"],
        "export": ["export", model_folder, "-o", target],
        "inspect --picture": ["inspect", few, "-m", model_folder, "--picture", target],
        "predict --report": ["inspect", place.parent / "t.h5", "--report", target],
    }[name]
    real = os.fsync

    def fsync(handle):
        if not target.exists():
            target.write_text("precious")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    result = CliRunner().invoke(cli, [str(word) for word in arguments])
    assert result.exit_code == 8, result.output
    assert "during this run" in result.stderr
    assert [item.name for item in place.iterdir()] == [target.name]
    assert target.read_text() == "precious"
    again = CliRunner().invoke(cli, [str(word) for word in arguments])
    assert again.exit_code == 8
    assert "exists already" in again.stderr
    replaced = CliRunner().invoke(cli, [*(str(word) for word in arguments), "--overwrite"])
    assert replaced.exit_code == 0, replaced.output
    assert target.stat().st_size > 100


# -- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "inter")]
)
def test_a_signal_before_anybody_could_clear_up(number, code, word, few, model_folder, place, monkeypatch):
    """The table is begun, and the block that would remove it has not been entered."""
    from moefast.predicting import run as running

    def strike(*_):
        assert len(list(place.iterdir())) == 1
        os.kill(os.getpid(), number)

    monkeypatch.setattr(running, "warm_up", strike)
    ended = run(command("predict", few, "-m", model_folder, "-q", "-o", place / "t.h5"), place.parent / "log")
    assert ended.code == code
    assert ended.said.count("moefast: ") == 1
    assert f"moefast: {word}" in ended.said
    assert list(place.iterdir()) == []


# -- forks and threads ---------------------------------------------------------------------------------------------


def test_a_process_forked_after_an_evaluation_works(few, model, place):
    evaluate(few, model)
    expected = predict(few, model).columns
    for _ in range(2):
        ended = run(partial(predict, few, model, place / "t.h5", overwrite=True), place.parent / "log")
        assert ended.code == 0, ended.said
        same_rows(read_table(place / "t.h5")[0], expected)


def test_several_threads_predict_at_once(few, model):
    expected = predict(few, model).columns
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: predict(few, model).columns, range(8)):
            same_rows(found, expected)


# -- environments --------------------------------------------------------------------------------------------------


def test_an_evaluation_in_odd_surroundings(few, model_folder, place):
    """No home, a terminal without Greek letters, the backend of a notebook, and a name that looks like mathematics."""
    source = place / "a$_$.h5"
    shutil.copy(few, source)
    environment = {
        name: text for name, text in os.environ.items() if name in {"PATH", "NUMBA_CACHE_DIR", "LD_LIBRARY_PATH"}
    } | {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "cp1252"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "from moefast.cli import main; main()",
         "evaluate", source.name, "-m", str(model_folder), "-o", "report", "-q"],
        cwd=place, env=environment, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode("cp1252")
    assert {"report.json", "report.html", "report.png"} <= {
        item.name for item in (place / "report").iterdir()
    }
    assert "R²".encode("cp1252") in done.stdout


# -- names ---------------------------------------------------------------------------------------------------------

LONG, NUL = "n" * 300, "a\0b"
OUTPUTS = {
    "predict": ("predict", "FEW", "-m", "MODEL", "-o", "NAME.h5"),
    "simulate": ("simulate", "NAME.h5", "-n", "2", "--seed", "1"),
    "evaluate": ("evaluate", "FEW", "-m", "MODEL", "-o", "NAME"),
    "export": ("export", "MODEL", "-o", "NAME.onnx"),
    "fit": ("fit", "FEW", "-o", "NAME"),
    "scenarios": ("scenarios", "MODEL", "-o", "NAME.json"),
}
INPUTS = {
    "predict": ("predict", "NAME.h5", "-m", "MODEL"),
    "predict a folder": ("predict", "NAME", "-m", "MODEL"),
    "predict by a model": ("predict", "FEW", "-m", "NAME"),
    "predict with velocities": ("predict", "FEW", "-m", "MODEL", "--velocity", "NAME.csv"),
    "inspect": ("inspect", "NAME.h5"),
    "evaluate": ("evaluate", "NAME.h5", "-m", "MODEL", "-o", "r"),
    "evaluate a graph": ("evaluate", "FEW", "-m", "NAME.onnx", "-o", "r"),
    "evaluate a table": ("evaluate", "FEW", "-m", "NAME.csv", "-o", "r"),
    "evaluate a model": ("evaluate", "FEW", "-m", "NAME", "-o", "r"),
    "compare": ("compare", "NAME", "NAME"),
    "milestones": ("milestones", "NAME"),
    "export": ("export", "NAME", "-o", "m.onnx"),
}


@pytest.mark.parametrize("kind", ["long", "nul", "loop"])
@pytest.mark.parametrize(("name", "codes"), [(k, {8}) for k in OUTPUTS] + [(k, {3, 6}) for k in INPUTS])
def test_names_that_no_file_has_are_told_by_every_command(
    name, codes, kind, few, model_folder, place, monkeypatch
):
    monkeypatch.chdir(place)
    arguments = (OUTPUTS if codes == {8} else INPUTS)[name]
    stem = {"long": LONG, "nul": NUL, "loop": "loop/a"}[kind]
    os.symlink("loop", place / "loop")
    words = {"FEW": str(few), "MODEL": str(model_folder)}
    result = CliRunner().invoke(cli, [words.get(word, word.replace("NAME", stem)) for word in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code in codes | {2}, result.output
    assert "rror: " in result.stderr
    assert [item.name for item in place.iterdir()] == ["loop"]


def test_identifiers_that_fits_cannot_name_are_told_first(few, model, place):
    with h5py.File(few, "r+") as file:
        values = file["dataset/params"][()]
        del file["dataset/params"]
        for name in values.dtype.names:
            file[f"dataset/params/{name}"] = values[name]
        file["dataset/params/é_id"] = np.arange(len(values))
    found = CliRunner().invoke(cli, ["predict", str(few), "-m", str(model.path), "-o", str(place / "t.fits")])
    assert found.exit_code == 8, found.output
    assert "'é_id'" in found.stderr
    assert list(place.iterdir()) == []
    predict(few, model, place / "t.h5")
    np.testing.assert_array_equal(read_table(place / "t.h5")[0]["é_id"], np.arange(len(values)))


def test_a_column_whose_name_only_looks_like_a_weight_is_ignored(few, model, place):
    table = place / "t.csv"
    lines = ["row,log_g,weight_²", *(f"{i},3.0,1" for i in range(40))]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = evaluate(few, table)
    assert not [name for name in found.stars if name.startswith("weight")]


def test_default_names_are_those_of_the_files(few, stars, model_folder, place, monkeypatch):
    """A file may be called like a pattern; and a table of other spectra is never replaced under the default name."""
    monkeypatch.chdir(place)
    for k in (1, 2):
        stars.take(slice(10 * k, 10 * k + 10)).write(place / f"run[{k}].h5")

    def go(*arguments):
        return CliRunner().invoke(
            cli, ["predict", *map(str, arguments), "-m", str(model_folder), "-q", "--overwrite"]
        )

    for k in (1, 2):
        assert go(f"run[{k}].h5").exit_code == 0
    ids = {k: read_table(place / f"run[{k}].log_g.h5")[0]["id"].tolist() for k in (1, 2)}
    assert ids == {k: list(range(10 * k, 10 * k + 10)) for k in (1, 2)}
    (place / "elsewhere").mkdir()
    shutil.copy(few, place / "elsewhere" / "run[1].h5")
    refused = go("elsewhere/run[1].h5")
    assert refused.exit_code == 8
    assert "run[1].log_g.h5: is the table of other spectra" in refused.stderr
    assert read_table(place / "run[1].log_g.h5")[0]["id"].tolist() == ids[1]


# -- handles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_more_files_than_may_be_open(shift, stars, model, place):
    """On the grid of the model, and on another one; with identifiers, labels and velocities to look at."""
    some = stars.take(slice(0, 2)).observed()
    some = replace(some, wave=some.wave + shift)
    for i in range(60):
        some.write(place / f"f{i:02d}.h5")

    def limit():
        # Others that this process was forked with are open already.
        taken = {int(number) for number in os.listdir("/proc/self/fd")}
        free = (number for number in itertools.count() if number not in taken)
        most = next(itertools.islice(free, 40, None))
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    def work():
        found = predict(place, model)
        print(len(found.columns["log_g"]), len(found.failures), "id" in found.columns)

    ended = run(work, place.parent / "log", first=limit)
    assert "120 0 True" in ended.said, ended.said


# -- pipes ---------------------------------------------------------------------------------------------------------

PIPES = {
    "predict": ("predict", "PIPE.h5", "-m", "MODEL", "-o", "t.h5"),
    "predict fits": ("predict", "PIPE.fits", "-m", "MODEL", "-o", "t.h5"),
    "predict by a model": ("predict", "FEW", "-m", "PIPE", "-o", "t.h5"),
    "velocities": ("predict", "FEW", "-m", "MODEL", "-o", "t.h5", "--velocity", "PIPE.csv"),
    "velocities fits": ("predict", "FEW", "-m", "MODEL", "-o", "t.h5", "--velocity", "PIPE.fits"),
    "inspect": ("inspect", "PIPE.h5"),
    "evaluate a graph": ("evaluate", "FEW", "-m", "PIPE.onnx", "-o", "r"),
    "evaluate a table": ("evaluate", "FEW", "-m", "PIPE.csv", "-o", "r"),
    "evaluate a table .h5": ("evaluate", "FEW", "-m", "PIPE.h5", "-o", "r"),
    "milestones": ("milestones", "PIPE.json"),
    "compare": ("compare", "PIPE", "PIPE"),
    "fit": ("fit", "PIPE.h5", "-o", "m"),
    "checkpoint": ("fit", "FEW", "-o", "m", "--checkpoint", "."),
}


@pytest.mark.parametrize("name", PIPES)
def test_nobody_waits_for_a_pipe(name, few, model_folder, place, monkeypatch):
    monkeypatch.chdir(place)
    words = {"FEW": str(few), "MODEL": str(model_folder)}
    arguments = [words.get(word, word.replace("PIPE", "pipe")) for word in PIPES[name]]
    pipe = (
        "first-pass.npz"
        if name == "checkpoint"
        else next(word for word in arguments if word.startswith("pipe"))
    )
    os.mkfifo(place / pipe)
    ended = run(command(*arguments), place.parent / "log")
    assert ended.code in {3, 6, 8}, (ended.code, ended.said)
    assert "moefast: error: " in ended.said
    assert [item.name for item in place.iterdir()] == [pipe]
