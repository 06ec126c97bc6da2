"""Stars of the training set are recognised in a test set, whatever the files are called."""

import numpy as np
import pytest

from moefast.core.sketches import SKETCH_SIZE, row_hashes, share_seen, sketch
from moefast.simulate.rows import simulate_params


def labels(first, stop, seed=1):
    return {name: simulate_params(first, stop, seed=seed)[name] for name in ("T_eff", "log_g", "M_H")}


TRAINING = labels(0, 50_000)


@pytest.mark.parametrize(
    ("first", "stop", "seed", "share"),
    [
        (0, 50_000, 1, 1.0),
        (10_000, 20_000, 1, 1.0),
        (40_000, 60_000, 1, 0.5),
        (50_000, 70_000, 1, 0.0),
        (0, 20_000, 2, 0.0),
    ],
)
def test_share_of_training_stars(first, stop, seed, share):
    found = share_seen(sketch(TRAINING), labels(first, stop, seed))
    # About a fiftieth of the rows can be judged: 400 of 20 000.
    assert found == pytest.approx(share, abs=4 * np.sqrt(0.25 / 400) if 0 < share < 1 else 0)


def test_a_hundred_training_stars_among_ten_thousand_are_noticed():
    mixed = labels(100_000, 110_000)
    for name, values in mixed.items():
        values[:100] = TRAINING[name][:100]
    shares = [share_seen(sketch(TRAINING, size), mixed, size) for size in (SKETCH_SIZE, 50_000)]
    assert shares[1] == pytest.approx(0.01)
    # Of the hundred about two lie below the limit of the sketch; here some do, of some two hundred rows judged.
    assert shares[0] > 0


def test_a_small_training_set_is_known_whole():
    few = labels(0, 100)
    assert len(sketch(few)) == 100
    assert share_seen(sketch(few), labels(0, 200)) == 0.5


def test_order_and_type_do_not_matter():
    shuffled = {name: values[::-1].astype(np.float64) for name, values in TRAINING.items()}
    assert sketch(shuffled) == sketch(TRAINING)
    assert len(np.unique(row_hashes(TRAINING))) == 50_000


def test_nothing_to_judge():
    assert share_seen([], labels(0, 10)) is None
    assert share_seen(sketch(TRAINING), labels(0, 0)) is None
