"""The command `moefast`, also as `python -m moefast`: an interrupt while its code is loaded ends as one at work."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Load the command line and run it."""
    try:
        from moefast.cli import main as run
    except KeyboardInterrupt:
        print("\nmoefast: interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
