"""`bootstrap` against textbook standard errors, and what it keeps of the design."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from issm.fitting import bootstrap as module

TRUTH = issm.make_lgssm_params(0.0, 1.0, 0.8, 1.0, 1.0, 1e-4)
WEIGHT = eqx.tree_at(lambda p: p.dynamics.weights, jax.tree.map(lambda _: False, TRUTH), True)
OPTIONS = {"trainable": WEIGHT, "num_samples": 200, "num_iters": 30, "num_at_once": 70}


@pytest.fixture(scope="module")
def emissions():
    sample = lambda key: issm.lgssm_sample(key, TRUTH, 10)[1]  # noqa: E731
    return jax.vmap(sample)(jax.random.split(jax.random.key(0), 20))


@pytest.fixture(scope="module")
def fit(emissions):
    """Least squares, which is the maximum without emission noise."""
    y = np.asarray(emissions)[..., 0]
    slope = (y[:, 1:] * y[:, :-1]).sum() / (y[:, :-1] ** 2).sum()
    return eqx.tree_at(lambda p: p.dynamics.weights, TRUTH, jnp.array([[slope]]))


@pytest.fixture(scope="module")
def parametric(emissions, fit):
    return issm.bootstrap(jax.random.key(1), fit, emissions, **OPTIONS)


def test_parametric_standard_errors_of_an_observed_autoregression(emissions, fit, parametric):
    r"""Almost without emission noise: $\sqrt{q / \sum x^2}$; 200 refits know it to 5 %."""
    past = np.asarray(emissions)[:, :-1]
    expected = 1 / np.sqrt((past**2).sum())
    error = float(parametric.standard_errors.dynamics.weights[0, 0])
    np.testing.assert_allclose(error, expected, rtol=0.2)
    assert abs(float(parametric.bias.dynamics.weights[0, 0])) < 4 * expected / np.sqrt(200) + 2 / past.size
    assert parametric.reason == "200 of 200 refits converged"
    np.testing.assert_array_equal(parametric.draws.dynamics.cov, 1.0)  # fixed
    np.testing.assert_array_equal(parametric.standard_errors.emissions.cov, 0.0)
    lower, upper = parametric.intervals(0.9)
    draws = np.asarray(parametric.draws.dynamics.weights)[:, 0, 0]
    inside = (draws >= float(lower.dynamics.weights[0, 0])) & (draws <= float(upper.dynamics.weights[0, 0]))
    assert inside.mean() == pytest.approx(0.9, abs=0.01)


def test_resampled_trials_against_the_jackknife(emissions, fit):
    """The standard error over trials, by leaving one out in a ratio of sums."""
    refits = issm.bootstrap(jax.random.key(2), fit, emissions, kind="trials", **OPTIONS)
    y = np.asarray(emissions)[..., 0]
    cross, square = (y[:, 1:] * y[:, :-1]).sum(axis=1), (y[:, :-1] ** 2).sum(axis=1)
    left_out = (cross.sum() - cross) / (square.sum() - square)
    expected = np.sqrt((len(y) - 1) / len(y) * ((left_out - left_out.mean()) ** 2).sum())
    np.testing.assert_allclose(refits.standard_errors.dynamics.weights[0, 0], expected, rtol=0.2)


def test_new_data_keep_the_design():
    """Clamps hold in the new data, what is missing stays missing, and trials keep their own clamps and inputs."""
    mask = np.zeros((3, 6, 1), bool)
    mask[1, 2:4] = True
    plan = issm.Intervention(mask, np.where(mask, 50.0, 0.0))
    emissions = np.zeros((3, 6, 1))
    emissions[2, 4] = np.nan
    trials = module.as_trials(TRUTH, emissions, None, plan)
    drawn, _, kept = module._redraw(jax.random.key(0), TRUTH, trials)
    np.testing.assert_array_equal(np.isnan(drawn), np.isnan(emissions))
    np.testing.assert_allclose(drawn[1, 2:4], 50.0, atol=0.1)
    assert np.abs(np.nan_to_num(drawn[0])).max() < 10
    np.testing.assert_array_equal(kept.mask, mask)

    marked = eqx.tree_at(lambda t: t.emissions, trials, jnp.arange(3.0)[:, None, None] * jnp.ones((3, 6, 1)))
    drawn, _, kept = module._resample(jax.random.key(4), TRUTH, marked)
    chosen = np.asarray(drawn)[:, 0, 0].astype(int)
    np.testing.assert_array_equal(kept.mask, mask[chosen])


def test_bad_input(emissions, parametric):
    for options, message in (
        ({"kind": "block"}, "kind: got 'block'"),
        ({"num_samples": 1}, "num_samples: got 1"),
        ({"num_at_once": 0}, "num_at_once: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            issm.bootstrap(jax.random.key(0), TRUTH, emissions, **options)
    with pytest.raises(ValueError, match="emissions: got one trial"):
        issm.bootstrap(jax.random.key(0), TRUTH, emissions[0], kind="trials")
    with pytest.raises(ValueError, match="emissions: got values that JAX traces"):
        jax.jit(lambda y: issm.bootstrap(jax.random.key(0), TRUTH, y))(emissions)
    with pytest.raises(ValueError, match="level: got 2"):
        parametric.intervals(2.0)
