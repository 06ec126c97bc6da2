"""Simulated stars in bins of four pixels: the real labels, lines and noise at a quarter of the cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources

import h5py
import numpy as np

from moefast.simulate import Emulator, simulate_rows

BINNED = 4


@dataclass(frozen=True)
class Stars:
    """Flux, error and noisy flux (n, 1024) with labels and identifiers; `mask` where a test sets one."""

    wave: np.ndarray
    flux: np.ndarray
    error: np.ndarray
    noisy: np.ndarray
    params: dict
    mask: np.ndarray | None = None

    def __len__(self):
        return len(self.flux)

    def take(self, rows):
        """Some of the rows, as copies that a test may spoil."""
        mask = None if self.mask is None else self.mask[rows].copy()
        arrays = {name: getattr(self, name)[rows].copy() for name in ("flux", "error", "noisy")}
        params = {name: values[rows].copy() for name, values in self.params.items()}
        return replace(self, **arrays, params=params, mask=mask)

    def observed(self):
        """Noise once, as `flux`."""
        return replace(self, flux=self.noisy)

    def write(self, path, *, arrays=("flux", "error"), dtype="f4", params=None, **storage):
        """One spectrum file, written with h5py alone. `params` are the names of the columns; all if None."""
        with h5py.File(path, "w") as file:
            for name in arrays:
                kind = "u1" if name == "mask" else dtype
                values = getattr(self, name).astype(kind)
                file.create_dataset(f"dataset/arrays/{name}/value", data=values, **storage)
            file["spectrumdataset/wave"] = self.wave
            names = list(self.params) if params is None else list(params)
            if names:
                columns = {name: _stored(self.params[name]) for name in names}
                table = np.empty(len(self), [(name, c.dtype) for name, c in columns.items()])
                for name, column in columns.items():
                    table[name] = column
                file["dataset/params"] = table
        return path


def _stored(values):
    return np.char.encode(values, "utf-8") if values.dtype.kind == "U" else values


def emulator():
    """The shipped emulator in bins of four pixels, to simulate rows of the reference sets from."""
    with np.load(str(resources.files("moefast.simulate") / "data" / "emulator.npz")) as file:
        arrays = dict(file)
    shipped = Emulator.load()
    inner = slice(shipped.margin, shipped.margin + 4096)
    for name in ("mean", "basis"):
        whole = arrays[name][..., inner]
        arrays[name] = whole.reshape(*whole.shape[:-1], -1, BINNED).mean(-1)
    arrays |= {"wave_edges": shipped.wave_edges[::BINNED], "margin": np.array(0)}
    return Emulator.from_arrays(arrays)


def stars(n, seed):
    """Rows 0 … n − 1 of a simulated survey."""
    shipped = Emulator.load()
    block = simulate_rows(0, n, seed=seed, emulator=shipped)

    def binned(values):
        return values.reshape(*values.shape[:-1], -1, BINNED).mean(-1)

    return Stars(
        wave=binned(shipped.wave),
        flux=binned(block.flux),
        error=np.sqrt(binned(block.error**2) / BINNED),
        noisy=binned(block.noisy),
        params=block.params,
    )


def same_rows(found, expected, rows=slice(None), *, other_rows=None, but=("row", "file")):
    """Every column has the same bits in these rows (`other_rows` of the second table)."""
    other_rows = rows if other_rows is None else other_rows
    assert set(found) - set(but) == set(expected) - set(but)
    for name in set(found) - set(but):
        mine, theirs = np.asarray(found[name])[rows], np.asarray(expected[name])[other_rows]
        assert mine.dtype == theirs.dtype, name
        assert mine.tobytes() == theirs.tobytes(), f"{name} differs"
