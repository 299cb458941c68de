"""Predictions, effects and counterfactuals by draws, against closed forms and against loops."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from helpers import assert_refused, random_system
from issm.models.couplings import couple
from issm.models.emissions import Emission

KEY = jax.random.key(0)
NUM_DRAWS = 4000
SYSTEM = random_system(
    3, num_trials=2, num_timesteps=6, input_dim=1, clamps="mixed", missing=0.2, shared_interventions=False
)
PLAN = issm.do({0: 1.5}, num_timesteps=6, state_dim=2, start=1, stop=4)
GAUSSIAN = issm.ssm_from_lgssm(SYSTEM.params)
LINEAR = issm.make_lgssm_params([0.2, 0.0], [0.3, 0.2], [[0.7, -0.3], [0.4, 0.6]], [0.05, 0.1], np.eye(2), [0.1, 0.1])
MAP = issm.LinearMap([[1.0, 0.5], [-0.5, 1.0], [0.3, -1.0]], [0.5, 1.0, 0.0])
POISSON = issm.SSM(LINEAR.initial, LINEAR.dynamics, issm.PoissonEmission(MAP, 2.0, link="exp"))


def assert_within(draws, mean, variance=None, errors=5.0):
    """Means (and variances) of draws within their Monte-Carlo errors; exact where nothing varies."""
    draws = np.moveaxis(np.asarray(draws), -3, 0)
    sd = draws.std(axis=0)
    slack = errors * sd / len(draws) ** 0.5 + 1e-9
    assert (np.abs(draws.mean(axis=0) - mean) < slack).all()
    if variance is not None:
        fourth = ((draws - draws.mean(axis=0)) ** 4).mean(axis=0)
        slack = errors * np.sqrt(np.maximum(fourth - sd**4, 0.0) / len(draws)) + 1e-9
        assert (np.abs(sd**2 - variance) < slack).all()


def variances(moments):
    return np.diagonal(np.asarray(moments.cov), axis1=-2, axis2=-1)


def past():
    return issm.History(SYSTEM.emissions, SYSTEM.inputs, SYSTEM.data[1]["interventions"])


def test_prediction_of_a_linear_model_is_the_closed_form():
    inputs = np.broadcast_to(np.linspace(-1, 1, 6)[:, None], (2, 6, 1))
    exact = issm.interventional_prediction(SYSTEM.params, PLAN, history=past(), inputs=inputs)
    ours = issm.sample_prediction(KEY, GAUSSIAN, PLAN, history=past(), inputs=inputs, num_draws=NUM_DRAWS)
    for name in ("states", "emissions"):
        found, expected = getattr(ours, name), getattr(exact, name)
        assert_within(found.draws, expected.mean, variances(expected))
        np.testing.assert_allclose(found.monte_carlo_error, found.sd / NUM_DRAWS**0.5)
    lower, upper = ours.states.interval(0.9)
    inside = (ours.states.draws >= lower[:, None]) & (ours.states.draws <= upper[:, None])
    np.testing.assert_allclose(inside.mean(axis=1)[:, 4:], 0.9, atol=2e-3)
    assert "emission 0" in ours.summary()


def test_effect_in_a_linear_model_is_the_closed_form():
    inputs = np.zeros((6, 1))
    options = {
        "inputs": inputs,
        "reference": issm.do({1: -0.5}, num_timesteps=6, state_dim=2, stop=2),
        "window": "after",
    }
    for of in ("emissions", "states", issm.Readout(np.array([[1.0, -1.0]]), of="states")):
        exact = issm.causal_effect(SYSTEM.params, PLAN, of=of, **options)
        ours = issm.sample_effect(KEY, GAUSSIAN, PLAN, of=of, num_draws=NUM_DRAWS, **options)
        for name in ("per_step", "cumulative", "average"):
            found, expected = getattr(ours, name), getattr(exact, name)
            error = 5 * found.sd / NUM_DRAWS**0.5 + 1e-9
            assert (jnp.abs(found.mean - expected.mean) < error).all(), name
            np.testing.assert_allclose(found.sd, expected.sd, rtol=0.1, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(ours.monte_carlo_error, ours.per_step.sd / NUM_DRAWS**0.5)


def test_counterfactual_of_a_linear_model_is_the_closed_form():
    """With missing entries, a full R, noisy clamps and clamps that are lifted."""
    arguments, options = SYSTEM.data
    exact = issm.counterfactual(SYSTEM.params, arguments[0], PLAN, inputs=arguments[1], **options)
    ours = issm.sample_counterfactual(
        KEY, GAUSSIAN, arguments[0], PLAN, inputs=arguments[1], num_draws=NUM_DRAWS, **options
    )
    for name in ("states", "emissions"):
        expected = getattr(exact, name)
        assert_within(getattr(ours, name).draws, expected.mean, variances(expected))


def test_effect_on_counts_is_that_of_loops():
    """Both worlds by loops in NumPy, from the equations of the model."""
    rng, num = np.random.default_rng(0), 40_000
    dynamics, initial = LINEAR.dynamics, LINEAR.initial
    mask, value = np.asarray(PLAN.mask), np.asarray(PLAN.value)
    worlds = np.zeros((2, num, 2))
    rates = np.zeros((2, 6, 3))
    for t in range(6):
        noise = rng.normal(size=(num, 2)) * np.sqrt(initial.cov if t == 0 else dynamics.cov)
        for world, clamped in enumerate((np.zeros(2, bool), mask[t])):
            free = np.asarray(initial.mean) if t == 0 else worlds[world] @ np.asarray(dynamics.weights).T
            worlds[world] = np.where(clamped, value[t], free + noise)
            rates[world, t] = 2.0 * np.exp(worlds[world] @ np.asarray(MAP.weights).T + np.asarray(MAP.bias)).mean(
                axis=0
            )
    effect = issm.sample_effect(KEY, POISSON, PLAN, num_draws=NUM_DRAWS)
    error = 5 * np.sqrt(effect.monte_carlo_error**2 * (1 + NUM_DRAWS / num)) + 1e-9
    assert (np.abs(effect.mean - (rates[1] - rates[0])) < error).all()
    np.testing.assert_array_equal(effect.mean[0], 0.0)
    np.testing.assert_allclose(
        effect.relative.mean, (rates[1] - rates[0]).mean(axis=0) / rates[0].mean(axis=0), rtol=0.05
    )


def test_equal_plans():
    """No effect; and the counterfactual is the trial itself."""
    counts = issm.sample(KEY, POISSON, 6, interventions=PLAN)[1]
    nothing = issm.sample_effect(KEY, POISSON, PLAN, reference=PLAN, num_draws=10)
    np.testing.assert_array_equal(nothing.mean, 0.0)
    np.testing.assert_array_equal(nothing.per_step.total.p_value, 1.0)
    same = issm.sample_counterfactual(KEY, POISSON, counts, PLAN, interventions=PLAN, num_draws=10)
    np.testing.assert_array_equal(same.emissions.draws, np.broadcast_to(counts, (10, 6, 3)))


def test_counterfactual_counts_before_the_plans_differ_are_those_observed():
    counts = issm.sample(KEY, POISSON, 6)[1]
    other = issm.sample_counterfactual(KEY, POISSON, counts, PLAN, num_draws=50)
    np.testing.assert_array_equal(other.emissions.draws[:, 0], np.broadcast_to(counts[0], (50, 3)))
    assert (np.asarray(other.emissions.draws)[:, 1:] != np.asarray(counts)[1:]).any()
    np.testing.assert_allclose(other.states.draws[:, 1:4, 0], 1.5, rtol=1e-12)


EMISSIONS = {
    "gaussian": issm.GaussianEmission(MAP, [[0.5, 0.2, 0.0], [0.2, 0.4, 0.1], [0.0, 0.1, 0.3]]),
    "poisson": issm.PoissonEmission(MAP, 2.0),
    "negative binomial": issm.NegativeBinomialEmission(MAP, [2.0, 5.0, 20.0]),
    "bernoulli": issm.BernoulliEmission(MAP),
}


@pytest.mark.parametrize("name", EMISSIONS)
def test_coupled_emissions_have_the_distribution_of_the_other_world(name):
    """Drawn as $y \\sim p(\\eta)$ and then given y, $y'$ has the moments of $p(\\eta')$; where y is missing too."""
    emission, num = EMISSIONS[name], 20_000
    here = jnp.broadcast_to(jnp.array([0.3, -0.4, 1.0]), (num, 3))
    there = jnp.broadcast_to(jnp.array([1.0, -1.0, 1.0]), (num, 3))
    keys = jax.random.split(KEY, 3)
    drawn, direct = emission.sample(keys[0], here), np.asarray(emission.sample(keys[1], there))
    drawn = jnp.where(jnp.arange(num)[:, None] % 4 == 0, jnp.nan, drawn)
    coupled = np.asarray(couple(emission, keys[2], drawn, here, there))
    error = 5 * np.sqrt(2 / num)
    assert (np.abs(coupled.mean(axis=0) - direct.mean(axis=0)) < error * direct.std(axis=0)).all()
    fourth = ((direct - direct.mean(axis=0)) ** 4).mean(axis=0)
    assert (np.abs(coupled.var(axis=0) - direct.var(axis=0)) < error * np.sqrt(fourth)).all()
    seen = ~np.isnan(np.asarray(drawn))
    np.testing.assert_array_equal(coupled[:, 2][seen[:, 2]], np.asarray(drawn)[:, 2][seen[:, 2]])  # equal predictors


class Own(Emission):
    """An emission model of the user's own."""

    map: Callable
    input_weights: jax.Array | None
    inner: issm.PoissonEmission

    def mean(self, predictors):
        return self.inner.mean(predictors)

    def log_prob(self, emissions, predictors):
        return self.inner.log_prob(emissions, predictors)

    def sample(self, key, predictors):
        return self.inner.sample(key, predictors)

    def local_information(self, emissions, predictors):
        return self.inner.local_information(emissions, predictors)


OWN = issm.SSM(LINEAR.initial, LINEAR.dynamics, Own(MAP, None, EMISSIONS["poisson"]))
BAD = {
    "one draw": (lambda: issm.sample_effect(KEY, POISSON, PLAN, num_draws=1), "num_draws"),
    "a linear model": (lambda: issm.sample_prediction(KEY, LINEAR, PLAN), "model"),
    "half an event": (
        lambda: issm.sample_prediction(KEY, POISSON, PLAN, history=issm.History(np.full((3, 3), 0.5))), "history.emissions"),
    "a longer plan": (lambda: issm.sample_counterfactual(KEY, POISSON, np.ones((4, 3)), PLAN), "plan"),
    "an emission without a coupling": (
        lambda: issm.sample_counterfactual(KEY, OWN, np.ones((6, 3)), PLAN, num_draws=2), "model.emission"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_say_what_is_wrong(name):
    assert_refused(*BAD[name])
