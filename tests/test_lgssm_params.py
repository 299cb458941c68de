"""Parameters: what `make_lgssm_params` builds. Refusals are in `test_bad_input.py`."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from issm.models.fields import as_matrix, is_diagonal, over_time
from issm.models.lgssm import check_params

ARRAYS = {
    "initial_mean": np.zeros(2),
    "initial_cov": np.eye(2),
    "dynamics_weights": 0.5 * np.eye(2),
    "dynamics_cov": np.ones(2),
    "emissions_weights": np.ones((3, 2)),
    "emissions_cov": np.eye(3),
}


def test_sizes_and_defaults():
    params = issm.make_lgssm_params(**ARRAYS)
    assert (params.state_dim, params.emission_dim, params.input_dim) == (2, 3, 0)
    for block, size in ((params.dynamics, 2), (params.emissions, 3)):
        np.testing.assert_array_equal(block.bias, np.zeros(size))
        assert block.input_weights.shape == (size, 0)


def test_every_argument_lands_in_its_field():
    given = ARRAYS | {
        "dynamics_bias": np.arange(2.0),
        "dynamics_input_weights": np.arange(2.0)[:, None],
        "emissions_bias": np.arange(3.0),
        "emissions_input_weights": np.arange(3.0)[:, None],
    }
    params = issm.make_lgssm_params(**given)
    for argument, value in given.items():
        block, name = argument.split("_", 1)
        np.testing.assert_array_equal(getattr(getattr(params, block), name), value)


@pytest.mark.parametrize("name", ["dynamics_input_weights", "emissions_input_weights"])
def test_one_kind_of_input_weights_fills_the_other_with_zeros(name):
    size = 2 if name.startswith("dynamics") else 3
    params = issm.make_lgssm_params(**ARRAYS, **{name: np.ones((size, 4))})
    assert params.input_dim == 4
    assert params.dynamics.input_weights.shape == (2, 4)
    assert params.emissions.input_weights.shape == (3, 4)
    assert float(params.dynamics.input_weights.sum() + params.emissions.input_weights.sum()) == 4 * size


def test_numbers_make_a_scalar_model():
    params = issm.make_lgssm_params(0, 1, 0.9, 0.1, 1, 0.5, dynamics_bias=2)
    assert params.dynamics.weights.shape == params.emissions.weights.shape == (1, 1)
    assert params.initial.cov.shape == params.dynamics.cov.shape == params.emissions.cov.shape == (1,)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float64")}


def test_dtype_is_the_widest_of_the_jax_arrays():
    single = ARRAYS | {"dynamics_weights": jnp.eye(2, dtype=jnp.float32)}
    params = issm.make_lgssm_params(**single)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    params = issm.make_lgssm_params(**single | {"dynamics_cov": jnp.ones(2)})
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float64")}


def test_parameters_are_frozen():
    params = issm.make_lgssm_params(**ARRAYS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.dynamics.bias = jnp.ones(2)  # pyright: ignore


@pytest.mark.parametrize("size", [2, 3])
def test_time_is_never_guessed_from_shapes(size):
    """A square covariance whose size is the number of steps is a covariance; one marked as varying is not."""
    params = issm.make_lgssm_params(
        np.zeros(size), np.ones(size), np.eye(size), np.eye(size), np.eye(size), np.eye(size)
    )
    assert not is_diagonal(params.emissions.cov)
    assert over_time(params.emissions.cov, size).shape == (size, size, size)
    varying = issm.make_lgssm_params(
        np.zeros(size), np.ones(size), np.eye(size), np.eye(size), np.eye(size), issm.TimeVarying(np.ones((size, size)))
    )
    assert is_diagonal(varying.emissions.cov)
    assert over_time(varying.emissions.cov, size).shape == (size, size)
    np.testing.assert_array_equal(as_matrix(varying.emissions.cov).values, np.stack([np.eye(size)] * size))


def test_every_dynamics_and_emissions_field_may_vary():
    fields = {
        "dynamics_weights": (2, 2), "dynamics_bias": (2,), "dynamics_input_weights": (2, 1), "dynamics_cov": (2,),
        "emissions_weights": (3, 2), "emissions_bias": (3,), "emissions_input_weights": (3, 1), "emissions_cov": (3,),
    }  # fmt: skip
    varying = {name: issm.TimeVarying(np.ones((5, *shape))) for name, shape in fields.items()}
    params = issm.make_lgssm_params(**ARRAYS | varying)
    assert (params.state_dim, params.emission_dim, params.input_dim) == (2, 3, 1)


@pytest.mark.parametrize("cov", [np.zeros(2), np.zeros((2, 2)), np.ones((2, 2))])
def test_state_covariances_may_be_singular(cov):
    params = issm.make_lgssm_params(**ARRAYS | {"initial_cov": cov, "dynamics_cov": cov})
    np.testing.assert_array_equal(params.dynamics.cov, cov)


def test_rounding_is_not_asymmetry_or_indefiniteness():
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(2, 1))
    cov = factor @ factor.T + 1e-17 * rng.normal(size=(2, 2))
    issm.make_lgssm_params(**ARRAYS | {"dynamics_cov": cov})
    issm.make_lgssm_params(**ARRAYS | {"dynamics_cov": jnp.asarray(cov, jnp.float32)})


def test_parameters_are_built_under_transformations():
    def total(scale):
        params = issm.make_lgssm_params(
            **ARRAYS | {"dynamics_weights": scale * jnp.eye(2), "emissions_cov": scale * jnp.ones(3)}
        )
        check_params(params)
        return params.dynamics.weights.sum() + params.emissions.cov.sum()

    assert float(jax.jit(total)(2.0)) == 10.0
    assert float(jax.grad(total)(2.0)) == 5.0
    np.testing.assert_array_equal(jax.vmap(total)(jnp.arange(3.0)), [0.0, 5.0, 10.0])


def test_parameters_edited_field_by_field_are_a_pytree():
    params = issm.make_lgssm_params(**ARRAYS)
    edited = eqx.tree_at(lambda p: p.dynamics.bias, params, jnp.ones(2))
    check_params(edited)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, edited)
    np.testing.assert_array_equal(doubled.dynamics.bias, [2.0, 2.0])
    np.testing.assert_array_equal(params.dynamics.bias, [0.0, 0.0])


def test_batched_parameters_pass_through_vmap():
    params = issm.make_lgssm_params(**ARRAYS)
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    traces = jax.vmap(lambda p: jnp.trace(p.dynamics.weights))(batch)
    np.testing.assert_array_equal(traces, [1.0, 2.0])
