"""How long commands are silent: the longest time in which nothing new is seen on a terminal, or in a pipe.

python -m moefast.benchmarks.silence "predict night.fits -o table.h5" "evaluate test.h5 -o report/"
"""

from __future__ import annotations

import math
import os
import pty
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import click

__all__ = ["Heard", "Silence", "listen", "longest", "main"]


@dataclass(frozen=True)
class Heard:
    """Something that was said, and when: seconds since the command was started, and seconds of processor time."""

    at: float
    cpu: float
    words: str


@dataclass(frozen=True)
class Silence:
    """The longest time in which nothing new was said: its length, when it began, and what was said last before it."""

    seconds: float
    cpu: float
    begin: float
    after: str


def longest(heard: Sequence[Heard]) -> Silence:
    """The longest silence between the start and the last thing said, its end; the same words again are no news."""
    found, last = Silence(0.0, 0.0, 0.0, ""), Heard(0.0, 0.0, "")
    for one in heard:
        if one.words == last.words:
            continue
        if one.at - last.at > found.seconds:
            found = Silence(one.at - last.at, one.cpu - last.cpu, last.at, last.words)
        last = one
    return found


def _processor_time(process: int) -> float:
    """Seconds of processor time that a process has had, all its threads together; NaN where the system does not say."""
    try:
        with open(f"/proc/{process}/stat") as file:
            user, system = file.read().rpartition(")")[2].split()[11:13]
    except OSError:
        return math.nan
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def listen(command: Sequence[str], *, terminal: bool = True) -> tuple[list[Heard], int]:
    """What a command says on standard output and error, up to its end, and its exit code."""
    mine, its = pty.openpty() if terminal else os.pipe()
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=its, stderr=its, stdin=subprocess.DEVNULL)
    os.close(its)
    heard = []

    def hear(words: str) -> None:
        heard.append(Heard(time.monotonic() - begin, _processor_time(process.pid), words))

    while True:
        select.select([mine], [], [])
        try:
            said = os.read(mine, 1 << 16)
        except OSError:
            # The other end of a terminal is closed.
            said = b""
        if not said:
            break
        words = said.decode(errors="replace").strip()
        if words:
            hear(words.replace("\r", "\n").splitlines()[-1].strip())
    os.close(mine)
    # It has ended, or will in a moment, and tells its time as long as nobody has waited for it.
    hear("the end")
    return heard, process.wait()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("commands", nargs=-1, required=True, metavar="COMMAND…")
@click.option("--pipe", is_flag=True, help="Listen through a pipe instead of a terminal.")
def main(commands: tuple[str, ...], pipe: bool) -> None:
    """Run each COMMAND, what follows moefast on the command line, and print its longest silence."""
    for line in commands:
        heard, code = listen([sys.executable, "-m", "moefast", *shlex.split(line)], terminal=not pipe)
        silence = longest(heard)
        click.echo(
            f"silent for {silence.seconds:6.1f} s of {heard[-1].at:6.1f} s; processor time {silence.cpu:6.1f} s of "
            f"{heard[-1].cpu:6.1f} s: moefast {line} (exit code {code})\n"
            f"         from {silence.begin:.1f} s on, after {silence.after!r}"
        )


if __name__ == "__main__":
    main()
