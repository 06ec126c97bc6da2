"""Runs over many files: one table each, trusted only if it is what would be written."""

import csv
import io
import os

import numpy as np
import pytest
from click.testing import CliRunner

from moefast.cli import cli
from moefast.cluster import nights
from moefast.core.errors import InputError
from moefast.predicting.files import predict
from moefast.spectra.paths import content_of
from moefast.spectra.tables import read_table


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return model.save(tmp_path_factory.mktemp("nights") / "model").path


@pytest.fixture
def night(stars, tmp_path):
    for index, name in enumerate(("a.h5", "b.h5")):
        stars.take(slice(10 * index, 10 * index + 10)).write(tmp_path / name)
    (tmp_path / "bad.h5").write_text("no spectra")
    (tmp_path / "list.txt").write_text("# one night\n\na.h5\nb.h5\nbad.h5\n")
    return tmp_path


def states(path):
    return {row["input"].rpartition("/")[2]: row for row in csv.DictReader(io.StringIO(path.read_text()))}


def run(night, saved, *options):
    command = [
        "predict",
        "--from-file",
        str(night / "list.txt"),
        "-m",
        str(saved),
        "--out-dir",
        str(night / "out"),
    ]
    return CliRunner().invoke(cli, [*command, *options])


def test_one_input_that_fails_costs_itself_alone(night, saved):
    result = run(night, saved, str(night / "a.h5"), "--log", str(night / "run.log"))
    assert result.exit_code == 3
    assert "a.h5 is among the inputs more than once" in result.stderr
    assert "2 done, 1 failed" in result.output
    assert "bad.h5: not an HDF5 file" in result.output
    found = states(night / "out/status.csv")
    assert [row["state"] for row in found.values()] == ["done", "done", "failed"]
    assert found["a.h5"]["rows"] == "10"
    assert found["bad.h5"]["exit_code"] == "3"
    alone = predict(night / "b.h5", saved).columns
    np.testing.assert_array_equal(read_table(night / "out/b.log_g.h5")[0]["log_g"], alone["log_g"])
    assert not (night / "out/bad.log_g.h5").exists()
    lines = (night / "run.log").read_text().splitlines()
    assert sum(" done " in line for line in lines) == 2
    assert sum(" failed " in line for line in lines) == 1


def test_tables_are_skipped_only_if_nothing_changed(night, saved, stars):
    run(night, saved)
    times = {name: (night / "out" / f"{name}.log_g.h5").stat().st_mtime_ns for name in "ab"}

    def changed(*options):
        result = run(night, saved, "--skip-existing", *options)
        assert result.exit_code == 3, result.output
        now = {name: (night / "out" / f"{name}.log_g.h5").stat().st_mtime_ns for name in "ab"}
        names = [name for name in "ab" if now[name] != times[name]]
        times.update(now)
        return names

    assert changed() == []
    stars.take(slice(20, 30)).write(night / "a.h5")
    assert changed() == ["a"]
    assert states(night / "out/status.csv")["b.h5"]["state"] == "skipped"
    os.utime(night / "b.h5", (1, 1))
    assert changed() == ["b"]
    assert changed("--limit", "5") == ["a", "b"]
    assert len(read_table(night / "out/a.log_g.h5")[0]["row"]) == 5
    (night / "out/a.log_g.h5").write_text("cut off")
    assert changed("--limit", "5") == ["a"]


@pytest.mark.parametrize("suffix", ["h5", "parquet", "fits"])
def test_a_table_with_a_value_that_changed_is_not_trusted(suffix, night, saved):
    (night / "list.txt").write_text("a.h5\n")
    assert run(night, saved, "--format", suffix).exit_code == 0
    path = night / f"out/a.log_g.{suffix}"
    content = path.read_bytes()
    values = read_table(path)[0]["log_g"]
    at = content.find(
        values.astype(">f4" if suffix == "fits" else "<f4").tobytes()[: 4 if suffix == "fits" else None]
    )
    assert at > 0
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    result = run(night, saved, "--format", suffix, "--skip-existing", "--log", str(night / "log"))
    assert result.exit_code == 0, result.output
    assert "1 done" in result.output
    assert "the table that is there cannot be read" in (night / "log").read_text()
    np.testing.assert_array_equal(read_table(path)[0]["log_g"], values)
    assert "1 skipped" in run(night, saved, "--format", suffix, "--skip-existing").output


def test_without_a_word_nothing_is_replaced(night, saved):
    run(night, saved)
    before = (night / "out/a.log_g.h5").read_bytes()
    result = run(night, saved)
    assert result.exit_code == 8
    assert "exists already" in result.output
    assert (night / "out/a.log_g.h5").read_bytes() == before


def test_another_model_is_seen(night, saved, model, stars):
    jobs = nights.plan([night / "a.h5"], night / "out")
    nights.run(jobs, model, options={})
    again = nights.run(nights.plan([night / "a.h5"], night / "out"), model, options={}, skip_existing=True)
    assert again[0].state == "skipped"
    record = read_table(night / "out/a.log_g.h5")[1]["made_of"]
    assert record["model_sha256"] == model.hash
    assert record["input"]["bytes"] == (night / "a.h5").stat().st_size


@pytest.mark.parametrize(
    ("option", "how"), [("velocity", "file"), ("velocity", "pattern"), ("targets", "file")]
)
def test_tables_of_velocities_and_targets_count_by_their_content(option, how, night, model):
    table = night / "tables" / "v.csv"
    table.parent.mkdir()
    given = {"file": table, "pattern": table.parent / "*.csv"}[how]
    assert (
        content_of(str(night / "absent"))
        is content_of("fit")
        is content_of(-26.0)
        is content_of(None)
        is None
    )
    seen = []
    for text in ("id,v_los\n0,5\n", "id,v_los\n0,6\n", "id,v_los\n0,5\n"):
        table.write_text(text)
        seen.append(
            nights._record(nights.Job(night / "a.h5", night / "o.h5"), model, {option: str(given)})[option]
        )
    assert seen[0] == seen[2] != seen[1]
    assert None not in seen


def test_inputs_of_one_name_keep_their_folders(stars, tmp_path):
    for folder in ("1", "2"):
        (tmp_path / folder).mkdir()
        stars.take(slice(0, 2)).write(tmp_path / folder / "x.h5")
    jobs = nights.plan([tmp_path / "1", tmp_path / "2"], tmp_path / "out", ".fits")
    assert [str(job.table.relative_to(tmp_path / "out")) for job in jobs] == [
        "1/x.log_g.fits",
        "2/x.log_g.fits",
    ]
    (tmp_path / "x.fits").write_bytes(b"")
    (tmp_path / "x.h5").write_bytes(b"")
    with pytest.raises(InputError, match="would both write"):
        nights.plan([tmp_path / "x.fits", tmp_path / "x.h5"], tmp_path / "out")


def test_a_list_names_inputs(tmp_path):
    (tmp_path / "list").write_text("# none\n\n")
    with pytest.raises(InputError, match="names no input"):
        nights.listed(tmp_path / "list")
    with pytest.raises(InputError, match="cannot be read"):
        nights.listed(tmp_path / "absent")
    (tmp_path / "list").write_text(f"{tmp_path}/a.h5\n  b.h5  \n")
    assert nights.listed(tmp_path / "list") == [f"{tmp_path}/a.h5", f"{tmp_path}/b.h5"]


def test_the_gravest_exit_code_counts():
    jobs = [nights.Job(None, None, exit_code=code) for code in (0, 3, 8, 4)]
    assert nights.worst(jobs) == 8
    assert nights.worst([]) == 0
    assert nights.worst([nights.Job(None, None, exit_code=3), nights.Job(None, None, exit_code=0)]) == 3


def test_settings_come_from_a_file_and_the_command_line_counts_more(night, saved):
    (night / "run.toml").write_text(
        f'[predict]\nmodel = "{saved}"\nfiles = ["{night}/a.h5"]\nlimit = 3\nkeep = ["T_eff"]\n'
    )
    out = night / "t.h5"
    call = ["predict", "--config", str(night / "run.toml"), "-o", str(out), "-q"]
    result = CliRunner().invoke(cli, call)
    assert result.exit_code == 0, result.output
    columns, attributes = read_table(out)
    assert len(columns["row"]) == 3
    assert attributes["options"]["limit"] == 3
    assert attributes["options"]["keep"] == ["T_eff"]
    result = CliRunner().invoke(cli, [*call, "--limit", "2", "--overwrite"])
    assert result.exit_code == 0, result.output
    assert len(read_table(out)[0]["row"]) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[predict]\nmodl = "z0"', "did you mean 'model'"),
        ("[fit]\nseed = 1", r"no settings for \[predict\]; it has \[fit\]"),
        ("[predict", "cannot be read as TOML"),
        ('[predict]\nbackend = "tpu"\nfiles = ["x.h5"]', "'tpu' is not one of"),
    ],
)
def test_settings_that_are_not_understood(tmp_path, text, words):
    (tmp_path / "run.toml").write_text(text)
    result = CliRunner().invoke(cli, ["predict", "--config", str(tmp_path / "run.toml")])
    assert result.exit_code == 2
    assert __import__("re").search(words, " ".join(result.output.split()))


def test_options_of_runs_belong_to_runs():
    for options, words in (
        (["x.h5", "--skip-existing"], "belong to --out-dir"),
        (["x.h5", "--out-dir", "d", "-o", "t.h5"], "leave out -o"),
        ([], "name a FILE"),
    ):
        result = CliRunner().invoke(cli, ["predict", *options])
        assert result.exit_code == 2
        assert words in result.output
