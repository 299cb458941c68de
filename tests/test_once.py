"""What is looked at once: arrays that cannot change, told apart by identity, for as long as they live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from issm._once import look_once

PARAMS = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])


@pytest.fixture
def looks():
    """A function that is looked through, and the list of what it saw."""
    seen = []

    @look_once
    def total(array):
        seen.append(array)
        return float(np.asarray(array).sum()) if not isinstance(array, jax.core.Tracer) else None

    return total, seen


def test_arrays_are_looked_at_once(looks):
    total, seen = looks
    ones, twos = jnp.ones(3), jnp.full(3, 2.0)
    assert [total(ones), total(twos), total(ones), total(twos)] == [3.0, 6.0, 3.0, 6.0]
    assert len(seen) == 2


def test_arrays_that_may_change_are_looked_at_again(looks):
    total, seen = looks
    array = np.ones(3)
    assert total(array) == 3.0
    array[0] = 5.0
    assert total(array) == 7.0
    jax.jit(lambda x: (total(x), x)[1])(jnp.ones(3))
    assert len(seen) == 3


def test_what_was_found_goes_with_its_array():
    found = look_once(lambda array: float(array.sum()))
    for number in range(200):  # a new array may get the place of one that has died
        assert found(jnp.asarray(np.full(2, float(number)))) == 2.0 * number


def test_an_entry_that_goes_missing_in_numpy_data_is_seen():
    emissions = np.zeros((4, 1))
    complete = issm.marginal_log_prob(PARAMS, emissions)
    emissions[2] = np.nan
    missing = issm.marginal_log_prob(PARAMS, emissions)
    np.testing.assert_allclose(missing, issm.marginal_log_prob(PARAMS, jnp.asarray(emissions)))
    assert complete != missing


def test_patterns_of_clamps_are_found_for_the_clamps_at_hand():
    emissions = jnp.zeros((2, 4, 1))
    mask = np.zeros((2, 4, 1), bool)
    mask[0, 1] = True
    first = issm.Intervention(mask, 1.0)
    second = issm.Intervention(mask[::-1], 1.0)
    for plan in (first, second, first):
        means = issm.lgssm_filter(PARAMS, emissions, interventions=plan).filtered_means
        np.testing.assert_array_equal(np.asarray(means[:, 1, 0]) == 1.0, np.asarray(plan.mask)[:, 1, 0])


def test_known_parameters_choose_their_method_within_jit():
    """A nearly exact observation takes square roots, whether the caller traces the data or not."""
    exact = issm.make_lgssm_params([0.0], [1e7], [[1.0]], [0.1], [[1.0]], [1e-8])
    emissions = jnp.arange(4.0)[:, None]
    inside = jax.jit(lambda y: issm.marginal_log_prob(exact, y))(emissions)
    np.testing.assert_allclose(inside, issm.marginal_log_prob(exact, emissions), rtol=1e-13)
