"""What the compiler made of every kernel when that was last written down, and how far it is from that now.

Design: a kernel that grows, by a change of its own or of a device function that it calls, is slower on every device,
and there need be none to see it. The numbers lie in `compiled_kernels.json` beside the kernels. The same compiler gives
the same numbers to the last one; the room that is left is for other releases of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moefast.kernels.cuda.assembly import KINDS, Resources

__all__ = ["DRIFT", "PATH", "differences", "read", "renewed"]

PATH = Path(__file__).parent / "compiled_kernels.json"
DRIFT = 0.1
"""Share by which numbers may differ from those written down."""
FEW = 2
"""Instructions of one kind that may come on top of that."""
MORE_REGISTERS = 8
"""A thread's registers are given out in eights."""
COMPILER = ("numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink")
RENEW = "python -m moefast.kernels.cuda --renew"
KEPT = ("registers", "shared", "instructions", *KINDS)


def read() -> dict[str, Any]:
    """The table: `compiler`, its releases, and `kernels`, numbers by target and name."""
    table: dict[str, Any] = json.loads(PATH.read_text())
    return table


def renewed(table: dict[str, Any], rows: Iterable[Resources]) -> dict[str, Any]:
    """The table with the numbers of `rows`, for all targets that they speak of, in place of those that stood there."""
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for row in rows:
        kernels.setdefault(_target(row), {})[row.kernel] = {name: getattr(row, name) for name in KEPT}
    compiler = {name: version(name) for name in COMPILER}
    return {"compiler": compiler, "kernels": {**table["kernels"], **kernels}}


def differences(table: dict[str, Any], rows: Iterable[Resources]) -> list[str]:
    """A sentence for every number that is further from the table than other releases of the compiler explain.

    A kernel may not spill. Instructions may be a tenth more, or fewer: fewer must be written down, too, or the next
    ones too many would go unseen. Of each kind a tenth and two more are allowed, of registers eight, and of shared
    memory none.
    """
    found = [sentence for row in rows for sentence in _of_kernel(table, row)]
    compiler = {name: version(name) for name in COMPILER}
    if found:
        here, before = (
            ", ".join(f"{name} {number}" for name, number in numbers.items())
            for numbers in (compiler, table["compiler"])
        )
        if here != before:
            found.append(f"They were compiled by {here}; the table by {before}.")
        found.append(f"If that is meant, write it down: {RENEW}")
    return found


def _of_kernel(table: dict[str, Any], row: Resources) -> list[str]:
    place, found = f"{row.kernel} on {_target(row)}", []
    if row.spill_stores or row.spill_loads:
        found.append(
            f"{place} spills {row.spill_stores} bytes, and reads back {row.spill_loads}; none are allowed."
        )
    before = table["kernels"].get(_target(row), {}).get(row.kernel)
    if before is None:
        return [*found, f"{place} is not in {PATH.name}."]
    most = {kind: (1 + DRIFT) * before[kind] + FEW for kind in KINDS}
    most["instructions"] = (1 + DRIFT) * before["instructions"]
    most["registers"], most["shared"] = before["registers"] + MORE_REGISTERS, before["shared"]
    least = {"instructions": (1 - DRIFT) * before["instructions"]}
    for name in KEPT:
        number, low, high = getattr(row, name), least.get(name, 0), most[name]
        if not low <= number <= high:
            change = f" ({100 * (number / before[name] - 1):+.0f} %)" if before[name] else ""
            found.append(
                f"{place} has {number} {_WORDS.get(name, name)}, {before[name]} in {PATH.name}{change}; "
                f"{f'{low:.0f} to ' if low else 'at most '}{high:.0f} are allowed."
            )
    return found


def _target(row: Resources) -> str:
    return f"sm_{row.target[0]}{row.target[1]}"


_WORDS = {
    "shared": "bytes of shared memory",
    "loads": "loads from device memory",
    "stores": "stores to device memory",
    "single": "single-precision operations",
    "double": "double-precision operations",
    "shared_accesses": "accesses to shared memory",
}
