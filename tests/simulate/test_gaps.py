"""Gaps are where and as often as they are said to be, and belong to a row, not to a block."""

import numpy as np
import pytest

from moefast.core.errors import MoefastError
from moefast.simulate.emulator import Emulator
from moefast.simulate.gaps import (
    CALCIUM,
    GAPS,
    Gaps,
    lost_block,
    lost_edges,
    outside_calcium,
    random_pixels,
)
from moefast.spectra.telluric import telluric_pixels

WAVE = Emulator.load().wave
ROWS = np.arange(600)


def runs(lost):
    """Number of runs of lost pixels of each star."""
    return (np.diff(np.pad(lost, ((0, 0), (1, 0))).astype(int), axis=1) == 1).sum(axis=1)


def test_telluric_mask_takes_37_percent():
    lost = telluric_pixels(WAVE)
    assert 0.36 < lost.mean() < 0.38
    for wavelength, expected in (
        (7149.0, False),
        (7275.0, True),
        (7600.0, True),
        (8200.0, True),
        (8498.0, False),
    ):
        assert lost[np.abs(WAVE - wavelength).argmin()] == expected


def test_only_the_calcium_region_is_left():
    left = WAVE[~outside_calcium(WAVE)]
    assert CALCIUM[0] <= left[0] < CALCIUM[0] + 0.5
    assert left[-1] == WAVE[-1]


def test_random_pixels_have_the_share_that_was_asked_for():
    lost = random_pixels(ROWS, 4096, seed=3, share=0.28)
    assert abs(lost.mean() - 0.28) < 5 * np.sqrt(0.28 * 0.72 / lost.size)
    share = random_pixels(ROWS, 4096, seed=3).mean(axis=1)
    assert share.min() < 0.01
    assert share.max() > 0.045
    assert abs(share.mean() - 0.0275) < 0.002


def test_a_block_is_one_run_of_its_size():
    lost = lost_block(ROWS, 1000, seed=3)
    assert (runs(lost) == 1).all()
    size = lost.sum(axis=1)
    assert (size.min() >= 50, size.max() <= 200, size.min() < 60, size.max() > 190) == (True,) * 4
    # Every pixel may be lost, the first and the last included.
    few = lost_block(ROWS, 50, seed=3, share=0.1)
    assert few[:, 0].any()
    assert few[:, -1].any()
    assert (few.sum(axis=1) == 5).all()


def test_edges_are_lost_from_one_side():
    lost = lost_edges(ROWS, 1000, seed=3, share=0.1)
    assert (lost.sum(axis=1) == 100).all()
    assert ((lost[:, 0] & ~lost[:, -1]) | (lost[:, -1] & ~lost[:, 0])).all()
    assert 0.4 < lost[:, 0].mean() < 0.6


def test_shares_of_stars_with_each_gap():
    gaps = Gaps(calcium=0.05)
    kinds = gaps.kinds(np.arange(20_000), seed=1)
    for name, share in (("telluric", 2 / 3), ("block", 0.1), ("edges", 0.2), ("calcium", 0.05)):
        assert abs(kinds[name].mean() - share) < 0.015, name
    # Kinds are independent of each other.
    assert abs((kinds["telluric"] & kinds["edges"]).mean() - 2 / 15) < 0.015


def test_a_star_loses_the_same_pixels_in_any_block():
    gaps = Gaps(calcium=0.1)
    whole = gaps.lost_pixels(WAVE, ROWS[:90], seed=5)
    some = np.array([41, 7, 88])
    np.testing.assert_array_equal(gaps.lost_pixels(WAVE, some, seed=5), whole[some])
    assert (gaps.lost_pixels(WAVE, some, seed=6) != whole[some]).any(axis=1).all()
    kinds = gaps.kinds(ROWS[:90], seed=5)
    without_telluric = kinds["telluric"] | kinds["calcium"]
    np.testing.assert_array_equal(whole[:, telluric_pixels(WAVE)].all(axis=1), without_telluric)


@pytest.mark.parametrize("name", GAPS)
def test_every_kind_by_itself(name):
    lost = GAPS[name](WAVE, ROWS[:50], 2)
    assert lost.shape == (50, len(WAVE))
    assert lost.dtype == bool
    shares = {
        "none": 0,
        "telluric": 0.372,
        "random 28 %": 0.28,
        "bluest 15 %": 0.15,
        "reddest 10 %": 0.1,
        "Ca II alone": 0.743,
    }
    if name in shares:
        assert lost.mean() == pytest.approx(shares[name], abs=0.003)
    else:
        assert 0 < lost.mean() < 0.2


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), (0.3, 0.2)])
def test_shares_out_of_range_are_refused(wrong):
    with pytest.raises(MoefastError, match="share: expected numbers from 0 to 1"):
        random_pixels(ROWS[:2], 10, seed=1, share=wrong)
    with pytest.raises(MoefastError, match="telluric: expected numbers from 0 to 1"):
        Gaps(telluric=wrong)
