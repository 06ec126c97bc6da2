"""`python -m moefast.kernels.cuda`: compile every CUDA kernel and print what it takes. No GPU is needed."""

from __future__ import annotations

import sys

from moefast.kernels.cuda.assembly import TARGETS, assemble, format_table
from moefast.kernels.cuda.registry import load


def main() -> int:
    """Print the table; 1 if a kernel spills registers."""
    rows = [assemble(kernel, target) for kernel in load().values() for target in TARGETS]
    print(format_table(rows))
    return int(any(row.spill_stores or row.spill_loads for row in rows))


if __name__ == "__main__":
    sys.exit(main())
