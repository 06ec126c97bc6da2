"""How close two arrays must be: one rule, by the dtype in which the numbers were made."""

import numpy as np

TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-10}


def assert_close(found, expected, *, made_in=None, factor=1.0):
    """|found − expected| ≤ tolerance · (|expected| + max |expected|).

    `made_in` is the dtype of the arithmetic where it is not that of `found`; a `factor` other than 1 needs a reason
    beside it.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    tolerance = factor * TOLERANCE[np.dtype(made_in or found.dtype)]
    largest = float(np.abs(expected).max()) if expected.size else 0.0
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * largest)
