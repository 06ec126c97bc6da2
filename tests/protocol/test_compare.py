"""Comparisons: paired over the same stars, refused for others, verdicts that do not hang on the last bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from made_up import evaluated

from moefast.cli import cli
from moefast.core import metrics
from moefast.core.errors import InputError, OutputError
from moefast.protocol import compare as comparing
from moefast.protocol import figures
from moefast.protocol.compare import Kept, compare, format_text, read_evaluation
from moefast.protocol.evaluate import evaluate
from moefast.protocol.milestones.evaluations import read_reports
from moefast.protocol.report_folder import write_report

N = 900


def kept(path, predicted, seed=4, **data_set):
    """An evaluation of predictions of fake stars; the stars are the same for the same seed."""
    rng = np.random.default_rng(seed)
    snr = np.exp(rng.normal(2.1, 0.4, N))
    stars = {
        "row": np.arange(N),
        "log_g_true": rng.uniform(1, 5, N),
        "T_eff": rng.uniform(3750, 6000, N),
        "M_H": rng.uniform(-2.5, 0.75, N),
        "snr_norm": (0.4 * snr).astype(np.float32),
        "snr_median": snr.astype(np.float32),
    }
    stars["log_g"] = predicted(stars["log_g_true"], stars)
    found = evaluated(
        stars["log_g_true"],
        stars["log_g"],
        None,
        t_eff=stars["T_eff"],
        m_h=stars["M_H"],
        snr_norm=stars["snr_norm"],
        snr_median=stars["snr_median"],
        **{"data_set": "fake", "fingerprint": "abc", "noise": "stored", "noise_level": 1.0} | data_set,
        model={"name": str(path)},
        n_resamples=50,
    )
    return Kept(path, found, stars)


def noisy(scale, seed):
    return lambda y, _: y + np.random.default_rng(seed).normal(0, scale, N)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return kept(tmp_path_factory.mktemp("a"), noisy(0.5, 1))


def test_better_worse_and_neither(base, tmp_path):
    # As good on the whole, better for metal-rich stars, worse for metal-poor ones.
    mixed = kept(
        tmp_path / "mixed",
        lambda y, stars: y + (base.stars["log_g"] - y) * np.where(stars["M_H"] < -1, 1.2, 0.7),
    )
    better = kept(tmp_path / "better", lambda y, _: y + 0.6 * (base.stars["log_g"] - y))
    alike = kept(tmp_path / "alike", noisy(0.5, 2))
    found = compare([base, better, alike, mixed], n_resamples=200)
    json.dumps(found, allow_nan=False)
    first, second, third = found["comparisons"]
    assert {entry["verdict"] for entry in first["overall"].values()} == {"better"}
    assert {entry["verdict"] for kind in first["groups"].values() for entry in kind} == {"better"}
    assert {entry["verdict"] for entry in second["overall"].values()} == {"no difference"}
    assert [entry["verdict"] for entry in third["groups"]["metallicity"]] == ["worse", "better"]
    assert (compare([better, base], n_resamples=200)["comparisons"][0]["overall"]["r2"]["verdict"]) == "worse"
    for entry, y in ((first["overall"]["r2"], base.stars["log_g_true"]),):
        assert entry["from"] == pytest.approx(metrics.r2(y, base.stars["log_g"]), abs=1e-9)
        assert entry["to"] == pytest.approx(metrics.r2(y, better.stars["log_g"]), abs=1e-9)
        assert entry["difference"] == pytest.approx(entry["to"] - entry["from"], abs=1e-9)
    assert first["overall"]["mae"]["difference"] < 0


def test_pairing_is_what_tells_small_differences(base, tmp_path):
    """A difference far below either interval is found, because both err on the same stars."""
    slightly = kept(tmp_path / "b", lambda y, _: y + 0.97 * (base.stars["log_g"] - y))
    entry = compare([base, slightly])["comparisons"][0]["overall"]["r2"]
    own = metrics.bootstrap(base.stars["log_g_true"], base.stars["log_g"])
    assert entry["verdict"] == "better"
    assert entry["difference"] < 0.5 * (own.high - own.low)
    assert entry["interval"][1] - entry["interval"][0] < 0.2 * (own.high - own.low)


def test_intervals_are_those_of_the_metrics(base, tmp_path):
    other = kept(tmp_path / "b", noisy(0.4, 3))
    found = compare([base, other])["comparisons"][0]
    members = base.stars["M_H"] < -1
    y, a, b = (v[members] for v in (base.stars["log_g_true"], base.stars["log_g"], other.stars["log_g"]))
    expected = metrics.bootstrap_difference(y, b, a)
    entry = found["groups"]["metallicity"][0]
    assert entry["n"] == members.sum()
    assert entry["interval"] == pytest.approx([expected.low, expected.high], abs=1e-9)
    assert [len(found["groups"][kind]) for kind in ("snr_norm", "snr_median", "grid", "metallicity")] == [
        4,
        8,
        9,
        2,
    ]


def test_the_same_predictions_are_no_difference(base):
    entry = compare([base, base])["comparisons"][0]
    for found in (*entry["overall"].values(), *(g for kind in entry["groups"].values() for g in kind)):
        assert found["difference"] in {0.0, None}
        assert found["verdict"] in {"no difference", "undefined"}


def test_rounding_is_no_difference_however_sure(base, tmp_path):
    """Two engines of one model differ in the last bits, all in one direction if chance will have it."""
    rounded = kept(tmp_path / "b", lambda y, _: y + (1 - 1e-6) * (base.stars["log_g"] - y))
    entry = compare([base, rounded], n_resamples=100)["comparisons"][0]
    assert entry["overall"]["r2"]["interval"][0] > 0
    verdicts = {found["verdict"] for kind in entry["groups"].values() for found in kind}
    assert verdicts == {entry["overall"]["r2"]["verdict"]} == {"no difference"}


def test_missing_predictions_count_as_the_mean_label(base, tmp_path):
    def some(y, _):
        values = base.stars["log_g"].copy()
        values[:300] = np.nan
        return values

    found = compare([base, kept(tmp_path / "b", some)], n_resamples=100)
    assert found["evaluations"][1]["n_nan"] == 300
    assert found["comparisons"][0]["overall"]["r2"]["verdict"] == "worse"
    assert found["comparisons"][0]["overall"]["r2"]["n"] == N
    assert "300 without prediction" in format_text(found)


def test_text(base, tmp_path):
    found = compare([base, kept(tmp_path / "b", noisy(0.3, 5))], n_resamples=100)
    text = format_text(found)
    assert f"{N} stars, file fingerprint abc" in text
    assert "B against A: B is better by +0." in text
    assert "groups are called different; about 1." in text
    rows = [line for line in text.splitlines() if line.startswith(("  cool", "  warm", "  hot"))]
    assert len(rows) == 9
    assert format_text(json.loads(json.dumps(found))) == text
    alike = compare([base, kept(tmp_path / "c", noisy(0.5, 6))], n_resamples=100)
    assert "B is neither better nor worse" in format_text(alike)


# -- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fingerprint": "def"}, "different test sets, abc and def"),
        ({"noise": "drawn"}, "different kinds of noise"),
        ({"noise_level": 2.0}, "different noise levels, 1.0 and 2.0"),
        ({"noise_seed": 5}, "different noise seeds, None and 5"),
        ({"seed": 8}, "log_g_true differs in 900 rows, first in row 0"),
    ],
)
def test_other_stars_or_other_noise(changes, words, base, tmp_path):
    seed = changes.pop("seed", 4)
    with pytest.raises(InputError, match=words):
        compare([base, kept(tmp_path / "b", noisy(0.5, 1), seed=seed, **changes)])


def test_noise_that_shows_in_the_snr(base, tmp_path):
    other = kept(tmp_path / "b", noisy(0.5, 1))
    other.stars["snr_median"][7] *= 1.05
    with pytest.raises(InputError, match="snr_median differs, so the noise was not the same"):
        compare([base, other])


def test_one_is_no_comparison(base):
    with pytest.raises(InputError, match="two or more"):
        compare([base])


# -- folders -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(stars, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations")
    path = stars.take(slice(0, 300)).write(folder / "set.h5", arrays=("flux", "error", "noisy"))
    write_report(evaluate(path, model), folder / "moe", pictures=False)
    table = folder / "ridge.csv"
    rows = evaluate(path, model).stars
    values = 0.5 * rows["log_g"] + 1.5
    table.write_text("row,log_g\n" + "".join(f"{i},{v!r}\n" for i, v in enumerate(values.tolist())))
    write_report(evaluate(path, table), folder / "ridge", pictures=False)
    return folder


def test_folders(folders):
    found = compare([folders / "moe", folders / "ridge" / "report.json"])
    assert found["comparisons"][0]["overall"]["r2"]["verdict"] == "worse"
    assert found["evaluations"][1]["model"]["kind"] == "table"
    assert compare([folders / "moe", folders / "ridge"]) == found


def test_the_picture(folders, tmp_path):
    picture = tmp_path / "both.png"
    command = [
        "compare",
        str(folders / "moe"),
        str(folders / "ridge" / "report.json"),
        "--picture",
        str(picture),
    ]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert CliRunner().invoke(cli, command).exit_code != 0, "it is not replaced unasked"
    for names in (("--picture", "x.pdf"), ("--picture", "x.png", "-o", "x.png")):
        refused = CliRunner().invoke(cli, [*command[:3], *names])
        assert isinstance(refused.exception, OutputError) or "ends in .png" in refused.output


def test_folders_of_the_same_name_are_told_apart_in_the_picture(folders, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figures, "compared", lambda reports, path, overwrite: drawn.append(list(reports)))
    for name in ("a", "b"):
        shutil.copytree(folders / "moe", tmp_path / name / "report")
    command = [
        "compare",
        *(str(tmp_path / name / "report") for name in "ab"),
        "--picture",
        str(tmp_path / "x.png"),
    ]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert drawn == [["A report", "B report"]]


def test_the_picture_has_every_model_and_the_ceiling_if_it_is_known(folders, monkeypatch, tmp_path):
    drawn = []
    savefig = figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k))
    )
    report = read_evaluation(folders / "moe").report
    octiles = tuple(replace(group, ceilings={"bayes": group.r2 + 0.01}) for group in report.snr_median.groups)
    report = replace(report, snr_median=replace(report.snr_median, groups=octiles))
    without, other = (read_evaluation(folders / name).report for name in ("ridge", "moe"))
    figures.compared({str(i): report for i in range(8)}, tmp_path / "a.png")
    figures.compared({"ridge": without, "moe": other}, tmp_path / "b.png")
    figures.compared({"ridge": without, "moe": report}, tmp_path / "c.png")
    (left, right), (_, beside), (_, below) = (figure.axes for figure in drawn)
    looks = {(line.get_color(), line.get_marker()) for line in left.lines}
    assert len(looks) == len(left.lines) == 9  # eight models that can be told apart, and the ceiling
    np.testing.assert_allclose(right.lines[0].get_ydata(), 0.01)
    expected = [a.r2 - b.r2 for a, b in zip(*(r.snr_median.groups for r in (without, report)), strict=True)]
    np.testing.assert_allclose(beside.lines[1].get_ydata(), expected)
    assert beside.get_ylabel() == "R² below that of ridge"
    np.testing.assert_allclose(
        below.lines[1].get_ydata(), 0.01, err_msg="the ceiling of whichever report has one"
    )


def test_folders_that_are_no_evaluations(folders, tmp_path):
    with pytest.raises(InputError, match="no evaluation"):
        read_evaluation(tmp_path)
    source = folders / "moe"
    for name in ("report.json", "predictions.h5"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    assert read_evaluation(tmp_path).report.overall.n == 300
    told = json.loads((source / "report.json").read_text())
    changed = told | {"overall": told["overall"] | {"r2": told["overall"]["r2"] + 1e-6}}
    for damaged in (
        changed,
        {("shb256" if name == "sha256" else name): value for name, value in told.items()},
    ):
        (tmp_path / "report.json").write_text(json.dumps(damaged))
        with pytest.raises(InputError, match=r"report\.json: its checksum does not fit"):
            read_evaluation(tmp_path)
        with pytest.raises(InputError, match=r"report\.json: its checksum does not fit"):
            read_reports([tmp_path])
    # What follows is said of reports of earlier versions as well, which have none.
    del told["sha256"]
    (tmp_path / "report.json").write_text(json.dumps(told | {"schema_version": 1}))
    with pytest.raises(InputError, match="schema 1 found, 2 expected"):
        read_evaluation(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(told | {"overall": told["overall"] | {"r2": "x"}}))
    with pytest.raises(InputError, match=r"report\.json: entry overall\.r2: expected a number, found 'x'"):
        read_evaluation(tmp_path)
    told["overall"]["r2"] += 0.01
    (tmp_path / "report.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match="different evaluations"):
        read_evaluation(tmp_path)
    (tmp_path / "predictions.h5").unlink()
    with pytest.raises(InputError, match=r"predictions\.h5 is missing"):
        read_evaluation(tmp_path)
    (tmp_path / "report.json").write_text("nonsense")
    with pytest.raises(InputError, match="no evaluation"):
        read_evaluation(tmp_path)


def test_statistics_are_those_of_the_metrics():
    assert set(comparing.STATISTICS) < set(metrics.STATISTICS)
