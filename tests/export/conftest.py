from dataclasses import replace

import pytest
from plans import random_library, random_mixture, random_trees


@pytest.fixture(scope="session", params=["linear", "library", "some of each"])
def mixture(request):
    made = random_mixture()
    if request.param == "linear":
        return made
    if request.param == "library":
        return replace(made, library=random_library())
    marks, others = (
        (True, False, False, True, False),
        {1: random_trees(9 + 12 + 1), 4: random_trees(512, "flux")},
    )
    return replace(made, library=random_library(), from_library=marks, others=others)


@pytest.fixture
def make_mixture():
    return random_mixture
