"""What commands say beside their result: progress with one time to go, details, a log, silence."""

from __future__ import annotations

import itertools
import logging
import os
import pty
import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from moefast.cli import cli, messages
from moefast.core import progress as module
from moefast.core.progress import LOGGER, SCREEN, ProgressLine, Whole


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    # Nothing happens between reports but what a test says.
    monkeypatch.setattr(module.threading, "Thread", lambda **_: NoThread())
    return made


class NoThread:
    def start(self):
        pass

    def join(self, timeout=None):
        pass


@pytest.fixture
def lines(monkeypatch):
    said = []
    monkeypatch.setattr(SCREEN, "line", said.append)
    return said


def test_a_share_of_all_stages_never_falls():
    whole = Whole({"a": 1, "b": 2, "never": 5, "c": 2})
    shares = []
    for report in (
        ("a", 1, 2),
        ("a", 2, 2),
        ("unknown", 1, 9),
        ("b", 0, 0),
        ("b", 4, 4),
        ("a", 0, 2),
        ("c", 1, 2),
    ):
        whole.report(*report)
        shares.append(whole.share)
    assert shares == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.3, 0.3, 0.9])


def test_stages_have_one_time_to_go(clock, lines):
    with ProgressLine(shares={"first": 10.0, "second": 30.0}) as progress:
        progress.stage("first", 0, 5)
        clock.now += 10
        progress.stage("first", 5, 5)
        clock.now += 3
        progress.stage("second", 1, 10)
        clock.now += 12
        progress.stage("second", 5, 10)
    assert lines == [
        "25 %, 30 s left; first: 5 of 5 spectra, 0/s",
        "62 %, 15 s left; second: 5 of 10 spectra, 0/s",
    ]


def test_one_stage_has_a_rate_and_a_time_to_go(clock, lines):
    with ProgressLine() as progress:
        report = progress.rows("predict")
        report(0, 1000)
        clock.now += 10
        report(400, 1000)
        clock.now += 15
        report(1000, 1000)
    assert lines == [
        "predict: 400 of 1,000 spectra (40 %), 40/s, 15 s left",
        "predict: 1,000 of 1,000 spectra (100 %), 40/s",
    ]


def test_lines_are_often_at_first_and_seldom_later(clock, lines):
    with ProgressLine() as progress:
        for second in range(1200):
            progress.stage("network", second, 2000)
            clock.now += 1
    times = [int(re.search(r"([\d,]+) of", line)[1].replace(",", "")) for line in lines]
    gaps = [later - before for before, later in itertools.pairwise(times)]
    assert times[0] <= 5
    assert max(gap for time_, gap in zip(times, gaps, strict=False) if time_ < 25) <= 5
    assert max(gaps) <= 60
    assert len(lines) < 50


def test_a_stage_without_reports_tells_how_long_it_takes(clock, lines):
    with ProgressLine() as progress:
        progress.doing("building")
        for _ in range(3):
            clock.now += 5
            progress._show(clock.now)
    assert lines == ["building (5 s)", "building (10 s)", "building (15 s)"]


def test_on_a_terminal_no_five_seconds_look_alike(clock, monkeypatch):
    drawn = []
    monkeypatch.setattr(type(SCREEN), "changes", True)
    monkeypatch.setattr(SCREEN, "draw", drawn.append)
    with ProgressLine() as progress:
        progress.stage("ceiling", 0, 60)
        for _ in range(100):
            clock.now += 4
            progress._show(clock.now)
    assert drawn[30] == "ceiling: 0 of 60 spectra (0 %) (2 min 0 s)"
    assert all(one != other for one, other in itertools.pairwise(drawn))


def test_the_thread_speaks_while_nothing_is_reported(lines, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.01)
    monkeypatch.setattr(module, "PAUSES", ((float("inf"), 0.02),))
    monkeypatch.setattr(module, "PATIENCE", -1.0)
    spoken = module.threading.Event()
    monkeypatch.setattr(SCREEN, "line", lambda text: (lines.append(text), spoken.set()))
    with ProgressLine() as progress:
        progress.doing("building")
        assert spoken.wait(300)
    n = len(lines)
    assert lines[0].startswith("building (")
    assert progress._ticker is None
    spoken.clear()
    assert not spoken.wait(0.1)
    assert len(lines) == n


@pytest.fixture
def command():
    """A command that says all there is to say."""

    @click.command("speak")
    @messages_talk()
    def speak(quiet):
        with ProgressLine(quiet) as progress:
            progress.stage("steps", 1, 1)
            logging.getLogger("moefast.somewhere").info("a decision")
            progress.note("note: something odd")
        messages.tell_result("table.h5: 3 spectra", quiet=quiet)

    return speak


def messages_talk():
    from moefast.cli.options import talk

    return talk


def test_notes_are_said_and_details_are_not(command):
    result = CliRunner().invoke(command, [])
    assert result.stdout == "table.h5: 3 spectra\n"
    assert result.stderr == "steps: 1 of 1 spectrum (100 %)\nnote: something odd\n"


def test_details_come_with_the_time_and_how_long_stages_took(command):
    said = CliRunner().invoke(command, ["-v"]).stderr
    assert re.search(r"^\[ +\d+\.\d\d s\] a decision$", said, re.MULTILINE)
    assert re.search(r"^\[ +\d+\.\d\d s\] steps took \d+\.\d\d s$", said, re.MULTILINE)
    assert "\nnote: something odd\n" in said


def test_quiet_is_silent_and_the_log_has_all(command, tmp_path):
    result = CliRunner().invoke(command, ["-q", "--log", str(tmp_path / "run.log")])
    assert (result.exit_code, result.output) == (0, "")
    kept = (tmp_path / "run.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d ", line) for line in kept)
    assert [line.partition(" ")[2] for line in kept][0:2] == ["a decision", "note: something odd"]
    assert kept[-1].endswith("table.h5: 3 spectra")
    assert LOGGER.handlers == []


def test_quiet_and_verbose_exclude_each_other(command):
    result = CliRunner().invoke(command, ["-q", "-v"])
    assert result.exit_code == 2
    assert "give one of them" in result.stderr


def test_a_log_that_cannot_be_written_is_told_before_the_work(command, tmp_path):
    result = CliRunner().invoke(command, ["--log", str(tmp_path / "none" / "run.log")])
    assert result.exit_code == 2
    assert "cannot be written (No such file or directory)" in " ".join(result.stderr.split())


def test_errors_are_said_once_however_quiet_and_logged(tmp_path):
    log = tmp_path / "run.log"
    call = ["predict", str(tmp_path / "none.h5"), "-o", str(tmp_path / "t.h5"), "--log", str(log)]
    for option in ("-q", "-v"):
        result = CliRunner().invoke(cli, [*call, option])
        assert result.exit_code == 3
        assert result.stderr.count("moefast: error: ") == 1
    assert sum("moefast: error: " in line for line in log.read_text().splitlines()) == 2


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_on_a_terminal_one_line_changes_and_nothing_has_colours():
    code = (
        "import time\n"
        "from moefast.core.progress import ProgressLine\n"
        "with ProgressLine(shares={'reading': 1, 'fitting': 3}) as progress:\n"
        "    for stage in ('reading', 'fitting'):\n"
        "        for done in range(4):\n"
        "            progress.stage(stage, done, 3)\n"
        "            time.sleep(0.25)\n"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "60"}
    with subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 1000):
                shown += piece
        except OSError:
            pass
        assert process.wait() == 0
    os.close(ours)
    assert b"\x1b" not in shown
    drawn = [line.strip() for line in shown.decode().split("\r") if line.strip()]
    assert len(drawn) >= 4
    assert shown.count(b"\n") == 1
    assert max(map(len, drawn)) < 60
    shares = [int(found[1]) for line in drawn if (found := re.match(r"(\d+) %", line))]
    assert shares == sorted(shares)
    assert drawn[-1].startswith("100 %; fitting: 3 of 3")


def test_a_failure_is_told_once_before_a_command_talks():
    """Without a handler, Python prints what is logged once more: an interrupt was told twice when it came early."""
    program = "from moefast.cli.messages import fail; fail('moefast: interrupted')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stderr == "moefast: interrupted\n"
