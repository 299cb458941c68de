"""All methods give the same moments; the square root does so in single precision; "auto" takes it where others fail."""

from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import issm
from helpers import random_system, relative_error
from issm.inference import covariances, shared_means
from issm.inference.covariances import STEPS_OF_BLOCK
from issm.inference.dense import dense_moments
from issm.inference.exact import exact_residual
from issm.inference.methods import METHODS, choose_method
from issm.inference.parallel import parallel_moments
from issm.inference.recursions import small_moments
from issm.inference.sqrt import condition, sqrt_moments
from issm.models.trials import as_trials
from test_filter import FIELDS, SMOOTHED

TOLERANCE = 1e-10
CLAMPS = ("perfect", "zero", "noisy", "initial", "throughout", "everything", "mixed")
QUICK = {"xla_backend_optimization_level": "0"}  # compiled once for a few milliseconds of work


def shared_moments(params, trials):
    """The means of few trials by the loops that are meant for many, and few rows by the elimination that is meant for many."""
    fewest, most = (shared_means, "SMALLEST_SHARED_STEP", 0), (covariances, "MOST_UNROLLED_PIVOTS", 0)
    with mock.patch.object(*fewest), mock.patch.object(*most):
        return small_moments(params, trials)


KERNELS = {
    kernel.__name__: jax.jit(kernel, compiler_options=QUICK)
    for kernel in (dense_moments, small_moments, shared_moments, parallel_moments, sqrt_moments)
}

# Shapes, and the kinds of covariances that share them. A case draws its numbers and everything else.
FULL, DIAGONAL = ("full", "singular"), ("diagonal", "zero", 0.1)
SHAPES = {
    "one-step": dict(num_timesteps=1, state_dim=2, emission_dim=3, input_dim=1, cov=FULL, emissions_cov="full"),
    "one-state": dict(num_timesteps=13, state_dim=1, emission_dim=1, cov=DIAGONAL, emissions_cov="diagonal", misses=True),
    "fewer-emissions": dict(num_timesteps=17, state_dim=3, emission_dim=2, cov=FULL, emissions_cov="full", misses=True),
    "grouped": dict(num_trials=4, num_timesteps=11, state_dim=3, emission_dim=8, cov=FULL, emissions_cov="diagonal",
                    shared_interventions=False, misses=True),
    "own-patterns": dict(num_trials=3, num_timesteps=7, state_dim=2, emission_dim=30, input_dim=1, cov=DIAGONAL,
                         emissions_cov="full", shared_interventions=False, shared_inputs=False),
    "time-varying": dict(num_timesteps=12, state_dim=2, emission_dim=3, cov=FULL, emissions_cov="full",
                         time_varying="all", misses=True),
}  # fmt: skip
CASES = 34
"""For each shape: 204 in all."""


def assert_same(actual, expected, tolerance=TOLERANCE):
    scales = {"smoothed_cross_covs": expected.smoothed_covs}
    for name, value in vars(expected).items():
        error = relative_error(getattr(actual, name), value, scales.get(name))
        assert error < tolerance, f"{name}: {error:.1e}"


def assert_covariances(covs, tolerance):
    covs = np.asarray(covs, float).reshape(-1, *covs.shape[-2:])
    assert np.isfinite(covs).all()
    scale = np.maximum(np.abs(covs).max(axis=(1, 2)), np.finfo(float).tiny)
    assert (np.abs(covs - covs.swapaxes(1, 2)).max(axis=(1, 2)) <= tolerance * scale).all()
    assert (np.linalg.eigvalsh(covs).min(axis=1) >= -tolerance * scale).all()


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), clamps=st.sampled_from(CLAMPS))
def test_methods_agree(shape, data, seed, clamps):
    options = dict(SHAPES[shape])
    covs, misses = st.sampled_from(options.pop("cov")), options.pop("misses", False)
    if misses:
        options["missing"] = data.draw(st.sampled_from((0.0, 0.2, 0.5)))
        options["missing_steps"] = data.draw(st.sampled_from(((0,), (3, 4), (options["num_timesteps"] - 1,))))
    if options.get("time_varying"):
        clamps = data.draw(st.sampled_from(("perfect", "mixed")))
    system = random_system(seed, clamps=clamps, dynamics_cov=data.draw(covs), initial_cov=data.draw(covs), **options)
    if shape == "grouped":  # two patterns of clamps and missing entries over four trials
        missing = np.isnan(system.emissions[:2])
        system.emissions[2:][missing] = np.nan
        system.emissions[2:][~missing & np.isnan(system.emissions[2:])] = 0.0
        for array in (system.mask, system.value, system.variance):
            array[2:] = array[:2]
        system.mask[[0, 2], 5, 1], system.mask[[1, 3], 5, 1] = False, True
    if shape == "own-patterns":
        for k in range(3):
            system.mask[k, 2:5, 0] = np.arange(3) == k
    arguments, keywords = system.data
    trials = as_trials(system.params, *arguments, keywords["interventions"])
    assert trials.num_patterns == {"grouped": 2, "own-patterns": 3}.get(shape, 1)
    expected = KERNELS["dense_moments"](system.params, trials)
    for name in ("small_moments", "shared_moments", "parallel_moments", "sqrt_moments"):
        assert_same(KERNELS[name](system.params, trials), expected)


@pytest.mark.parametrize("misses", [False, True])
def test_long_trials(misses):
    """Covariances that settle are computed until they have, and again wherever a step differs from the one before it."""
    num_timesteps = 12 * STEPS_OF_BLOCK + 5
    edge = 4 * STEPS_OF_BLOCK
    windows = ((), (edge - 1,), (edge,), (edge - 3, edge + 40), (0, 1, num_timesteps - 1), range(edge, num_timesteps))
    system = random_system(5, num_timesteps=num_timesteps, state_dim=2, emission_dim=3, clamps="perfect")
    if misses:
        system.emissions[7 * STEPS_OF_BLOCK + 2, 1] = np.nan
        system.emissions[8 * STEPS_OF_BLOCK :, 2] = np.nan
    for window in windows:
        system.mask[:] = False
        system.mask[list(window), 0] = True
        arguments, keywords = system.data
        trials = as_trials(system.params, *arguments, keywords["interventions"])
        actual = KERNELS["small_moments"](system.params, trials)
        assert_same(actual, KERNELS["dense_moments"](system.params, trials))
        if len(window) <= 2:
            last = actual.predicted_covs[0, -2 * STEPS_OF_BLOCK :]
            assert (last == last[-1:]).all()


def test_covariances_that_take_long_to_settle():
    """A state that hardly forgets and is hardly seen: what is passed over must not be what still changes."""
    params = issm.make_lgssm_params(
        np.zeros(2), np.ones(2), np.diag([0.99999, 0.5]), [1e-6, 0.1], np.eye(2), [1e3, 1.0]
    )
    trials = as_trials(params, np.random.default_rng(0).normal(size=(3000, 2)), None, None)
    assert_same(KERNELS["small_moments"](params, trials), KERNELS["dense_moments"](params, trials))


def test_trials_with_patterns_of_their_own_hold_nothing_but_results():
    """Everything beside the results takes less than two arrays of the covariances of all trials; each costs more than the arithmetic."""
    shape = dict(num_trials=20, num_timesteps=50, state_dim=6, emission_dim=2)
    system = random_system(0, clamps="mixed", shared_interventions=False, missing=0.2, **shape)
    arguments, keywords = system.data
    trials = as_trials(system.params, *arguments, keywords["interventions"])
    assert trials.num_patterns == trials.num_trials
    compiled = jax.jit(small_moments).lower(system.params, trials).compile()
    covariances = compiled(system.params, trials).smoothed_covs
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * covariances.nbytes


@pytest.mark.parametrize("cov", ["diagonal", "full"])
@pytest.mark.parametrize("offset", [1e2, 1e6])
def test_emissions_far_from_zero(cov, offset):
    """Where products with the emissions would lose digits, residuals take their place."""
    system = random_system(3, num_timesteps=6, state_dim=2, emission_dim=5, emissions_cov=cov)
    arguments, keywords = system.data
    params = eqx.tree_at(lambda p: p.emissions.bias, system.params, system.params.emissions.bias + offset)
    trials = as_trials(params, np.asarray(arguments[0]) + offset, *arguments[1:], keywords["interventions"])
    assert_same(KERNELS["small_moments"](params, trials), KERNELS["dense_moments"](params, trials), 1e-12)


def test_many_states():
    system = random_system(0, state_dim=17, emission_dim=2, num_timesteps=3, clamps="perfect")
    arguments, options = system.data
    expected = issm.lgssm_smoother(system.params, *arguments, **options, method="sequential")
    for method in ("parallel", "sqrt"):
        assert_same_posteriors(issm.lgssm_smoother(system.params, *arguments, **options, method=method), expected)


def assert_same_posteriors(actual, expected, tolerance=TOLERANCE):
    scales = {"smoothed_cross_covariances": expected.smoothed_covariances}
    for name in (*FIELDS, *SMOOTHED):
        error = relative_error(getattr(actual, name), getattr(expected, name), scales.get(name))
        assert error < tolerance, name


@pytest.fixture(scope="module")
def system():
    return random_system(3, num_trials=2, num_timesteps=5, clamps="mixed", shared_interventions=False, missing=0.2)


@pytest.fixture(scope="module")
def expected(system):
    arguments, options = system.data
    return issm.lgssm_smoother(system.params, *arguments, **options, method="sequential")


@pytest.mark.parametrize("method", ["parallel", "sqrt"])
def test_every_method_at_the_door_and_with_traced_masks(method, system, expected):
    def smooth(mask):
        plan = eqx.tree_at(lambda p: p.mask, system.interventions, mask)
        return issm.lgssm_smoother(system.params, *system.data[0], interventions=plan, method=method)

    mask = jnp.asarray(system.mask)
    assert_same_posteriors(smooth(mask), expected)
    assert_same_posteriors(jax.jit(smooth)(mask), expected)


@pytest.mark.parametrize("method", ["parallel", "sqrt"])
def test_derivatives_are_those_of_the_sequential_form(method, system):
    arguments, options = system.data

    def loss(params, method):
        posterior = issm.lgssm_smoother(params, *arguments, **options, method=method)
        return posterior.marginal_loglik.sum() + (posterior.smoothed_means**2).sum()

    expected = jax.grad(loss)(system.params, "sequential")
    for actual, wanted in zip(*map(jax.tree.leaves, (jax.grad(loss)(system.params, method), expected)), strict=True):
        assert relative_error(actual, wanted) < TOLERANCE


def test_an_unknown_method_is_refused(system):
    with pytest.raises(ValueError, match=r"method.*'fast'.*'auto', 'sequential', 'parallel', 'sqrt'"):
        issm.lgssm_filter(system.params, system.emissions, method="fast")
    assert METHODS[0] == "auto"


# Single precision


def stressed_system(num_timesteps, noise=1e-6, prior=1e6, roots=0.9999, num_emissions=12, num_states=6):
    """Data drawn from a model with near-unit roots, a vague prior and almost no emission noise, in single precision."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(num_states, num_states)))
    weights = (basis * np.linspace(0.9, roots, num_states)) @ basis.T
    emission_weights = rng.normal(size=(num_emissions, num_states))
    state, states = np.sqrt(prior) * rng.normal(size=num_states), []
    for _ in range(num_timesteps):
        states.append(state)
        state = weights @ state + np.sqrt(0.1) * rng.normal(size=num_states)
    emissions = states @ emission_weights.T + np.sqrt(noise) * rng.normal(size=(num_timesteps, num_emissions))
    variances = (np.full(num_states, prior), np.full(num_states, 0.1), np.full(num_emissions, noise))
    fields = (np.zeros(num_states), variances[0], weights, variances[1], emission_weights, variances[2])
    return [np.float32(field) for field in fields], np.float32(emissions)


@pytest.fixture(scope="module")
def stressed():
    fields, emissions = stressed_system(2000)
    exact = issm.lgssm_smoother(issm.make_lgssm_params(*map(np.float64, fields)), np.float64(emissions), method="sqrt")
    return issm.make_lgssm_params(*fields), emissions, exact


def test_single_precision(stressed):
    params, emissions, exact = stressed
    posterior = issm.lgssm_smoother(params, emissions)  # "auto" is "sqrt" here
    assert posterior.marginal_loglik.dtype == jnp.float32
    assert relative_error(posterior.marginal_loglik, exact.marginal_loglik) < 1e-5
    assert relative_error(posterior.smoothed_means, exact.smoothed_means) < 1e-5
    for name in ("filtered_covariances", "predicted_covariances", "smoothed_covariances"):
        covs = getattr(posterior, name)
        assert_covariances(covs, 1e-6)
        assert relative_error(covs, getattr(exact, name)) < 1e-5


def test_auto_chooses_by_values_and_dtype(stressed, system):
    params, emissions, _ = stressed
    trials = as_trials(params, emissions, None, None)
    assert choose_method("auto", params, trials) == "sqrt"
    assert choose_method("parallel", params, trials) == "parallel"
    in_double = lambda params: jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)  # noqa: E731
    assert choose_method("auto", in_double(params), trials) == "sqrt"
    noisy = eqx.tree_at(
        lambda p: (p.initial.cov, p.emissions.cov), params, (jnp.ones(6, "f4"), jnp.full(12, 1e-3, "f4"))
    )
    assert choose_method("auto", noisy, trials) == "sqrt"
    assert choose_method("auto", in_double(noisy), trials) == "sequential"
    calm = eqx.tree_at(lambda p: (p.initial.cov, p.emissions.cov), params, (jnp.ones(6, "f4"), jnp.ones(12, "f4")))
    assert choose_method("auto", calm, trials) == "sequential"
    full = eqx.tree_at(lambda p: p.emissions.cov, params, 1e-6 * jnp.eye(12, dtype=jnp.float32))
    assert choose_method("auto", full, trials) == "sqrt"


def test_auto_decides_at_run_time_under_jit():
    fields, emissions = stressed_system(20, num_emissions=3, num_states=2)
    params, double = issm.make_lgssm_params(*fields), issm.make_lgssm_params(*map(np.float64, fields))
    smooth = jax.jit(lambda params: issm.lgssm_smoother(params, jnp.asarray(emissions, params.initial.mean.dtype)))
    actual, expected = smooth(params), smooth(double)
    assert relative_error(actual.smoothed_covariances, expected.smoothed_covariances) < 1e-5
    calm = eqx.tree_at(lambda p: p.emissions.cov, params, jnp.full(3, 1e6, jnp.float32))
    assert np.isfinite(smooth(calm).marginal_loglik)


# The parts


def test_condition_keeps_small_directions_beside_large_ones():
    """L (I + L'H'HL)^-1 L' for a prior of 1e6 and noise of 1e-6, in single precision."""
    rng = np.random.default_rng(1)
    factor, rows = np.float32(1e3 * np.tril(rng.normal(size=(3, 3)))), np.float32(1e3 * rng.normal(size=(2, 3)))
    exact_factor, exact_rows = factor.astype(np.longdouble), rows.astype(np.longdouble)
    cov = exact_factor @ exact_factor.T
    gain = np.linalg.solve(np.float64(np.eye(2) + exact_rows @ cov @ exact_rows.T), np.float64(exact_rows @ cov)).T
    kept = np.eye(3) - gain @ np.float64(rows)
    expected = kept @ np.float64(cov) @ kept.T + gain @ gain.T
    actual = np.float64(condition(jnp.asarray(factor), jnp.asarray(rows)).factor)
    along = np.float64(rows)  # the directions that were seen: 1e12 times smaller than the others
    np.testing.assert_allclose(actual @ actual.T, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    seen = along @ actual
    np.testing.assert_allclose(np.diag(seen @ seen.T), np.diag(along @ expected @ along.T), rtol=1e-2)


def test_residuals_in_twice_the_precision():
    rng = np.random.default_rng(0)
    weights, states = np.float32(rng.normal(size=(1, 4, 6))), np.float32(1e3 * rng.normal(size=(50, 6)))
    emissions = np.float32(states @ weights[0].T)
    expected = np.float64(emissions) - np.float64(states) @ np.float64(weights[0]).T
    actual = jax.jit(exact_residual)((jnp.asarray(emissions),), jnp.asarray(weights), jnp.asarray(states))
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9)
