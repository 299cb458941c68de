"""Plans of clamps: what their builders put where. Refusals are in `test_bad_input.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm


def test_values_under_a_false_mask_are_dropped():
    mask = np.array([[True, False], [False, False]])
    plan = issm.Intervention(mask, np.array([[2.0, np.nan], [np.inf, 7.0]]), 3.0)
    np.testing.assert_array_equal(plan.mask, mask)
    np.testing.assert_array_equal(plan.value, [[2.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(plan.variance, [[3.0, 0.0], [0.0, 0.0]])


def test_numbers_fill_the_mask():
    plan = issm.Intervention(np.ones((2, 3, 4), dtype=bool), 1)
    assert plan.value.shape == plan.variance.shape == (2, 3, 4)
    assert (plan.num_timesteps, plan.state_dim) == (3, 4)
    assert plan.value.dtype == jnp.float64
    assert bool((plan.value == 1).all())
    assert bool((plan.variance == 0).all())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_follows_the_value(dtype):
    plan = issm.Intervention(np.ones((2, 1), dtype=bool), jnp.ones((2, 1), dtype), np.ones((2, 1)))
    assert plan.value.dtype == plan.variance.dtype == dtype


def test_no_intervention_leaves_every_state_free():
    plan = issm.no_intervention(4, 2)
    assert plan.mask.shape == (4, 2)
    assert not plan.mask.any()


def test_do_clamps_the_window_and_nothing_else():
    plan = issm.do({1: 2.0, 0: [0.0, 5.0]}, num_timesteps=5, state_dim=3, start=1, stop=3, variance=0.5)
    expected = np.zeros((5, 3), dtype=bool)
    expected[1:3, :2] = True
    np.testing.assert_array_equal(plan.mask, expected)
    np.testing.assert_array_equal(plan.value[1:3], [[0.0, 2.0, 0.0], [5.0, 2.0, 0.0]])
    np.testing.assert_array_equal(plan.variance, np.where(expected, 0.5, 0.0))


def test_do_defaults_to_the_whole_plan_and_clamps_to_zero():
    plan = issm.do({0: 0}, num_timesteps=3, state_dim=2)
    assert plan.mask[:, 0].all()
    assert not plan.mask[:, 1].any()
    assert not plan.value.any()


def test_stimulate_sums_the_active_channels_that_hit_a_state():
    targets = np.array([[1.0, 0.0, 2.0], [0.5, 0.0, 0.0]])
    plan = issm.stimulate([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]], targets)
    np.testing.assert_array_equal(plan.mask, [[0, 0, 0], [1, 0, 1], [1, 0, 1]])
    np.testing.assert_array_equal(plan.value, [[0, 0, 0], [3, 0, 6], [5, 0, 6]])


def test_stimulate_with_active_clamps_to_zero():
    active = np.array([[True], [False]])
    plan = issm.stimulate([[0.0], [2.0]], [[1.0, 0.0]], active, variance=0.1)
    np.testing.assert_array_equal(plan.mask, [[True, False], [False, False]])
    assert not plan.value.any()
    np.testing.assert_array_equal(plan.variance, [[0.1, 0.0], [0.0, 0.0]])


def test_stimulate_keeps_the_trial_axis():
    amplitudes = np.arange(12.0).reshape(2, 3, 2)
    plan = issm.stimulate(amplitudes, np.eye(2))
    np.testing.assert_array_equal(plan.value, amplitudes)
    np.testing.assert_array_equal(plan.mask, amplitudes != 0)


def test_merge_takes_every_clamp_of_either():
    a = issm.do({0: 1.0}, num_timesteps=3, state_dim=2, stop=2)
    b = issm.do({1: 0.0}, num_timesteps=3, state_dim=2, start=1, variance=2.0)
    for merged in (issm.merge(a, b), issm.merge(b, a)):
        np.testing.assert_array_equal(merged.mask, [[1, 0], [1, 1], [0, 1]])
        np.testing.assert_array_equal(merged.value, [[1, 0], [1, 0], [0, 0]])
        np.testing.assert_array_equal(merged.variance, [[0, 0], [0, 2], [0, 2]])


def test_merge_allows_equal_clamps_and_a_missing_trial_axis():
    shared = issm.do({0: 1.0}, num_timesteps=2, state_dim=1)
    trials = issm.Intervention(np.array([[[True], [False]], [[False], [False]]]), 1.0)
    merged = issm.merge(trials, shared)
    assert merged.mask.shape == (2, 2, 1)
    assert merged.mask.all()
    assert (merged.value == 1.0).all()
    traced = jax.jit(issm.merge)(trials, shared)
    jax.tree.map(np.testing.assert_array_equal, traced, merged)


def test_plans_go_through_transformations():
    mask = np.array([[True, False], [True, True]])

    def total(amplitude):
        stimulated = issm.stimulate(amplitude * jnp.ones((2, 2)), np.eye(2), np.eye(2, dtype=bool))
        plan = issm.merge(issm.Intervention(mask, amplitude), stimulated)
        return plan.value.sum() + issm.do({0: amplitude}, num_timesteps=3, state_dim=2).value.sum()

    np.testing.assert_allclose(jax.jit(total)(2.0), 12.0)
    np.testing.assert_allclose(jax.grad(total)(2.0), 6.0)
    np.testing.assert_allclose(jax.vmap(total)(jnp.arange(3.0)), [0.0, 6.0, 12.0])
    plan = issm.Intervention(mask, 1.0)
    assert jax.tree.structure(jax.tree.map(lambda leaf: leaf, plan)) == jax.tree.structure(plan)
