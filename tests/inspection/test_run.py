"""A run without labels: counts against the table, the worst stars, the page, and what others wrote in it."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner

from moefast.cli import cli
from moefast.core.errors import InputError
from moefast.inspection.run import format_text, is_table, summarise, summarise_table
from moefast.inspection.run_page import FIGURES, page
from moefast.inspection.worst import spectra_of_worst
from moefast.pages.drawing import LIGHT, single, styled
from moefast.predicting.files import predict
from moefast.spectra.quality import Flag

N = 2000


@pytest.fixture(scope="module")
def columns():
    """2000 made-up predictions whose errors fall with SNR; known stars carry known flags."""
    rng = np.random.default_rng(3)
    snr = np.exp(rng.normal(2, 0.5, N))
    found = {
        "row": np.arange(N),
        "id": 5000 + np.arange(N),
        "log_g": rng.uniform(1, 5, N),
        "log_g_err": 3 / snr,
        "T_eff": rng.uniform(3750, 6000, N),
        "M_H": rng.uniform(-2, 0.5, N),
        "foreign": np.full(N, 1e-8),
        "snr_median": snr,
        "chi2": rng.normal(1, 0.02, N),
        "flag": np.zeros(N, np.uint32),
    }
    found["flag"][[10, 11, 12, 13, 14, 15]] = int(Flag.UNLIKE_TRAINING)
    found["chi2"][[10, 11, 12, 13, 14, 15]] = [2.0, 1.5, 3.0, 0.2, 1.4, 1.3]
    found["flag"][20:40] |= np.uint32(Flag.LOW_CONFIDENCE)
    found["flag"][12] |= np.uint32(Flag.LOW_CONFIDENCE)
    found["flag"][50], found["log_g"][50] = int(Flag.NO_DATA | Flag.FEW_GOOD_PIXELS), np.nan
    return found


@pytest.fixture(scope="module")
def run(columns):
    return summarise(
        columns, {"model": "posterior (m)", "inputs": ["night.h5"], "notes": ["a note"]}, "log_g.h5"
    )


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_counts_are_those_of_the_table(run, columns):
    assert run.n == N
    assert run.n_flagged == 6 + 20 + 1
    assert run.flags == {"NO_DATA": 1, "FEW_GOOD_PIXELS": 1, "LOW_CONFIDENCE": 21, "UNLIKE_TRAINING": 6}
    assert sum(step.n for step in run.by_snr) == N - 1
    assert sum(run.log_g["all"]) == N - 1
    assert sum(run.log_g["without_flag"]) == N - run.n_flagged
    assert sum(cell[2] for cell in run.kiel["cells"]) == N - 1
    flagged = sum(step.n * step.flagged["UNLIKE_TRAINING"] for step in run.by_snr)
    assert flagged == pytest.approx(6)
    for step in run.by_snr:
        here = (columns["snr_median"] >= step.range[0]) & (columns["snr_median"] <= step.range[1])
        here &= np.isfinite(columns["log_g"])
        assert step.log_g_err[1] == pytest.approx(np.median(columns["log_g_err"][here]))
    assert run.percentiles["snr_median"][2] == pytest.approx(np.median(columns["snr_median"]))


def test_the_worst_come_first_and_once(run):
    rows = [star.row for star in run.worst]
    # |ln χ²|: 0.2 is further from 1 than 3.
    assert rows[:4] == [13, 12, 10, 11]
    assert len(rows) == len(set(rows))
    assert run.worst[1].flags == ("LOW_CONFIDENCE", "UNLIKE_TRAINING")
    assert run.worst[0].ids == {"id": 5013}
    assert 50 in rows
    assert all(star.reason for star in run.worst)
    assert "row 13, id 5013: unlike the training set, chi2 0.2" in format_text(run)


def test_numbers_are_json(run):
    facts = json.loads(json.dumps(run.to_dict(), allow_nan=False))
    assert facts["flags"]["UNLIKE_TRAINING"] == 6
    assert facts["worst"][0]["row"] == 13


def test_figures_show_the_numbers(run):
    with styled(LIGHT):
        axes = {
            name: single(lambda a, d=drawing: d.draw(a, run, LIGHT), LIGHT).axes[0]
            for name, drawing in FIGURES.items()
        }
    lines = {line.get_label(): line for line in axes["error"].get_lines()}
    np.testing.assert_allclose(lines["median"].get_ydata(), [step.log_g_err[1] for step in run.by_snr])
    assert len(lines["star with a flag"].get_xdata()) == sum(run.points["flagged"])
    flags = {line.get_label(): line for line in axes["flags"].get_lines()}
    np.testing.assert_allclose(flags["any"].get_ydata(), [100 * step.flagged["any"] for step in run.by_snr])
    # One colour per step of the error; every cell once.
    corners = sum(len(patch.get_path().vertices) for patch in axes["kiel"].patches)
    assert corners == 5 * len(run.kiel["cells"])
    assert all(one.get_legend() is not None for one in axes.values())
    assert all(drawing.describe(run) for drawing in FIGURES.values())


def test_the_page_stands_alone(run):
    text = page(run, {}, "No pictures: not at hand.")
    assert text == page(run, {}, "No pictures: not at hand.")
    read = Reader(text)
    assert "default-src 'none'" in text
    for tag, attributes in read.tags:
        assert tag not in {"script", "iframe", "object", "img"}
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:,"))
    for words in (
        "2,000",
        "UNLIKE_TRAINING",
        "id 5013",
        "a note",
        "No pictures: not at hand.",
        "posterior (m)",
    ):
        assert words in read.text, words
    known = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(known) == len(set(known))


def test_what_others_wrote_is_text(columns):
    evil = '<script>alert("x")</script> & "sons"'
    named = columns | {"star_id": np.full(N, evil)}
    found = page(
        summarise(named, {"model": evil, "inputs": [evil], "notes": [evil], "oddities": [evil]}, evil)
    )
    assert "<script" not in found
    assert found.count("&lt;script&gt;") >= 5


def test_tables_without_other_labels_flags_or_stars(columns):
    bare = {
        name: columns[name][100:200] for name in ("row", "log_g", "log_g_err", "chi2", "snr_median", "flag")
    }
    run = summarise(bare, {})
    assert run.kiel is None
    assert run.worst == []
    assert "No star carries a flag." in Reader(page(run)).text
    nothing = summarise({name: values[:0] for name, values in bare.items()}, {})
    assert nothing.n == 0
    page(nothing)
    format_text(nothing)
    lost = summarise({name: values[50:51] for name, values in columns.items()}, {})
    page(lost)


@pytest.mark.parametrize("suffix", [".h5", ".parquet", ".fits"])
def test_a_real_run_in_every_format(suffix, odd_stars, posterior_model, tmp_path):
    folder = posterior_model.save(tmp_path / "model").path
    model = type(posterior_model).load(folder)
    table = tmp_path / f"log_g{suffix}"
    predict(odd_stars, model, table)
    assert is_table(table)
    assert not is_table(odd_stars)
    run = summarise_table(table)
    assert run.n == 40
    assert run.flags["NO_DATA"] == 1
    stars, reason = spectra_of_worst(run)
    assert reason == ""
    assert set(stars) == {(star.file, star.row) for star in run.worst}
    for star in run.worst:
        shown = stars[star.file, star.row]
        expected = star.values["log_g"]
        assert expected is None or shown.values["log_g"] == pytest.approx(expected, abs=1e-6)
    assert page(run, stars).count("<figure") == len(stars) + sum(d.exists(run) for d in FIGURES.values())


def test_pictures_are_of_the_model_that_made_the_table(run, odd_stars, posterior_model, model, tmp_path):
    table = tmp_path / "log_g.h5"
    predict(odd_stars, posterior_model, table)
    found = summarise_table(table)
    stars, reason = spectra_of_worst(found, model)
    assert not stars
    assert "another model" in reason
    stars, reason = spectra_of_worst(found, posterior_model, [tmp_path / "gone.h5"])
    assert not stars
    assert "not at hand; name them with --spectra" in reason
    assert spectra_of_worst(found, posterior_model, [odd_stars])[0]


def test_a_table_that_lacks_columns_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"row": [0, 1], "log_g": [1.0, 2.0]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match=r"other\.parquet: has no column log_g_err"):
        summarise_table(tmp_path / "other.parquet")


def test_the_commands(odd_stars, model_folder, tmp_path):
    def run(*words, code=0):
        result = CliRunner().invoke(cli, [*map(str, words)])
        assert result.exit_code == code, result.output
        return result

    table, first, second = tmp_path / "log_g.h5", tmp_path / "first.html", tmp_path / "second.html"
    result = run("predict", odd_stars, "-m", model_folder, "-o", table, "--report", first)
    assert f"written: {first}" in result.stderr
    text = run("inspect", table, "--report", second)
    assert "40 predictions by" in text.stdout
    assert first.read_text() == second.read_text()
    assert json.loads(run("inspect", table, "--json").stdout)["n"] == 40
    run("inspect", table, "--report", second, code=8)
    run("inspect", table, "--report", second, "--overwrite")
    assert "name the file of spectra" in run("inspect", table, "--row", 1, code=3).stderr
