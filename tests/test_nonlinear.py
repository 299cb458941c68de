"""Nonlinear dynamics: equal to linear ones where the map is linear, to NumPy loops and dense Hessians where it is not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from helpers import assert_refused
from issm.metrics import r2
from issm.simulate import random_stimulation

KEY = jax.random.key(4)
T, D, N = 12, 2, 4
PLAN = issm.do({0: 0.8}, num_timesteps=T, state_dim=D, start=3, stop=6)
OTHER = issm.do({1: -0.5}, num_timesteps=T, state_dim=D, start=7, stop=9)
READOUT = issm.LinearMap([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [-0.5, 1.0]], [0.5, 0.5, 0.5, 0.5])
LINEAR = issm.make_lgssm_params(
    [0.3, -0.2], [[0.3, 0.1], [0.1, 0.2]], [[0.9, 0.3], [-0.3, 0.9]], [0.05, 0.08], np.ones((N, D)), np.ones(N),
    dynamics_bias=[0.1, 0.0], dynamics_input_weights=[[0.5], [-0.2]],
)  # fmt: skip
INPUTS = np.linspace(-1.0, 1.0, T)[:, None]


class Cycle(eqx.Module):
    """One Euler step of the van der Pol oscillator."""

    rate: jax.Array

    def __call__(self, state):
        x, v = state
        return state + 0.2 * jnp.stack([v, self.rate * (1 - x**2) * v - x])


def emission(dtype=float):
    return issm.PoissonEmission(READOUT, np.asarray(3.0, dtype))


CURVED = issm.SSM(
    LINEAR.initial, issm.NonlinearDynamics(Cycle(jnp.array(1.0)), [0.01, 0.02], [[0.3], [0.0]]), emission()
)
STATES, COUNTS = issm.sample(KEY, CURVED, T, INPUTS, interventions=PLAN)


@pytest.fixture(scope="module")
def twins():
    """The same linear model in both forms."""
    dynamics = LINEAR.dynamics
    curved = issm.NonlinearDynamics(
        issm.LinearMap(dynamics.weights, dynamics.bias), dynamics.cov, dynamics.input_weights
    )
    return tuple(issm.SSM(LINEAR.initial, each, emission()) for each in (dynamics, curved))


def test_a_linear_map_is_the_linear_model(twins):
    data = dict(interventions=PLAN)
    densities = [issm.log_joint(model, STATES, COUNTS, INPUTS, **data) for model in twins]
    np.testing.assert_allclose(*densities, rtol=1e-12)
    expected, actual = (issm.posterior(model, COUNTS, INPUTS, **data) for model in twins)
    for name in ("marginal_loglik", "smoothed_means", "smoothed_covariances", "smoothed_cross_covariances"):
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=1e-7, atol=1e-9, err_msg=name)


def test_fits_of_both_forms_find_the_same_noise(twins):
    """Maps are frozen; what has a closed form is equal to that of the linear model."""
    found = []
    for model in twins:
        frozen = jax.tree.map(lambda _: False, eqx.filter(model, eqx.is_inexact_array))
        free = eqx.tree_at(lambda m: (m.dynamics.cov, m.initial.mean), frozen, (True, True))
        fit = issm.fit_laplace_em(model, COUNTS, INPUTS, interventions=PLAN, num_rollout=0, num_iters=3, trainable=free)
        found.append(fit)
    np.testing.assert_allclose(found[1].params.dynamics.cov, found[0].params.dynamics.cov, rtol=1e-5)
    np.testing.assert_allclose(found[1].params.initial.mean, found[0].params.initial.mean, rtol=1e-5)
    np.testing.assert_allclose(found[1].log_probs, found[0].log_probs, rtol=1e-6)


def test_paths_are_those_of_a_loop():
    """Moments of many draws against NumPy, state by state; clamps hold exactly."""
    rng, count = np.random.default_rng(0), 20000
    x = np.array([0.3, -0.2]) + rng.normal(size=(count, D)) @ np.linalg.cholesky(LINEAR.initial.cov).T
    paths = [x]
    for t in range(1, T):
        position, speed = x.T
        x = x + 0.2 * np.stack([speed, (1 - position**2) * speed - position], axis=1) + INPUTS[t] * [0.3, 0.0]
        x = x + np.sqrt([0.01, 0.02]) * rng.normal(size=x.shape)
        x = np.where(PLAN.mask[t], PLAN.value[t], x)
        paths.append(x)
    expected = np.stack(paths, axis=1)
    drawn = issm.sample_prediction(KEY, CURVED, PLAN, inputs=INPUTS, num_draws=count).states
    np.testing.assert_array_equal(drawn.draws[:, 3:6, 0], 0.8)
    error = np.sqrt((expected.var(axis=0) + drawn.sd**2) / count)
    assert (np.abs(expected.mean(axis=0) - drawn.mean) <= 4 * error + 1e-12).all()
    np.testing.assert_allclose(drawn.sd, expected.std(axis=0), rtol=0.04, atol=1e-12)


def test_the_path_found_is_the_most_probable_one():
    result = issm.posterior(CURVED, COUNTS, INPUTS, interventions=PLAN)
    assert bool(result.converged)
    slope = jax.grad(lambda x: issm.log_joint(CURVED, x, COUNTS, INPUTS, interventions=PLAN))(result.modes)
    np.testing.assert_allclose(np.where(PLAN.mask, 0.0, slope), 0.0, atol=1e-4)
    np.testing.assert_array_equal(result.smoothed_means[3:6, 0], 0.8)


def test_fit_finds_a_limit_cycle():
    """From the linear fit: the drift that is learned turns as the true one does where the data were, the linear one does not."""
    plan = random_stimulation(
        jax.random.key(1), 60, D, num_trials=8, duration=2, gap=(8, 20), amplitude=2.0, distribution="uniform"
    )
    dynamics = issm.NonlinearDynamics(Cycle(jnp.array(1.0)), [1e-3, 1e-3])
    truth = issm.SSM(LINEAR.initial, dynamics, issm.GaussianEmission(READOUT, np.full(N, 0.01)))
    states, emissions = issm.sample(jax.random.key(2), truth, 60, interventions=plan)
    linear = issm.initialize_lgssm(KEY, emissions, D, interventions=plan).params
    start = issm.bend_dynamics(KEY, issm.ssm_from_lgssm(linear), widths=(16,))
    fit = issm.fit_laplace_em(start, emissions, interventions=plan, num_iters=150, emission_rate=5e-2)
    assert fit.rollout_log_probs.shape == (0,)
    visited = states.reshape(-1, D)
    step = lambda model: jax.vmap(model.dynamics.map)(visited) - visited  # noqa: E731
    assert float(r2(step(truth), step(start))) < 0.8
    assert float(r2(step(truth), step(fit.params))) > 0.97
    np.testing.assert_allclose(fit.params.dynamics.cov, 1e-3, rtol=0.7)
    np.testing.assert_allclose(fit.params.emission.cov, 0.01, rtol=0.3)


def test_effects_and_counterfactuals_share_the_noise():
    none = issm.sample_effect(KEY, CURVED, PLAN, reference=PLAN, inputs=INPUTS, num_draws=10)
    np.testing.assert_array_equal(none.per_step.mean, 0.0)
    past = issm.History(COUNTS, INPUTS, PLAN)
    effect = issm.sample_effect(KEY, CURVED, OTHER, history=past, inputs=INPUTS, of="states", num_draws=50)
    np.testing.assert_allclose(effect.mean[:7], 0.0, atol=1e-12)
    assert (effect.sd[7:9, 1] > 0).all()
    assert np.abs(effect.mean[9:]).min() > 0
    same = issm.sample_counterfactual(KEY, CURVED, COUNTS, PLAN, interventions=PLAN, inputs=INPUTS, num_draws=20)
    np.testing.assert_allclose(same.emissions.mean, COUNTS, atol=1e-9)


def test_a_counterfactual_is_the_path_with_the_noise_it_had():
    """Emissions that show the states: abduction finds the noise, and a NumPy loop makes the other world from it."""
    seen = issm.SSM(CURVED.initial, CURVED.dynamics, issm.GaussianEmission(READOUT, np.full(N, 1e-10)))
    states, emissions = issm.sample(KEY, seen, T, INPUTS, interventions=PLAN)
    result = issm.sample_counterfactual(
        KEY, seen, emissions, OTHER, interventions=PLAN, inputs=INPUTS, num_draws=4
    ).states.draws
    step = lambda x, t: np.asarray(Cycle(1.0)(x)) + INPUTS[t] * [0.3, 0.0]  # noqa: E731
    states = np.asarray(states)
    x = states[0]
    for t in range(1, 3):  # before the first clamp all noise is known
        x = np.where(OTHER.mask[t], OTHER.value[t], step(x, t) + states[t] - step(states[t - 1], t))
        np.testing.assert_allclose(result[:, t], np.broadcast_to(x, (4, D)), atol=1e-4)
    np.testing.assert_array_equal(result[:, 7:9, 1], -0.5)
    assert result[:, 3, 0].std() > 0.01  # the clamp hid the noise of the first state


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtypes(dtype):
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), CURVED)
    counts, inputs = np.asarray(COUNTS, dtype), np.asarray(INPUTS, dtype)
    plan = jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else leaf.astype(dtype), PLAN)
    result = issm.posterior(cast, np.stack([counts, counts]), inputs, interventions=plan)
    assert result.smoothed_means.dtype == dtype
    whole = issm.posterior(CURVED, COUNTS, INPUTS, interventions=PLAN)
    np.testing.assert_allclose(result.smoothed_means[1], whole.smoothed_means, atol=1e-3)


BAD = {
    "correlated noise": ("cov", lambda: issm.NonlinearDynamics(READOUT, np.eye(2))),
    "no noise": ("cov", lambda: issm.NonlinearDynamics(READOUT, [0.1, 0.0])),
    "no map": ("map", lambda: issm.NonlinearDynamics(3.0, [0.1, 0.1])),
    "map of other sizes": (
        "dynamics.map",
        lambda: issm.SSM(LINEAR.initial, issm.NonlinearDynamics(READOUT, [0.1, 0.1]), emission()),
    ),
    "bent twice": ("model.dynamics", lambda: issm.bend_dynamics(KEY, CURVED)),
    "correlated noise to bend": (
        "cov",
        lambda: issm.bend_dynamics(KEY, issm.ssm_from_lgssm(eqx.tree_at(lambda p: p.dynamics.cov, LINEAR, jnp.eye(2)))),
    ),
    "exact algorithms": ("model.dynamics", lambda: issm.ssm_to_lgssm(CURVED)),
    "variational": ("model.dynamics", lambda: issm.fit_vi(KEY, CURVED, None, COUNTS, INPUTS, interventions=PLAN)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_say_what_is_wrong(name):
    argument, call = BAD[name]
    assert_refused(call, argument)
