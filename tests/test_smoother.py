"""`lgssm_smoother` against the joint Gaussian; errors are norm-wise, as in `test_filter.py`."""

import numpy as np
import pytest

import issm
from helpers import SEEDS, SYSTEMS, random_system, references, relative_error
from test_filter import FIELDS, SMOOTHED, assert_covariances, assert_same, errors


@pytest.mark.parametrize("name", SYSTEMS)
def test_smoother_is_the_joint_gaussian(name):
    for seed in SEEDS:
        system = random_system(seed, **SYSTEMS[name])
        arguments, options = system.data
        posterior = issm.lgssm_smoother(system.params, *arguments, **options)
        assert not errors(posterior, references(system), (*FIELDS, *SMOOTHED)), f"seed {seed}"
        assert_covariances(posterior.smoothed_covariances)
        assert (posterior.smoothed_means[..., -1, :] == posterior.filtered_means[..., -1, :]).all()


def test_a_clamped_state_sends_nothing_backwards():
    """With every state clamped at a step, what comes before it is smoothed as if the data had ended there."""
    system = random_system(5, state_dim=2, emission_dim=2, num_timesteps=6)
    clamp = issm.do({0: 40.0, 1: -40.0}, num_timesteps=6, state_dim=2, start=3, stop=4)
    posterior = issm.lgssm_smoother(system.params, system.emissions, interventions=clamp)
    before = issm.lgssm_smoother(system.params, system.emissions[:3])
    np.testing.assert_allclose(posterior.smoothed_means[:3], before.smoothed_means, rtol=1e-12)
    np.testing.assert_allclose(posterior.smoothed_covariances[:3], before.smoothed_covariances, rtol=1e-12)
    np.testing.assert_array_equal(posterior.smoothed_means[3], [40.0, -40.0])
    np.testing.assert_array_equal(posterior.smoothed_covariances[3], np.zeros((2, 2)))
    np.testing.assert_array_equal(posterior.smoothed_cross_covariances[2:4], np.zeros((2, 2, 2)))


def test_doing_is_not_conditioning():
    """The value of a clamp says nothing about the state before it; the same value observed would."""
    system = random_system(6, state_dim=1, emission_dim=1, num_timesteps=6)
    means = [
        issm.lgssm_smoother(
            system.params,
            system.emissions,
            interventions=issm.do({0: value}, num_timesteps=6, state_dim=1, start=4, stop=5),
        ).smoothed_means
        for value in (-50.0, 50.0)
    ]
    np.testing.assert_array_equal(means[0][:4], means[1][:4])
    assert abs(float(means[0][5, 0] - means[1][5, 0])) > 1


def test_leading_axes():
    system = random_system(
        12, num_trials=2, input_dim=1, clamps="mixed", shared_interventions=False, shared_inputs=False
    )
    arguments, options = system.data
    together = issm.lgssm_smoother(system.params, *arguments, **options)
    assert together.smoothed_means.shape == (2, 6, 2)
    assert together.smoothed_cross_covariances.shape == (2, 5, 2, 2)
    for k in range(2):
        emissions, inputs, *clamps = system.trial(k)
        alone = issm.lgssm_smoother(system.params, emissions, inputs, interventions=issm.Intervention(*clamps))
        assert_same(together, alone, trial=k)


def test_one_step_has_no_cross_covariances():
    system = random_system(0, num_timesteps=1)
    posterior = issm.lgssm_smoother(system.params, system.emissions)
    assert posterior.smoothed_cross_covariances.shape == (0, 2, 2)
    assert relative_error(posterior.smoothed_means, posterior.filtered_means) == 0
