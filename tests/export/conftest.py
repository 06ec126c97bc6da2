from dataclasses import replace

import pytest
from made_network import with_heads
from plans import random_library, random_mixture, random_tower, random_trees


@pytest.fixture(
    scope="session", params=["linear", "library", "some of each", "dual", "conditional", "pca-mlp", "vit"]
)
def mixture(request):
    made = random_mixture()
    if request.param == "linear":
        return made
    if request.param == "dual":
        return replace(made, tower=random_tower(10, 5, "quality"))
    if request.param == "conditional":
        return replace(made, tower=random_tower(14, 5, "features", 6.0))
    if request.param in {"pca-mlp", "vit"}:
        return with_heads(made, request.param)
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
