from dataclasses import replace

import pytest
from plans import random_library, random_mixture


@pytest.fixture(scope="session", params=["linear", "library", "some of each"])
def mixture(request):
    made = random_mixture()
    if request.param == "linear":
        return made
    marks = (True,) * 5 if request.param == "library" else (True, False, True, True, False)
    return replace(made, library=random_library(), from_library=marks)


@pytest.fixture
def make_mixture():
    return random_mixture
