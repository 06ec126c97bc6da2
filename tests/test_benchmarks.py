"""The benchmark runs, and every engine in it gives the same log g (it stops otherwise)."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "run.py"


def test_the_benchmark_reports_throughput_and_r2(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "-n", "400", "--samples", "1", "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["rows"] == 400
    assert result["environment"]["cores"] >= 1
    rows = {entry["engine"]: entry for entry in result["results"]}
    assert len(rows) == 5
    assert all(entry["spectra_per_second"] > 0 and len(entry["samples"]) == 1 for entry in rows.values())
    scores = [entry["r2"] for entry in rows.values() if entry["r2"] is not None]
    assert len(scores) == 3
    assert max(scores) - min(scores) < 1e-5
    assert scores[0] > 0.6
