import numpy as np
import pytest

from issm import metrics


def test_r2_against_its_definition():
    rng = np.random.default_rng(0)
    truth, prediction = rng.normal(size=(2, 4, 10, 3)) * [1.0, 5.0, 0.1]
    truth[0, :3, 1] = np.nan
    expected, residuals, totals = [], 0.0, 0.0
    for n in range(3):
        seen = ~np.isnan(truth[..., n])
        y, p = truth[..., n][seen], prediction[..., n][seen]
        residual, total = ((y - p) ** 2).sum(), ((y - y.mean()) ** 2).sum()
        expected.append(1 - residual / total)
        residuals, totals = residuals + residual, totals + total
    np.testing.assert_allclose(metrics.r2(truth, prediction, pooled=False), expected, rtol=1e-12)
    np.testing.assert_allclose(metrics.r2(truth, prediction), 1 - residuals / totals, rtol=1e-12)
    assert float(metrics.r2(truth, truth)) == 1.0
    assert np.isnan(metrics.r2(np.ones((5, 1)), np.zeros((5, 1))))


def test_relative_error():
    truth = np.array([[3.0, 0.0], [0.0, 4.0]])
    assert float(metrics.relative_error(truth + np.array([[0.0, 1.0], [0.0, 0.0]]), truth)) == pytest.approx(0.2)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="prediction: got shape"):
        metrics.r2(np.ones((3, 2)), np.ones((3, 1)))
    with pytest.raises(ValueError, match="estimate: got shape"):
        metrics.relative_error(np.ones((3, 2)), np.ones((3, 1)))
