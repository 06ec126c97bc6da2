"""The report: groups add up, JSON is deterministic and complete, text and picture come out of it."""

import json
from pathlib import Path

import made_up
import numpy as np
import pytest
from made_up import evaluated, read_back
from sklearn.metrics import r2_score

from moefast.core import grids, groups, metrics
from moefast.core.atomic import write_json
from moefast.core.errors import LabelError, OutputError
from moefast.core.records import as_entries
from moefast.protocol import figures, html, report, report_text

N = 1201


@pytest.fixture(scope="module")
def sample():
    rng = np.random.default_rng(4)
    y = rng.uniform(1, 5, N)
    snr_median = np.exp(rng.normal(2.1, 0.4, N))
    yhat = y + rng.normal(0, 3 / snr_median)
    yhat[:3] = np.nan
    return {
        "y": y,
        "yhat": yhat,
        "err": 3 / snr_median,
        "t_eff": rng.uniform(3750, 6000, N),
        "m_h": rng.uniform(-2.5, 0.75, N),
        "snr_norm": 0.4 * snr_median,
        "snr_median": snr_median,
        "data_set": "fake",
        "fingerprint": "sha256:0123456789abcdef",
        "weights": rng.dirichlet(np.ones(9), N),
        "expert_grid": grids.PHYSICAL_GRID,
        "references": {
            "published-ridge": y + rng.normal(0, 0.9, N),
            "global-ridge": y + rng.normal(0, 0.7, N),
            "oracle phys-moe": y + rng.normal(0, 0.3, N),
        },
        "ceilings": {"bayes": 0.9},
        "noise_level": 1.0,
        "noise_seed": 11,
        "model": {"recipe": "phys-moe"},
        "n_resamples": 100,
    }


@pytest.fixture(scope="module")
def result(sample):
    return evaluated(**sample)


def test_json_is_deterministic_and_strict(sample, result, tmp_path):
    again = evaluated(**{key: value for key, value in sample.items()})
    assert json.dumps(as_entries(again), allow_nan=False) == json.dumps(as_entries(result), allow_nan=False)
    write_json(as_entries(result), tmp_path / "report.json")
    write_json(as_entries(again), tmp_path / "again.json")
    assert (tmp_path / "report.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    assert json.loads((tmp_path / "report.json").read_text()) == as_entries(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json", "report.json"]


def test_what_is_read_back_is_what_was_written(sample, result):
    assert read_back(result) == result
    for few in (minimal(sample, slice(0, 0)), minimal(sample, slice(9), model={"list": [1, [2.5, None]]})):
        assert read_back(few) == few


def test_headline_matches_scikit_learn_with_the_mean_rule(sample, result):
    filled = np.where(np.isfinite(sample["yhat"]), sample["yhat"], sample["y"].mean())
    assert result.schema_version == report.SCHEMA_VERSION == 2
    assert result.overall.n_nan == 3
    assert result.overall.r2 == pytest.approx(r2_score(sample["y"], filled), rel=1e-9)
    low, high = result.overall.r2_interval
    assert low < result.overall.r2 < high
    covered = grids.PHYSICAL_GRID.covered(sample["t_eff"], sample["m_h"])
    assert result.covered.n == covered.sum()
    assert result.covered.r2 == pytest.approx(r2_score(sample["y"][covered], filled[covered]), rel=1e-9)


@pytest.mark.parametrize(
    ("key", "size"), [("snr_norm", 4), ("snr_median", 8), ("grid", 9), ("metallicity", 2)]
)
def test_every_star_is_in_one_group_of_each_kind(result, key, size):
    groups = result.groups(key)
    assert len(groups) == size
    assert sum(group.n for group in groups) == N
    assert sum(group.n_nan for group in groups) == 3
    # Residual sums of squares add up to the whole.
    total = sum(group.n * group.rmse**2 for group in groups if group.n)
    assert total == pytest.approx(N * result.overall.rmse**2, rel=1e-8)


def test_groups_select_the_right_stars(sample, result):
    norm, m_h = sample["snr_norm"], sample["m_h"]
    assert [group.n for group in result.snr_norm.groups] == [
        (norm <= 2).sum(),
        ((norm > 2) & (norm <= 4)).sum(),
        ((norm > 4) & (norm <= 7)).sum(),
        (norm > 7).sum(),
    ]
    assert result.metallicity.groups[0].n == (m_h < -1).sum()
    poor_cool = (m_h < -1) & (sample["t_eff"] < 4500)
    assert result.grid.groups[0].name == "cool-poor"
    assert result.grid.groups[0].n == poor_cool.sum()
    assert result.grid.groups[0].n_covered == (poor_cool & (m_h >= -2)).sum()


def test_octiles_of_a_known_sample():
    edges = groups.octile_edges(np.arange(17.0))
    np.testing.assert_allclose(edges, np.arange(0, 17, 2))
    octiles = groups.assign_octiles([0.0, 1.9, 2.0, 13.9, 14.0, 16.0, np.nan], edges)
    np.testing.assert_array_equal(octiles, [0, 0, 1, 6, 7, 7, -1])
    assert np.isnan(groups.octile_edges([np.nan])).all()


def test_octile_edges_are_reported(sample, result):
    np.testing.assert_allclose(
        result.snr_median.edges, np.percentile(sample["snr_median"], 12.5 * np.arange(9)), rtol=1e-9
    )
    sizes = [group.n for group in result.snr_median.groups]
    assert max(sizes) - min(sizes) <= 1
    for group in result.snr_median.groups:
        assert group.range[0] <= group.centre <= group.range[1]


def test_references_rho_and_ceilings(sample, result):
    references = result.references
    assert list(references) == list(sample["references"])
    published = references["published-ridge"]
    assert published.r2_gain == pytest.approx(result.overall.r2 - published.r2, abs=1e-9)
    assert published.r2_gain_interval[0] < published.r2_gain < published.r2_gain_interval[1]
    assert [len(published.r2_by(key)) for key in ("snr_norm", "snr_median", "grid")] == [4, 8, 9]
    rho = metrics.rho(result.overall.r2, references["global-ridge"].r2, references["oracle phys-moe"].r2)
    assert result.rho.value == pytest.approx(rho.value, rel=1e-7)
    assert result.rho.oracle == "oracle phys-moe"
    bayes = result.ceilings["bayes"]
    assert bayes.efficiency == pytest.approx(result.overall.r2 / 0.9, rel=1e-8)
    gap = metrics.gap_closed(result.overall.r2, published.r2, 0.9)
    assert bayes.gap_closed == pytest.approx(gap.value, rel=1e-7)


def test_routing_summary(sample, result):
    gate = sample["weights"]
    expected = (gate.argmax(axis=1) == grids.PHYSICAL_GRID.assign(sample["t_eff"], sample["m_h"])).mean()
    assert result.routing.accuracy == pytest.approx(expected)
    assert sum(result.routing.usage) == pytest.approx(1)
    assert sum(result.routing.mean_weight) == pytest.approx(1)


def test_calibrated_errors_cover_as_they_should(result):
    one, two = result.overall.error_coverage.levels
    assert one.fraction == pytest.approx(0.6827, abs=0.05)
    assert two.fraction == pytest.approx(0.95, abs=0.025)
    assert result.overall.error_coverage.n_undefined == 3
    assert sum(group.error_coverage.n for group in result.snr_norm.groups) == N


def minimal(sample, rows, **changes):
    columns = ("y", "yhat", "t_eff", "m_h", "snr_norm", "snr_median")
    arguments = {key: np.array(sample[key][rows]) for key in columns}
    arguments |= {"err": None, "data_set": "fake", "fingerprint": "0", "n_resamples": 20}
    return evaluated(**(arguments | changes))


@pytest.mark.parametrize("n", [0, 1, 2, 9])
def test_tiny_sets_give_a_report_text_and_picture(sample, n, tmp_path):
    found = minimal(sample, slice(100, 100 + n))
    json.dumps(as_entries(found), allow_nan=False)
    assert found.rho is None
    assert found.routing is None
    assert found.references == found.ceilings == {}
    assert (found.overall.r2 is None) == (n < 2)
    assert "log g on fake" in report_text.format_text(found)
    figures.overview(found, tmp_path / "tiny.png")
    assert f"{n:,} stars" in html.page(found)
    assert (tmp_path / "tiny.png").stat().st_size > 10_000


def test_stars_without_snr_stay_in_the_headline(sample):
    snr = sample["snr_norm"][:50].copy()
    snr[[3, 7]] = np.nan
    found = minimal(sample, slice(50), snr_norm=snr, snr_median=snr)
    assert found.overall.n == 50
    assert found.snr_norm.n_unassigned == found.snr_median.n_unassigned == 2
    assert sum(group.n for group in found.snr_median.groups) == 48
    assert "2 stars have no finite snr_norm" in report_text.format_text(found)


def test_an_oracle_without_uplift_is_said_aloud(sample):
    y = sample["y"][:50]
    references = {"global-ridge": y + 0.1, "oracle-ridge": y + 0.2}
    found = minimal(sample, slice(50), references=references)
    assert found.rho.value is None
    assert "the oracle is no better" in found.rho.reason
    assert "the oracle is no better" in report_text.format_text(found)


def test_both_gates_of_the_same_experts_stand_beside_each_other(sample):
    y, draw = sample["y"], np.random.default_rng(3)
    scatters = {"oracle-hybrid": 0.3, "global-ridge": 0.9, "bayes-gate": 0.5, "oracle-ridge, sampled": 0.8}
    references = {name: y + scatter * draw.standard_normal(len(y)) for name, scatter in scatters.items()}
    found = minimal(
        sample, slice(None), references=references, oracle_reference="oracle-hybrid",
        yhat=y + 0.4 * draw.standard_normal(len(y)),
    )  # fmt: skip
    r2 = {name: entry.r2 for name, entry in found.references.items()}
    base, top = r2["global-ridge"], r2["oracle-hybrid"]
    assert found.rho.value == pytest.approx((found.overall.r2 - base) / (top - base))
    assert found.rho_bayes.value == pytest.approx((r2["bayes-gate"] - base) / (top - base))
    low, high = found.rho_bayes.interval
    assert low < found.rho_bayes.value < high < found.rho.value
    text, page = report_text.format_text(found), html.page(found)
    assert "the same experts mixed by Bayes' rule alone" in text
    assert f"{found.rho_bayes.value:.3f}" in text
    assert read_back(found).rho_bayes == found.rho_bayes
    with_gate = minimal(
        sample, slice(None), references=references, oracle_reference="oracle-hybrid",
        weights=np.full((len(y), 9), 1 / 9), expert_grid=grids.PHYSICAL_GRID,
    )  # fmt: skip
    assert (
        f"{with_gate.rho_bayes.value:.3f}"
        in html.page(with_gate).split("by Bayes' rule on the same experts")[0]
    )
    assert "by Bayes' rule on the same experts" not in page


def test_the_worst_metal_poor_bin_stands_beside_its_sampled_ridge(sample):
    y, noise = sample["y"], np.random.default_rng(3).standard_normal(len(sample["y"]))
    bins = grids.PHYSICAL_GRID.assign(sample["t_eff"], sample["m_h"])
    # The worst of all bins is metal-rich, the worst metal-poor one is warm.
    scatter = np.select([bins == 5, bins == 3, bins == 6], [1.3, 1.0, 0.8], 0.4)
    references = {"oracle-hybrid": y + 0.2 * noise, "oracle-ridge, sampled": y + scatter * noise}
    found = minimal(
        sample, slice(None), references=references, oracle_reference="oracle-hybrid", yhat=y + 0.3 * noise
    )
    worst, mine = found.worst_metal_poor, bins == 3
    assert (worst.name, worst.n) == ("warm-poor", mine.sum())
    expected = [metrics.r2(y[mine], y[mine] + s * noise[mine]) for s in (1.0, 0.2, 0.3)]
    assert [worst.r2_sampled, worst.r2_oracle, worst.r2] == pytest.approx(expected)
    assert worst.gain == pytest.approx(expected[1] - expected[0])
    assert worst.gain_interval[0] < worst.gain < worst.gain_interval[1]
    for words in (report_text.format_text(found), html.page(found)):
        assert "Worst metal-poor bin: warm-poor" in words
        assert f"{worst.r2_sampled:.3f} by the ridge of that bin" in words
    del references["oracle-ridge, sampled"]
    assert minimal(sample, slice(None), references=references).worst_metal_poor is None


def test_an_expert_for_each_bin_of_snr_stands_beside_one_for_all(sample):
    y, noise = sample["y"], np.random.default_rng(3).standard_normal(len(sample["y"]))
    references = {
        "global-ridge, average noise": y + 0.9 * noise,
        "snr-oracle, average noise": y + 0.8 * noise,
    }
    found = minimal(sample, slice(None), references=references)
    one, four = (metrics.r2(y, y + scatter * noise) for scatter in (0.9, 0.8))
    assert (found.snr_oracle.r2_one, found.snr_oracle.r2) == pytest.approx((one, four))
    assert found.snr_oracle.gain == pytest.approx(four - one)
    low, high = found.snr_oracle.gain_interval
    assert low < four - one < high < 2 * (four - one)
    assert read_back(found).snr_oracle == found.snr_oracle
    for words in (" ".join(report_text.format_text(found).split()), html.page(found)):
        assert f"of snr_norm has R² {four:.3f}, one for all {one:.3f}" in words
        assert f"{four - one:+.3f} [" in words
        assert "(published: +0.05)" in words
    del references["snr-oracle, average noise"]
    assert minimal(sample, slice(None), references=references).snr_oracle is None


def test_what_exact_posterior_means_have_on_the_same_stars_stands_beside_the_ceiling(sample):
    y, noise = sample["y"], np.random.default_rng(3).standard_normal(len(sample["y"]))
    means, own = y + 0.50 * noise, y + 0.52 * noise
    of_groups = {"snr_norm": [{"bayes": 0.9, "posterior means": 0.8}] * 4}
    found = minimal(
        sample,
        slice(None),
        yhat=own,
        ceilings={"bayes": 0.9},
        group_ceilings=of_groups,
        posterior_means=means,
    )
    both = found.posterior_means
    share = metrics.r2(y, own) / metrics.r2(y, means)
    assert both.r2 == pytest.approx(metrics.r2(y, means))
    assert both.efficiency == pytest.approx(share)
    # Errors of both are alike but for their size, so that the quotient is far better known than either R².
    low, high = both.efficiency_interval
    assert low < share < high
    assert high - low < 0.2 * (both.r2_interval[1] - both.r2_interval[0])
    assert read_back(found).posterior_means == both
    text, page = report_text.format_text(found), html.page(found)
    assert f"this model has {share:.3f} [{low:.3f}, {high:.3f}] of it" in " ".join(text.split())
    assert f"this model has {share:.3f}" in page
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("By snr_norm"))
    assert lines[head].split()[-3:] == ["efficiency", "of", "means"]
    for line, group in zip(lines[head + 1 :], found.snr_norm.groups, strict=False):
        assert line.split()[-2:] == [f"{group.r2 / 0.9:.3f}", f"{group.r2 / 0.8:.3f}"]
    assert max(map(len, lines)) <= 100
    useless = minimal(sample, slice(None), ceilings={"bayes": 0.9}, posterior_means=y.mean() + noise)
    assert useless.posterior_means.efficiency is None
    assert "not above zero" in report_text.format_text(useless)


def test_efficiency_within_a_group_is_r2_over_its_own_ceiling():
    result = made_up.report()
    lines = report_text.format_text(result).splitlines()
    assert next(line for line in lines if line.startswith("By ")).endswith("efficiency")
    for title, kind in (("By snr_norm", "snr_norm"), ("By snr_median", "snr_median")):
        head = next(i for i, line in enumerate(lines) if line.startswith(title))
        for i, group in enumerate(result.groups(kind), head + 1):
            assert lines[i].split()[-1] == f"{group.r2 / group.ceilings['bayes']:.3f}"
    assert "efficiency is R² over the Bayes ceiling there" in html.page(result)


def test_a_ceiling_without_the_published_ridge_says_why_there_is_no_gap(sample):
    found = minimal(sample, slice(50), ceilings={"bayes": 0.8})
    assert found.ceilings["bayes"].gap_closed is None
    assert "no predictions of published-ridge" in report_text.format_text(found)


def test_wrong_arguments_are_named(sample):
    with pytest.raises(LabelError, match="t_eff must have shape"):
        minimal(sample, slice(50), t_eff=np.ones(3))
    with pytest.raises(LabelError, match="must be finite"):
        minimal(sample, slice(50), m_h=np.full(50, np.nan))
    with pytest.raises(ValueError, match="snr_norm must have shape"):
        minimal(sample, slice(50), snr_norm=np.ones(3))
    with pytest.raises(ValueError, match="weights must have shape"):
        minimal(sample, slice(50), weights=np.ones(50))
    with pytest.raises(ValueError, match="9 bins and weights 4"):
        minimal(sample, slice(50), weights=np.ones((50, 4)), expert_grid=grids.PHYSICAL_GRID)
    with pytest.raises(ValueError, match="oracle_reference 'x'"):
        minimal(sample, slice(50), oracle_reference="x")
    with pytest.raises(ValueError, match="global_reference 'x'"):
        minimal(sample, slice(50), global_reference="x")
    with pytest.raises(TypeError, match="JSON values only; found object"):
        minimal(sample, slice(50), model={"recipe": object()})


def test_a_reference_set_is_named_with_the_fingerprint_that_simulate_prints():
    known = {"reference_set": "z0", "part": "test_1k", "fingerprint": "5" * 64}
    found = made_up.report(reference_set=known)
    lines = report_text.format_text(found).splitlines()
    assert lines[1] == "set z0 test_1k, fingerprint " + "5" * 64
    assert lines[2].startswith("file fingerprint 0123456789abcdef, model ")
    assert len(lines[1]) <= 100
    words = f"z0 test_1k, the set with the fingerprint {'5' * 64}"
    assert words in html.page(found)
    assert words not in html.page(made_up.report())
    assert report_text.format_text(made_up.report()).splitlines()[1].startswith("file fingerprint ")


def test_text_leads_with_the_headline_and_lines_up(result):
    throughput = {"spectra_per_second": 12345.6, "device": "CPU"}
    text = report_text.format_text(result, throughput)
    lines = text.splitlines()
    assert lines[0] == "log g on fake: 1,201 stars, noise level 1 (seed 11)"
    assert lines[3].split()[0] == "R²"
    assert f"{result.overall.r2:.4f}" in lines[3]
    assert "12,346 spectra/s on CPU" in text
    assert "3 predictions are not finite" in text
    assert max(len(line) for line in lines) <= 100
    rows = [line for line in lines if line.startswith(("  cool", "  warm", "  hot"))]
    assert len(rows) == 9
    assert len({len(row) for row in rows}) == 1
    assert report_text.format_text(read_back(result), throughput) == text
    assert "spectra/s" not in report_text.format_text(result)


def test_failed_writes_are_named_and_leave_nothing(result, tmp_path):
    with pytest.raises(OutputError, match=r"missing/report\.json"):
        write_json(as_entries(result), tmp_path / "missing" / "report.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder"):
        write_json(as_entries(result), tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def paths_of(value, path=""):
    """Where every number of a report stands; of lists the first entry, of names the one word."""
    if isinstance(value, dict):
        names = "*" if path.endswith((".references", ".ceilings")) else None
        return {p for key, item in value.items() for p in paths_of(item, f"{path}.{names or key}")}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return paths_of(value[0], f"{path}[]")
    return {path}


def test_entries_of_report_json_are_those_documented(result):
    """Other programs read report.json: an entry may come, none may go or move without a new schema version."""
    stored = Path(__file__).with_name("report_entries.txt").read_text().split("\n")
    found = paths_of(as_entries(result)) - {".model.recipe"}
    assert sorted(found) == [line for line in stored if line], "add new entries to report_entries.txt"
    assert result.schema_version == 2
