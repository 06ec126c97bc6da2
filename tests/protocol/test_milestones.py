"""Milestones: true passes, true fails, what was not run, and evaluations that must not be mixed."""

import inspect
import json
import re
import shlex
from dataclasses import replace

import click
import numpy as np
import pytest
from click.testing import CliRunner
from made_reports import Z0, N, evaluation, predictions, stars

from moefast.cli import cli
from moefast.core import metrics
from moefast.core.errors import InputError
from moefast.core.records import as_entries, read_entries
from moefast.protocol import evaluate as evaluation_module
from moefast.protocol import report_folder, report_text
from moefast.protocol.milestones.evaluations import NotRunError, Section, read_reports
from moefast.protocol.milestones.judge import judge, judge_alone
from moefast.protocol.milestones.marks import MILESTONES
from moefast.protocol.milestones.quantities import HYBRID_ORACLE, RIDGE_ORACLE, SAMPLED_ORACLE
from moefast.protocol.milestones.rules import Check, Measured, Quantity, Rule
from moefast.protocol.milestones.text import format_text
from moefast.protocol.report_parts import Report
from moefast.simulate.sets import FINGERPRINTS
from moefast.spectra.tables import Column, open_table

NOTHING = Section((), (), None, None)


def write(folder, *contents):
    """Each content in a folder of its own."""
    paths = []
    for content in contents:
        paths.append(folder / f"report-{len(list(folder.iterdir()))}")
        paths[-1].mkdir()
        (paths[-1] / "report.json").write_text(content)
    return paths


def verdicts(result, index=0):
    return {row.id: (row.absolute.verdict, row.reference.verdict)
            for row in result.sections[index].milestones}  # fmt: skip


def row_of(result, identifier, index=0):
    return next(row for row in result.sections[index].milestones if row.id == identifier)


def test_nothing_given_is_nothing_run():
    result = judge([])
    assert list(verdicts(result)) == [
        "C0",
        "C1",
        "C1.1",
        "C2",
        "C2.0",
        "C2.0+",
        "C2.0e",
        "C3",
        "C3+",
        "C3.p",
        "C4",
    ]
    assert set(verdicts(result).values()) == {("not run", "not run")}
    assert all(row.ours.value is None and row.ours.reason for row in result.sections[0].milestones)


PHYS = (("published-ridge", 0.5), ("global-ridge", 0.6), ("oracle-ridge", 0.8))


def test_a_gate_that_passes_and_one_that_fails(tmp_path):
    good = judge(read_reports(write(tmp_path, evaluation("phys-moe", 0.795, references=PHYS))))
    rho = row_of(good, "C2").absolute.checks[0]
    assert rho.value == pytest.approx(0.975, abs=1e-3)
    assert rho.interval[0] <= rho.value <= rho.interval[1]
    # Fusion was not measured: the reference mark is neither passed nor failed.
    assert verdicts(good)["C2"] == ("pass", "not run")
    assert "no evaluation of conditional-moe" in row_of(good, "C2").reference.checks[1].reason

    bad = judge(read_reports(write(tmp_path, evaluation("phys-moe", 0.63, references=PHYS))))
    assert verdicts(bad)["C2"] == ("fail", "fail")
    assert row_of(bad, "C2").ours.value == pytest.approx(0.63, abs=0.01)


def fusion(gain_x, gain_rest):
    x = stars()["snr_norm"] <= 2
    return tuple(np.where(x, 0.7 + gain_x, 0.78 + gain_rest).tolist())


PHYS_BY_SNR = tuple(np.where(stars()["snr_norm"] <= 2, 0.7, 0.78).tolist())
ALMOST = (("global-ridge", 0.6), ("oracle-ridge", 0.7601))


@pytest.mark.parametrize(
    ("gain_x", "gain_rest", "verdict"), [(0.05, 0.0, "pass"), (0.05, -0.01, "fail"), (0.001, 0.01, "fail")]
)
def test_conditional_fusion(tmp_path, gain_x, gain_rest, verdict):
    files = write(
        tmp_path,
        evaluation("phys-moe", PHYS_BY_SNR, references=ALMOST),
        evaluation("conditional-moe", fusion(gain_x, gain_rest)),
    )
    result = judge(read_reports(files))
    x, rest = row_of(result, "C2").reference.checks[1:]
    assert (x.value >= 0.01, rest.value >= -1e-9) == (gain_x >= 0.01, gain_rest >= 0)
    assert verdicts(result)["C2"][1] == verdict


def hybrid(gain, poor_gain, recipe="hybrid-moe", r2=0.8):
    """Oracles with true bins; the sampled ridge is worst in the cool metal-poor bin."""
    data = stars()
    poor = (data["m_h"] < -1) & (data["t_eff"] < 4500)
    sampled = np.where(poor, 0.5, 0.8)
    own = np.where(poor, 0.5 + poor_gain, 0.85 + gain)
    return evaluation(
        recipe, r2, bayes=0.85,
        references=((HYBRID_ORACLE, tuple(own.tolist())), (RIDGE_ORACLE, 0.78),
                    (SAMPLED_ORACLE, tuple(sampled.tolist()))),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gain", "poor_gain", "verdict"), [(0.05, 0.2, "pass"), (0.05, 0.01, "fail"), (-0.1, 0.3, "fail")]
)
def test_oracle_uplift(tmp_path, gain, poor_gain, verdict):
    result = judge(read_reports(write(tmp_path, hybrid(gain, poor_gain))))
    row = row_of(result, "C1")
    assert row.reference.checks[2].note == "bin cool-poor"
    assert row.reference.checks[2].passed == (poor_gain >= 0.05)
    assert row.reference.checks[3].passed == (gain > -0.05)
    assert row.reference.verdict == verdict
    # Any one of the two absolute marks is enough.
    assert row.absolute.combine == "any"
    assert row.absolute.verdict == "pass"


def test_the_gate_of_the_hybrid_is_judged_on_the_way_to_its_own_experts(tmp_path):
    """ρ to the hybrid's experts, not to linear ones that the report holds too: (0.76 − 0.6)/(0.8 − 0.6) = 0.8."""
    references = ((HYBRID_ORACLE, 0.8), ("global-ridge", 0.6), (RIDGE_ORACLE, 0.7))
    result = judge(
        read_reports(write(tmp_path, evaluation("hybrid-regression", 0.76, references=references)))
    )
    (check,) = row_of(result, "C2.0").absolute.checks
    assert check.value == pytest.approx(0.8, abs=0.01)
    assert verdicts(result)["C2.0"] == ("fail", "fail")
    assert verdicts(result)["C2.0+"] == ("pass", "pass")
    other = evaluation("hybrid-regression", 0.64, references=references[::-1])
    result = judge(read_reports(write(tmp_path, other)))
    assert "is to oracle-ridge" in row_of(result, "C2.0").absolute.checks[0].reason
    assert verdicts(result)["C2.0+"] == ("not run", "not run")
    result = judge(read_reports(write(tmp_path, other, evaluation("hybrid-moe", 0.66))))
    assert verdicts(result)["C2.0+"] == ("pass", "pass")


@pytest.mark.parametrize(("recipe", "r2", "verdict"), [
    ("heads-vit", 0.93, ("pass", "pass")), ("heads-cnn", 0.93, ("pass", "pass")),
    # 0.44 of the gap from 0.5 to 0.95; the other trunk is not there.
    ("heads-cnn", 0.72, ("pass", "not run")), ("heads-single", 0.93, ("not run", "not run")),
])  # fmt: skip
def test_either_trunk_that_sees_pixels_counts(tmp_path, recipe, r2, verdict):
    made = evaluation(recipe, r2, references=(("published-ridge", 0.5),))
    assert verdicts(judge(read_reports(write(tmp_path, made))))["C3.p"] == verdict


@pytest.mark.parametrize(
    ("poor_gain", "loss", "verdict"), [(0.2, 0, "pass"), (0.01, 0, "fail"), (0.2, 0.1, "fail")]
)
def test_rescue_of_the_metal_poor(tmp_path, poor_gain, loss, verdict):
    poor = stars()["m_h"] < -1
    focused = hybrid(0.05, poor_gain, "hybrid-metal-poor", tuple(np.where(poor, 0.8 - loss, 0.8).tolist()))
    row = row_of(judge(read_reports(write(tmp_path, focused, hybrid(0.05, 0.2)))), "C1.1")
    gain, kept = row.reference.checks
    assert gain.note == "bin cool-poor"
    assert gain.interval[0] <= gain.value <= gain.interval[1]
    assert kept.value == pytest.approx(-loss, abs=0.02)
    assert row.reference.verdict == verdict
    assert row.absolute.verdict == ("pass" if poor_gain > 0.05 else "fail")
    assert row.ours.note.startswith("bin cool-poor, sampled ridge 0.")


def test_a_hybrid_without_the_oracles_it_is_compared_with_is_not_run(tmp_path):
    result = judge(
        read_reports(write(tmp_path, evaluation("hybrid-moe", 0.8, references=(("oracle-ridge", 0.7),))))
    )
    assert verdicts(result)["C1"] == ("not run", "not run")
    assert f"no reference {HYBRID_ORACLE}" in row_of(result, "C1").ours.reason


@pytest.mark.parametrize(
    ("r2", "first", "second"),
    [(0.945, ("pass", "pass"), ("pass", "pass")), (0.9, ("pass", "pass"), ("pass", "fail")),
     (0.72, ("pass", "fail"), ("fail", "fail")), (0.6, ("fail", "fail"), ("fail", "fail"))],
)  # fmt: skip
def test_heads_by_both_marks(tmp_path, r2, first, second):
    found = verdicts(
        judge(read_reports(write(tmp_path, evaluation("heads", r2, references=(("published-ridge", 0.5),)))))
    )
    assert (found["C3"], found["C3+"]) == (first, second)


def test_without_a_bayes_ceiling_no_gap_is_closed(tmp_path):
    content = evaluation("heads", 0.94, references=(("published-ridge", 0.5),), bayes=None)
    result = judge(read_reports(write(tmp_path, content)))
    assert verdicts(result)["C3"] == ("pass", "not run")
    assert "no Bayes ceiling" in row_of(result, "C3").reference.checks[0].reason


def residual(change_poor):
    return tuple(np.where(stars()["m_h"] < -1, 0.9 + change_poor, 0.96).tolist())


@pytest.mark.parametrize(("change_poor", "passed"), [(0.03, True), (-0.03, False)])
def test_residual_mixture_must_be_no_worse_than_heads_where_it_is_hard(tmp_path, change_poor, passed):
    published = (("published-ridge", 0.5),)
    files = write(
        tmp_path,
        evaluation("heads", 0.9, references=published),
        evaluation("residual-moe", residual(change_poor), references=published),
    )
    row = row_of(judge(read_reports(files)), "C4")
    gap, efficiency, poor, low_snr = row.reference.checks
    assert poor.passed is passed
    assert poor.value == pytest.approx(change_poor, abs=0.01)
    assert low_snr.passed is True
    assert row.absolute.verdict == ("pass" if passed else "fail")
    overall = json.loads(evaluation("residual-moe", residual(change_poor), references=published))["overall"][
        "r2"
    ]
    assert efficiency.value == pytest.approx(overall / 0.95)
    assert gap.passed == (gap.value >= 0.95)
    assert row.reference.verdict == ("pass" if passed and gap.passed and efficiency.passed else "fail")


def test_kept_predictions_give_differences_an_interval(tmp_path):
    published = (("published-ridge", 0.5),)
    contents = (
        evaluation("heads", 0.9, references=published),
        evaluation("residual-moe", 0.96, references=published),
    )
    files = write(tmp_path, *contents)
    result = judge(read_reports(files))
    assert row_of(result, "C4").absolute.checks[1].interval is None

    data = stars()
    names = ("log_g_true", "log_g", "M_H", "snr_norm")
    for path, r2 in zip(files, (0.9, 0.96), strict=True):
        values = (data["log_g"], predictions(np.sqrt(1 - r2)), data["m_h"], data["snr_norm"])
        layout = [Column(name, np.dtype("float64"), "", "") for name in names]
        with open_table(path / "predictions.h5", N, layout, {}) as table:
            table.write(0, dict(zip(names, values, strict=True)))
    poor = row_of(judge(read_reports(files)), "C4").absolute.checks[1]
    members = data["m_h"] < -1
    expected = metrics.bootstrap_difference(
        data["log_g"][members], predictions(0.2)[members], predictions(np.sqrt(0.1))[members]
    )
    assert poor.interval == pytest.approx([expected.low, expected.high], rel=1e-6)
    assert poor.value == pytest.approx(expected.value, rel=1e-6)

    # A table that is not of this report is not believed.
    (files[0] / "predictions.h5").write_bytes((files[1] / "predictions.h5").read_bytes())
    assert row_of(judge(read_reports(files)), "C4").absolute.checks[1].interval is None


def ruler(r2, training, noise_seed=None, **more):
    return evaluation(
        "global-ridge", 0.7, references=(("published-ridge", r2),), noise_seed=noise_seed,
        training=(("fingerprint", f"train-{training}"), ("seed", 0), ("n_spectra", 100_000)), **more,
    )  # fmt: skip


def test_the_ruler_is_stable_over_training_and_noise_seeds(tmp_path):
    trained = [ruler(0.496 + 0.001 * k, k) for k in range(5)]
    noisy = [ruler(0.496, 0, noise_seed=k) for k in range(1, 5)]
    result = judge(read_reports(write(tmp_path, *trained, *noisy)))
    row = row_of(result, "C0")
    assert verdicts(result)["C0"] == ("pass", "pass")
    spread = row.reference.checks[0]
    assert spread.value == pytest.approx(0.002, abs=5e-4)
    assert spread.note == "5 training and 5 noise seeds, 9 runs"
    assert row.ours.interval[0] < row.ours.value < row.ours.interval[1]
    # Other draws of noise enter the ruler only.
    assert any("count for C0 only" in note for note in result.sections[0].notes)

    wide = judge(read_reports(write(tmp_path, *trained, *noisy, ruler(0.54, 5))))
    assert verdicts(wide)["C0"][1] == "fail"


def test_too_few_seeds_or_a_repeated_file_do_not_make_a_ruler(tmp_path):
    trained = [ruler(0.5 + 0.0005 * k, k) for k in range(5)]
    few = judge(read_reports(write(tmp_path, *trained, ruler(0.5, 0, noise_seed=1))))
    assert verdicts(few)["C0"] == ("pass", "not run")
    assert row_of(few, "C0").reference.checks[0].reason == "needs 5 training and 5 noise seeds, found 5 and 2"

    same = read_reports(write(tmp_path, *[ruler(0.5, 0)] * 5))
    assert len(same) == 1
    small = judge(read_reports(write(tmp_path, ruler(0.5, 0, n=1000, reference_set=False))))
    assert verdicts(small)["C0"] == ("not run", "not run")


def test_the_weakest_evaluation_counts(tmp_path):
    contents = [evaluation("heads", r2, references=(("published-ridge", 0.5),)) for r2 in (0.94, 0.6)]
    result = judge(read_reports(write(tmp_path, *contents)))
    assert verdicts(result)["C3"] == ("fail", "fail")
    assert row_of(result, "C3").ours.note == "weakest of 2"
    assert any("of 2 evaluations of heads" in note for note in result.sections[0].notes)


def test_sets_and_noise_levels_are_kept_apart(tmp_path):
    files = write(
        tmp_path,
        evaluation("heads", 0.94, references=(("published-ridge", 0.5),)),
        evaluation("residual-moe", 0.945, references=(("published-ridge", 0.5),), fingerprint="a" * 64,
                   data_set="mine", reference_set=False),
        evaluation("heads", 0.6, references=(("published-ridge", 0.5),), noise_level=2.0),
    )  # fmt: skip
    result = judge(read_reports(files))
    assert len(result.sections) == 3
    assert verdicts(result, 0)["C3"] == ("pass", "pass")
    assert verdicts(result, 2)["C3"] == ("fail", "fail")
    # Heads of another set say nothing here, and a mark for reference sets needs one.
    assert verdicts(result, 1)["C4"] == ("not run", "not run")


def test_marks_for_reference_sets_need_a_reference_set(tmp_path):
    content = evaluation("heads", 0.94, references=(("published-ridge", 0.5),), reference_set=False)
    row = row_of(judge(read_reports(write(tmp_path, content))), "C3")
    assert row.absolute.verdict == "pass"
    assert row.reference.verdict == "not run"
    assert row.reference.checks[0].passed is True
    forged = json.loads(content)
    forged["data_set"]["reference_set"] = Z0 | {"fingerprint": "0" * 64}
    row = row_of(judge(read_reports(write(tmp_path, json.dumps(forged)))), "C3")
    assert row.reference.verdict == "not run"


def test_the_small_part_of_a_reference_set_passes_nothing(tmp_path):
    content = json.loads(evaluation("heads", 0.94, references=(("published-ridge", 0.5),)))
    part = "test_1k"
    content["data_set"]["reference_set"] = {
        "reference_set": "z0",
        "part": part,
        "fingerprint": FINGERPRINTS["z0", part],
    }
    row = row_of(judge(read_reports(write(tmp_path, json.dumps(content)))), "C3")
    assert row.reference.verdict == "not run"
    assert row.reference.reason == "needs test_10k of a reference set, this is z0 test_1k"


def test_a_model_fitted_on_its_test_set_is_refused(tmp_path):
    content = evaluation("heads", 0.99, training=(("fingerprint", "f" * 64),))
    with pytest.raises(InputError, match="fitted on stars of its test set"):
        read_reports(write(tmp_path, content))


def test_a_model_fitted_on_some_of_its_test_stars_is_refused(tmp_path):
    content = json.loads(evaluation("heads", 0.99))
    content["model"]["share_seen"] = 0.02
    with pytest.raises(InputError, match="fitted on stars of its test set"):
        read_reports(write(tmp_path, json.dumps(content)))


def test_tables_of_predictions_are_of_no_recipe(tmp_path):
    content = json.loads(evaluation("heads", 0.94))
    content["model"]["kind"] = "table"
    assert verdicts(judge(read_reports(write(tmp_path, json.dumps(content)))))["C3"] == ("not run", "not run")


@pytest.mark.parametrize("mark", [0.69, 0.7000001, 0.8])
def test_a_point_decides_not_its_interval(mark):
    quantity = Quantity("R²", lambda _: Measured(0.7, (0.6, 0.8)))
    assert Check(quantity, "≥", mark).run(NOTHING).passed is (mark <= 0.7)
    assert Check(quantity, "≤", mark).run(NOTHING).passed is (mark >= 0.7)


def test_what_was_not_run_never_passes_by_itself():
    def missing(_):
        raise NotRunError("nothing")

    passed = Check(Quantity("a", lambda _: Measured(1.0)), "≥", 0.5)
    failed = Check(Quantity("b", lambda _: Measured(0.0)), "≥", 0.5)
    absent = Check(Quantity("c", missing), "≥", 0.5)
    verdict = {
        ("all", (passed, passed)): "pass", ("all", (passed, absent)): "not run", ("all", (absent, failed)): "fail",
        ("any", (passed, absent)): "pass", ("any", (failed, absent)): "not run", ("any", (failed, failed)): "fail",
    }  # fmt: skip
    for (combine, checks), expected in verdict.items():
        assert Rule(checks, combine).run(NOTHING).verdict == expected


def broken(**changes):
    content = json.loads(evaluation("heads", 0.94))
    for key, value in changes.items():
        content[key] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [("no json", "found no JSON"), ("[1]", "found a list"), ('{"a": 1}', "is no evaluation"),
     (broken(schema_version=99), "found 99"),
     (broken(overall={}), "expected an entry overall.name, found none"),
     (broken(references=None), "entry references: expected an object, found None"),
     (broken(protocol=json.loads(broken())["protocol"] | {"seed": 1}), "not made by the frozen protocol")],
)  # fmt: skip
def test_what_is_no_evaluation_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_reports([path])
    assert str(path) in str(caught.value)


def test_missing_files_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.json: cannot be read"):
        read_reports([tmp_path / "nowhere.json"])
    with pytest.raises(InputError, match=r"holds a report\.json"):
        read_reports([tmp_path])


# --- command line and text -------------------------------------------------------------------------------


def test_command_line(tmp_path):
    write(tmp_path, evaluation("phys-moe", 0.63, references=PHYS))
    out = tmp_path / "milestones.json"
    run = CliRunner().invoke(cli, ["milestones", str(tmp_path), "-o", str(out)])
    # A failed milestone is a finding, not an error.
    assert run.exit_code == 0, run.output
    assert "fail" in run.output
    found = json.loads(out.read_text())
    assert found == as_entries(judge(read_reports([tmp_path])))
    again = CliRunner().invoke(cli, ["milestones", str(tmp_path), "--json"])
    assert json.loads(again.output) == found
    assert CliRunner().invoke(cli, ["milestones", str(tmp_path), "-o", str(out)]).exit_code == 8
    assert CliRunner().invoke(cli, ["milestones", str(out)]).exit_code == 3


def test_text_names_set_fingerprint_marks_and_commands(tmp_path):
    contents = evaluation("phys-moe", 0.795, references=PHYS), evaluation("heads", 0.94)
    text = format_text(judge(read_reports(write(tmp_path, *contents))))
    lines = [line for line in text.splitlines() if str(tmp_path) not in line]
    assert max(len(line) for line in lines) <= 100
    assert text.startswith(
        "Milestones on z0 test_10k: 10,000 stars, noise level 1\nfile fingerprint " + "f" * 64
    )
    for expected in (
        "0.4957",
        "ViT 0.698-0.711",
        "mark ≥ 0.95",
        "moefast fit train.h5 -o heads/ --recipe heads",
    ):
        assert expected in text


def test_a_report_has_a_section_of_the_milestones_it_bears_on_if_they_are_asked_for():
    report = read_entries(Report, json.loads(evaluation("phys-moe", 0.63, references=PHYS)), "report.json")
    text = report_text.format_text(report, judged=judge_alone(report))
    head, *rows = text.partition("\nMilestones ")[2].splitlines()[1:]
    assert head.split()[-4:] == ["their", "mark", "any", "set"]
    assert [row.split()[0] for row in rows] == ["C0", "C2"]
    assert rows[1].split()[-2:] == ["fail", "fail"]
    assert "Milestones" not in report_text.format_text(report)
    # Numbers that were not made by the frozen protocol are judged by nothing.
    assert judge_alone(replace(report, protocol=replace(report.protocol, n_resamples=10))) is None


def test_commands_are_commands_of_this_version(monkeypatch):
    """Every command parses: the options it names exist."""
    done = []
    for module, name in ((evaluation_module, "evaluate"), (report_folder, "write_report")):
        signature = inspect.signature(getattr(module, name))
        monkeypatch.setattr(
            module, name, lambda *a, _s=signature, **k: done.append(_s.bind(*a, **k).arguments)
        )
    for milestone in MILESTONES:
        for line in milestone.commands:
            line = line.format(set="z0")
            line = re.sub(r"^for s in .*; do (.*); done$", r"\1", line)
            line = re.sub(r"\$\(\(s\*100000\)\):\$\(\(s\*100000\+100000\)\)", "100000:200000", line).replace(
                "$s", "1"
            )
            if line.startswith("python -c "):
                exec(shlex.split(line)[2], {})
                continue
            program, name, *words = shlex.split(line)
            assert program == "moefast"
            command = cli.commands[name]
            # click keeps the help option of the first context a command meets: the group's, as on the command line.
            with click.Context(command, info_name=name, **cli.context_settings) as context:
                command.parse_args(context, words)
    assert [sorted(arguments) for arguments in done] == [
        ["model", "noise", "noise_seed", "paths"],
        ["evaluation", "folder"],
    ]
