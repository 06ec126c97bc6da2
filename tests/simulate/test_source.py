"""A fit from the generator is the fit from the file of the same rows."""

import numpy as np
import pytest

import moefast
from moefast.core.errors import InputError, LabelError, MoefastError
from moefast.simulate import Emulator, Settings, SimulatedSpectra, simulate_file, simulate_rows, simulate_set
from moefast.simulate.rows import PARAMS
from moefast.simulate.sets import fingerprint
from moefast.spectra import SpectrumWriter, open_spectra


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "rows.h5"
    simulate_file(path, 300, seed=4, first_row=70)
    return open_spectra(path)


@pytest.fixture(scope="module")
def source():
    return SimulatedSpectra(300, seed=4, first_row=70)


@pytest.mark.parametrize("array", ["auto", "flux", "noisy"])
@pytest.mark.parametrize(
    ("size", "rows"), [(128, None), (1, (7, 9)), (1000, (299, 300)), (50, (130, 280)), (5, (3, 3))]
)
def test_reads_like_a_file(file, source, array, size, rows):
    names = ("T_eff", "mag", "snr")
    found = list(source.blocks(size, array=array, rows=rows, params=names))
    expected = list(file.blocks(size, array=array, rows=rows, params=names))
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.first_row, mine.shard, mine.mask) == (theirs.first_row, theirs.shard, None)
        np.testing.assert_array_equal(mine.flux, theirs.flux)
        np.testing.assert_array_equal(mine.error, theirs.error)
        assert mine.flux.flags.writeable
        for name in names:
            np.testing.assert_array_equal(mine.params[name], theirs.params[name])


def test_says_what_it_is_like_a_file(file, source):
    assert (len(source), source.n_rows, source.n_pixels) == (300, file.n_rows, file.n_pixels)
    np.testing.assert_array_equal(source.wave, file.wave)
    np.testing.assert_array_equal(source.first_rows, file.first_rows)
    assert source.columns == file.columns
    for names in (("T_eff", "log_g", "M_H"), ("mag",)):
        for name, values in file.labels(names).items():
            np.testing.assert_array_equal(source.labels(names)[name], values)
    assert source.has_labels()
    assert not source.has_labels(("absent",))
    assert (source.shards[0].n_rows, source.shards[0].arrays) == (300, file.shards[0].arrays)
    assert source.failures == []
    source.close()


def test_fingerprints_tell_sources_apart(source):
    others = [
        SimulatedSpectra(301, seed=4, first_row=70),
        SimulatedSpectra(300, seed=5, first_row=70),
        SimulatedSpectra(300, seed=4),
        SimulatedSpectra(300, seed=4, first_row=70, settings=Settings(mag=(20, 21))),
        SimulatedSpectra.of_set("z0", rows=(0, 300)),
    ]
    assert len({s.fingerprint() for s in (source, *others)}) == 6
    assert source.fingerprint() == SimulatedSpectra(300, seed=4, first_row=70).fingerprint()


def test_a_reference_set_has_its_fingerprint(tmp_path):
    spectra = SimulatedSpectra.of_set("z0", rows=(10, 14))
    identity = simulate_set(tmp_path / "z0.h5", "z0", "train", rows=(10, 14))
    assert spectra.identity == identity
    assert spectra.fingerprint() == identity.fingerprint == fingerprint("z0", "train", (10, 14))
    np.testing.assert_array_equal(
        next(spectra.blocks(4, array="flux")).flux, next(open_spectra(tmp_path / "z0.h5").blocks(4)).flux
    )
    assert SimulatedSpectra.of_set("z0", "test_1k").n_rows == 1000
    assert "z0 train, rows 10:14" in repr(spectra)


@pytest.fixture(scope="module")
def coarse(shipped_arrays):
    """The shipped emulator in bins of four pixels: a fit costs a fiftieth."""
    emulator = Emulator.load()
    inner = slice(emulator.margin, emulator.margin + 4096)
    binned = {name: shipped_arrays[name][..., inner] for name in ("mean", "basis")}
    binned = {name: a.reshape(*a.shape[:-1], -1, 4).mean(-1) for name, a in binned.items()}
    edges = {"wave_edges": emulator.wave_edges[::4], "margin": np.array(0)}
    return Emulator.from_arrays(shipped_arrays | binned | edges)


def test_a_fit_is_that_of_the_file(coarse, tmp_path):
    source = SimulatedSpectra(1500, seed=4, emulator=coarse)
    block = simulate_rows(0, 1500, seed=4, emulator=coarse, noisy=False)
    with SpectrumWriter(
        tmp_path / "train.h5", n_rows=1500, wave=coarse.wave, wave_edges=coarse.wave_edges, params=PARAMS
    ) as writer:
        writer.write(0, params=block.params, flux=block.flux, error=block.error)
    from_file = moefast.fit(tmp_path / "train.h5", recipe="global-ridge", seed=3)
    generated = moefast.fit(source, recipe="global-ridge", seed=3)
    for name in ("reference", "noise_shape", "knots", "expert_weights", "expert_intercepts", "columns"):
        mine, theirs = getattr(generated.mixture, name), getattr(from_file.mixture, name)
        np.testing.assert_array_equal(mine, theirs)
    for mine, theirs in zip(generated.mixture.gate, from_file.mixture.gate, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for name, form in from_file.references.items():
        np.testing.assert_array_equal(generated.references[name].weights, form.weights)
    training = generated.manifest["training"]
    assert training["files"] == ["simulated, seed 4, rows 0:1500"]
    assert training["n_spectra"] == 1500
    assert training["labels"] == from_file.manifest["training"]["labels"]


def test_nothing_is_kept_between_passes(monkeypatch):
    made = []

    def counted(first, stop, **options):
        made.append((first, stop))
        return simulate_rows(first, stop, **options)

    monkeypatch.setattr("moefast.simulate.source.simulate_rows", counted)
    source = SimulatedSpectra(100, seed=1)
    made.clear()
    for _ in range(2):
        blocks = source.blocks(40)
        assert made in ([], [(0, 40), (40, 80), (80, 100)])
        next(blocks)
        assert made[-1] == (0, 40)
        list(blocks)
    assert made == 2 * [(0, 40), (40, 80), (80, 100)]


def test_nonsense_is_refused(source):
    with pytest.raises(MoefastError, match="n_rows"):
        SimulatedSpectra(0, seed=1)
    with pytest.raises(MoefastError, match="seed"):
        SimulatedSpectra(5, seed=-1)
    with pytest.raises(MoefastError, match="velocities"):
        SimulatedSpectra(5, seed=1, settings=Settings(velocity_scatter=1000.0))
    with pytest.raises(ValueError, match="block_rows"):
        source.blocks(0)
    with pytest.raises(ValueError, match="rows 5 to 301"):
        source.blocks(8, rows=(5, 301))
    with pytest.raises(InputError, match="array"):
        source.blocks(8, array="mask")
    with pytest.raises(InputError, match="no column 'night'"):
        source.blocks(8, params=("night",))
    with pytest.raises(InputError, match="no column 'snr'"):
        source.params(["snr"])
    with pytest.raises(LabelError, match="no column 'V_mic'"):
        source.labels(["V_mic"])
