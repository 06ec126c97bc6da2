"""What a posterior derives from its arrays when it is loaded."""

import numpy as np
from threadpoolctl import threadpool_limits

from moefast.model import Model


def test_bits_do_not_depend_on_the_threads_of_blas():
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(Model.load("observed").mixture.numbers)
    for name, values in found[0].items():
        np.testing.assert_array_equal(values, found[1][name], err_msg=name)
