"""Many trials of one system in NumPy, in several worlds that share every draw of noise: `docs/concepts.md`, line by line."""

import numpy as np


def factor(cov):
    """Any L with L L' = cov, which may be singular."""
    cov = np.diag(cov) if np.ndim(cov) == 1 else np.asarray(cov)
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(np.clip(values, 0.0, None))


def simulate(rng, fields, inputs, plans, num_draws, *, start=None):
    """States and emissions of `num_draws` trials under each of `plans` (mask, value, variance), all with the same noise.

    `fields` are the arguments of `make_lgssm_params`. With `start`, draws of the state before the first step, the first step is
    an ordinary arrival. Returns a list of `(states, emissions)`, each `(num_draws, num_timesteps, ...)`.
    """
    num_timesteps, d = plans[0][0].shape
    n = len(fields["emissions_weights"])
    noise = rng.normal(size=(num_timesteps, num_draws, d)) @ factor(fields["dynamics_cov"]).T
    clamp_noise = rng.normal(size=(num_timesteps, num_draws, d))
    emission_noise = rng.normal(size=(num_timesteps, num_draws, n)) @ factor(fields["emissions_cov"]).T
    if start is None:
        initial = fields["initial_mean"] + rng.normal(size=(num_draws, d)) @ factor(fields["initial_cov"]).T
    worlds = []
    for mask, value, variance in plans:
        state, states, emissions = start, [], []
        for t in range(num_timesteps):
            if t == 0 and start is None:
                free = initial
            else:
                drive = fields["dynamics_bias"] + fields["dynamics_input_weights"] @ inputs[t]
                free = state @ np.asarray(fields["dynamics_weights"]).T + drive + noise[t]
            state = np.where(mask[t], value[t] + np.sqrt(variance[t]) * clamp_noise[t], free)
            offset = fields["emissions_bias"] + fields["emissions_input_weights"] @ inputs[t]
            states.append(state)
            emissions.append(state @ np.asarray(fields["emissions_weights"]).T + offset + emission_noise[t])
        worlds.append((np.stack(states, 1), np.stack(emissions, 1)))
    return worlds


def assert_within(draws, mean, variance, *, num_errors=4.0, tol=1e-9):
    """Mean and variance of the draws are those given, within `num_errors` of their own standard errors."""
    count = len(draws)
    sd = np.sqrt(np.asarray(variance))
    off = np.abs(draws.mean(axis=0) - mean) - num_errors * sd / np.sqrt(count)
    assert (off <= tol).all(), f"mean is off by {off.max():.3g} more than {num_errors} standard errors"
    off = np.abs(draws.var(axis=0) - variance) - num_errors * sd**2 * np.sqrt(2 / count)
    assert (off <= tol).all(), f"variance is off by {off.max():.3g} more than {num_errors} standard errors"


def as_plan(intervention):
    """Mask, value and variance of an Intervention in NumPy."""
    return tuple(np.asarray(each) for each in (intervention.mask, intervention.value, intervention.variance))
