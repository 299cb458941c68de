"""`interventional_prediction` against the joint Gaussian, and against draws written from the model's definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from helpers import joint_moments, random_system, reference, relative_error
from worlds import as_plan, assert_within, simulate

SYSTEMS = {
    "full": dict(num_timesteps=6, input_dim=2, clamps="mixed"),
    "diagonal": dict(num_timesteps=6, state_dim=3, initial_cov="diagonal", dynamics_cov="diagonal", emissions_cov="diagonal",
                     clamps="zero"),
    "singular": dict(num_timesteps=6, state_dim=3, dynamics_cov="singular", initial_cov="zero", clamps="initial"),
    "varying": dict(num_timesteps=6, input_dim=1, clamps="mixed", time_varying="all"),
}  # fmt: skip


def step_covs(cov, num_timesteps):
    dim = len(cov) // num_timesteps
    blocks = cov.reshape(num_timesteps, dim, num_timesteps, dim)
    return np.stack([blocks[t, :, t] for t in range(num_timesteps)])


@pytest.mark.parametrize("name", SYSTEMS)
def test_from_the_initial_distribution(name):
    system = random_system(3, **SYSTEMS[name])
    prediction = issm.interventional_prediction(system.params, system.interventions, inputs=system.inputs)
    mean, cov = joint_moments(system)
    split = 6 * system.state_dim
    assert relative_error(prediction.states.mean.ravel(), mean[:split]) < 1e-10
    assert relative_error(prediction.states.cov, step_covs(cov[:split, :split], 6)) < 1e-10
    assert relative_error(prediction.emissions.mean.ravel(), mean[split:]) < 1e-10
    assert relative_error(prediction.emissions.cov, step_covs(cov[split:, split:], 6)) < 1e-10


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("num_past", [1, 4])
def test_after_a_history_is_smoothing_with_a_future_that_nobody_saw(name, num_past):
    system = random_system(4, missing=0.2, missing_steps=tuple(range(num_past, 6)), **SYSTEMS[name])
    history, plan, inputs = split(system, num_past)
    prediction = issm.interventional_prediction(system.params, plan, history=history, inputs=inputs)
    expected = reference(system)
    assert relative_error(prediction.states.mean, expected.smoothed_means[num_past:]) < 1e-10
    assert relative_error(prediction.states.cov, expected.smoothed_covariances[num_past:]) < 1e-10
    for t in range(num_past, 6):
        weights = np.float64(system.at("emissions_weights", t))
        cov = weights @ expected.smoothed_covariances[t] @ weights.T + np.float64(system.at("emissions_cov", t))
        assert relative_error(prediction.emissions.cov[t - num_past], cov) < 1e-10


def split(system, num_past):
    """The system's data as a history, a plan and the inputs of the horizon."""
    pick = lambda array, *steps: None if array is None else array[slice(*steps)]  # noqa: E731
    clamps = system.interventions
    past, ahead = (jax.tree.map(lambda leaf, s=s: leaf[s], clamps) for s in (slice(num_past), slice(num_past, None)))
    history = issm.History(system.emissions[:num_past], pick(system.inputs, num_past), past)
    return history, ahead, pick(system.inputs, num_past, None)


@pytest.mark.parametrize("state_dim", [2, 5, 10])
def test_draws_from_the_definition(state_dim):
    diagonal = "diagonal" if state_dim == 5 else "full"
    system = random_system(5, state_dim=state_dim, emission_dim=2, num_timesteps=4, input_dim=1, dynamics_cov=diagonal)
    plan = issm.merge(
        issm.do({0: 0.0}, num_timesteps=4, state_dim=state_dim, start=1),
        issm.do({1: [2.0, -1.0]}, num_timesteps=4, state_dim=state_dim, start=1, stop=3),
    )
    prediction = issm.interventional_prediction(system.params, plan, inputs=system.inputs)
    ((states, emissions),) = simulate(np.random.default_rng(0), system.fields, system.inputs, [as_plan(plan)], 100_000)
    assert_within(states, prediction.states.mean, prediction.states.sd**2)
    assert_within(emissions, prediction.emissions.mean, prediction.emissions.sd**2)


def test_leading_axes():
    """Trials come from any of the arguments, and each is what it is alone."""
    system = random_system(6, num_trials=2, num_timesteps=5, input_dim=1, shared_inputs=False, missing=0.2)
    plan = issm.do({0: 1.0}, num_timesteps=3, state_dim=2, start=1)
    plans = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), plan)
    history = issm.History(system.emissions, system.inputs)
    ahead = system.inputs[:, :3]
    together = issm.interventional_prediction(system.params, plans, history=history, inputs=ahead)
    assert together.emissions.cov.shape == (2, 3, 3, 3)
    for k in range(2):
        alone = issm.interventional_prediction(
            system.params,
            jax.tree.map(lambda leaf, k=k: leaf[k], plans),
            history=issm.History(system.emissions[k], system.inputs[k]),
            inputs=ahead[k],
        )
        jax.tree.map(lambda a, b, k=k: np.testing.assert_allclose(a[k], b, rtol=1e-10, atol=1e-12), together, alone)
    for options in (
        dict(plan=plans, inputs=ahead[0]),
        dict(plan=plan, inputs=ahead),
        dict(plan=plan, inputs=ahead[0], history=history),
        dict(plan=plans, inputs=ahead[0], history=issm.History(system.emissions[0], system.inputs[0])),
    ):
        assert issm.interventional_prediction(system.params, **options).states.mean.shape == (2, 3, 2)


def test_a_clamped_step_has_no_spread_and_intervals_are_normal():
    system = random_system(7)
    plan = issm.do({0: 0.0, 1: 3.0}, num_timesteps=4, state_dim=2, start=2, stop=3)
    prediction = issm.interventional_prediction(system.params, plan)
    np.testing.assert_array_equal(prediction.states.mean[2], [0.0, 3.0])
    np.testing.assert_array_equal(prediction.states.cov[2], np.zeros((2, 2)))
    lower, upper = prediction.emissions.interval(0.9)
    np.testing.assert_allclose((upper - lower) / prediction.emissions.sd, 2 * 1.6448536269514722)
    np.testing.assert_allclose((upper + lower) / 2, prediction.emissions.mean, atol=1e-12)


def test_single_precision():
    system = random_system(8, num_timesteps=5, input_dim=1, clamps="mixed")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), system.params)
    history, plan, inputs = split(system, 2)
    single = issm.interventional_prediction(params, plan, history=history, inputs=inputs)
    double = issm.interventional_prediction(system.params, plan, history=history, inputs=inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(single)} == {jnp.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), single, double)
