"""How long commands are silent: the benchmark that listens to them."""

from __future__ import annotations

import sys

import pytest
from click.testing import CliRunner

from moefast.benchmarks import silence
from moefast.benchmarks.silence import Heard, Silence, listen, longest


def test_the_longest_silence_lies_between_two_different_things_said():
    heard = [
        Heard(1.0, 0.5, "loading"), Heard(3.0, 1.0, "loading"), Heard(4.5, 2.0, "done"), Heard(5.0, 2.5, "the end"),
    ]  # fmt: skip
    assert longest(heard) == Silence(3.5, 1.5, 1.0, "loading")
    assert longest([Heard(2.0, 0.1, "the end")]) == Silence(2.0, 0.1, 0.0, "")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_command_is_heard_where_it_believes_to_be(terminal):
    code = "import sys; print(sys.stderr.isatty(), file=sys.stderr); input_ = sys.stdin.read(); sys.exit(3)"
    heard, exit_code = listen([sys.executable, "-c", code], terminal=terminal)
    assert [one.words for one in heard] == [str(terminal), "the end"]
    assert exit_code == 3
    assert 0 < heard[0].at <= heard[1].at
    assert 0 <= heard[0].cpu <= heard[1].cpu


def test_each_command_is_reported():
    said = CliRunner().invoke(silence.main, ["export --help", "nonsense"]).output
    assert ": moefast export --help (exit code 0)" in said
    assert ": moefast nonsense (exit code 2)" in said
