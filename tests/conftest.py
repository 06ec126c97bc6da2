import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # With a process per core, further threads have none, and BLAS lets them wait actively, at several times the work.
    # NumPy reads this when it is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import h5py
import hypothesis
import numpy as np
import pytest

from moefast.core.random import standard_normals
from moefast.spectra.writer import SpectrumWriter

# `from tolerances import assert_close` in any folder; appended, so that nothing installed is shadowed.
sys.path.append(str(Path(__file__).parent))

# The same examples every time: a test that fails must fail again. On a machine that is slow for a moment an example
# takes longer than the 200 ms that hypothesis allows it, which says nothing of what is tested.
hypothesis.settings.register_profile(
    "fixed", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("fixed")

LONGEST = (
    "test_cuda_simulator.py",
    "test_benchmarks.py",
    "test_ceiling.py",
    "test_fitting.py",
    "test_checkpoint.py",
    "test_recipes.py",
    "test_posterior_fit.py",
    "test_robustness.py",
    "test_surroundings.py",
)
"""Files of tests that take longest: begun first, so that no process ends long after the others."""


def pytest_configure(config):
    # With a process per core, files with few tests would come last, and some of them take minutes.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    if find_spec("torch") is None:
        for item in items:
            if "torch" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="torch is not installed"))
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


# Pixels of 2.7 Å: the narrowest stretch that the gate measures, 3 Å, holds one at least.
N_PIXELS = 640


@dataclass(frozen=True)
class Toy:
    """Spectra of low rank whose response to log g changes sign along T_eff: one linear fit cannot see it."""

    wave: np.ndarray
    flux: np.ndarray
    error: np.ndarray
    labels: dict

    def noisy(self, seed=999):
        draw = standard_normals(seed, np.arange(len(self.flux)), self.flux.shape[1])
        return self.flux + self.error * draw

    def write(self, path, rows=slice(None), **changes):
        arrays = {"flux": self.flux, "error": self.error, **changes.pop("arrays", {})}
        arrays = {name: a[rows] for name, a in arrays.items()}
        labels = {name: np.asarray(v)[rows] for name, v in (self.labels | changes).items()}
        step = self.wave[1] - self.wave[0]
        with SpectrumWriter(
            path,
            n_rows=len(arrays["flux"]),
            wave=self.wave,
            wave_edges=np.append(self.wave, self.wave[-1] + step) - step / 2,
            arrays=tuple(arrays),
            params=dict.fromkeys(labels, "f8"),
        ) as writer:
            writer.write(0, params=labels, **arrays)
        return path


def toy(n, seed):
    rng = np.random.default_rng(seed)
    t_eff, log_g, m_h = rng.uniform(3750, 6000, n), rng.uniform(1, 5, n), rng.uniform(-2.5, 0.75, n)
    t, g, m = (t_eff - 4875) / 1125, (log_g - 3) / 2, (m_h + 0.875) / 1.625
    wave = np.linspace(7100.2, 8849.8, N_PIXELS)
    fixed = np.random.default_rng(0)
    phase = (wave - wave[0]) / (wave[-1] - wave[0])
    waves = [np.sin(2 * np.pi * (k * phase + fixed.random())) for k in fixed.permutation(np.arange(2, 26))]
    terms = [t, m, 0.35 * g, 1.1 * g * t, 0.4 * g * m, t * m, t**2, m**2]
    flux = 1 + sum(0.03 * c[:, None] * np.add(*waves[2 * k : 2 * k + 2]) for k, c in enumerate(terms))
    strength = 0.15 * np.exp(0.5 * m - 0.4 * t)
    for centre in (8189.0, 8498.02, 8542.09, 8662.14):
        width = 2.5 * np.exp(0.3 * g)[:, None]
        flux -= strength[:, None] * np.exp(-0.5 * ((wave - centre) / width) ** 2)
    shape = 0.1 * (1 + 0.5 * np.sin(7 * phase) + 3 * (fixed.random(N_PIXELS) < 0.05))
    error = shape * np.exp(rng.normal(0, 0.6, (n, 1)))
    return Toy(
        wave,
        flux.astype(np.float32),
        error.astype(np.float32),
        {"T_eff": t_eff, "log_g": log_g, "M_H": m_h},
    )


@pytest.fixture(scope="session")
def train_toy():
    return toy(3000, 1)


@pytest.fixture(scope="session")
def test_toy():
    return toy(1000, 2)


@pytest.fixture(scope="session")
def make_toy():
    return toy


@pytest.fixture(scope="session")
def train_file(train_toy, tmp_path_factory):
    return train_toy.write(tmp_path_factory.mktemp("train") / "train.h5")


@pytest.fixture(scope="session")
def stars():
    import small

    return small.stars(2600, seed=12)


@pytest.fixture(scope="session")
def stars_file(stars, tmp_path_factory):
    return stars.write(tmp_path_factory.mktemp("stars") / "night.h5", arrays=("flux", "error", "noisy"))


@pytest.fixture(scope="session")
def labelled_file(tmp_path_factory):
    import small

    return small.stars(1500, seed=11).write(tmp_path_factory.mktemp("labelled") / "train.h5")


@pytest.fixture(scope="session")
def model_folder(labelled_file, tmp_path_factory):
    from moefast.recipes import fit

    folder = tmp_path_factory.mktemp("fitted") / "model"
    fit(labelled_file).save(folder)
    return folder


@pytest.fixture(scope="session")
def model(model_folder):
    from moefast.model import Model

    return Model.load(model_folder)


@pytest.fixture(scope="session")
def whole(model, stars_file):
    """The table of all rows of `stars_file`, in memory."""
    from moefast.predicting.files import predict

    return predict(stars_file, model)


@pytest.fixture
def make_file(tmp_path):
    """Write a file and return its path and the arrays that reading should give."""

    def make(
        name="dataset.h5",
        *,
        n=11,
        p=32,
        dtype="f8",
        arrays=("flux", "error"),
        wave=None,
        chunks=None,
        labels=("T_eff", "log_g", "M_H"),
        seed=0,
        **options,
    ):
        rng = np.random.default_rng([seed, n, p])
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {}
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
