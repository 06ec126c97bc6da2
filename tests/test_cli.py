"""The command line: what it says, what it leaves behind, and the code it ends with."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from small import same_rows

import moefast
from moefast import backend
from moefast.cli import cli
from moefast.cli.signals import Terminated
from moefast.cli.swapped import PLACES
from moefast.core.errors import MoefastError
from moefast.protocol.report_folder import REPORT_FILES
from moefast.recipes import RECIPES
from moefast.spectra import open_spectra, read_table


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command in an empty folder; whatever goes wrong must be said in one message, without a traceback."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def invoke(*arguments, code=0):
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        if 3 <= code <= 8:
            assert "moefast: error: " in result.stderr
        return result

    return invoke


@pytest.fixture
def few(stars, tmp_path):
    return stars.take(slice(0, 40)).write(tmp_path / "few.h5", arrays=("flux", "error", "noisy"))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(backend, "cuda_devices", lambda: ([], "no NVIDIA driver (libcuda.so.1 not found)"))


# -- help ------------------------------------------------------------------------------------------------------

HELP = {
    "simulate": ("OUT", "--number", "--seed", "--mag", "--noise-level", "--overwrite", "log g 1-5"),
    "inspect": ("FILE…", "--picture", "--limit", "--json", "SNR"),
    "fit": (
        "FILE…", "--out", "--recipe", *RECIPES, "--grid", "--noise", "closed-form", "--references", "--checkpoint",
    ),
    "evaluate": ("FILE…", "--model", "--out", "--noise", "--backend", "R²", "report.json"),
    "compare": ("REPORT…", "--out", "better, worse or no difference"),
    "export": ("MODEL", "--part", "mixture", "expert-0", "ONNX", "verified"),
    "predict": (
        "FILE…", "--model", "--out", ".parquet", ".fits", "--rows", "--limit", "--shard", "--backend", "--array",
        "--overwrite", "--json", "log_g_err", "flag", "one row per spectrum", "--velocity", "--wave-medium",
        "--select", "--keep", "pfsCalibrated", "DESI",
    ),
    "doctor": ("--json", "machine"),
}  # fmt: skip


def test_every_command_is_listed():
    assert set(HELP) <= set(cli.commands)


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_help(command, run):
    text = " ".join(run(command, "--help").output.split())
    for words in HELP.get(command, ()):
        assert words in text
    assert run(command, "-h").output == run(command, "--help").output
    documented = [p for p in cli.commands[command].params if p.param_type_name == "option"]
    assert all(option.help for option in documented)


def test_main_help_says_how_to_start_and_every_exit_code(run):
    text = run("--help").output
    for code in (*range(10), 130):
        assert f"\n    {code}  " in text, code
    kinds = {kind.exit_code for kind in _kinds(MoefastError)}
    assert kinds == {1, 3, 4, 5, 6, 7, 8, 9}
    assert "moefast predict spectra.h5" in text
    assert run("--version").output.strip() == f"moefast, version {moefast.__version__}"


def _kinds(kind):
    yield kind
    for other in kind.__subclasses__():
        yield from _kinds(other)


def test_help_does_not_wait_for_numba():
    code = "import sys; from moefast.cli import cli; sys.exit(bool({'numba', 'h5py', 'onnx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_predictions_import_nothing_that_they_do_not_need():
    code = (
        "import sys, moefast.predicting.files\n"
        "slow = {'scipy.interpolate', 'scipy.ndimage', 'scipy.optimize', 'scipy.stats', 'matplotlib', 'jinja2',\n"
        "        'torch', 'lightgbm', 'dask', 'pandas', 'moefast.fitting', 'moefast.protocol'}\n"
        "sys.exit(', '.join(slow & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- work ------------------------------------------------------------------------------------------------------


def test_simulate_inspect(run):
    result = run("simulate", "x.h5", "-n", 5, "--seed", 3, "--mag", 20, 21)
    assert result.stdout == "x.h5: 5 spectra, seed 3, flux, error, noisy\n"
    mag = open_spectra("x.h5").params(["mag"])["mag"]
    assert ((mag >= 20) & (mag <= 21)).all()
    assert "exists already" in run("simulate", "x.h5", "-n", 5, "--seed", 3, code=8).stderr
    run("simulate", "x.h5", "-n", 6, "--seed", 3, "--clean", "--overwrite", "-q")
    assert open_spectra("x.h5").shards[0].arrays == ("flux", "error")
    text = run("inspect", "x.h5", "--picture", "x.png").stdout
    for words in ("6 spectra in 1 file, 4096 pixels 7100.2", "flux, error (float32, contiguous)", "T_eff"):
        assert words in text
    with open("x.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"
    assert json.loads(run("inspect", "x.h5", "--json", "--limit", 2).stdout)["rows_examined"] == 2


def test_inspect_names_what_is_wrong(run, stars, tmp_path):
    some = stars.take(slice(0, 30))
    some = replace(some, flux=some.flux * 1000, error=some.error * 1000, mask=np.zeros(some.flux.shape, bool))
    some.flux[7] = np.nan
    some.error[3, 5] = 0
    some.mask[9, :600] = True
    some.params["log_g"][4] = np.nan
    some.params["name"] = np.full(30, "star")
    path = some.write(tmp_path / "x.h5", arrays=("flux", "error", "mask"))
    other = stars.take(slice(0, 10)).write(tmp_path / "y.h5", dtype="f8", params=())
    broken = tmp_path / "broken.h5"
    broken.write_bytes(b"nothing")
    text = run("inspect", path).stdout
    for words in (
        "row 3: BAD_ERROR", "row 7: NO_DATA, FEW_GOOD_PIXELS", "row 9: FEW_GOOD_PIXELS", "1 not finite",
        "bad rows         NO_DATA 1, FEW_GOOD_PIXELS 2, BAD_ERROR 1", "text", "name",
        "flux is not normalised to a median near 1", "snr_norm", "snr_median",
    ):  # fmt: skip
        assert words in text, words
    assert max(map(len, text.splitlines())) < 150
    result = run("inspect", path, other, broken, code=3)
    assert "40 spectra in 2 files" in result.stdout
    assert f"30 in {path}: flux, error (float32, contiguous); mask (uint8, contiguous)" in result.stdout
    assert f"{other}: flux, error (float64, contiguous)" in result.stdout
    assert "in 1 of 2 files" in result.stdout
    assert f"cannot be read   {broken}: not an HDF5 file" in result.stdout
    assert "broken.h5: not an HDF5 file" in result.stderr
    plain = run("inspect", other).stdout
    assert "params           none, so no labels" in plain
    assert "note" not in plain
    assert "bad rows         none" in plain


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--simulate 300 --set z9", "'z9' is unknown; choose one of z0, survey, wild, library"),
        (
            "--simulate 300 --recipe posterior --size base",
            "--size is that of a network, and posterior has none",
        ),
        ("--simulate 300 --steps 7", "--steps is that of a network, and phys-moe has none"),
    ],
)
def test_options_of_a_fit_that_make_no_sense(words, said, run):
    assert said in " ".join(run("fit", "-o", "model", *words.split(), code=2).stderr.split())


@pytest.mark.parametrize("words", ["predict few.h5 -o a.h5 --format fits", "predict few.h5 --format h5"])
def test_a_format_belongs_to_a_folder(words, run):
    assert "--format belongs to --out-dir" in run(*words.split(), code=2).stderr


def test_a_fit_that_was_stopped_goes_on(run, labelled_file, monkeypatch):
    command = (
        "fit",
        labelled_file,
        "-o",
        "model",
        "--grid",
        "1x1",
        "--no-references",
        "--checkpoint",
        "so-far",
    )

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moefast.fitting.linear_experts.principal_subspace", stop)
        result = run(*command, code=130)
    assert "interrupted; nothing was written" in result.stderr
    assert os.listdir("so-far") == ["first-pass.npz"]
    result = run(*command, "--seed", "1", code=3)
    assert "the checkpoint is of another fit (options.seed was 0, is 1)" in result.stderr
    result = run(*command)
    assert "so-far/first-pass.npz: 1,500 spectra done; the fit goes on from there" in result.stderr
    assert "1,500 spectra" in result.stdout
    assert sorted(os.listdir()) == ["model"]
    # Damaged, it is told and made anew.
    os.mkdir("so-far")
    Path("so-far/first-pass.npz").write_text("hello")
    result = run(*command, "--overwrite")
    assert "so-far/first-pass.npz: not a complete checkpoint" in result.stderr
    for stage in ("mean spectrum", "normal equations", "noise levels", "gate sample"):
        assert f"{stage}: " in result.stderr
    assert re.search(r"^\d+ %.*; error model: ([\d,]+) of \1 steps$", result.stderr, re.MULTILINE)
    shares = [int(share) for share in re.findall(r"^(\d+) %", result.stderr, re.MULTILINE)]
    assert shares == sorted(shares)
    assert shares[-1] > 80
    assert not os.path.exists("so-far")


def test_a_checkpoint_stays_if_the_model_cannot_be_written(run, labelled_file, monkeypatch):
    from moefast.core.errors import OutputError
    from moefast.model import Model

    def fail(*_, **__):
        raise OutputError("disk full")

    monkeypatch.setattr(Model, "save", fail)
    run(
        "fit",
        labelled_file,
        "-o",
        "m",
        "--grid",
        "1x1",
        "--no-references",
        "-q",
        "--checkpoint",
        "so-far",
        code=8,
    )
    assert os.listdir("so-far") == ["first-pass.npz"]


def test_fit_evaluate_export(run, labelled_file, few, model):
    facts = json.loads(
        run("fit", labelled_file, "-o", "model", "--grid", "1x1", "--no-references", "--json").stdout
    )
    assert facts["rows"] == {"used": 1500, "left_out": 0}
    assert 0 < facts["cross_validation"]["r2"] < 1
    result = run("fit", labelled_file, "-o", "model", code=8)
    assert "exists already" in result.stderr
    text = run("fit", labelled_file, "-o", "model", "--recipe", "global-ridge", "--overwrite").stdout
    assert "1,500 spectra" in text
    assert "R² 0." in text
    text = run("evaluate", few, "-m", "model", "-o", "report", "--name", "forty stars").stdout
    assert "log g on forty stars: 40 stars" in text
    assert sorted(os.listdir("report")) == sorted(REPORT_FILES)
    assert "exists already" in run("evaluate", few, "-m", "model", "-o", "report", code=8).stderr
    assert json.loads(run("evaluate", few, "-m", "model", "--json", "-q").stdout)["overall"]["n"] == 40
    assert (
        run("evaluate", few, "-m", "model", "--json", "-q").stdout
        == run("evaluate", few, "-m", "model", "--json", "-q").stdout
    )
    run("evaluate", few, "-m", "report/predictions.h5", "-o", "table", "-q", "--no-pictures")
    assert "B is neither better nor worse" in run("compare", "report", "table", "-o", "compare.json").stdout
    assert (
        json.loads(Path("compare.json").read_text())["comparisons"][0]["overall"]["r2"]["verdict"]
        == "no difference"
    )
    assert "exists already" in run("compare", "report", "table", "-o", "compare.json", code=8).stderr
    assert "two or more" in run("compare", "report", code=3).stderr
    text = run("export", "model", "-o", "mixture.onnx").stdout
    assert "mixture.onnx: mixture," in text
    assert onnxruntime.InferenceSession("mixture.onnx").get_outputs()[0].name == "log_g"
    assert "exists already" in run("export", "model", "-o", "mixture.onnx", code=8).stderr
    run("export", "model", "-o", "mixture.onnx", "--overwrite", "--part", "expert-0")
    assert (
        "is none of mixture, gate, expert-0"
        in run("export", "model", "-o", "e", "--part", "nil", code=2).stderr
    )
    assert "'fog' is unknown; choose of z0" in run("scenarios", "--scenario", "fog", code=2).stderr
    assert not os.path.exists("e")


def test_predict(run, few, model, model_folder):
    result = run("predict", few, "-m", model_folder)
    columns, attrs = read_table("few.log_g.h5")
    assert len(columns["log_g"]) == 40
    assert "few.log_g.h5: 40 spectra, array noisy" in result.stdout
    assert f"R² {attrs['r2']:.3f}" in result.stdout
    assert "spectra/s on cpu" in result.stdout
    assert "backend cpu: no NVIDIA driver (libcuda.so.1 not found)" in result.stdout
    assert "exists already" in run("predict", few, "-m", model_folder, code=8).stderr
    facts = json.loads(
        run("predict", few, "-m", model_folder, "--overwrite", "--json", "--backend", "cpu").stdout
    )
    assert facts["rows"] == 40
    assert facts["r2"] == attrs["r2"]
    assert facts["failures"] == []
    assert facts["reason"] == "as asked"
    same_rows(read_table("few.log_g.h5")[0], columns, but=())


def test_details_of_predict_are_its_decisions_line_by_line(run, few, model, model_folder):
    result = run("predict", few, "-m", model_folder, "--rows", "3:20", "-v", "--log", "log.txt")
    lines = (
        f"model: phys-moe ({model_folder}), SHA-256 {model.hash[:12]}…, 1024 pixels from 7100.9 to 8849.1 Å",
        "backend: cpu (",
        "blocks: ",
        "input: 1 file, rows 3:20 of 40, of which 17 are predicted",
        "layout: HDF5 of the PFS simulator, contiguous",
        "array: noisy (--array auto takes noisy where a file has it)",
        "wavelengths: vacuum",
        "resampling: none, spectra are on the model's grid",
        "telluric: no pixels are masked (--telluric auto)",
        "velocity: spectra are taken to be at rest",
        "columns of the input in the table: id",
    )
    with open("log.txt", encoding="utf-8") as file:
        log = file.read().splitlines()
    for line in lines:
        assert sum(f" s] {line}" in said for said in result.stderr.splitlines()) == 1, line
        assert sum(f" {line}" in said for said in log) == 1, line
    quiet = run("predict", few, "-m", model_folder, "--overwrite").stderr
    assert not any(line in quiet for line in lines)


def test_predict_without_labels_says_so(run, stars, tmp_path, model_folder):
    path = stars.take(slice(0, 4)).write(tmp_path / "x.h5", params=())
    assert "no labels, so no R²" in run("predict", path, "-m", model_folder).stdout


def test_parts_do_not_write_to_one_name(run, few, model_folder):
    for i in range(3):
        run("predict", few, "-m", model_folder, "--shard", f"{i}/3", "-q")
    parts = [read_table(f"few.log_g.{i}-of-3.h5")[0]["row"] for i in range(3)]
    assert np.concatenate(parts).tolist() == list(range(40))
    run("predict", few, "-m", model_folder, "--rows", "5:9", "-o", "part.fits", "-q")
    assert read_table("part.fits")[0]["row"].tolist() == [5, 6, 7, 8]
    run("predict", few, "-m", model_folder, "--limit", "2", "-o", "part.parquet", "-q")
    assert len(read_table("part.parquet")[0]["row"]) == 2


def test_predict_the_folder_one_is_in(run, few, model_folder):
    shutil.copy(few, "night.h5")
    result = run("predict", ".", "-m", model_folder)
    assert "here.log_g.h5: 40 spectra" in result.stdout


def test_a_damaged_file_among_others(run, few, model_folder, tmp_path):
    (tmp_path / "broken.h5").write_bytes(b"nothing")
    result = run("predict", few, tmp_path / "broken.h5", "-m", model_folder, "-o", "t.h5", code=3)
    assert "t.h5: 40 spectra" in result.stdout
    assert "broken.h5: not an HDF5 file" in result.stderr
    assert len(read_table("t.h5")[0]["log_g"]) == 40
    result = run("predict", tmp_path / "broken.h5", "-m", model_folder, "-o", "u.h5", code=3)
    assert os.listdir() == ["t.h5"]
    assert result.stderr.count("moefast: error") == 1


# -- exit codes ------------------------------------------------------------------------------------------------

NONSENSE = [
    ("nonsense",),
    ("predict",),
    ("predict", "FILE", "--rows", "a:b"),
    ("predict", "FILE", "--rows", "5"),
    ("predict", "FILE", "--shard", "3/3"),
    ("predict", "FILE", "--shard", "1"),
    ("predict", "FILE", "--limit", "0"),
    ("predict", "FILE", "--backend", "tpu"),
    ("predict", "FILE", "--array", "mask"),
    ("simulate", "x.h5", "-n", "0", "--seed", "1"),
    ("simulate", "x.h5", "-n", "5"),
    ("simulate", "x.h5", "-n", "5", "--seed", "1", "--mag", "22", "21"),
    ("simulate", "x.h5", "-n", "5", "--seed", "1", "--noise-level", "-1"),
    ("fit", "FILE"),
    ("fit", "FILE", "-o", "m", "--grid", "3"),
    ("fit", "FILE", "-o", "m", "--grid", "0x3"),
    ("fit", "FILE", "-o", "m", "--recipe", "best"),
    ("fit", "FILE", "-o", "m", "--noise", "white"),
    ("fit", "FILE", "-o", "m", "--noise-level", "0"),
    ("fit", "FILE", "-o", "m", "--noise-level", "nan"),
    ("evaluate", "FILE", "--noise-level", "inf"),
    ("evaluate", "FILE", "--noise", "loud"),
    ("inspect",),
    ("export", "model"),
]


@pytest.mark.parametrize("arguments", NONSENSE, ids=" ".join)
def test_nonsense_is_2_and_leaves_nothing(arguments, run, few):
    result = run(*(few if a == "FILE" else a for a in arguments), code=2)
    assert "Usage: " in result.stderr
    assert "Error: " in result.stderr
    assert os.listdir() == []


def test_3_a_file_that_is_missing_or_lacks_a_dataset(run, few, model_folder):
    for command in ("predict", "evaluate"):
        assert "no such file" in run(command, "absent.h5", "-m", model_folder, code=3).stderr
    assert "no such file" in run("fit", "absent.h5", "-o", "m", code=3).stderr
    assert "no such file" in run("inspect", "absent.h5", code=3).stderr
    with h5py.File(few, "r+") as file:
        del file["dataset/arrays/error"]
    assert "dataset/arrays/error/value is missing" in run("predict", few, "-m", model_folder, code=3).stderr
    assert os.listdir() == []


def test_3_rows_that_the_file_has_not(run, few, model_folder):
    assert "rows 0:41 asked for" in run("predict", few, "-m", model_folder, "--rows", "0:41", code=3).stderr
    assert "less than LAST" in run("predict", few, "-m", model_folder, "--rows", "7:7", code=2).stderr


def test_results_among_the_spectra_are_no_spectra(run, few, model_folder):
    shutil.copy(few, "night.h5")
    for _ in range(2):
        run("predict", ".", "-m", model_folder, "-o", "mine.log_g.h5", "--overwrite", "-q")
    run("predict", "*.h5", "-m", model_folder, "-q")
    assert len(read_table("spectra.log_g.h5")[0]["row"]) == 40
    said = run("predict", "mine.log_g.h5", "-m", model_folder, code=3).stderr
    assert "is a table of predictions" in said


def test_spectra_without_data_have_no_r2(run, few, model_folder):
    with h5py.File(few, "r+") as file:
        file["dataset/arrays/error/value"][:] = np.nan
    found = run("predict", few, "-m", model_folder)
    assert "40 of 40 spectra without a good pixel got no prediction" in found.stdout
    assert "R² 0" not in found.stdout


def test_4_another_wave_grid(run, stars, tmp_path, model_folder):
    some = stars.take(slice(0, 4))
    path = replace(some, wave=some.wave + 5000).write(tmp_path / "x.h5")
    message = run("predict", path, "-m", model_folder, code=4).stderr
    assert "12100.854" in message
    assert "7100.854" in message
    run("evaluate", path, "-m", model_folder, code=4)
    assert os.listdir() == []


def test_5_labels(run, stars, tmp_path, model_folder):
    path = stars.take(slice(0, 4)).write(tmp_path / "x.h5", params=("id", "T_eff"))
    assert "lacks log_g, M_H" in run("evaluate", path, "-m", model_folder, code=5).stderr
    assert "lacks log_g, M_H" in run("fit", path, "-o", "m", code=5).stderr
    assert os.listdir() == []


def test_6_models(run, few, model_folder):
    folder = shutil.copytree(model_folder, "altered")
    data = bytearray((few.parent / "here" / folder / "model.onnx").read_bytes())
    data[1000] ^= 1
    with open("altered/model.onnx", "wb") as file:
        file.write(data)
    for command in (("predict", few, "-m"), ("evaluate", few, "-m"), ("export", "-o", "x.onnx")):
        assert "it was altered" in run(*command, "altered", code=6).stderr
        assert "no manifest.json" in run(*command, "absent", code=6).stderr
    assert os.listdir() == ["altered"]


SWAPPED = [
    ("predict z0 -m few.h5", 3, "z0: is a model that comes with moefast, where spectra are expected",
     "moefast predict few.h5 -m z0"),
    ("predict few.h5 z0", 3, "z0: is a model that comes with moefast", "moefast predict few.h5 -m z0"),
    ("predict model -m few.h5", 6, "model: is the folder of a model, where spectra", "moefast predict few.h5 -m model"),
    ("evaluate observed", 3, "observed: is a model that comes with moefast", "moefast evaluate FILE -m observed"),
    ("fit z0 -o own", 3, "z0: is a model that comes with moefast", "name files of spectra"),
    ("predict table.h5", 3, "table.h5: is a table of predictions, where spectra", "moefast inspect table.h5"),
    ("evaluate table.h5 -m few.h5", 3, "table.h5: is a table", "moefast evaluate few.h5 -m table.h5"),
    ("evaluate table.h5", 3, "table.h5: is a table", "moefast evaluate FILE -m table.h5"),
    ("evaluate few.h5 -m few.h5", 3, "few.h5: holds spectra, where a model is expected", "evaluate few.h5 -m MODEL"),
    ("predict few.h5 -m table.h5", 6, "table.h5: is a table of predictions, where a model", "(observed, z0, survey)"),
    ("export few.h5 -o x.onnx", 6, "few.h5: holds spectra, where a model", "a model that moefast fit wrote"),
    ("scenarios few.h5", 6, "few.h5: holds spectra, where a model", "a model that moefast fit wrote"),
    ("simulate x.h5 -n 2 --seed 1 --like z0", 3, "z0: is a model", "name files of spectra"),
]  # fmt: skip


def test_swapped_arguments_are_told(run, few, model_folder):
    shutil.copy(few, "few.h5")
    os.symlink(model_folder, "model")
    run("predict", few, "-m", model_folder, "-o", "table.h5", "--limit", "3", "-q")
    before = sorted(os.listdir())
    for line, code, found, remedy in SWAPPED:
        said = run(*line.split(), code=code).stderr
        assert found in said, line
        assert remedy in said, line
    assert sorted(os.listdir()) == before


MISPLACED = [
    ("predict few.h5 --velocity few.h5", "few.h5: holds spectra, where velocities are expected: a number in km/s"),
    ("predict few.h5 --velocity report", "report: is an evaluation, as moefast evaluate writes them, where velocities"),
    ("predict few.h5 --velocity x.onnx", "x.onnx: is an ONNX file, where velocities are expected"),
    ("predict few.h5 --targets few.h5", "few.h5: holds spectra, where a list of targets is expected"),
    ("predict few.h5 --targets report/report.json", "report/report.json: is an evaluation, as moefast"),
    ("predict few.h5 --targets model", "model: is the folder of a model, where a list of targets is expected"),
    ("predict --from-file few.h5", "few.h5: holds spectra, where a text file is expected that names a file of spectra"),
    ("predict --from-file ceiling.json.gz", "ceiling.json.gz: is a ceiling, as moefast ceiling writes them, where"),
    ("predict few.h5 -m report", "report: is an evaluation, as moefast evaluate writes them, where a model is"),
    ("predict few.h5 -m x.onnx", "x.onnx: is an ONNX file, where a model is expected; name the folder"),
    ("predict report", "report: is an evaluation, as moefast evaluate writes them, where spectra are expected"),
    ("inspect x.onnx", "x.onnx: is an ONNX file, where spectra, or a table that moefast predict wrote, are expected"),
    ("fit part.npz -o m", "part.npz: holds the statistics of a part of a fit, where spectra are expected"),
    ("ceiling page.html", "page.html: is an HTML page, where spectra are expected"),
    ("evaluate few.h5 -m report", "report: is an evaluation, as moefast evaluate writes them, where a model is"),
    ("evaluate few.h5 -m model --ceiling few.h5", "few.h5: holds spectra, where a ceiling is expected; name the file"),
    ("merge few.h5 -o t.h5", "few.h5: holds spectra, where parts are expected: tables that moefast predict wrote"),
    ("merge report -o t.h5", "report: is an evaluation, as moefast evaluate writes them, where parts are expected"),
    ("compare model report", "model: is the folder of a model, where an evaluation is expected; name the folder"),
    ("compare table.h5 report", "table.h5: is a table, where an evaluation is expected; name the folder"),
    ("milestones few.h5", "few.h5: holds spectra, where an evaluation is expected; name the folder"),
    ("export report -o y.onnx", "report: is an evaluation, as moefast evaluate writes them, where a model is expected"),
    ("scenarios x.onnx", "x.onnx: is an ONNX file, where a model is expected"),
]  # fmt: skip
"""Files of one kind where another is expected, and what is said of them."""


def test_files_in_the_wrong_place_are_told(run, few, model_folder):
    shutil.copy(few, "few.h5")
    os.symlink(model_folder, "model")
    shutil.copy(Path(moefast.__file__).parent / "ceilings/data/z0-test_1k.json.gz", "ceiling.json.gz")
    run("evaluate", few, "-m", model_folder, "-o", "report", "--no-pictures", "-q")
    run("predict", few, "-m", model_folder, "-o", "table.h5", "--limit", "3", "-q")
    run("fit", few, "-o", "part.npz", "--shard", "0/1", "--recipe", "global-ridge", "-q")
    for name in ("x.onnx", "page.html"):
        Path(name).write_bytes(b"\x08")
    before = sorted(os.listdir())
    for line, words in MISPLACED:
        options = line.split()
        if options[0] == "predict" and "-m" not in options:
            options += ["-m", "model"]
        said = run(*options, code=6 if ", where a model is" in words else 3).stderr
        assert words in said, line
    assert sorted(os.listdir()) == before


def test_every_argument_that_names_files_has_its_place():
    written = {"checkpoint", "folder", "log", "out", "picture", "report", "scratch", "status"}
    # What is no file of moefast's: settings, code, and numbers of velocities alone.
    others = {"config", "expert", "simulate velocity"}
    placed = set()
    for command in cli.commands.values():
        for one in command.params:
            name = (
                f"{command.name} {one.name}"
                if command.name == "simulate" and one.name == "velocity"
                else one.name
            )
            if name in PLACES:
                placed.add(name)
            elif re.search("FILE|FOLDER|MODEL|REPORT|PART…|TABLE|LIST", str(one.metavar)):
                assert name in written | others, (command.name, name)
    assert placed == {name for name in PLACES if " " not in name}


def test_nothing_is_called_swapped_that_is_in_its_place(run, few, model_folder):
    os.mkdir("z0")
    shutil.copy(few, "z0/few.h5")
    run("predict", "z0", "-m", model_folder, "-o", "table.h5", "--limit", "3", "-q")
    assert "no such file or folder" in run("predict", "absent.h5", "-m", model_folder, code=3).stderr
    assert "which has no spectra" in run("inspect", "table.h5", "--row", "1", code=3).stderr


def test_7_backend(run, few, model_folder):
    for command in ("predict", "evaluate"):
        message = run(command, few, "-m", model_folder, "--backend", "cuda", code=7).stderr
        assert "--backend cuda: no NVIDIA driver" in message
        assert "--backend cpu" in message
    assert os.listdir() == []


def test_8_outputs(run, few, model_folder):
    for out, words in (("t.csv", "unknown table format"), ("absent/t.h5", "does not exist; create it first")):
        assert words in run("predict", few, "-m", model_folder, "-o", out, code=8).stderr
    assert (
        "is one of the inputs"
        in run("predict", few, "-m", model_folder, "-o", few, "--overwrite", code=8).stderr
    )
    assert open_spectra(few).n_rows == 40
    # Before anything of the input is looked at.
    missing = ("absent.h5", "-m", model_folder)
    for out, words in (("t.csv", "unknown table format"), ("absent/t.h5", "does not exist; create it first")):
        assert words in run("predict", *missing, "-o", out, code=8).stderr
        assert words in run("merge", "absent.h5", "-o", out, code=8).stderr
    like = ("--like", "absent.fits", "-n", 1, "--seed", 1)
    assert "does not exist; create it first" in run("simulate", "absent/x.h5", *like, code=8).stderr
    assert "does not exist" in run("fit", few, "-o", "absent/model", code=8).stderr
    assert "does not exist" in run("simulate", "absent/x.h5", "-n", 1, "--seed", 1, code=8).stderr
    assert os.listdir() == []


def test_a_table_of_a_file_with_a_long_name_has_a_name_of_its_own(run, few, model_folder):
    long = "n" * 250 + ".h5"
    shutil.copy(few, long)
    assert "spectra.log_g.h5" in run("predict", long, "-m", model_folder, "--limit", 3).stdout
    assert sorted(os.listdir()) == [long, "spectra.log_g.h5"]


def test_130_interrupted(run, few, model_folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("moefast.predicting.run.score_block", interrupt)
    result = run("predict", few, "-m", model_folder, code=130)
    assert "interrupted" in result.stderr
    assert os.listdir() == []


# -- doctor ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signal", "code", "words"),
    [(KeyboardInterrupt, 130, "interrupted"), (Terminated, 143, "terminated")],
)
def test_interrupts_before_a_command_begins(run, few, monkeypatch, signal, code, words):
    def interrupted(*_, **__):
        raise signal

    monkeypatch.setattr(cli, "make_context", interrupted)
    assert words in run("predict", few, code=code).stderr


def test_doctor(run, model, monkeypatch):
    monkeypatch.setattr("moefast.model.shipped_path", lambda *_: model.path)
    text = run("doctor").stdout
    for words in ("CPU", "GPU", "backend  auto will use cpu", "no problems found", "numpy", "phys-moe"):
        assert words in text
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["problems"] == []
    assert facts["moefast"] == moefast.__version__
    assert facts["shipped_models"]["survey"]["sha256"] == model.hash


def test_doctor_ends_with_1_where_something_is_wrong(run, tmp_path, monkeypatch):
    monkeypatch.setattr("moefast.model.shipped_path", lambda *_: tmp_path / "absent")
    result = run("doctor", code=1)
    assert "problem  " in result.stdout
    assert json.loads(run("doctor", "--json", code=1).stdout)["problems"]


@pytest.mark.parametrize(
    ("words", "expected"), [("moefast pre", "plain,predict"), ("moefast predict --tar", "plain,--targets")]
)
def test_shells_complete_commands_and_options(words, expected):
    env = {
        "_MOEFAST_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = CliRunner().invoke(cli, [], prog_name="moefast", env=env)
    assert done.output.splitlines() == [expected]


# -- progress --------------------------------------------------------------------------------------------------


def test_progress_goes_to_standard_error(run, few, model_folder):
    result = run("predict", few, "-m", model_folder)
    assert "predict: 40 of 40 spectra (100 %)" in result.stderr
    assert "predict: " not in result.stdout
    assert run("predict", few, "-m", model_folder, "--overwrite", "-q").stderr == ""
    assert run("predict", few, "-m", model_folder, "--overwrite", "--json").stderr == ""


def test_predict_tells_oddities_on_standard_error_and_in_json(run, stars, model_folder, tmp_path):
    few = stars.take(slice(0, 40)).observed()
    few.flux[3] = 0
    path = few.write(tmp_path / "odd.h5")
    said = run("predict", path, "-m", model_folder, "-o", tmp_path / "t.h5", "--json")
    facts = json.loads(said.stdout)
    assert len(facts["oddities"]) == 1
    assert "dead fibres" in facts["oddities"][0]
    assert f"note: {facts['oddities'][0]}" in said.stderr
    shown = run("inspect", path, "-m", model_folder)
    assert "dead fibres" in " ".join(shown.stdout.split())


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_help_has_an_example_and_a_whole_sentence_in_the_list(command, run):
    text = run(command, "--help").output
    assert re.search(rf"^ +moefast {command}\b", text, re.MULTILINE)
    (line,) = re.findall(rf"^  {command} +(\S.*)$", run("--help").output, re.MULTILINE)
    assert re.fullmatch(r"[A-Z].*[.]", line)
    for option in ("-q, --quiet", "-v, --verbose", "--log FILE"):
        assert f"\n  {option} " in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_shells(shell, monkeypatch):
    words = {"COMP_WORDS": "moefast predict --back", "COMP_CWORD": "--back" if shell == "fish" else "2"}
    for key, value in words.items():
        monkeypatch.setenv(key, value)
    result = CliRunner().invoke(cli, [], prog_name="moefast", env={"_MOEFAST_COMPLETE": f"{shell}_complete"})
    assert "--backend" in result.stdout
    source = CliRunner().invoke(cli, [], prog_name="moefast", env={"_MOEFAST_COMPLETE": f"{shell}_source"})
    assert "_MOEFAST_COMPLETE" in source.stdout
    page = Path(__file__).parents[1] / "docs/command-line.md"
    assert not page.is_file() or f"_MOEFAST_COMPLETE={shell}_source moefast" in page.read_text()
