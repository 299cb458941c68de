"""`structural_model` against statsmodels, `observed_effect` against the joint Gaussian of a whole series, and the Nile."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from statsmodels.tsa.statespace.structural import UnobservedComponents

import issm
from helpers import joint_gaussian, random_system

NILE = np.genfromtxt(Path(__file__).parents[1] / "examples/data/nile.csv", delimiter=",", names=True)


def test_structure_is_that_of_statsmodels():
    """Log-likelihood and forecast of level, slope, season and a regressor, at the same parameters and start."""
    rng = np.random.default_rng(0)
    series, driver = rng.normal(size=(30, 1)).cumsum(axis=0), rng.normal(size=(30, 1))
    series[7] = np.nan
    model = issm.structural_model(series, driver, trend=True, seasonal=4)
    theirs = UnobservedComponents(series[:, 0], "lltrend", seasonal=4, exog=driver)
    params = model.params
    theirs.loglikelihood_burn = 0
    theirs.ssm.initialize_known(np.asarray(params.initial.mean), np.diag(params.initial.cov))
    flat = [*params.emissions.cov, *params.dynamics.cov[:3], *params.emissions.input_weights[0]]
    assert theirs.param_names == ["sigma2.irregular", "sigma2.level", "sigma2.trend", "sigma2.seasonal", "beta.x1"]
    result = theirs.smooth(np.array(flat, float))
    ours = issm.marginal_log_prob(params, series, driver)
    assert float(ours) == pytest.approx(result.llf, rel=1e-9)
    longer, ahead = np.concatenate([series, np.zeros((5, 1))]), rng.normal(size=(5, 1))
    effect = issm.observed_effect(params, longer, np.concatenate([driver, ahead]), start=30)
    forecast = result.get_forecast(5, exog=ahead)
    np.testing.assert_allclose(-effect.per_step.mean[:, 0], forecast.predicted_mean, rtol=1e-8)
    np.testing.assert_allclose(effect.per_step.sd[:, 0], forecast.se_mean, rtol=1e-8)
    np.testing.assert_allclose(effect.expected.mean[30:, 0], forecast.predicted_mean, rtol=1e-8)
    np.testing.assert_allclose(effect.expected.mean[:30, 0], result.fittedvalues, rtol=1e-7, atol=1e-9)


@pytest.fixture(scope="module")
def system():
    system = random_system(5, num_timesteps=12, state_dim=2, emission_dim=2, input_dim=1)
    system.emissions[[2, 9], [0, 1]] = np.nan
    return system


def test_effects_are_those_of_the_joint_gaussian(system):
    """Two series at once; a window in the middle; missing entries before and after."""
    _, factors, emission_means, _ = joint_gaussian(system)
    loading, noise = system.fields["emissions_weights"], np.asarray(system.fields["emissions_cov"])
    noise = np.diag(noise) if noise.ndim == 1 else noise
    stacked = np.concatenate([loading @ np.asarray(f, float) for f in factors])
    mean, cov = np.concatenate(emission_means).astype(float), stacked @ stacked.T + np.kron(np.eye(12), noise)
    observed = system.emissions.ravel()
    past = np.flatnonzero(~np.isnan(observed) & (np.arange(24) < 14))
    after = np.arange(14, 24)
    gain = np.linalg.solve(cov[np.ix_(past, past)], cov[np.ix_(past, after)]).T
    forecast = mean[after] + gain @ (observed[past] - mean[past])
    spread = cov[np.ix_(after, after)] - gain @ cov[np.ix_(past, after)]
    effect = issm.observed_effect(system.params, system.emissions, system.inputs, start=7, window=(1, 4))
    difference = (observed[after] - forecast).reshape(5, 2)
    np.testing.assert_allclose(effect.per_step.mean, difference, rtol=1e-8)
    seen = ~np.isnan(difference)
    np.testing.assert_allclose(effect.per_step.sd[seen], np.sqrt(np.diag(spread)).reshape(5, 2)[seen], rtol=1e-8)
    for n in range(2):
        weight = seen[:, n] & np.array([False, True, True, True, False])
        weights = np.zeros((5, 2))
        weights[weight, n] = 1.0
        sd, total = np.sqrt(weights.ravel() @ spread @ weights.ravel()), difference[weight, n].sum()
        np.testing.assert_allclose(effect.cumulative.mean[-1, n], total, rtol=1e-8)
        np.testing.assert_allclose(effect.cumulative.sd[-1, n], sd, rtol=1e-8)
        np.testing.assert_allclose(effect.average.mean[n], total / weight.sum(), rtol=1e-8)
        expected = forecast.reshape(5, 2)[weight, n].mean()
        np.testing.assert_allclose(effect.relative.mean[n], total / weight.sum() / expected, rtol=1e-8)
        np.testing.assert_allclose(effect.relative.sd[n], sd / weight.sum() / abs(expected), rtol=1e-8)
    table = effect.summary().splitlines()
    assert table[1].split() == ["effect", "output", "mean", "sd", "lower", "upper", "p"]
    assert [line.split()[:2] for line in table[3:]] == [
        [e, n] for e in ("average", "cumulative", "relative") for n in "01"
    ]


def test_uncertain_parameters_move_the_forecast(system):
    """A covariance of rank one, against finite differences of the effect along its direction."""
    flat, unravel = ravel_pytree(system.params)
    weights = eqx.tree_at(
        lambda p: p.dynamics.weights, jax.tree.map(jnp.zeros_like, system.params), 0.1 * jnp.ones((2, 2))
    )
    direction = ravel_pytree(weights)[0]

    def average(size):
        return issm.observed_effect(
            unravel(flat + size * direction), system.emissions, system.inputs, start=7
        ).average.mean

    slope = (average(1e-4) - average(-1e-4)) / 2e-4
    effect = issm.observed_effect(
        system.params, system.emissions, system.inputs, start=7, parameters=jnp.outer(direction, direction)
    ).average
    np.testing.assert_allclose(effect.parameter.sd, np.abs(slope), rtol=1e-5)
    np.testing.assert_allclose(effect.total.sd, np.hypot(effect.parameter.sd, effect.trial.sd), rtol=1e-9)


def test_a_fit_keeps_the_structure_and_finds_the_rest():
    rng = np.random.default_rng(1)
    driver = rng.normal(size=(200, 1)).cumsum(axis=0)
    series = 3.0 * driver + 0.3 * rng.normal(size=(200, 1)).cumsum(axis=0) + rng.normal(size=(200, 1))
    model = issm.structural_model(series, driver)
    fit = issm.fit_em(model.params, series, driver, trainable=model.trainable, num_iters=300)
    np.testing.assert_allclose(fit.params.emissions.input_weights, 3.0, atol=0.15)
    np.testing.assert_allclose(np.sqrt(fit.params.emissions.cov), 1.0, atol=0.2)
    np.testing.assert_allclose(np.sqrt(fit.params.dynamics.cov), 0.3, atol=0.15)
    kept = jax.tree.map(lambda old, new: bool((old == new).all()), model.params, fit.params)
    assert jax.tree.leaves(kept) == [True] * 5 + [False, True, True, False, False]


def test_the_nile_after_the_dam():
    """With a constant level the average effect is a difference of means, Cobb's (1978) drop of 1899."""
    series = NILE["volume"][:, None]
    past, after = series[:28], series[28:]
    variance = past.var(ddof=1)
    params = issm.make_lgssm_params(1000.0, 1e12, 1.0, 0.0, 1.0, variance)
    effect = issm.observed_effect(params, series, start=28)
    np.testing.assert_allclose(effect.average.mean, after.mean() - past.mean(), rtol=1e-6)
    np.testing.assert_allclose(effect.average.sd, np.sqrt(variance * (1 / 28 + 1 / 72)), rtol=1e-6)
    assert -260 < float(effect.average.mean[0]) < -235
    assert float(effect.average.total.p_value[0]) < 1e-6


def test_placebos_find_nothing_where_nothing_happened():
    """Each date is judged by what came before it, with parameters fitted to that."""
    series = NILE["volume"][:28, None]
    seen = []

    def fit(emissions, inputs):
        seen.append((len(emissions), inputs))
        return issm.make_lgssm_params(1000.0, 1e12, 1.0, 0.0, 1.0, emissions.var(ddof=1))

    placebos = issm.placebo_effects(fit, series, starts=[16, 20], num_timesteps=8)
    assert seen == [(16, None), (20, None)]
    expected = [series[s : s + 8].mean() - series[:s].mean() for s in (16, 20)]
    np.testing.assert_allclose(placebos.mean[:, 0], expected, rtol=1e-6)
    assert (placebos.total.p_value > 0.01).all()
