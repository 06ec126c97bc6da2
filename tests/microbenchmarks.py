"""How fast kernels were against their baselines, run by run, and what may not be exceeded.

    python tests/microbenchmarks.py append result.json   # adds what `bench_kernels.py` measured to `history.jsonl`
    python tests/microbenchmarks.py check                # exit code 1 if a case has drifted
    python tests/microbenchmarks.py renew CASE…          # writes the ratio of a case down anew that was changed

Design: a bound on one run must leave room for noise, and a kernel that becomes a little slower every week stays below
it. Therefore every line of `history.jsonl` holds the ratios of one run (date, machine, ratio of each case), and the
median of the last `RECENT` runs of a machine is compared with `ratios.json`, where the bounds come from. What became
faster has drifted, too: its bound would let pass that it becomes slow again. Ratios of machines of another kind differ,
so that they have numbers of their own; where there are none yet, a bound far above those of other machines holds, which
sees what has gone wrong altogether.
"""

import json
import math
import statistics
import sys
from pathlib import Path

import numpy  # noqa: F401  (loads its BLAS)
from threadpoolctl import threadpool_info

from moefast.backend import cpu_count, cpu_name

HISTORY, RATIOS = (Path(__file__).parent / "micro" / name for name in ("history.jsonl", "ratios.json"))
ALLOWED = 1.8
"""How many times the ratio that is written down one run may have.

In the first ten runs, on two cores that 11 to 24 processes wanted, no case had more than 1.2 times its median.
"""
ALLOWED_ELSEWHERE = 6.0
"""The same beside the largest ratio of other machines, where this kind of machine has none written down."""
TRIES = 3
"""How often a case is measured at most until its ratio is allowed.

One process that disturbs another for a second changes one measurement; a kernel that has become slow, all of them.
"""
RECENT = 10
DRIFT = 1.25
"""Factor by which the median of recent runs may differ from the ratio that is written down, either way."""


def machine():
    """The kind of machine: processor, cores, and the processor that BLAS has its code for: one name has several."""
    found = {library["architecture"] for library in threadpool_info() if library.get("architecture")}
    return f"{cpu_name()}, {cpu_count()} cores, BLAS for {' and '.join(sorted(found)) or 'any processor'}"


def read():
    """All lines of the history."""
    return [json.loads(line) for line in HISTORY.read_text().splitlines()]


def written():
    """Machine -> case -> ratio."""
    return json.loads(RATIOS.read_text())


def allowed(case):
    """The largest ratio that one run of a case may have on this machine; inf where none is written down."""
    of_machines = written()
    usual = of_machines.get(machine(), {}).get(case)
    if usual is not None:
        return ALLOWED * usual
    others = [ratios[case] for ratios in of_machines.values() if case in ratios]
    return ALLOWED_ELSEWHERE * max(others, default=math.inf)


def measured(measure, bound):
    """Ratios that `measure` gives, until one is within the bound, `TRIES` at most."""
    ratios = [measure()]
    while ratios[-1] > bound and len(ratios) < TRIES:
        ratios.append(measure())
    return ratios


def line_of(result):
    """The line of the history that tells a result of `pytest --benchmark-json`.

    It holds the first ratio of each case. The smallest, or the last, of several would be below the usual one wherever a
    case was measured again, and a drift towards slower would be seen late.
    """
    told = [entry["extra_info"] for entry in result["benchmarks"] if "case" in entry["extra_info"]]
    return {
        "date": result["datetime"][:10],
        "machine": machine(),
        "ratios": {info["case"]: float(f"{info['ratio']:.3g}") for info in told},
    }


def recent(history):
    """Machine -> case -> median of the last `RECENT` ratios, for cases that have as many."""
    ratios = {}
    for line in history:
        for case, ratio in line["ratios"].items():
            ratios.setdefault(line["machine"], {}).setdefault(case, []).append(ratio)
    return {
        name: {case: statistics.median(r[-RECENT:]) for case, r in cases.items() if len(r) >= RECENT}
        for name, cases in ratios.items()
    }


def drifts(history, of_machines):
    """A sentence for every case whose recent ratios are not what is written down."""
    found = []
    for name, cases in recent(history).items():
        for case, ratio in cases.items():
            usual = of_machines.get(name, {}).get(case)
            if usual is None or not usual / DRIFT <= ratio <= usual * DRIFT:
                found.append(
                    f"{case}: the median ratio of the last {RECENT} runs is {ratio:.3g}, {usual} is written down "
                    f"({name}); find out why, or, if that is meant: python tests/microbenchmarks.py renew {case}"
                )
    return found


def renewed(history, of_machines, cases):
    """The ratios of `cases` as they were in the last runs, of all cases if none are named."""
    new = {name: dict(ratios) for name, ratios in of_machines.items()}
    for name, ratios in recent(history).items():
        chosen = {case: ratio for case, ratio in ratios.items() if not cases or case in cases}
        new.setdefault(name, {}).update({case: float(f"{ratio:.3g}") for case, ratio in chosen.items()})
    return new


def main(command, *arguments):
    """See the top of this file."""
    if command == "append":
        with HISTORY.open("a") as file:
            for path in arguments:
                print(json.dumps(line_of(json.loads(Path(path).read_text()))), file=file)
    elif command == "renew":
        RATIOS.write_text(json.dumps(renewed(read(), written(), arguments), indent=1) + "\n")
    elif command != "check":
        raise SystemExit("append RESULT.json…, check, or renew CASE…")
    if found := drifts(read(), written()):
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main(*(sys.argv[1:] or [""]))
