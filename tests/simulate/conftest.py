"""An emulator whose spectra reach beyond its pixels."""

from importlib.resources import files

import numpy as np
import pytest

from moefast.simulate import Emulator

MARGIN = 32


@pytest.fixture(scope="session")
def shipped_arrays():
    with (files("moefast.simulate") / "data" / "emulator.npz").open("rb") as stream, np.load(stream) as data:
        return {key: data[key] for key in data.files}


@pytest.fixture(scope="session")
def wide(shipped_arrays):
    """The shipped emulator on its inner 4032 pixels; what lies beyond is known from the shipped spectra."""
    emulator = Emulator.load()
    inner = slice(emulator.margin, emulator.margin + 4096)
    arrays = shipped_arrays | {
        "margin": np.array(MARGIN),
        "wave_edges": emulator.wave_edges,
        "mean": shipped_arrays["mean"][inner],
        "basis": shipped_arrays["basis"][:, inner],
    }
    return Emulator.from_arrays(arrays)
