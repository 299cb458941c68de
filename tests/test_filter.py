"""`lgssm_filter` and `marginal_log_prob` against the joint Gaussian.

Errors are norm-wise: the largest absolute difference over the largest entry of the reference array (see `relative_error`);
for cross-covariances, over the largest entry of the smoothed covariances, since both are blocks of one joint covariance.
"""

import jax
import numpy as np
import pytest

import issm
from helpers import SEEDS, SYSTEMS, random_system, references, relative_error

TOLERANCE = 1e-9
FIELDS = (
    "marginal_loglik",
    "logliks",
    "filtered_means",
    "filtered_covariances",
    "predicted_means",
    "predicted_covariances",
)


def errors(posterior, expected, fields):
    scales = {"smoothed_cross_covariances": expected.smoothed_covariances}
    found = {
        name: relative_error(getattr(posterior, name), getattr(expected, name), scales.get(name)) for name in fields
    }
    return {name: error for name, error in found.items() if not error < TOLERANCE}


def assert_covariances(covs):
    """Symmetric and positive semidefinite up to rounding, each relative to its own largest entry."""
    covs = np.asarray(covs).reshape(-1, *covs.shape[-2:])
    scale = np.maximum(np.abs(covs).max(axis=(1, 2)), np.finfo(float).tiny)
    assert (np.abs(covs - covs.swapaxes(1, 2)).max(axis=(1, 2)) <= 1e-14 * scale).all()
    assert (np.linalg.eigvalsh(covs).min(axis=1) >= -1e-12 * scale).all()


SMOOTHED = ("smoothed_means", "smoothed_covariances", "smoothed_cross_covariances")


def assert_same(actual, expected, trial=...):
    """Every field of two results, of `trial` alone in the first if one is given."""
    assert type(actual) is type(expected)
    for name in (*FIELDS, *(SMOOTHED if isinstance(expected, issm.PosteriorGSSMSmoothed) else ())):
        value, wanted = getattr(actual, name)[trial], getattr(expected, name)
        np.testing.assert_allclose(value, wanted, rtol=1e-11, atol=1e-13, err_msg=name)


def test_the_systems_are_at_least_thirty():
    assert len(SYSTEMS) * len(SEEDS) >= 30


@pytest.mark.parametrize("name", SYSTEMS)
def test_filter_is_the_joint_gaussian(name):
    for seed in SEEDS:
        system = random_system(seed, **SYSTEMS[name])
        arguments, options = system.data
        posterior = issm.lgssm_filter(system.params, *arguments, **options)
        assert not errors(posterior, references(system), FIELDS), f"seed {seed}"
        assert_covariances(posterior.filtered_covariances)
        assert_covariances(posterior.predicted_covariances)


@pytest.mark.parametrize("name", ["tall", "trials", "time-varying", "one-step", "many-emissions", "tiny-noise-wide"])
def test_marginal_log_prob_is_the_joint_gaussian(name):
    system = random_system(0, **SYSTEMS[name])
    arguments, options = system.data
    log_prob = issm.marginal_log_prob(system.params, *arguments, **options)
    assert relative_error(log_prob, references(system).marginal_loglik) < TOLERANCE


def test_published_value_of_the_nile():
    nile = pytest.importorskip("statsmodels.datasets.nile")
    emissions = nile.load().data["volume"].to_numpy(dtype=float)[:, None]
    level = issm.make_lgssm_params(0.0, 1e7, 1.0, 1469.1, 1.0, 15099.0)
    np.testing.assert_allclose(issm.marginal_log_prob(level, emissions), -641.5855784594, rtol=1e-12)


# What a clamp is. All tests below share one shape, and so one compilation.


@pytest.fixture(scope="module")
def system():
    return random_system(11, num_trials=2, state_dim=2, emission_dim=2, input_dim=1, shared_inputs=False)


def plan_of(clamps, **window):
    return issm.do(clamps, num_timesteps=6, state_dim=2, **window)


def test_a_clamped_state_is_known(system):
    posterior = issm.lgssm_filter(
        system.params, system.emissions, system.inputs, interventions=plan_of({1: 0.0}, start=2, stop=4)
    )
    np.testing.assert_array_equal(posterior.filtered_means[:, 2:4, 1], np.zeros((2, 2)))
    np.testing.assert_array_equal(posterior.predicted_means[:, 2:4, 1], np.zeros((2, 2)))
    for covs in (posterior.filtered_covariances, posterior.predicted_covariances):
        np.testing.assert_array_equal(covs[:, 2:4, 1], np.zeros((2, 2, 2)))
        np.testing.assert_array_equal(covs[:, 2:4, :, 1], np.zeros((2, 2, 2)))
        assert (covs[:, :, 0, 0] > 0).all()


def test_a_clamp_to_zero_is_a_clamp(system):
    data = (system.params, system.emissions, system.inputs)
    free = issm.lgssm_filter(*data, interventions=issm.no_intervention(6, 2))
    zero = issm.lgssm_filter(*data, interventions=plan_of({1: 0.0}, start=2, stop=4))
    assert relative_error(zero.marginal_loglik, free.marginal_loglik) > 1e-3
    assert_same(issm.lgssm_filter(*data), free)


def test_missing_steps_are_pure_predictions(system):
    emissions = system.emissions.copy()
    emissions[:, 1] = emissions[0, 4] = np.nan
    posterior = issm.lgssm_filter(system.params, emissions, system.inputs)
    for missing in ((slice(None), 1), (0, 4)):
        np.testing.assert_array_equal(posterior.logliks[missing], 0.0)
        np.testing.assert_allclose(posterior.filtered_means[missing], posterior.predicted_means[missing], rtol=1e-14)
        filtered, predicted = posterior.filtered_covariances, posterior.predicted_covariances
        np.testing.assert_allclose(filtered[missing], predicted[missing], rtol=1e-14)
    assert (posterior.logliks[1, 4] != 0).all()


def test_emissions_may_change_units(system):
    """y -> c y + k moves the log-likelihood by -log c for each number observed, and nothing else."""
    scale, shift = 1e3, -7.0
    scaled = {name: np.asarray(value) for name, value in system.fields.items()}
    for name in ("emissions_weights", "emissions_input_weights", "emissions_bias"):
        scaled[name] = scale * scaled[name]
    scaled["emissions_bias"] = scaled["emissions_bias"] + shift
    scaled["emissions_cov"] = scale**2 * scaled["emissions_cov"]
    plain = issm.lgssm_filter(system.params, system.emissions, system.inputs)
    moved = issm.lgssm_filter(issm.make_lgssm_params(**scaled), scale * system.emissions + shift, system.inputs)
    np.testing.assert_allclose(moved.logliks, plain.logliks - 2 * np.log(scale), rtol=1e-10)
    np.testing.assert_allclose(moved.filtered_means, plain.filtered_means, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(moved.filtered_covariances, plain.filtered_covariances, rtol=1e-9, atol=1e-12)


def test_leading_axes(system):
    """One sequence, trials, shared and per-trial plans and inputs: the same numbers under the same leading axes."""
    params, emissions, inputs = system.params, system.emissions, system.inputs
    shared = plan_of({0: 1.5}, start=1, stop=3)
    each = issm.Intervention(*(np.stack([leaf, leaf]) for leaf in (shared.mask, shared.value, shared.variance)))
    together = issm.lgssm_filter(params, emissions, inputs, interventions=shared)
    assert together.filtered_means.shape == (2, 6, 2)
    assert together.marginal_loglik.shape == (2,)
    assert_same(issm.lgssm_filter(params, emissions, inputs, interventions=each), together)
    for k in range(2):
        alone = issm.lgssm_filter(params, emissions[k], inputs[k], interventions=shared)
        assert alone.marginal_loglik.shape == ()
        assert_same(together, alone, trial=k)
    same_inputs = np.stack([inputs[0], inputs[0]])
    expected = issm.lgssm_filter(params, emissions, same_inputs, interventions=shared)
    assert_same(issm.lgssm_filter(params, emissions, inputs[0], interventions=shared), expected)


def test_lists_and_methods_are_accepted(system):
    arguments = (system.params, system.emissions, system.inputs)
    expected = issm.lgssm_filter(*arguments)
    given = issm.lgssm_filter(system.params, system.emissions.tolist(), system.inputs.tolist(), method="sequential")
    assert_same(given, expected)


def test_everything_closed_over_in_a_callers_jit():
    """The kernels have compiler options of their own, which only a program of its own may have."""
    system = random_system(0, num_trials=2, num_timesteps=6, state_dim=2, emission_dim=3)
    arguments, keywords = system.data
    loglik = lambda shift: shift + issm.lgssm_filter(system.params, *arguments, **keywords).marginal_loglik  # noqa: E731
    assert relative_error(jax.jit(loglik)(0.0), loglik(0.0)) < 1e-12
    gradient = jax.grad(lambda shift: loglik(shift).sum())(0.0)
    assert gradient == 2
