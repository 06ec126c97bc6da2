import pytest
from made_posterior import model_of, posterior_of


@pytest.fixture(scope="session")
def posterior_model(stars):
    """A small posterior that was never saved."""
    return model_of(posterior_of(stars.take(slice(0, 1200))))


@pytest.fixture(scope="session")
def odd_stars(stars, tmp_path_factory):
    """Forty stars: row 3 has a gap, row 4 no pixel, row 5 a spike; identifiers are text, and two of them alike."""
    few = stars.take(slice(2400, 2440))
    few.noisy[3, 100:700] = float("nan")
    few.noisy[4] = float("nan")
    few.noisy[5, 200], few.error[5, 200] = 1e3, 5e2
    few.params["id"][:] = range(1000, 1040)
    few.params["id"][8] = 1007
    return few.write(tmp_path_factory.mktemp("odd") / "night.h5", arrays=("flux", "error", "noisy"))
