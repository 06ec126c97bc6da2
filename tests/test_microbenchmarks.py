"""The history of microbenchmarks: no case has drifted, and one that had would be seen."""

import json

import microbenchmarks as micro
import pytest

MACHINE = "a processor, 2 cores"


def history(*ratios):
    return [{"date": "2026-11-30", "machine": MACHINE, "ratios": {"fast": 0.2, "slow": r}} for r in ratios]


def test_no_case_has_drifted_from_what_is_written_down():
    assert micro.recent(micro.read()), f"fewer than {micro.RECENT} runs in {micro.HISTORY}"
    assert micro.drifts(micro.read(), micro.written()) == []


def test_every_machine_has_ratios_of_the_same_cases():
    cases = {frozenset(ratios) for ratios in micro.written().values()}
    assert len(cases) == 1
    assert all(ratio > 0 for line in micro.read() for ratio in line["ratios"].values())


@pytest.mark.parametrize(("now", "drifted"), [(1.2, False), (1.3, True), (0.85, False), (0.75, True)])
def test_a_median_that_drifted_is_told_either_way(now, drifted):
    # A few runs of before, and one that was disturbed, change nothing.
    runs = history(*[1.0] * 4, *[now] * 9, 5.0)
    found = micro.drifts(runs, {MACHINE: {"fast": 0.2, "slow": 1.0}})
    assert len(found) == drifted
    if drifted:
        assert found[0].startswith(
            f"slow: the median ratio of the last 10 runs is {now}, 1.0 is written down"
        )
        assert "renew slow" in found[0]


def test_fewer_runs_than_ten_say_nothing():
    assert micro.drifts(history(*[3.0] * 9), {MACHINE: {"fast": 0.2, "slow": 1.0}}) == []


def test_only_cases_that_are_named_are_renewed():
    runs, before = history(*[3.0] * 10), {MACHINE: {"fast": 0.1, "slow": 1.0}, "other": {"fast": 7.0}}
    assert micro.renewed(runs, before, ["slow"]) == {
        MACHINE: {"fast": 0.1, "slow": 3.0},
        "other": {"fast": 7.0},
    }
    assert micro.renewed(runs, before, [])[MACHINE] == {"fast": 0.2, "slow": 3.0}
    assert micro.drifts(runs, micro.renewed(runs, before, [])) == []


def test_bounds_are_those_of_the_machine_or_wide_ones(monkeypatch):
    monkeypatch.setattr(micro, "written", lambda: {MACHINE: {"fast": 0.1}, "other": {"fast": 0.3}})
    monkeypatch.setattr(micro, "machine", lambda: MACHINE)
    assert micro.allowed("fast") == pytest.approx(0.1 * micro.ALLOWED)
    monkeypatch.setattr(micro, "machine", lambda: "unknown")
    assert micro.allowed("fast") == pytest.approx(0.3 * micro.ALLOWED_ELSEWHERE)
    assert micro.allowed("new") == float("inf")


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([1.7, 9.0], [1.7]),
        ([2.5, 1.7, 9.0], [2.5, 1.7]),
        ([2.5, 2.4, 1.7], [2.5, 2.4, 1.7]),
        ([2.5, 2.4, 2.3, 1.0], [2.5, 2.4, 2.3]),
    ],
)
def test_what_is_beyond_its_bound_is_measured_again(ratios, expected):
    assert micro.measured(iter(ratios).__next__, 1.8) == expected


def test_a_result_becomes_a_line_and_a_drift_ends_the_command(monkeypatch, tmp_path):
    result = {
        "datetime": "2026-11-30T02:00:00+00:00",
        "benchmarks": [{"extra_info": {"case": "slow", "ratio": 1.23456}}, {"extra_info": {"ratio": 2.0}}],
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    for name, text in (("HISTORY", ""), ("RATIOS", "{}")):
        monkeypatch.setattr(micro, name, tmp_path / name)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(micro, "machine", lambda: MACHINE)
    for _ in range(9):
        micro.main("append", str(tmp_path / "result.json"))
    with pytest.raises(SystemExit, match=r"slow: .* last 10 runs is 1\.23, None is written"):
        micro.main("append", str(tmp_path / "result.json"))
    assert micro.read() == [{"date": "2026-11-30", "machine": MACHINE, "ratios": {"slow": 1.23}}] * 10
    micro.main("renew")
    micro.main("check")
    assert micro.written() == {MACHINE: {"slow": 1.23}}
    with pytest.raises(SystemExit, match="append RESULT"):
        micro.main("?")
