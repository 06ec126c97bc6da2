"""Files that the survey's simulator wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.fixture
def producer_files():
    files = [SHARED / "pfsspec_contiguous.h5", SHARED / "pfsspec_streamed.h5"]
    if not all(file.exists() for file in files):
        pytest.skip(f"the files of the survey's simulator are not in {SHARED}")
    return files
