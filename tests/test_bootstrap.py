"""`bootstrap` against textbook standard errors, and what it keeps of the design."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from issm.fitting import bootstrap as module
from issm.inference import methods

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
    problem = module.pose(TRUTH, trials, module.make_rules(TRUTH, None, None), 3, 0.0)
    drawn = module._redraw(jax.random.key(0), TRUTH, problem).trials
    np.testing.assert_array_equal(np.isnan(drawn.emissions), np.isnan(emissions))
    np.testing.assert_allclose(drawn.emissions[1, 2:4], 50.0, atol=0.1)
    assert np.abs(np.nan_to_num(drawn.emissions[0])).max() < 10
    np.testing.assert_array_equal(drawn.plan.intervention.mask, mask)

    marked = jnp.arange(3.0)[:, None, None] * jnp.ones((3, 6, 1))
    problem = eqx.tree_at(lambda p: p.trials.emissions, problem, marked)
    drawn = module._resample(jax.random.key(4), TRUTH, problem).trials
    chosen = np.asarray(drawn.emissions)[:, 0, 0].astype(int)
    np.testing.assert_array_equal(drawn.plan.intervention.mask, mask[chosen])


@pytest.mark.parametrize("kind", ["parametric", "trials"])
def test_refits_are_fits_to_the_new_data(kind, monkeypatch):
    """Trials that share clamps and missing entries do so in the refits: `fit_em`, which looks for itself, finds the same."""
    monkeypatch.setattr(methods, "FEWEST_UNROLLED_STEPS", 0)  # the kernel that shares covariances by pattern
    params = issm.make_lgssm_params(
        [0.5, 0.0], [1.0, 1.0], [[0.9, 0.0], [0.3, 0.8]], [[0.2, 0.05], [0.05, 0.2]], np.eye(2), [0.2, 0.2]
    )
    mask = np.zeros((4, 12, 2), bool)
    mask[:2, 3:6, 0] = mask[2:, 5:9, 1] = True
    plan = issm.Intervention(mask, np.where(mask, 1.5, 0.0))
    keys = jax.random.split(jax.random.key(0), 4)
    sample = lambda key, plan: issm.lgssm_sample(key, params, 12, interventions=plan)[1]  # noqa: E731
    emissions = jax.vmap(sample)(keys, plan).at[1, 4].set(jnp.nan)
    refits = issm.bootstrap(
        jax.random.key(1), params, emissions, interventions=plan, kind=kind, num_samples=2, num_iters=4
    )
    trials = module.as_trials(params, emissions, None, plan)
    problem = module.pose(params, trials, module.make_rules(params, None, None), 4, 0.0)
    redraw = module._redraw if kind == "parametric" else module._resample
    for k, key in enumerate(jax.random.split(jax.random.key(1), 2)):
        new = redraw(key, params, problem).trials
        fit = issm.fit_em(params, new.emissions, interventions=new.plan.intervention, num_iters=4)
        np.testing.assert_allclose(refits.log_probs[k], fit.log_probs[-1], rtol=1e-9)
        for one, other in zip(jax.tree.leaves(refits.draws), jax.tree.leaves(fit.params), strict=True):
            np.testing.assert_allclose(one[k], other, rtol=1e-6, atol=1e-9)


def test_bad_input(emissions, parametric):
    for options, message in (
        ({"kind": "block"}, "kind: got 'block'"),
        ({"num_samples": 1}, "num_samples: got 1"),
        ({"num_at_once": 0}, "num_at_once: got 0"),
        ({"num_iters": 0}, "num_iters: got 0"),
        ({"tol": -1.0}, "tol: got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            issm.bootstrap(jax.random.key(0), TRUTH, emissions, **options)
    with pytest.raises(ValueError, match="emissions: got one trial"):
        issm.bootstrap(jax.random.key(0), TRUTH, emissions[0], kind="trials")
    with pytest.raises(ValueError, match="emissions: got values that JAX traces"):
        jax.jit(lambda y: issm.bootstrap(jax.random.key(0), TRUTH, y))(emissions)
    with pytest.raises(ValueError, match="level: got 2"):
        parametric.intervals(2.0)
