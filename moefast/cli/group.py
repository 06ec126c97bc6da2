"""The command line: parse, call, print.

Design: no numerics here, and heavy imports only inside the command that needs them, so that `moefast --help` is quick.
People read standard output; `--json` gives machines the same facts. Progress and notes go to standard error.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import click

from moefast.cli.bench import bench
from moefast.cli.ceiling import ceiling
from moefast.cli.compare import compare
from moefast.cli.doctor import doctor
from moefast.cli.evaluate import evaluate
from moefast.cli.export import export
from moefast.cli.fit import fit
from moefast.cli.inspect import inspect
from moefast.cli.merge import merge
from moefast.cli.messages import fail
from moefast.cli.milestones import milestones
from moefast.cli.predict import predict
from moefast.cli.roadmap import roadmap
from moefast.cli.scenarios import scenarios
from moefast.cli.signals import Terminated, not_lost, terminate
from moefast.cli.simulate import simulate
from moefast.core.atomic import remove_unfinished
from moefast.core.errors import MoefastError, OutputError
from moefast.core.version import __version__
from moefast.core.watched import interrupt_behind

__all__ = ["cli", "main"]

EXIT_CODES = """\b
Exit codes:
  0  done
  1  something unforeseen; please report it
  2  the command line was not understood
  3  a file is missing, damaged or lacks a dataset (with several files: the others were still done)
  4  a file is on another wave grid than the model
  5  labels are needed and missing, or are numbers that no star has
  6  the model folder is incomplete, altered or of another version
  7  the backend asked for cannot be used here
  8  the result cannot be written
  9  an engine of a benchmark gives another answer, or the benchmark cannot be carried out
  130  interrupted; nothing half-written is left under the name of the result
  143  terminated (SIGTERM); the same holds
"""


class _Group(click.Group):
    """Lists the commands in the order of use, and turns our errors into one message and their exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, in the order in which they were added."""
        return list(self.commands)

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run; an interrupt that comes before a command begins ends as one that comes in it."""
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **extra)
        try:
            code = run(*args, standalone_mode=False, **extra)
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except click.Abort:
            fail("\nmoefast: interrupted; nothing was written")
            code = 130
        except Terminated:
            fail("\nmoefast: terminated; nothing was written")
            code = 143
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except MoefastError as error:
            fail(f"moefast: error: {error}")
            ctx.exit(error.exit_code)
        except (KeyboardInterrupt, Terminated, SystemError) as error:
            interrupt = interrupt_behind(error)
            if interrupt is None:
                raise
            terminated = isinstance(interrupt, Terminated)
            words = "terminated" if terminated else "interrupted"
            fail(f"\nmoefast: {words}; nothing was written")
            ctx.exit(143 if terminated else 130)
        except ValueError as error:
            if "null byte" not in str(error):
                raise
            fail("moefast: error: no name of a file holds a NUL byte; choose another one")
            ctx.exit(2)
        except (MemoryError, OSError) as error:
            # What no check of a file foresees: a full disk, a lost network share, no memory.
            number = getattr(error, "errno", None)
            if number == errno.EPIPE:
                raise
            fail(f"moefast: error: {str(error) or 'out of memory'}")
            ctx.exit(OutputError.exit_code if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) else 1)


@click.group(cls=_Group, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="moefast")
def cli() -> None:
    """Surface gravities (log g) for faint stellar spectra, from the survey's own files.

    \b
    Predict log g with the model that comes with moefast:
        moefast inspect spectra.h5
        moefast predict spectra.h5 -o log_g.h5
    Fit and measure your own:
        moefast simulate train.h5 -n 20000 --seed 1 --clean
        moefast simulate test.h5 -n 5000 --seed 2
        moefast fit train.h5 -o model/
        moefast evaluate test.h5 -m model/ -o report/

    FILE may be a file, a folder of shards, or a quoted pattern; several are read in the order given.
    """


# In the order in which they are used: first what users of a model need, then what those need who fit their own.
COMMANDS = (
    inspect, predict, merge, doctor,
    simulate, fit, evaluate, scenarios, compare, export,
    ceiling, milestones, roadmap, bench,
)  # fmt: skip

for _command in COMMANDS:
    cli.add_command(_command)


def main() -> None:
    """Entry point of the `moefast` command."""
    # Numba's threads must not wait actively while BLAS works, on the same cores; read when Numba starts them.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        # Terminals of other alphabets show what they can; no result is lost over a letter.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, terminate)
    sys.unraisablehook = not_lost
    if hasattr(signal, "SIGPIPE"):
        # `moefast inspect … | head` must end quietly.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        cli()
    finally:
        # An interrupt may come when a file has been begun and nobody is there yet to remove it.
        remove_unfinished()
