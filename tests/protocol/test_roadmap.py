"""The roadmap: which stage follows which, by which number; what is there is not done again."""

import functools
import json

import pytest
from click.testing import CliRunner
from made_reports import evaluation
from markupsafe import escape

from moefast.cli import cli
from moefast.core import metrics
from moefast.core.errors import InputError, OutputError
from moefast.core.records import as_entries
from moefast.fitting import error_model, gate
from moefast.protocol import roadmap as module
from moefast.protocol.group_scores import Bootstrap
from moefast.protocol.roadmap import Plan, roadmap, roadmap_text
from moefast.protocol.roadmap_stages import END, STAGES
from moefast.spectra import open_spectra

PLAN = Plan(train=1000, seeds=2)
OTHERS = (
    ("published-ridge", 0.5),
    ("global-ridge", 0.6),
    ("oracle-ridge", 0.8),
    ("oracle-ridge, sampled", 0.7),
    ("global-ridge, average noise", 0.55),
    ("snr-oracle, average noise", 0.59),
)


@pytest.fixture
def made(monkeypatch):
    """Stands in for fits and evaluations: reports with the R² that a test asks for, by the name of the run."""
    numbers = {
        "phys-moe": 0.79,
        "hybrid-moe": 0.82,
        "hybrid-metal-poor": 0.82,
        "hybrid-regression": 0.81,
        "conditional-moe": 0.8,
        "heads": 0.84,
        "residual-moe": 0.85,
    }
    oracle, performed = {"r2": 0.83}, []

    def perform(run, plan, folder, test, backend, progress):
        for seed in (None, *run.noise_seeds):
            name = run.name if seed is None else f"{run.name}-noise-{seed}"
            report = folder / "reports" / name
            if (report / "report.json").exists():
                continue
            performed.append(name)
            report.mkdir(parents=True)
            training = (("fingerprint", f"{run.training}"), ("seed", 0), ("n_spectra", plan.train))
            hybrid = (("oracle-hybrid", oracle["r2"]),) if run.recipe.startswith("hybrid") else ()
            content = evaluation(
                run.recipe, numbers.get(run.recipe, 0.5 + 0.001 * run.training),
                references=(*hybrid, *OTHERS), noise_seed=seed, training=training,
            )  # fmt: skip
            (report / "report.json").write_text(content)

    def compare(folders):
        first, second = (numbers.get(folder.name, 0.8) for folder in folders)
        entry = {
            "n": 10, "from": first, "to": second, "difference": second - first, "interval": [0.01, 0.05],
            "verdict": "better",
        }  # fmt: skip
        return {"comparisons": [{"overall": {"r2": entry}}]}

    monkeypatch.setattr(module, "compare", compare)
    monkeypatch.setattr(module, "_perform", perform)
    monkeypatch.setattr(module, "simulate_set", lambda path, *_: path.write_bytes(b""))
    return numbers, oracle, performed


@pytest.mark.torch
def test_a_tiny_roadmap_is_fitted_evaluated_and_judged(labelled_file, stars, tmp_path, monkeypatch):
    """The whole tree with nothing made up: fits, evaluations, gates, verdicts and pages, of a few binned stars."""
    for owner, name in ((gate, "fit_gate"), (error_model, "fit_error_model")):
        monkeypatch.setattr(owner, name, functools.partial(getattr(owner, name), hidden=4, steps=150))
    # Twenty resamples are as good as a thousand to test with.
    monkeypatch.setattr(Bootstrap.__init__, "__defaults__", (20, metrics.SEED))
    monkeypatch.setattr(metrics, "N_RESAMPLES", 20)
    few = stars.take(slice(0, 400))
    spectra = open_spectra([labelled_file])
    monkeypatch.setattr(
        module, "simulate_set", lambda path, *_: few.write(path, arrays=("flux", "error", "noisy"))
    )
    monkeypatch.setattr(module.SimulatedSpectra, "of_set", lambda *_, **__: spectra)
    plan = Plan(train=1500, seeds=2, steps=5, families=("linear", "template"))
    result = roadmap(tmp_path / "r", plan, everything=True)
    assert result.path == tuple(stage.id for stage in STAGES)
    rows = {row.id: row for stage in result.stages for row in stage.milestones}
    assert all(row.ours.value is not None for row in rows.values())
    reports = {name: json.loads((tmp_path / "r/reports" / name / "report.json").read_text()) for name in (
        "hybrid-moe", "hybrid-regression", "hybrid-metal-poor",
    )}  # fmt: skip
    found = reports["hybrid-regression"]
    r2 = {name: entry["r2"] for name, entry in found["references"].items()} | {"own": found["overall"]["r2"]}

    def rho(name):
        return (r2[name] - r2["global-ridge"]) / (r2["oracle-hybrid"] - r2["global-ridge"])

    (check,) = rows["C2.0"].absolute.checks
    assert check.value == pytest.approx(rho("own"), abs=1e-6)
    assert found["rho_bayes"]["value"] == pytest.approx(rho("bayes-gate"), abs=1e-6)
    worst = reports["hybrid-metal-poor"]["worst_metal_poor"]
    assert rows["C1.1"].ours.value == worst["r2_oracle"]
    assert f"bin {worst['name']}" in rows["C1.1"].ours.note
    compared = {(one.base, one.other) for stage in result.stages for one in stage.comparisons}
    assert compared == {
        ("global-ridge, average noise", "snr-oracle, average noise"),
        ("hybrid-moe", "hybrid-metal-poor"), ("hybrid-moe", "hybrid-regression"), ("phys-moe", "hybrid-moe"),
        ("heads-single", "heads"), ("heads", "residual-moe"), ("heads", "residual-metal-poor"),
    }  # fmt: skip
    assert "moefast fit train.h5 -o models/residual-metal-poor/" in (tmp_path / "r/roadmap.html").read_text()


def test_a_strong_hybrid_and_a_good_gate_lead_to_residuals(made, tmp_path):
    said = []
    result = roadmap(tmp_path / "r", PLAN, say=said.append)
    assert result.path == ("C0", "C1", "C2", "C4")
    words = [stage.decision.words for stage in result.stages]
    assert words[1].startswith("oracle-hybrid 0.8")
    assert "C2 follows" in words[1]
    assert "≥ 0.85" in words[2]
    assert result.stages[-1].decision.follows == END
    assert any(line.startswith("C2: ρ of the hybrid is 0.9") for line in said)
    assert [row.id for row in result.stages[2].milestones] == ["C2.0", "C2.0e", "C2.0+", "C2"]
    rescue = result.stages[1].milestones[1]
    assert (rescue.id, rescue.absolute.verdict) == ("C1.1", "pass")
    assert json.loads((tmp_path / "r/roadmap.json").read_text()) == as_entries(result)
    text = (tmp_path / "r/roadmap.txt").read_text()
    assert text == roadmap_text(result) + "\n"
    html = (tmp_path / "r/roadmap.html").read_text()
    for stage in result.stages:
        assert escape(stage.decision.words) in html
        for row in stage.milestones:
            assert escape(row.what) in html
            for check in row.reference.checks:
                assert escape(check.what) in html
    assert "C0 → C1 → C2 → C4" in html
    assert "moefast fit train.h5 -o models/phys-moe/ --recipe phys-moe" in html
    (by_snr,) = (one for one in result.stages[1].comparisons if one.other == "snr-oracle, average noise")
    assert by_snr.difference == pytest.approx(by_snr.to_other - by_snr.from_base)
    assert by_snr.verdict == "better"
    for words in (text, html):
        assert (
            f"four bins of SNR brings over one for all (published +0.05): +{by_snr.difference:.3f} [" in words
        )
    for stage in result.stages:
        for row in stage.milestones:
            assert f"{row.id}  {row.what}" in text
    assert "moefast fit train.h5 -o models/phys-moe/ --recipe phys-moe" in text.replace(" \\\n     ", "")


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"oracle": 0.6}, ["C0", "C1", "C3", "C4"]),
        ({"hybrid-regression": 0.775, "hybrid-moe": 0.6}, ["C0", "C1", "C2", "C3", "C4"]),
        ({"hybrid-regression": 0.75, "hybrid-moe": 0.75}, ["C0", "C1", "C2"]),
        # The better gate decides.
        ({"hybrid-regression": 0.75}, ["C0", "C1", "C2", "C4"]),
        # Linear experts decide nothing: the gate that is judged is that of the hybrid.
        ({"phys-moe": 0.61}, ["C0", "C1", "C2", "C4"]),
    ],
)
def test_weaker_numbers_take_other_branches(made, tmp_path, change, path):
    """ρ = (R² − 0.6)/(0.83 − 0.6): 0.76 for 0.775, 0.65 for 0.75, which leads back to C1 and ends there."""
    numbers, oracle, _ = made
    oracle["r2"] = change.pop("oracle", 0.83)
    numbers.update(change)
    result = roadmap(tmp_path / "r", PLAN)
    assert list(result.path) == path
    text, html = ((tmp_path / "r" / f"roadmap.{kind}").read_text() for kind in ("txt", "html"))
    said = (
        "one head on the same trunk: +0.040 [+0.010, +0.050] of R² (heads-single 0.800, heads 0.840), better"
    )
    assert (said in text) == (said in html) == ("C3" in path)


def test_all_stages_are_run_if_asked_for_and_decisions_are_told_all_the_same(made, tmp_path):
    made[1]["r2"] = 0.6
    result = roadmap(tmp_path / "r", PLAN, everything=True)
    assert result.path == tuple(stage.id for stage in STAGES)
    assert result.stages[1].decision.follows == "C3"


def test_what_is_there_is_not_done_again(made, tmp_path):
    _, _, performed = made
    first = roadmap(tmp_path / "r", PLAN)
    n = len(performed)
    assert {
        "ruler-0",
        "ruler-0-noise-1",
        "ruler-1",
        "hybrid-moe",
        "phys-moe",
        "conditional-moe",
        "heads",
    } <= set(performed)
    with pytest.raises(OutputError, match="--resume"):
        roadmap(tmp_path / "r", PLAN)
    again = roadmap(tmp_path / "r", PLAN, resume=True)
    assert len(performed) == n
    assert again.path == first.path
    with pytest.raises(InputError, match="train was 1000, is 2000"):
        roadmap(tmp_path / "r", Plan(train=2000, seeds=2), resume=True)


def test_families_are_those_of_the_hybrid_alone_and_part_of_the_plan(made, tmp_path):
    plan = Plan(train=1000, seeds=2, families=("linear", "whitened"))
    result = roadmap(tmp_path / "r", plan)
    commands = [line for stage in result.stages for line in stage.commands if "--families" in line]
    assert {line.split("--recipe ")[1].split()[0] for line in commands} == {
        "hybrid-moe", "hybrid-metal-poor", "hybrid-regression",
    }  # fmt: skip
    assert all(" --families linear,whitened " in line for line in commands)
    assert roadmap(tmp_path / "r", plan, resume=True).path == result.path
    with pytest.raises(InputError, match="families was"):
        roadmap(tmp_path / "r", PLAN, resume=True)


def test_residuals_stand_on_the_model_that_is_named(made, tmp_path):
    result = roadmap(tmp_path / "r", Plan(train=1000, seeds=2, strong="template"))
    last = result.stages[-1]
    assert [(pair.base, pair.other) for pair in last.comparisons] == [
        ("template", "residual-moe"), ("template", "residual-metal-poor"),
    ]  # fmt: skip
    commands = [line for line in last.commands if line.startswith("moefast fit")]
    assert ["--strong template" in line for line in commands] == [False, True, True]
    assert (tmp_path / "r/reports/template").is_dir()
    assert not (tmp_path / "r/reports/heads").exists()


def test_folders_of_others_are_left_alone(made, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="not empty"):
        roadmap(tmp_path, PLAN)


def test_a_ruler_that_is_not_stable_is_said(made, tmp_path):
    made[0]["published-ridge"] = 0.5
    result = roadmap(tmp_path / "r", PLAN)
    assert "not measured" in result.stages[0].decision.words  # Two seeds of the five that the mark needs.
    full = roadmap(tmp_path / "s", Plan(train=1000, seeds=5))
    assert "is stable" in full.stages[0].decision.words


def test_the_command(made, tmp_path):
    call = ["roadmap", "-o", str(tmp_path / "r"), "--train", "1000", "--seeds", "2", "-q"]
    result = CliRunner().invoke(cli, call)
    assert result.exit_code == 0, result.output
    assert "Decisions" in result.output
    result = CliRunner().invoke(cli, [*call, "--resume", "--json"])
    assert json.loads(result.stdout)["path"] == ["C0", "C1", "C2", "C4"]
