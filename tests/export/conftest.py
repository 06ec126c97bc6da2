import pytest
from plans import random_mixture


@pytest.fixture(scope="session")
def mixture():
    return random_mixture()


@pytest.fixture
def make_mixture():
    return random_mixture
