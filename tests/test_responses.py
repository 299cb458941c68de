"""`impulse_response` against trials simulated in two independent worlds, and against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import issm
from helpers import random_system
from worlds import as_plan, simulate

NUM_DRAWS = 100_000


def simulated_difference(system, plan, reference, *, seed=0):
    """Difference between the mean states and emissions of two independent sets of trials, and its standard error."""
    inputs = np.zeros((plan.num_timesteps, 0))
    worlds = []
    for k, each in enumerate((plan, reference)):
        rng = np.random.default_rng([seed, k])
        worlds.append(simulate(rng, system.fields, inputs, [as_plan(each)], NUM_DRAWS)[0])
    for first, second in zip(*worlds, strict=True):
        error = np.sqrt((first.var(axis=0) + second.var(axis=0)) / NUM_DRAWS)
        yield first.mean(axis=0) - second.mean(axis=0), error


@pytest.mark.parametrize(
    "options", [dict(state_dim=2, dynamics_cov="full"), dict(state_dim=5, dynamics_cov="diagonal")]
)
def test_pulse_in_simulated_trials(options):
    """A pulse in the middle of a trial: nothing but the pulse differs before, and the response follows after."""
    system = random_system(1, num_timesteps=2, emission_dim=3, **options)
    sizes = dict(num_timesteps=6, state_dim=options["state_dim"], start=2, stop=3)
    response = issm.impulse_response(system.params, 3, source=1, value=3.0)
    drawn = simulated_difference(system, issm.do({1: 3.0}, **sizes), issm.do({1: 0.0}, **sizes))
    for (difference, error), expected in zip(drawn, (response.states, response.emissions), strict=True):
        assert (np.abs(difference[:2]) < 4 * error[:2]).all()
        assert (np.abs(difference[2:] - expected) <= 4 * error[2:] + 1e-12).all()


def test_powers_of_the_dynamics():
    system = random_system(2, state_dim=5, emission_dim=3)
    weights, loading = system.fields["dynamics_weights"], system.fields["emissions_weights"]
    for source in range(5):
        response = issm.impulse_response(system.params, 7, source=source, value=-2.0)
        states = np.stack([np.linalg.matrix_power(weights, h)[:, source] * -2.0 for h in range(8)])
        np.testing.assert_allclose(response.states, states, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(response.emissions, states @ loading.T, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(response.cumulative.states, np.cumsum(states, axis=0), rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(
            response.cumulative.emissions, np.cumsum(states, axis=0) @ loading.T, rtol=1e-12, atol=1e-13
        )


def parameter_draws(params, count, scale=0.05, seed=0):
    """Draws near `params`, in the weights and bias alone."""
    flat, unravel = ravel_pytree(params)
    moved = np.zeros(flat.size)
    weights = unravel(jnp.arange(flat.size, dtype=flat.dtype))
    for leaf in (weights.dynamics.weights, weights.emissions.weights):
        moved[np.asarray(leaf, int).ravel()] = scale
    noise = np.random.default_rng(seed).normal(size=(count, flat.size)) * moved
    return jax.vmap(unravel)(flat[None] + noise), np.diag(moved**2)


def test_uncertain_parameters():
    """Draws: their own responses. A covariance: the delta method, as for the effect of the same pulse."""
    system = random_system(3, state_dim=2, emission_dim=2)
    draws, cov = parameter_draws(system.params, 200)
    response = issm.impulse_response(system.params, 3, source=0, value=2.0, parameters=draws, level=0.9)
    each = [
        [np.asarray(loading) @ np.linalg.matrix_power(np.asarray(weights), h)[:, 0] * 2.0 for h in range(4)]
        for weights, loading in zip(draws.dynamics.weights, draws.emissions.weights, strict=True)
    ]
    for part, expected in [(response.per_step, np.array(each)), (response.cumulative, np.cumsum(each, axis=1))]:
        np.testing.assert_allclose(part.emissions, expected.mean(axis=0), rtol=1e-10)
        np.testing.assert_allclose(part.emissions_spread.sd, expected.std(axis=0, ddof=1), rtol=1e-8)
        np.testing.assert_allclose(part.emissions_spread.upper, np.quantile(expected, 0.95, axis=0), rtol=1e-8)
    response = issm.impulse_response(system.params, 3, source=0, value=2.0, parameters=cov)
    sizes = dict(num_timesteps=4, state_dim=2, stop=1)
    effect = issm.causal_effect(
        system.params, issm.do({0: 2.0}, **sizes), reference=issm.do({0: 0.0}, **sizes), parameters=cov
    )
    np.testing.assert_allclose(response.emissions, effect.mean, rtol=1e-12)
    np.testing.assert_allclose(response.per_step.emissions_spread.sd, effect.per_step.parameter.sd, rtol=1e-10)
    np.testing.assert_allclose(response.cumulative.emissions_spread.lower, effect.cumulative.lower, rtol=1e-10)
    assert float(response.level) == 0.95
