"""Fits in parts: the model of one process, bit for bit, or a refusal that names what does not belong together."""

import errno
import functools
import json
import os

import numpy as np
import pytest
from click.testing import CliRunner

from moefast.cli import cli
from moefast.cli.signals import Terminated
from moefast.cluster import fit_parts
from moefast.cluster.fit_parts import (
    FitPlan,
    TrainingSpectra,
    fit_of_parts,
    gather_to_file,
    only_one_first_pass,
)
from moefast.cluster.folders import OWNER, working_folder
from moefast.core import archives
from moefast.core.atomic import remove_quietly
from moefast.core.errors import InputError
from moefast.core.grids import uniform
from moefast.experts import normal_equations
from moefast.fitting import error_model, gate, linear_experts, posterior, sample, statistics
from moefast.recipes import fit
from moefast.simulate import SimulatedSpectra

ROWS, UNIT = 960, 64


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small samples and few choices, whose quality is not the question, and units of a few rows."""
    for room in (gate, error_model, posterior):
        name = "fit_gate" if room is gate else "fit_error_model"
        monkeypatch.setattr(room, name, functools.partial(getattr(room, name), steps=60))
    monkeypatch.setattr(normal_equations, "BUFFER_ROWS", 32)
    monkeypatch.setattr(statistics, "UNIT_ROWS", UNIT)
    monkeypatch.setattr(linear_experts, "RANK_STEP", 200)
    monkeypatch.setattr(linear_experts, "ALPHAS", (0.0, 0.1))
    monkeypatch.setattr(sample, "NOISY_ROWS", 2000)
    monkeypatch.setattr(posterior, "CALIBRATION_DRAWS", 1)


@pytest.fixture(scope="module")
def source(make_toy, tmp_path_factory):
    toy = make_toy(ROWS, 8)
    flux = toy.flux.copy()
    flux[77] = np.nan
    flux[234, 5] = np.nan
    return toy.write(tmp_path_factory.mktemp("toy") / "train.h5", arrays={"flux": flux})


def write_parts(plan, folder, count):
    prepared = plan.prepare()
    paths = [folder / f"part-{index}.npz" for index in range(count)]
    for index, path in enumerate(paths):
        rows = statistics.rows_of_part(prepared.spectra.n_rows, index, count)
        gather_to_file(path, plan, prepared, rows, shard=(index, count))
    return paths


def assert_same(one, two):
    """Models with the same bits: arrays, and what the manifest says of the fit."""
    assert one.manifest["fit"] == two.manifest["fit"]
    for name, value in vars(one.mixture).items():
        other = getattr(two.mixture, name)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, other, err_msg=name)
        elif isinstance(value, tuple) and value and isinstance(value[0], np.ndarray):
            for a, b in zip(value, other, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=name)
    assert list(one.references) == list(two.references)
    for name, form in one.references.items():
        np.testing.assert_array_equal(form.weights, two.references[name].weights, err_msg=name)


@pytest.mark.parametrize(
    ("recipe", "noise", "counts"),
    [
        ("phys-moe", "closed-form", (2, 15)),
        ("snr-moe", "closed-form", (3,)),
        ("global-ridge", "observed", (4,)),
        ("published-ridge", "sampled", (2,)),
        ("posterior-calibrated", "closed-form", (2,)),
    ],
)
def test_parts_give_the_model_of_one_process(source, tmp_path, recipe, noise, counts):
    whole = fit(source, recipe=recipe, noise=noise)
    plan = FitPlan(TrainingSpectra.of_files([source]), {"recipe": recipe, "noise": noise})
    said = []
    for count in counts:
        paths = write_parts(plan, tmp_path, count)
        assert_same(fit_of_parts(paths[::-1], tell=said.append), whole)
    assert said == []


def test_what_does_not_belong_together_is_named(source, train_file, tmp_path):
    plan = FitPlan(TrainingSpectra.of_files([source]), {"recipe": "global-ridge", "references": False})
    a, b, c = write_parts(plan, tmp_path, 3)
    other = tmp_path / "other"
    other.mkdir()

    def refused(parts, match):
        with pytest.raises(InputError, match=match):
            fit_of_parts(parts)

    refused([a, c], r"rows 320:640 are missing between .*part-0\.npz and .*part-2\.npz: shard 1/3; fit it")
    refused([a, b], r"rows 640:960 are missing after .*part-1\.npz: shard 2/3")
    refused([b, c], r"rows 0:320 are missing before .*part-1\.npz: shard 0/3")
    refused([a, b, b, c], r"part-1\.npz: rows 320:640 are in .*part-1\.npz already")
    for arguments, match in (
        ({"seed": 3}, r"is of other options than .* seed 3, expected 0"),
        ({"noise_level": 2.0}, r"other options .* noise_level 2\.0, expected 1\.0"),
        ({"recipe": "phys-moe"}, "is of another recipe"),
    ):
        odd = write_parts(FitPlan(plan.source, plan.arguments | arguments), other, 3)[1]
        refused([a, odd, c], match)
    odd = write_parts(FitPlan(TrainingSpectra.of_files([train_file]), plan.arguments), other, 3)[1]
    refused([a, odd, c], r"part-1\.npz: is of another input than .*part-0\.npz")
    b.write_bytes(b.read_bytes()[:-2000])
    refused([a, b, c], r"part-1\.npz: not a complete file of statistics")
    refused([], "no statistics")


def test_a_plan_is_read_as_it_was_written():
    plan = FitPlan(
        TrainingSpectra(simulate=600, name="survey", like=("a.fits",)),
        {"recipe": "phys-moe", "grid": uniform(2, 1), "families": ("linear",)},
    )
    again = FitPlan.of_document(json.loads(json.dumps(plan.document())))
    assert again.source == plan.source
    assert again.arguments | {"families": ("linear",)} == plan.arguments
    spectra = TrainingSpectra(simulate=20, name="survey").open()
    assert isinstance(spectra, SimulatedSpectra)
    assert len(spectra) == 20


def test_an_input_that_changed_is_named(make_toy, tmp_path):
    path = make_toy(200, 1).write(tmp_path / "x.h5")
    plan = FitPlan(TrainingSpectra.of_files([path]), {"recipe": "global-ridge", "references": False})
    parts = write_parts(plan, tmp_path, 2)
    path.unlink()
    make_toy(200, 2).write(path)
    with pytest.raises(InputError, match=r"x\.h5: the input has changed since .*part-0\.npz was written"):
        fit_of_parts(parts)
    path.unlink()
    with pytest.raises(InputError, match=r"x\.h5"):
        fit_of_parts(parts)


def test_parts_are_whole_units():
    bounds = [statistics.rows_of_part(1000, index, 5) for index in range(5)]
    assert [a for a, _ in bounds[1:]] == [b for _, b in bounds[:-1]]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 1000
    units = statistics.units_of(1000, 0, 1000)
    assert set(bounds[1:]) < {(units[i][0], units[j][1]) for i in range(16) for j in range(16)}
    # Equal shares: of 200,000 spectra in units of 65,536, one of two processes had two thirds.
    assert {b - a for a, b in units} == {62, 63}
    assert len(units) == statistics.n_units(1000) == 16
    assert statistics.units_of(1000, 100, 130) == [(100, 125), (125, 130)]
    with pytest.raises(InputError, match="divide them into 16 parts at most"):
        statistics.rows_of_part(1000, 0, 17)


def test_a_fit_that_needs_two_first_passes_has_no_parts(source):
    plan = FitPlan(TrainingSpectra.of_files([source]), {"recipe": "hybrid-moe"})
    with pytest.raises(InputError, match="--no-references"):
        only_one_first_pass(plan.prepare())


def test_the_commands(source, tmp_path, monkeypatch):
    run = CliRunner().invoke
    options = ["--recipe", "global-ridge", "--no-references", "--grid", "2x1"]
    for index in range(2):
        out = str(tmp_path / f"p{index}.npz")
        done = run(cli, ["fit", str(source), *options, "--shard", f"{index}/2", "-o", out, "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["shard"] == [index, 2]
    again = run(cli, ["fit", str(source), *options, "--shard", "0/2", "-o", str(tmp_path / "p0.npz")])
    assert again.exit_code == 8
    assert "exists already" in again.output
    wrong = run(cli, ["fit", str(source), *options, "--shard", "0/2", "-o", str(tmp_path / "model")])
    assert wrong.exit_code == 2
    assert "PART.npz" in wrong.output
    done = run(cli, ["merge", str(tmp_path / "p*.npz"), "-o", str(tmp_path / "model")])
    assert done.exit_code == 0, done.output
    assert "global-ridge, 959 spectra" in done.output
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    for name, value in (("MIN", "0"), ("MAX", "1"), ("COUNT", "2")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    done = run(cli, ["fit", str(source), *options, "-o", str(tmp_path / "p1.npz"), "--overwrite", "--shard"])
    assert done.exit_code == 0, done.output
    assert "part 1/2" in done.output
    assert fit_parts.read_header(tmp_path / "p1.npz")["shard"] == [1, 2]


@pytest.mark.parametrize("what", ["full", "terminated"])
def test_a_part_that_cannot_be_written_leaves_nothing(source, tmp_path, monkeypatch, what):
    original = archives._write_member

    def fail(*arguments):
        original(*arguments)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if what == "full" else Terminated

    monkeypatch.setattr(archives, "_write_member", fail)
    out = tmp_path / "p.npz"
    options = ["--recipe", "global-ridge", "--no-references", "--shard", "0/2", "-o", str(out), "-q"]
    done = CliRunner().invoke(cli, ["fit", str(source), *options])
    if what == "full":
        assert done.exit_code == 8
        assert f"{out}: cannot be written: No space left on device" in done.output
    else:
        assert done.exit_code == 143
    assert list(tmp_path.iterdir()) == []


def test_folders_of_ended_jobs_are_removed(tmp_path):
    out = tmp_path / "model"
    dead, alive = (working_folder(out, digest * 64) for digest in "ab")
    # No process has the largest number.
    token = (dead / OWNER).read_text().split("-")
    (dead / OWNER).write_text("-".join([*token[:2], str(2**22), *token[3:]]))
    own = working_folder(out, "c" * 64)
    assert own.is_dir()
    assert not dead.exists()
    assert alive.exists()
    remove_quietly(own)
    assert {path.name for path in tmp_path.iterdir()} == {alive.name}


def test_no_memory_is_no_damage(source, tmp_path, monkeypatch):
    plan = FitPlan(TrainingSpectra.of_files([source]), {"recipe": "global-ridge", "references": False})
    (path,) = write_parts(plan, tmp_path, 1)

    def none_left(*_, **__):
        raise MemoryError("none left")

    monkeypatch.setattr(np.lib.format, "read_array", none_left)
    for read in (fit_parts.read_header, fit_parts.statistics_of):
        with pytest.raises(MemoryError, match="none left"):
            read(path)


def test_a_part_that_asks_for_more_than_it_has_is_damaged(source, tmp_path):
    plan = FitPlan(TrainingSpectra.of_files([source]), {"recipe": "global-ridge", "references": False})
    (path,) = write_parts(plan, tmp_path, 1)
    content = path.read_bytes()
    shape = b"'shape': (640,), }".ljust(40)
    assert shape in content
    path.write_bytes(content.replace(shape, b"'shape': (64000000000000,), }".ljust(40)))
    with pytest.raises(InputError, match=r"not a complete file of statistics .* more than is there"):
        fit_parts.statistics_of(path)


def test_a_part_is_added_as_it_is_or_not_at_all(source, tmp_path):
    plan = FitPlan(TrainingSpectra.of_files([source]), {"recipe": "phys-moe"})
    a, b, c = write_parts(plan, tmp_path, 3)
    total, expected = fit_parts.statistics_of(a), fit_parts.statistics_of(a)
    fit_parts.add_statistics(total, b)
    expected.add(fit_parts.statistics_of(b))
    assert (total.first, total.rows, total.left_out) == (expected.first, expected.rows, expected.left_out)
    assert expected.rows == 640
    assert list(total.arrays()) == list(expected.arrays())
    for name, array in expected.arrays().items():
        np.testing.assert_array_equal(total.arrays()[name], array, err_msg=name)
    with pytest.raises(
        InputError, match=r"part-0\.npz: not a complete file .*rows from 640 on are expected, found 0"
    ):
        fit_parts.add_statistics(total, a)
    # A bit of a product, in an array that is added while it is read.
    header = fit_parts.read_header(c)
    assert fit_parts.is_whole(c, header)
    assert not fit_parts.is_whole(c, header | {"rows": [0, 320]})
    assert not fit_parts.is_whole(tmp_path / "absent.npz", header)
    gram = fit_parts.statistics_of(c).equations.gram
    content, middle = bytearray(c.read_bytes()), gram[4, 1, 1000:1010].tobytes()
    place = content.index(middle)
    content[place] ^= 1
    c.write_bytes(content)
    assert fit_parts.read_header(c) == header
    assert not fit_parts.is_whole(c, header)
    with pytest.raises(InputError, match=r"part-2\.npz: not a complete file of statistics"):
        fit_parts.add_statistics(total, c)
    with pytest.raises(InputError, match=r"part-1\.npz: .*it was replaced meanwhile"):
        fit_parts.add_statistics(total, b, fit_parts.read_header(a))
