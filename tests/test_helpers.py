"""The reference against two other ways to the same numbers: textbook conditioning, and draws from the equations."""

import numpy as np
import pytest

from helpers import SYSTEMS, joint_moments, random_system, reference, relative_error

WELL_CONDITIONED = ("tall", "wide", "clamped-start", "trials", "time-varying", "one-step", "singular-noise")


@pytest.mark.parametrize("name", WELL_CONDITIONED)
def test_reference_agrees_with_dense_conditioning(name):
    system = random_system(0, **SYSTEMS[name])
    mean, cov = joint_moments(system)
    size = system.num_timesteps * system.state_dim
    emissions = system.trial(0)[0].ravel()
    seen = np.flatnonzero(~np.isnan(emissions))
    rows, residual = size + seen, emissions[seen] - mean[size + seen]
    seen_cov = cov[np.ix_(rows, rows)]
    gain = np.linalg.solve(seen_cov, cov[rows, :size]).T
    quadratic = residual @ np.linalg.solve(seen_cov, residual)
    loglik = -(len(rows) * np.log(2 * np.pi) + np.linalg.slogdet(seen_cov)[1] + quadratic) / 2
    expected = reference(system)
    means = expected.smoothed_means.ravel()
    assert relative_error(mean[:size] + gain @ residual, means) < 1e-12
    smoothed = cov[:size, :size] - gain @ cov[rows, :size]
    assert relative_error(smoothed, expected.joint_smoothed_covariance) < 1e-11
    assert relative_error(loglik, expected.marginal_loglik) < 1e-12
    assert relative_error(expected.logliks.sum(), expected.marginal_loglik) < 1e-12


def test_joint_moments_agree_with_draws_of_the_equations():
    system = random_system(3, state_dim=2, emission_dim=2, num_timesteps=4, input_dim=1, clamps="mixed")
    field = system.fields
    _, inputs, mask, value, variance = system.trial(0)
    assert mask.any()
    assert (variance[mask] > 0).any()
    assert (variance[mask] == 0).any()
    rng, num_draws = np.random.default_rng(0), 200_000

    def noise(cov):
        return rng.multivariate_normal(np.zeros(len(cov)), cov, num_draws)

    states, emissions = [], []
    for t in range(system.num_timesteps):
        if t == 0:
            state = field["initial_mean"] + noise(field["initial_cov"])
        else:
            drive = field["dynamics_input_weights"] @ inputs[t] + field["dynamics_bias"]
            state = states[-1] @ field["dynamics_weights"].T + drive + noise(field["dynamics_cov"])
        clamp = value[t] + np.sqrt(variance[t]) * rng.normal(size=state.shape)
        states.append(np.where(mask[t], clamp, state))
        offset = field["emissions_input_weights"] @ inputs[t] + field["emissions_bias"]
        emission = states[-1] @ field["emissions_weights"].T + offset + noise(field["emissions_cov"])
        emissions.append(emission)
    draws = np.concatenate(states + emissions, axis=1)
    mean, cov = joint_moments(system)
    scale = np.sqrt(np.diag(cov))
    standard_error = np.sqrt((np.outer(scale, scale) ** 2 + cov**2) / num_draws)
    assert (np.abs(draws.mean(axis=0) - mean) <= 5 * scale / np.sqrt(num_draws) + 1e-9).all()
    assert (np.abs(np.cov(draws.T) - cov) <= 5 * standard_error + 1e-9).all()
