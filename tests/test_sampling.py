"""Draws against the moments of the joint Gaussian: means and covariances within five standard errors, fixed keys."""

import jax
import numpy as np
import pytest

import issm
from helpers import joint_moments, random_system, reference

NUM_DRAWS = 20_000
OPTIONS = {
    "full": dict(num_timesteps=4, input_dim=1, clamps="mixed", missing=0.3, missing_steps=(2,)),
    "diagonal": dict(num_timesteps=4, state_dim=3, emission_dim=2, initial_cov="diagonal", clamps="initial",
                     dynamics_cov="diagonal", emissions_cov="diagonal", missing=0.2),
    "varying": dict(num_timesteps=3, input_dim=1, clamps="perfect", time_varying="all", missing=0.2),
    "singular": dict(num_timesteps=4, state_dim=2, dynamics_cov="singular", initial_cov="zero", missing=0.2),
}  # fmt: skip


def assert_moments(draws, mean, cov):
    draws = np.asarray(draws).reshape(len(draws), -1)
    scale = np.sqrt(np.diag(cov))
    standard_error = np.sqrt((np.outer(scale, scale) ** 2 + cov**2) / len(draws))
    assert (np.abs(draws.mean(axis=0) - mean) <= 5 * scale / np.sqrt(len(draws)) + 1e-9).all()
    assert (np.abs(np.cov(draws.T) - cov) <= 5 * standard_error + 1e-9).all()


@pytest.fixture(scope="module", params=OPTIONS)
def system(request):
    return random_system(7, **OPTIONS[request.param])


def test_prior_draws_have_the_moments_of_the_joint_gaussian(system):
    @jax.jit
    @jax.vmap
    def draw(key):
        return issm.lgssm_sample(
            key, system.params, system.num_timesteps, system.inputs, interventions=system.interventions
        )

    states, emissions = draw(jax.random.split(jax.random.key(0), NUM_DRAWS))
    stacked = np.concatenate([states.reshape(NUM_DRAWS, -1), emissions.reshape(NUM_DRAWS, -1)], axis=1)
    assert_moments(stacked, *joint_moments(system))
    assert_clamped(states, system)


def test_posterior_draws_have_the_moments_of_the_joint_gaussian(system):
    arguments, options = system.data
    draws = issm.posterior_sample(jax.random.key(1), system.params, *arguments, **options, num_samples=NUM_DRAWS)
    expected = reference(system)
    assert draws.shape == (NUM_DRAWS, system.num_timesteps, system.state_dim)
    assert_moments(draws, expected.smoothed_means.ravel(), expected.joint_smoothed_covariance)
    assert_clamped(draws, system)


def assert_clamped(states, system):
    """A perfect clamp is its value, to the last bit, in every draw."""
    _, _, mask, value, variance = system.trial(0)
    perfect = mask & (variance == 0)
    assert (np.asarray(states)[:, perfect] == value[perfect]).all()


def test_trials_are_drawn_with_noise_of_their_own():
    system = random_system(8, num_trials=2, input_dim=1, clamps="perfect", shared_inputs=False)
    options = {"interventions": system.interventions}
    states, emissions = issm.lgssm_sample(jax.random.key(0), system.params, 6, system.inputs, **options)
    assert states.shape == (2, 6, 2)
    assert emissions.shape == (2, 6, 3)
    free = ~system.mask
    assert (np.asarray(states)[0][free] != np.asarray(states)[1][free]).all()
    same_inputs = np.stack([system.inputs[0]] * 2)
    states, _ = issm.lgssm_sample(jax.random.key(0), system.params, 6, same_inputs, **options)
    assert (np.asarray(states)[0][free] != np.asarray(states)[1][free]).all()
    paths = issm.posterior_sample(
        jax.random.key(0), system.params, system.emissions, system.inputs, **options, num_samples=3
    )
    assert paths.shape == (2, 3, 6, 2)
    assert len(np.unique(np.asarray(paths)[:, :, 0, 0])) == 6


def test_draws_follow_the_key():
    params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])

    def draw(seed):
        return issm.lgssm_sample(jax.random.key(seed), params, 5)[0]

    np.testing.assert_array_equal(draw(0), draw(0))
    assert (np.asarray(draw(0)) != np.asarray(draw(1))).all()
