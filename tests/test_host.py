"""What is known is computed before a program runs, and nothing compiles for it."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from issm._host import on_host, to_device
from issm.causal.predict import quantile_of_level
from issm.fitting.intervals import quantiles
from issm.fitting.result import FIELDS, first_broken_field


def test_known_arrays_go_to_numpy_and_traced_ones_stay():
    known = jnp.arange(3.0)
    xp, (a, b) = on_host(known, np.ones(3))
    assert xp is np
    assert all(isinstance(array, np.ndarray) for array in (a, b))

    def traced(x):
        xp, (a, b) = on_host(x, known)
        assert xp is jnp
        assert all(mine is given for mine, given in zip((a, b), (x, known), strict=True))
        return a + b

    np.testing.assert_array_equal(jax.jit(traced)(known), [0.0, 2.0, 4.0])


def test_what_reaches_the_device_is_a_copy():
    memory = np.zeros(1024)
    for start in range(8):  # XLA may share memory that is aligned to 64 bytes
        view = memory[start : start + 64]
        array = to_device(view)
        view[:] = 1.0
        assert not np.asarray(array).any()
        memory[:] = 0.0


def test_an_array_of_another_dtype_is_converted():
    single = jnp.ones(2, jnp.float32)
    assert to_device(single) is single
    assert to_device(single, single.dtype) is single
    for dtype in (np.float64, np.dtype("float64")):
        assert to_device(single, dtype).dtype == np.float64


@pytest.mark.parametrize("level", [0.9, np.float64(0.9), np.float32(0.9), jnp.asarray(0.9)])
def test_quantiles_keep_the_dtype_of_the_draws(level):
    draws = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    lower, upper = quantiles(jnp.asarray(draws), level)
    assert lower.dtype == upper.dtype == np.float32
    np.testing.assert_allclose([lower, upper], np.quantile(draws, [0.05, 0.95], axis=0), rtol=1e-5)


def test_plans_and_parameters_are_made_without_a_program(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("something was compiled")

    monkeypatch.setattr("jax._src.compiler.backend_compile_and_load", fail)
    steps, states = 37, 3  # a shape that nothing else uses
    clamp = issm.do({1: np.linspace(0.0, 1.0, 5)}, num_timesteps=steps, state_dim=states, start=2, stop=7)
    other = issm.stimulate(np.eye(steps, 2), np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]]))
    both = issm.merge(clamp, other)
    assert int(np.asarray(both.mask).sum()) == 7
    issm.make_lgssm_params(np.zeros(3), np.ones(3), np.eye(3), np.ones(3), np.ones((11, 3)), np.ones(11))
    with pytest.raises(AssertionError, match="something was compiled"):
        jnp.zeros((steps, 41))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_the_quantile_is_that_of_the_normal_distribution(dtype):
    expected = statistics.NormalDist().inv_cdf(0.95)
    known = quantile_of_level(0.9, dtype)
    traced = jax.jit(lambda level: quantile_of_level(level, dtype))(jnp.asarray(0.9, dtype))
    narrow = jax.jit(lambda level: quantile_of_level(level, jnp.dtype(dtype)))(jnp.asarray(0.5, jnp.float32))
    np.testing.assert_allclose(narrow, quantile_of_level(0.5, dtype), rtol=1e-6 if dtype == jnp.float32 else 1e-13)
    for found in (known, traced):
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=1e-6 if dtype == jnp.float32 else 1e-13)


def test_the_first_field_that_is_not_finite_is_named():
    params = issm.make_lgssm_params(
        np.zeros(2), np.ones(2), np.eye(2), np.ones(2), np.ones((3, 2)), np.ones(3), dynamics_input_weights=np.ones((2, 1))
    )  # fmt: skip
    assert int(first_broken_field(params)) == -1
    leaves, structure = jax.tree.flatten(params)
    assert [leaf.size > 0 for leaf in leaves] == [True] * len(FIELDS)
    for place in range(len(FIELDS)):
        broken = [jnp.full_like(leaf, jnp.nan) if k >= place else leaf for k, leaf in enumerate(leaves)]
        found = first_broken_field(jax.tree.unflatten(structure, broken))
        assert int(found) == place
