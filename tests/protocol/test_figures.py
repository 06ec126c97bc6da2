"""Figures: functions of the report alone, the same bytes twice, right numbers, whatever the report lacks."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from made_up import read_back
from made_up import report as made_up
from matplotlib.figure import Figure

from moefast.core.errors import OutputError
from moefast.pages.drawing import DARK, LIGHT
from moefast.protocol import captions, drawings, figures
from moefast.protocol.figures import FIGURES

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def report():
    return made_up()


@pytest.fixture(scope="module")
def bare():
    """What an evaluation without errors, gate, references, ceilings and SNRs has to show."""
    return made_up(
        30,
        err=None,
        weights=None,
        expert_grid=None,
        references={},
        ceilings={},
        group_ceilings=None,
        snr_median=np.full(30, np.nan),
        snr_norm=np.full(30, np.nan),
    )


def parsed(text):
    # A page knows the namespace of <svg>; a parser of XML must be told.
    return ElementTree.fromstring(text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def axes_of(name, report):
    axes = Figure().subplots()
    FIGURES[name].draw(axes, report, LIGHT)
    return axes


@pytest.mark.parametrize("name", FIGURES)
def test_png_and_svg(name, report, tmp_path):
    before = dict(mpl.rcParams)
    figures.png(report, name, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = figures.svg(report, name)
    assert text == figures.svg(read_back(report), name)
    assert dict(mpl.rcParams) == before
    root = parsed(text)
    assert root.find(f"{SVG}title").text == FIGURES[name].title
    assert len(root.find(f"{SVG}desc").text) > 30
    identifiers = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(identifiers) == len(set(identifiers))
    assert all(identifier.startswith(f"{name}-") for identifier in identifiers)
    for used in re.findall(r'(?:href="#|url\(#)([^")]+)', text):
        assert used in identifiers
    assert not re.search(r"#0102[0-9a-f]{2}|DejaVu|metadata|https?://(?!www\.w3\.org)", text)
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= set(LIGHT)
    assert "width=" not in text[: text.index(">")]


def test_the_same_png_twice(report, tmp_path):
    for name in ("a.png", "b.png"):
        figures.png(report, "r2-against-snr", tmp_path / name)
        figures.overview(report, tmp_path / f"overview-{name}")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "overview-a.png").read_bytes() == (tmp_path / "overview-b.png").read_bytes()


def test_what_a_report_lacks_is_not_drawn(bare, tmp_path):
    drawn = [name for name, drawing in FIGURES.items() if drawing.exists(bare)]
    assert set(FIGURES) - set(drawn) == {
        "what-helped",
        "error-calibration",
        "error-size",
        "gate-by-bin",
        "gate-by-snr",
    }
    for name in drawn:
        parsed(figures.svg(bare, name))
    figures.overview(bare, tmp_path / "overview.png")


def test_lines_carry_the_numbers(report):
    axes = axes_of("r2-against-snr", report)
    lines = {line.get_label(): line for line in axes.get_lines()}
    own = lines["this model (95 %)"]
    np.testing.assert_allclose(own.get_ydata(), [g.r2 for g in report.snr_median.groups])
    np.testing.assert_allclose(own.get_xdata(), [g.centre for g in report.snr_median.groups])
    np.testing.assert_allclose(
        lines["published-ridge"].get_ydata(), report.references["published-ridge"].r2_snr_median
    )
    np.testing.assert_array_equal(lines["Bayes ceiling"].get_ydata(), np.full(8, 0.9))
    assert "Fisher ceiling, median" in lines
    for name, points in (
        ("ridge", drawings.PUBLISHED_RIDGE_OCTILES), ("ViT", drawings.PUBLISHED_VIT_OCTILES),
    ):  # fmt: skip
        other = lines[f"{name}, published for other data"]
        np.testing.assert_array_equal(other.get_ydata(), [r2 for _, r2 in points])
        assert (other.get_markerfacecolor(), other.get_linestyle()) == ("none", "None")


def test_a_ceiling_without_groups_is_a_level(bare):
    only = read_back(made_up(group_ceilings=None))
    lines = {line.get_label() for line in axes_of("r2-against-snr", only).get_lines()}
    assert "Bayes ceiling (all stars)" in lines
    assert not any("ceiling" in line.get_label() for line in axes_of("r2-against-snr", bare).get_lines())


def test_texts_keep_their_digits(report):
    """Coordinates are rounded in SVG, numbers that are read are not."""
    texts = [
        "".join(element.itertext()) for element in parsed(figures.svg(report, "r2-by-bin")).iter(f"{SVG}text")
    ]
    for group in report.grid.groups:
        assert f"{group.r2:.3f}".replace("-", "−") in texts
    helped = figures.svg(report, "what-helped")
    assert f"{report.overall.r2:.3f}" in helped


def test_every_star_is_in_the_density(report):
    cells = report.density.cells
    assert sum(count for _, _, count in cells) == report.overall.n
    edges = report.density.edges
    assert len(edges) == 41
    assert all(0 <= i < 40 and 0 <= k < 40 for i, k, _ in cells)


def test_profiles_and_calibration(report):
    for rows in report.residuals.values():
        assert sum(row.n for row in rows) == report.overall.n
        mean = sum(row.n * row.mean for row in rows) / report.overall.n
        assert mean == pytest.approx(report.overall.bias, abs=1e-9)
        assert all(row.p16 <= row.median <= row.p84 for row in rows)
    found = report.calibration
    # The claims are right by construction.
    assert found.scale == pytest.approx(1, abs=0.06)
    assert found.pull_std == pytest.approx(1, abs=0.06)
    assert found.n_undefined == 3
    assert sum(row.n for row in found.by_error) == report.overall.n - 3
    for row in found.levels:
        assert row.fraction == pytest.approx(row.expected, abs=0.05)


def test_gate_by_group(report):
    for kind in ("grid", "snr_median", "snr_norm", "metallicity"):
        rows = report.routing.by_group[kind]
        assert [row.n for row in rows] == [group.n for group in report.groups(kind)]
        pooled = sum(row.n * np.array(row.mean_weight) for row in rows) / report.overall.n
        np.testing.assert_allclose(pooled, report.routing.mean_weight, rtol=1e-8)
        accuracy = sum(row.n * row.accuracy for row in rows) / report.overall.n
        assert accuracy == pytest.approx(report.routing.accuracy)


def test_kiel_diagram_holds_every_star_and_its_bias(report):
    cells = np.array(report.kiel.cells)
    assert cells[:, 2].sum() == report.overall.n
    assert (cells[:, 2] * cells[:, 3]).sum() / cells[:, 2].sum() == pytest.approx(
        report.overall.bias, abs=1e-9
    )
    rmse = np.sqrt((cells[:, 2] * cells[:, 4] ** 2).sum() / cells[:, 2].sum())
    assert rmse == pytest.approx(report.overall.rmse, rel=1e-8)
    drawn = sum(len(patch.get_path().vertices) for patch in axes_of("kiel-bias", report).patches)
    assert drawn == 5 * (cells[:, 2] >= captions.LEAST_IN_CELL).sum()


def test_giants_and_dwarfs():
    y = np.array([1.0, 2.0, 3.0, 3.4, 3.5, 4.0, 4.5, 5.0] * 50)
    n = len(y)
    # Every fourth giant is taken for a dwarf, and no dwarf for a giant.
    yhat = np.where(y == 3.4, 3.6, y)
    one = {"weights": None, "expert_grid": None, "references": {}, "ceilings": {}, "group_ceilings": None}
    found = made_up(n, y=y, yhat=yhat, snr_median=np.arange(n) + 1.0, snr_norm=np.ones(n), **one)
    giants, dwarfs = found.giants.parts
    for part, right in ((giants, 0.75), (dwarfs, 1.0)):
        assert sum(group.n for group in part.groups) == n / 2
        share = sum(g.n * g.right for g in part.groups) / sum(g.n for g in part.groups)
        assert share == pytest.approx(right)
    drawn = {line.get_label(): line for line in axes_of("giants-and-dwarfs", found).get_lines()}
    np.testing.assert_allclose(
        drawn["giants, log g < 3.5"].get_ydata(), [100 * g.right for g in giants.groups]
    )


def test_errors_by_snr_are_those_claimed_and_made(report):
    rows = report.errors_by_snr
    assert sum(row.n for row in rows) == report.overall.n
    squares = sum(row.n * row.rmse**2 for row in rows) / report.overall.n
    assert squares == pytest.approx(report.overall.rmse**2)
    for row, group in zip(rows, report.snr_median.groups, strict=True):
        # Errors are 3 / SNR by construction.
        assert row.p16 < 3 / group.centre < row.p84
        assert row.median == pytest.approx(3 / group.centre, rel=0.01)


def test_numbers_stand_inside_the_frame_beside_their_intervals(report):
    """Here the interval of the best one reaches far beyond its R², as it does with few stars."""
    best = max(entry.r2 for entry in (report.overall, *report.references.values()))
    wide = replace(report, overall=replace(report.overall, r2=best, r2_interval=(best - 0.1, best + 0.5)))
    axes = axes_of("what-helped", wide)
    axes.figure.canvas.draw()
    frame = axes.get_window_extent()
    assert len(axes.texts) == len(axes.get_yticklabels())
    assert all(text.get_window_extent().x1 <= frame.x1 for text in axes.texts)


def test_ceilings_stand_above_all_models():
    ceilings = {"bayes": 0.9, "fisher median": 0.8, "fisher mean": -3.0}
    axes = axes_of("what-helped", made_up(ceilings=ceilings, group_ceilings=None))
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[-2:] == ["Fisher ceiling, median", "Bayes ceiling"]
    assert not any("mean" in name for name in names)
    assert axes.get_xlim()[0] > -1
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        "this model",
        "simpler fits",
        "ceilings",
    }


def test_a_report_of_an_earlier_version_is_drawn(report, tmp_path):
    old = read_back(report, "kiel", "giants", "errors_by_snr")
    drawn = {name for name, drawing in FIGURES.items() if drawing.exists(old)}
    assert set(FIGURES) - drawn == {"kiel-bias", "giants-and-dwarfs", "error-by-snr"}
    figures.overview(old, tmp_path / "overview.png")


def test_many_experts_are_drawn_without_words():
    weights = np.random.default_rng(1).dirichlet(np.ones(49), 1201)
    many = made_up(weights=weights, expert_grid=bins_of(7, 7))
    text = figures.svg(many, "gate-by-bin")
    assert len(text) < 250_000
    assert "expert" in text


def bins_of(rows, columns):
    from moefast.core.grids import uniform

    return uniform(rows, columns)


def test_palettes_have_the_same_roles_and_contrast():
    assert set(LIGHT) == set(DARK)
    for palette in (LIGHT, DARK):
        surface = luminance(palette["surface"])
        for role in ("ink", "muted", "own", "first", "second", "third", "ceiling"):
            a, b = sorted((luminance(palette[role]), surface))
            # WCAG 2: text wants 4.5.
            assert (b + 0.05) / (a + 0.05) >= 4.5, role


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_picture_that_cannot_be_written(report, tmp_path):
    with pytest.raises(OutputError, match=r"missing/a\.png"):
        figures.png(report, "r2-by-bin", tmp_path / "missing" / "a.png")
    assert not list(tmp_path.iterdir())
