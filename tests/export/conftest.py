from dataclasses import replace

import pytest
from made_network import with_heads
from plans import random_lean, random_mixture, random_ridge, random_templates, random_tower, random_trees

KINDS = ["linear", "library", "some of each", "residuals", "dual", "conditional", "pca-mlp", "vit"]


@pytest.fixture(scope="session", params=KINDS)
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
        return made.with_expert(random_templates())
    made = made.with_expert(random_templates(), 0, 3).with_expert(random_trees(9 + 12 + 1), 1)
    if request.param == "residuals":
        # Beside an expert of the library, trees, and linear ones.
        residuals = {
            0: random_ridge(9 + 12),
            3: random_lean(),
            1: random_ridge(9 + 12, seed=1),
            2: random_trees(9 + 12 + 1, seed=2),
            4: random_trees(512, "flux", seed=3),
        }
        for k, residual in residuals.items():
            made = made.with_expert(residual, k, added=True)
        return made
    return made.with_expert(random_trees(512, "flux"), 4)


@pytest.fixture
def make_mixture():
    return random_mixture
