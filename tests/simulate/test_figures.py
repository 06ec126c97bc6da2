"""Pictures of the simulator: that they show the numbers, and what is said when the numbers are missing."""

import re

import numpy as np
import pytest
from matplotlib.image import imread

from moefast.core.errors import MoefastError
from moefast.simulate import Emulator, figures


def write_calculator(path, *, rows=4096, columns=11, factor=1.0):
    """Write our own curve in the calculator's layout, `factor` times too high."""
    table = np.full((rows, columns), 3.0)
    if rows > figures.CALCULATOR_SHIFT and columns == 11:
        edges = 7100.0 + 1750.0 / 4096 * (np.arange(rows - figures.CALCULATOR_SHIFT + 1) - 0.5)
        model = figures.calculator_model(edges)
        table[figures.CALCULATOR_SHIFT :, 5] = factor * model.sky_variance
        table[figures.CALCULATOR_SHIFT :, 10] = model.sky_electrons
    np.savetxt(path, table, header="SEEING: 0.75")
    return path


def made_up_errors(n=60):
    rng = np.random.default_rng(2)
    labels = rng.uniform((3750, 1, -2.5, -0.3, -0.5), (6000, 5, 0.75, 0.5, 0.5), (n, 5))
    median = 10.0 ** rng.uniform(-4, -3, n)
    return labels, np.stack([median, 7 * median, 30 * median], axis=1)


def test_the_command_draws_three_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "held_out_errors", made_up_errors)
    folder = tmp_path / "new" / "pictures"
    figures.main([str(folder), "--etc", str(write_calculator(tmp_path / "etc.txt"))])
    names = ["spectra.png", "noise.png", "emulator-error.png"]
    assert capsys.readouterr().out.split() == [str(folder / name) for name in names]
    for name in names:
        picture = imread(folder / name)
        assert min(picture.shape[:2]) > 400
        assert (folder / name).stat().st_size < 300_000
        assert picture[..., :3].std() > 0.05


def test_the_noise_picture_tells_the_ratio(tmp_path):
    calculator = figures.read_calculator(write_calculator(tmp_path / "etc.txt", factor=2.0))
    assert len(calculator.wave_edges) == 4096 - figures.CALCULATOR_SHIFT + 1
    axes = figures.noise_figure(Emulator.load().wave_edges, calculator).axes[-1]
    assert re.findall(r"\d\.\d+", axes.get_title()) == ["0.50", "0.50"]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 0.5, rtol=1e-9)
    alone = figures.noise_figure(Emulator.load().wave_edges)
    assert "12 x 900 s" in alone.axes[0].get_title()


def test_the_spectra_have_the_ratio_they_are_labelled_with():
    emulator = Emulator.load()
    figure = figures.spectra_figure(emulator)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert len(panels) == 12
    noisy, clean = np.array([[line.get_ydata() for line in axes.lines[:2]] for axes in panels]).swapaxes(0, 1)
    error = figures._errors_at(figures.NoiseModel(emulator.wave_edges), clean.astype(np.float32), 8.0)
    np.testing.assert_allclose(np.median(clean / error, axis=1), 8.0, rtol=1e-4)
    z = (noisy - clean) / error
    assert z.std() == pytest.approx(1.0, abs=0.02)
    assert abs(z.mean()) < 0.02


def test_the_error_map_shows_every_synthesis():
    labels, error = made_up_errors()
    panels = figures.emulator_figure(labels, error).axes
    for axes, label, column in zip(panels[:4], (1, 1, 2, 2), (0, 1, 0, 1), strict=True):
        points = axes.collections[0]
        order = np.argsort(error[:, column])
        np.testing.assert_allclose(points.get_offsets(), labels[order][:, (0, label)])
        np.testing.assert_allclose(points.get_array(), 100 * error[order, column])


def test_missing_errors_are_named(tmp_path):
    labels, error = made_up_errors()
    path = tmp_path / "emulator.npz"
    np.savez(path, held_out_labels=labels)
    with pytest.raises(MoefastError, match="held_out_error missing"):
        figures.held_out_errors(path)
    np.savez(path, held_out_labels=labels, held_out_error=error[:, :2])
    with pytest.raises(MoefastError, match=r"found \(60, 5\) and \(60, 2\)"):
        figures.held_out_errors(path)
    np.savez(path, held_out_labels=labels, held_out_error=error)
    np.testing.assert_array_equal(figures.held_out_errors(path)[1], error)


def test_calculator_files_are_checked(tmp_path):
    with pytest.raises(MoefastError, match="cannot read"):
        figures.read_calculator(tmp_path / "absent.txt")
    with pytest.raises(MoefastError, match="11 columns"):
        figures.read_calculator(write_calculator(tmp_path / "narrow.txt", columns=10))
