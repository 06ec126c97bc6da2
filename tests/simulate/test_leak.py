"""The error vector gives log g away; what a gate may see of it does not."""

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from moefast.simulate import simulate_rows
from moefast.spectra import quality_features

N_TRAIN, N_TEST = 4000, 2000


@pytest.fixture(scope="module")
def errors():
    block = simulate_rows(0, N_TRAIN + N_TEST, seed=11)
    return block.error, block.params["log_g"]


def test_error_pixels_predict_log_g(errors):
    error, log_g = errors
    shape = np.log(error.astype(float))
    shape -= shape.mean(axis=1, keepdims=True)
    model = Ridge(alpha=1e-4).fit(shape[:N_TRAIN], log_g[:N_TRAIN])
    assert r2_score(log_g[N_TRAIN:], model.predict(shape[N_TRAIN:])) > 0.8


@pytest.mark.parametrize(
    "scale", [np.asarray, lambda x: np.sign(x) * np.log(np.abs(x) + 1e-12)], ids=["as is", "log"]
)
@pytest.mark.parametrize(
    "model",
    [
        make_pipeline(StandardScaler(), RidgeCV(np.logspace(-6, 3, 10))),
        make_pipeline(
            StandardScaler(), PolynomialFeatures(2), StandardScaler(), RidgeCV(np.logspace(-4, 4, 9))
        ),
        HistGradientBoostingRegressor(max_depth=3, learning_rate=0.05, random_state=0),
    ],
    ids=["linear", "quadratic", "trees"],
)
def test_quality_features_do_not(errors, model, scale):
    error, log_g = errors
    features = scale(quality_features(error).astype(float))
    model.fit(features[:N_TRAIN], log_g[:N_TRAIN])
    assert r2_score(log_g[N_TRAIN:], model.predict(features[N_TRAIN:])) < 0.05


def test_exact_statistics_would(errors):
    """Why the features are rounded: unrounded, a quadratic of them goes well beyond the limit."""
    error, log_g = errors
    parts = [
        error.mean(1),
        error.std(1),
        error.min(1),
        error.max(1),
        *np.quantile(error, [0.25, 0.5, 0.75], axis=1),
    ]
    exact = np.stack(parts, axis=1).astype(float)
    model = make_pipeline(
        StandardScaler(), PolynomialFeatures(2), StandardScaler(), RidgeCV(np.logspace(-8, 4, 13))
    ).fit(exact[:N_TRAIN], log_g[:N_TRAIN])
    assert r2_score(log_g[N_TRAIN:], model.predict(exact[N_TRAIN:])) > 0.1
