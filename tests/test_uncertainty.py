"""`parameter_covariance` against second differences of a density in NumPy, textbook standard errors, and what is not identified."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import issm
from issm.fitting import uncertainty
from issm.inference.information import along, free_directions
from issm.models.fields import as_matrix
from issm.models.trials import as_trials


def log_density(params, emissions, mask, value):
    """The log density of trials that share clamps and missing entries, each one Gaussian vector, NaN left out."""
    p = jax.tree.map(np.asarray, params)
    full = lambda cov: np.diag(cov) if cov.ndim == 1 else cov  # noqa: E731
    num_timesteps, d = mask.shape
    onward, noise = np.zeros((2, num_timesteps, d, num_timesteps, d))
    shift = np.zeros((num_timesteps, d))
    for t in range(num_timesteps):
        free = ~mask[t]
        own = p.initial.mean if t == 0 else p.dynamics.bias
        shift[t] = np.where(free, own, value[t])
        noise[t, :, t] = full(p.initial.cov if t == 0 else p.dynamics.cov) * np.outer(free, free)
        if t:
            onward[t, :, t - 1] = p.dynamics.weights * free[:, None]
    size = num_timesteps * d
    solve = np.linalg.inv(np.eye(size) - onward.reshape(size, size))
    loadings = np.kron(np.eye(num_timesteps), p.emissions.weights)
    mean = loadings @ solve @ shift.ravel() + np.tile(p.emissions.bias, num_timesteps)
    cov = loadings @ solve @ noise.reshape(size, size) @ solve.T @ loadings.T
    cov = cov + np.kron(np.eye(num_timesteps), full(p.emissions.cov))
    flat = emissions.reshape(len(emissions), -1)
    seen = ~np.isnan(flat[0])
    residuals, cov = (flat - mean)[:, seen], cov[np.ix_(seen, seen)]
    _, log_det = np.linalg.slogdet(2 * np.pi * cov)
    return -(len(flat) * log_det + (residuals * np.linalg.solve(cov, residuals.T).T).sum()) / 2


def second_differences(log_prob, params, directions, step):
    """Minus the matrix of them along columns of the raveled parameters."""
    flat, unravel = ravel_pytree(params)
    at = lambda *moves: log_prob(unravel(flat + step * sum(moves)))  # noqa: E731
    information = np.zeros((directions.shape[1],) * 2)
    for i, a in enumerate(directions.T):
        for j, b in enumerate(directions.T[: i + 1]):
            bend = at(a, b) - at(a, -b) - at(-a, b) + at(-a, -b)
            information[i, j] = information[j, i] = -bend / (4 * step**2)
    return information


def only(params, *where):
    """A `trainable` that frees the fields named."""
    frozen = jax.tree.map(lambda _: False, params)
    return eqx.tree_at(lambda p: [f(p) for f in where], frozen, [True] * len(where))


def places(params, *where):
    """Where fields stand in the raveled parameters."""
    flat, unravel = ravel_pytree(params)
    order = unravel(jnp.arange(flat.size, dtype=flat.dtype))
    return [np.asarray(f(order)).astype(int) for f in where]


def weights(p):
    return p.dynamics.weights


def process_cov(p):
    return p.dynamics.cov


def noise_cov(p):
    return p.emissions.cov


TWO_STATES = issm.make_lgssm_params(
    initial_mean=[0.3, -0.2],
    initial_cov=[[1.0, 0.2], [0.2, 0.5]],
    dynamics_weights=[[0.7, 0.3], [-0.2, 0.8]],
    dynamics_cov=[[0.5, 0.2], [0.2, 0.4]],
    emissions_weights=[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]],
    emissions_cov=[0.3, 0.2, 0.4],
    dynamics_bias=[0.1, 0.2],
    emissions_bias=[0.0, 1.0, -1.0],
)
NUM_TIMESTEPS, NUM_TRIALS = 16, 24
PLAN = issm.merge(
    issm.do({0: 2.0}, num_timesteps=NUM_TIMESTEPS, state_dim=2, start=3, stop=7),
    issm.do({1: -1.0}, num_timesteps=NUM_TIMESTEPS, state_dim=2, start=9, stop=13),
)


def draw(params, num_timesteps, plan=None, num_trials=None, seed=0):
    sample = lambda key: issm.lgssm_sample(key, params, num_timesteps, interventions=plan)[1]  # noqa: E731
    key = jax.random.key(seed)
    return np.array(sample(key) if num_trials is None else jax.vmap(sample)(jax.random.split(key, num_trials)))


def test_inverse_of_second_differences_with_clamps_missing_entries_and_a_full_covariance():
    emissions = draw(TWO_STATES, NUM_TIMESTEPS, PLAN, NUM_TRIALS)
    emissions[:, 3, 1] = emissions[:, 7] = np.nan
    result = issm.parameter_covariance(
        TWO_STATES, emissions, interventions=PLAN, trainable=only(TWO_STATES, weights, process_cov)
    )
    assert result.reason == "every free parameter is identified"

    flat, _ = ravel_pytree(TWO_STATES)
    a, q = places(TWO_STATES, weights, process_cov)
    columns = [[i] for i in a.ravel()] + [[q[0, 0]], [q[1, 0], q[0, 1]], [q[1, 1]]]
    directions = np.stack([np.isin(np.arange(flat.size), column).astype(float) for column in columns], axis=1)
    mask, value = np.asarray(PLAN.mask), np.asarray(PLAN.value)
    differences = [
        second_differences(lambda p: log_density(p, emissions, mask, value), TWO_STATES, directions, step)
        for step in (2e-3, 4e-3)
    ]
    expected = directions @ np.linalg.inv((4 * differences[0] - differences[1]) / 3) @ directions.T
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    scale = np.where(scale > 0, scale, 1.0)
    np.testing.assert_allclose(result.covariance / scale, expected / scale, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(result.covariance)[expected == 0], 0.0)
    errors, _ = ravel_pytree(result.standard_errors)
    np.testing.assert_allclose(errors, np.sqrt(np.diag(expected)), rtol=1e-5)
    assert result.standard_errors.dynamics.cov[0, 1] == result.standard_errors.dynamics.cov[1, 0] > 0

    effect = issm.causal_effect(TWO_STATES, PLAN, parameters=result.covariance)
    assert bool((effect.per_step.parameter.sd[4:] > 0).all())


def test_information_of_the_predictions_where_some_trials_share_a_pattern():
    """F by differences of the one-step predictions, trial by trial."""
    emissions = draw(TWO_STATES, NUM_TIMESTEPS, PLAN, 3)
    emissions[1, 3, 1] = emissions[1, 5] = np.nan
    trials = as_trials(TWO_STATES, emissions, None, PLAN)
    assert trials.num_patterns == 2
    assert trials.pattern is not None
    directions = free_directions(TWO_STATES, only(TWO_STATES, weights))
    at = along(TWO_STATES, directions)
    step = 1e-5 * np.eye(directions.shape[1])

    def predictions(params, emissions):
        found = issm.lgssm_filter(params, emissions, interventions=PLAN)
        readout = np.asarray(params.emissions.weights)
        noise = np.asarray(as_matrix(params.emissions.cov))
        means = np.asarray(found.predicted_means) @ readout.T + np.asarray(params.emissions.bias)
        return means, readout @ np.asarray(found.predicted_covariances) @ readout.T + noise

    expected = np.zeros(step.shape)
    for y in emissions:
        _, covs = predictions(TWO_STATES, y)
        either = [[predictions(at(sign * h), y) for sign in (1, -1)] for h in step]
        slopes = [[(up - down) / 2e-5 for up, down in zip(*pair, strict=True)] for pair in either]
        for t in range(NUM_TIMESTEPS):
            seen = ~np.isnan(y[t])
            if not seen.any():
                continue
            inverse = np.linalg.inv(covs[t][np.ix_(seen, seen)])
            of_means = [mean[t][seen] for mean, _ in slopes]
            of_covs = [inverse @ cov[t][np.ix_(seen, seen)] for _, cov in slopes]
            expected += np.array([[a @ inverse @ b for b in of_means] for a in of_means])
            expected += np.array([[np.trace(a @ b) / 2 for b in of_covs] for a in of_covs])
    _, _, found = uncertainty._informations(at, jnp.zeros(len(step)), trials, "sequential")
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def one_state(weight=0.8, process=1.0, noise=1.0):
    return issm.make_lgssm_params(0.0, 1.0, weight, process, 1.0, noise, dynamics_input_weights=[[1.0]])


NEVER_ON = np.zeros((50, 1))


def test_observed_autoregression_has_textbook_standard_errors():
    r"""Almost without emission noise, at the least-squares estimates: $\sqrt{q / \sum x^2}$ and $q \sqrt{2 / n}$."""
    _, emissions = issm.lgssm_sample(jax.random.key(0), one_state(noise=1e-7), 50, NEVER_ON)
    past, now = np.asarray(emissions)[:-1, 0], np.asarray(emissions)[1:, 0]
    slope = past @ now / (past @ past)
    variance = np.mean((now - slope * past) ** 2)
    params = one_state(slope, variance, 1e-7)
    result = issm.parameter_covariance(params, emissions, NEVER_ON, trainable=only(params, weights, process_cov))
    errors = result.standard_errors
    np.testing.assert_allclose(errors.dynamics.weights, np.sqrt(variance / (past @ past)), rtol=1e-4)
    np.testing.assert_allclose(errors.dynamics.cov, variance * np.sqrt(2 / len(past)), rtol=1e-4)
    np.testing.assert_array_equal([errors.emissions.cov[0], errors.initial.mean[0]], 0.0)  # fixed
    assert float(result.remaining_gain) < 1e-6

    result = issm.parameter_covariance(
        params, emissions, NEVER_ON, trainable=only(params, weights, process_cov), scale="unconstrained"
    )
    np.testing.assert_allclose(result.standard_errors.dynamics.weights, errors.dynamics.weights, rtol=1e-6)
    np.testing.assert_allclose(
        result.standard_errors.dynamics.cov, np.sqrt(2 / len(past)), rtol=1e-4
    )  # of its logarithm


def test_the_free_basis_of_unclamped_states_is_found_and_named_where_the_fit_has_not_ended():
    """D² directions of basis and D of origin change no prediction; what they leave alone is known."""
    emissions = draw(TWO_STATES, NUM_TIMESTEPS, num_trials=NUM_TRIALS)
    result = issm.parameter_covariance(TWO_STATES, emissions)
    assert float(result.remaining_gain) > 1  # the truth is no maximum
    assert int(result.num_unidentified) == 6
    assert (
        "6 directions that the data say nothing about, in initial.mean, initial.cov, dynamics.weights" in result.reason
    )
    assert np.isinf(result.standard_errors.dynamics.weights).all()
    noise = np.asarray(result.standard_errors.emissions.cov)  # the same in every basis
    assert np.isfinite(noise).all()
    assert (noise > 0).all()
    assert bool(jnp.isfinite(result.covariance).all())
    assert not result.unidentified[places(TWO_STATES, noise_cov)[0]].any()


def test_an_input_that_was_never_on_and_a_start_that_is_no_maximum():
    params = one_state()
    _, emissions = issm.lgssm_sample(jax.random.key(0), params, 50, NEVER_ON)
    gain = lambda p: p.dynamics.input_weights  # noqa: E731
    result = issm.parameter_covariance(params, emissions, NEVER_ON, trainable=only(params, gain, process_cov))
    assert result.reason == "left out: 1 direction that the data say nothing about, in dynamics.input_weights"
    assert np.isinf(result.standard_errors.dynamics.input_weights[0, 0])
    assert 0 < float(result.standard_errors.dynamics.cov[0]) < 1

    far = eqx.tree_at(process_cov, params, jnp.array([30.0]))
    result = issm.parameter_covariance(far, emissions, NEVER_ON, trainable=only(params, gain, process_cov))
    assert "1 direction along which the parameters are not at a maximum, in dynamics.cov" in result.reason
    assert np.isinf(result.standard_errors.dynamics.cov[0])

    broken = eqx.tree_at(lambda p: p.emissions.bias, params, jnp.array([1e200]))
    result = issm.parameter_covariance(broken, emissions, NEVER_ON, trainable=only(params, gain, process_cov))
    assert result.reason.startswith("no covariance")
    assert np.isnan(result.standard_errors.dynamics.cov[0])


def test_bad_input():
    emissions = np.zeros((5, 3))
    with pytest.raises(ValueError, match="scale: got 'log'"):
        issm.parameter_covariance(TWO_STATES, emissions, scale="log")
    sure = eqx.tree_at(process_cov, TWO_STATES, jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"params.dynamics.cov: got a smallest eigenvalue of 0"):
        issm.parameter_covariance(sure, emissions, scale="unconstrained")
    lopsided = eqx.tree_at(
        process_cov, jax.tree.map(lambda _: True, TWO_STATES), np.array([[True, True], [False, True]])
    )
    with pytest.raises(ValueError, match=r"trainable.dynamics.cov: got an entry frozen on one side"):
        issm.parameter_covariance(TWO_STATES, emissions, trainable=lopsided)
    with pytest.raises(ValueError, match="trainable: got Booleans that JAX traces"):
        jax.jit(lambda flag: issm.parameter_covariance(TWO_STATES, emissions, trainable=flag))(True)
    with pytest.raises(ValueError, match="trainable: got nothing but False"):
        issm.parameter_covariance(TWO_STATES, emissions, trainable=False)
