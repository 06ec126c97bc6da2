import numpy as np
import pytest

from moefast.core.labels import RANGES, describe_implausible, plausible


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("mark", [np.nan, np.inf, -np.inf, -9999, -99999, 1e20, 1e200, 9999999.0])
def test_marks_of_the_unknown_are_no_labels(name, mark):
    low, high = RANGES[name]
    values = np.array([low, mark, high])
    assert plausible(name, values).tolist() == [True, False, True]
    assert f"{name} is" in describe_implausible(name, [values])
    assert "in 1 of 3 rows, the first of them 1 " in describe_implausible(name, [values])


def test_stars_are_labels():
    for name, values in {"T_eff": [2300.0, 60000.0], "log_g": [-0.5, 6.0], "M_H": [-5.0, 1.0]}.items():
        assert plausible(name, values).all()
        assert describe_implausible(name, [values]) == ""


def test_a_column_without_a_range_needs_finite_numbers():
    assert plausible("mag", [1e29, 1e31, np.nan]).tolist() == [True, False, False]
