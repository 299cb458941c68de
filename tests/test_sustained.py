"""`total_effects` and `controlled_direct_effect` against simulated trials, and against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from helpers import random_system
from test_responses import parameter_draws, simulated_difference


def held_for(weights, source, held, num_steps, value=1.0):
    """Difference between two worlds that hold the same states, step by step."""
    change = np.zeros(len(weights))
    change[source] = value
    course = [change]
    for _ in range(num_steps):
        change = weights @ change
        change[held] = 0.0
        change[source] = value
        course.append(change)
    return np.stack(course)


def contracting(seed, state_dim, **options):
    """A system whose total effects all exist."""
    system = random_system(seed, state_dim=state_dim, **options)
    system.fields["dynamics_weights"] *= 0.9 / np.linalg.norm(system.fields["dynamics_weights"], 2)
    return system


@pytest.mark.parametrize(
    "options", [dict(state_dim=2, dynamics_cov="full"), dict(state_dim=5, dynamics_cov="diagonal")]
)
@pytest.mark.parametrize("mediated", [False, True])
def test_clamp_in_simulated_trials(options, mediated):
    """Independent trials in each world; the mediators are held at some value, the same in both worlds."""
    system = contracting(1, num_timesteps=2, emission_dim=3, **options)
    state_dim = options["state_dim"]
    sizes = dict(num_timesteps=5, state_dim=state_dim, start=1)
    mediators = [state_dim - 1] if mediated else []
    clamps = dict.fromkeys(mediators, 0.7)
    plans = [issm.do({0: value, **clamps}, **sizes) for value in (2.0, 0.0)]
    drawn = simulated_difference(system, *plans)
    effect = issm.controlled_direct_effect(system.params, source=0, mediators=mediators, num_steps=3, value=2.0)
    for (difference, error), expected in zip(drawn, (effect.per_step.states, effect.per_step.emissions), strict=True):
        assert (np.abs(difference[:1]) < 4 * error[:1]).all()
        assert (np.abs(difference[1:] - expected) <= 4 * error[1:] + 1e-12).all()


@pytest.mark.parametrize("state_dim", [2, 5])
def test_every_pair(state_dim):
    """The limit is where the loop ends; with all others held it is the edge over the target's own leak."""
    system = contracting(2, state_dim, emission_dim=3)
    weights, loading = system.fields["dynamics_weights"], system.fields["emissions_weights"]
    total = issm.total_effects(system.params, num_steps=6, value=-2.0)
    for j in range(state_dim):
        course = held_for(weights, j, [], 600, -2.0)
        np.testing.assert_allclose(total.states[:, j], course[-1], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(total.emissions[:, j], loading @ course[-1], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(total.per_step.states[:, :, j], course[:7], rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(total.per_step.emissions[:, :, j], course[:7] @ loading.T, rtol=1e-12, atol=1e-13)
        clamped = np.delete(np.delete(weights, j, 0), j, 1)
        np.testing.assert_allclose(total.spectral_radius[j], np.abs(np.linalg.eigvals(clamped)).max(), rtol=1e-10)
        none_held = issm.controlled_direct_effect(system.params, source=j, mediators=(), value=-2.0)
        np.testing.assert_allclose(none_held.states, total.states[:, j], rtol=1e-12, atol=1e-14)
        for i in range(state_dim):
            others = [k for k in range(state_dim) if k not in (i, j)]
            if i != j:
                direct = issm.controlled_direct_effect(system.params, source=j, mediators=others, num_steps=1)
                assert direct.states[i] == pytest.approx(weights[i, j] / (1 - weights[i, i]), rel=1e-12)
                assert direct.per_step.states[1, i] == pytest.approx(weights[i, j], rel=1e-12)
                np.testing.assert_array_equal(direct.states[np.array(others, int)], 0.0)
    assert bool(total.stable.all())
    np.testing.assert_array_equal(np.diagonal(total.states), -2.0)


def test_one_mediator_of_many():
    system = contracting(3, 5, emission_dim=2)
    effect = issm.controlled_direct_effect(system.params, source=3, mediators=[1, 4], num_steps=4)
    course = held_for(system.fields["dynamics_weights"], 3, [1, 4], 600)
    np.testing.assert_allclose(effect.states, course[-1], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(effect.per_step.states, course[:5], rtol=1e-12, atol=1e-13)


def test_an_effect_without_limit():
    """A loop that feeds itself grows unless it is held; its finite steps are given all the same."""
    weights = np.array([[0.5, 0.0, 0.0], [1.0, 0.5, 1.0], [0.0, 0.5, 0.5]])  # states 1 and 2 excite each other
    params = issm.make_lgssm_params(np.zeros(3), np.ones(3), weights, np.ones(3), np.eye(3), np.ones(3))
    total = issm.total_effects(params, num_steps=30)
    assert total.stable.tolist() == [False, True, True]
    assert np.isnan(total.states[:, 0]).all()
    assert np.isnan(total.emissions[:, 0]).all()
    assert np.isfinite(total.states[:, 1:]).all()
    np.testing.assert_allclose(total.per_step.states[:, :, 0], held_for(weights, 0, [], 30), rtol=1e-12)
    held = issm.controlled_direct_effect(params, source=0, mediators=[2])
    assert bool(held.stable)
    assert held.states.tolist() == [1.0, 2.0, 0.0]

    def finite(weights, value):
        edited = issm.make_lgssm_params(np.zeros(3), np.ones(3), weights, jnp.ones(3), jnp.eye(3), jnp.ones(3))
        return jnp.nansum(issm.total_effects(edited, value=value).states)

    gradient = jax.grad(finite)(jnp.asarray(weights), 1.0)
    assert np.isfinite(gradient).all()
    draws, _ = parameter_draws(params, 3, scale=1e-3)
    spread = issm.total_effects(params, parameters=draws).limit.states_spread
    for leaf in jax.tree.leaves(spread):
        assert np.isnan(leaf[:, 0]).all()
        assert np.isfinite(leaf[:, 1:]).all()


def test_eigenvalues_that_meet_do_no_harm_to_derivatives():
    def effect(weights):
        params = issm.make_lgssm_params(jnp.zeros(3), jnp.ones(3), weights, jnp.ones(3), jnp.eye(3), jnp.ones(3))
        return issm.total_effects(params).states[2, 0]

    chain = jnp.diag(jnp.array([0.5, 0.5]), -1)
    resolvent, course = np.array([0.0, 0.5, 1.0]), np.array([1.0, 0.5, 0.25])  # the row of the source is cut
    np.testing.assert_allclose(jax.grad(effect)(chain), np.outer(resolvent, course), atol=1e-12)


def test_uncertain_parameters():
    """Draws: their own limits. A covariance: the delta method, here with derivatives by differences."""
    system = contracting(4, 2, emission_dim=1)
    draws, cov = parameter_draws(system.params, 100, scale=0.02)
    effect = issm.total_effects(system.params, parameters=draws)
    limits, radii = [], []
    for weights in np.asarray(draws.dynamics.weights):
        limits.append([[1.0, weights[0, 1] / (1 - weights[0, 0])], [weights[1, 0] / (1 - weights[1, 1]), 1.0]])
        radii.append([abs(weights[1, 1]), abs(weights[0, 0])])
    np.testing.assert_allclose(effect.states, np.mean(limits, axis=0), rtol=1e-10)
    np.testing.assert_allclose(effect.limit.states_spread.sd, np.std(limits, axis=0, ddof=1), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(effect.spectral_radius, np.max(radii, axis=0), rtol=1e-12)
    effect = issm.total_effects(system.params, parameters=cov)
    weights = system.fields["dynamics_weights"]
    leak = 1 - weights[1, 1]
    by_edge, by_leak = 1 / leak, weights[1, 0] / leak**2
    np.testing.assert_allclose(effect.limit.states_spread.sd[1, 0], 0.02 * np.hypot(by_edge, by_leak), rtol=1e-10)
    assert effect.limit.states_spread.sd[0, 0] == 0.0
