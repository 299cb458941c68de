"""The same model in other coordinates: nothing that can be seen changes, and the states move as they should."""

import dataclasses

import jax
import numpy as np
import pytest

import issm
from helpers import joint_moments, random_system, relative_error
from issm import metrics

D = 3
MIXED = np.array([[1.0, 0.5, -0.3], [0.2, -2.0, 0.4], [0.0, 0.7, 1.5]])
MONOMIAL = np.array([[0.0, -2.0, 0.0], [0.0, 0.0, 0.5], [3.0, 0.0, 0.0]])
OFFSET = np.array([0.5, -1.0, 2.0])


def observed(**options):
    """A system with inputs and missing entries."""
    options = dict(num_trials=3, state_dim=D, emission_dim=2, input_dim=1, missing=0.2) | options
    return random_system(7, **options)


def in_other_coordinates(system, matrix, offset):
    """The system with everything moved, as loops over NumPy arrays want it."""
    params = issm.transform_params(system.params, matrix, offset)
    fields, varying = {}, []
    for block in ("initial", "dynamics", "emissions"):
        for name, field in vars(getattr(params, block)).items():
            if isinstance(field, issm.TimeVarying):
                varying.append(f"{block}_{name}")
                field = field.values
            fields[f"{block}_{name}"] = np.asarray(field)
    moved = dataclasses.replace(system, fields=fields, time_varying=tuple(varying))
    if system.mask is not None:
        plan = issm.transform_interventions(system.interventions, matrix, offset)
        moved.mask, moved.value, moved.variance = (np.asarray(a) for a in (plan.mask, plan.value, plan.variance))
    return moved


def assert_same(system, matrix, offset=None):
    """The joint distribution of states and emissions, written out, is that of the moved states and the same emissions."""
    moved = in_other_coordinates(system, matrix, offset)
    num_timesteps, num_emissions = system.num_timesteps, system.num_timesteps * system.emission_dim
    whole = np.eye(num_timesteps * D + num_emissions)
    whole[: num_timesteps * D, : num_timesteps * D] = np.kron(np.eye(num_timesteps), matrix)
    shift = np.concatenate([np.tile(np.zeros(D) if offset is None else offset, num_timesteps), np.zeros(num_emissions)])
    for k in range(system.num_trials):
        mean, cov = joint_moments(system, k)
        found_mean, found_cov = joint_moments(moved, k)
        assert relative_error(found_mean, whole @ mean + shift) < 1e-12
        assert relative_error(found_cov, whole @ cov @ whole.T) < 1e-12
    return moved


@pytest.mark.parametrize("offset", [None, OFFSET])
@pytest.mark.parametrize("varying", ["", "all", ("dynamics_weights",), ("emissions_bias", "dynamics_cov")])
def test_nothing_seen_changes(offset, varying):
    assert_same(observed(time_varying=varying), MIXED, offset)


def test_the_likelihood_stays_and_the_smoothed_states_move():
    system = observed()
    args, kwargs = system.data
    before, after = (
        issm.lgssm_smoother(params, *args, **kwargs)
        for params in (system.params, issm.transform_params(system.params, MIXED, OFFSET))
    )
    np.testing.assert_allclose(after.marginal_loglik, before.marginal_loglik, rtol=1e-11)
    assert relative_error(after.smoothed_means, np.asarray(before.smoothed_means) @ MIXED.T + OFFSET) < 1e-10
    # Two fits that differ in nothing but coordinates, aligned by what a user sees of them: their smoothed means.
    alignment = metrics.align_states(after.smoothed_means, before.smoothed_means)
    assert float(metrics.consistency([before.smoothed_means, after.smoothed_means]).lowest) == pytest.approx(1.0)
    moved = issm.transform_params(system.params, MIXED, OFFSET)
    back = issm.transform_params(moved, alignment.matrix, alignment.offset)
    np.testing.assert_allclose(back.dynamics.weights, system.params.dynamics.weights, rtol=1e-6, atol=1e-8)


def test_diagonal_covariances():
    """They stay diagonal where they can, and become full where they must."""
    system = observed(initial_cov="diagonal", dynamics_cov="diagonal", emissions_cov="diagonal")
    for matrix, ndim in ((MONOMIAL, 1), (MIXED, 2)):
        moved = assert_same(system, matrix, OFFSET)
        assert moved.fields["dynamics_cov"].ndim == moved.fields["initial_cov"].ndim == ndim


def test_clamps_move_along():
    """Perfect, zero and noisy ones, from the first step on."""
    assert_same(observed(clamps="mixed"), MONOMIAL, OFFSET)


def test_states_that_are_never_clamped_may_be_mixed():
    system = observed()
    system.mask = np.zeros((3, system.num_timesteps, D), bool)
    system.mask[0, 2:5, 1], system.mask[2, :2, 1] = True, True
    system.value = np.where(system.mask, np.random.default_rng(0).normal(size=system.mask.shape), 0.0)
    system.variance = np.zeros_like(system.value)
    matrix = np.array([[0.0, 2.0, 0.0], [1.0, 0.0, 0.3], [-0.4, 0.0, 1.0]])
    moved = assert_same(system, matrix, OFFSET)
    assert moved.mask.any(axis=(0, 1)).tolist() == [True, False, False]


def test_there_and_back():
    params = observed(time_varying=("dynamics_bias",)).params
    there = issm.transform_params(params, MIXED, OFFSET)
    inverse = np.linalg.inv(MIXED)
    back = issm.transform_params(there, inverse, -inverse @ OFFSET)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), back, params)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, i: issm.transform_params(p, np.eye(2)), r"matrix: got shape \(2, 2\)"),
        (lambda p, i: issm.transform_params(p, np.ones((D, D))), "matrix: got a singular matrix"),
        (lambda p, i: issm.transform_params(p, np.eye(D), [1.0]), "offset: got shape"),
        (lambda p, i: issm.transform_interventions(i, MIXED), "matrix: got one that mixes state"),
        (lambda p, i: issm.transform_interventions(i, MONOMIAL, [np.nan] * D), "offset: got 3 entries"),
    ],
)
def test_bad_calls(call, message):
    system = observed(clamps="mixed")
    with pytest.raises(ValueError, match=message):
        call(system.params, system.interventions)
