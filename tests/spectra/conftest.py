"""Small spectrum files in the layouts that are found, made with h5py so that reading is checked from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.fixture
def producer_files():
    files = [SHARED / "pfsspec_contiguous.h5", SHARED / "pfsspec_streamed.h5"]
    if not all(file.exists() for file in files):
        pytest.skip(f"the files of the survey's simulator are not in {SHARED}")
    return files


@pytest.fixture
def make_file(tmp_path):
    """Write a file and return its path and the arrays that reading should give."""

    def make(
        name: str = "dataset.h5",
        *,
        n: int = 11,
        p: int = 32,
        dtype: Any = "f8",
        arrays: tuple[str, ...] = ("flux", "error"),
        wave: np.ndarray | None = None,
        chunks: Any = None,
        labels: tuple[str, ...] | None = ("T_eff", "log_g", "M_H"),
        seed: int = 0,
        **options: Any,
    ) -> tuple[Path, dict[str, np.ndarray]]:
        rng = np.random.default_rng([seed, n, p])
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values: dict[str, np.ndarray] = {}
        with h5py.File(path, "w") as file:
            for array in arrays:
                if array == "mask":
                    data = (rng.random((n, p)) < 0.1).astype("i8") * 4
                else:
                    data = (1 + rng.random((n, p))).astype(dtype)
                file.create_dataset(f"dataset/arrays/{array}/value", data=data, chunks=chunks, **options)
                values[array] = data != 0 if array == "mask" else data.astype("f4")
            file["spectrumdataset/wave"] = np.linspace(7100, 8850, p) if wave is None else wave
            if labels:
                table = np.zeros(n, [(label, "f8") for label in labels])
                for k, label in enumerate(labels):
                    table[label] = values[label] = (
                        5000 * rng.random(n) + 1000 if label == "T_eff" else rng.random(n) + k % 2
                    )
                file["dataset/params"] = table
        return path, values

    return make
