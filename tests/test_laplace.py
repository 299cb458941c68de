"""Laplace's approximation against the exact smoother, and against the dense Hessian of the log joint density."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from helpers import random_system

KEY = jax.random.key(3)
T, D, N = 5, 2, 3
PLAN = issm.do({0: 0.7}, num_timesteps=T, state_dim=D, start=2, stop=4)
LINEAR = issm.make_lgssm_params(
    np.array([0.1, -0.2]), [0.5, 0.5], [[0.9, 0.3], [-0.2, 0.8]], [[0.3, 0.1], [0.1, 0.2]], np.ones((N, D)), np.ones(N),
    dynamics_input_weights=[[1.0], [0.5]],
)  # fmt: skip
INPUTS = np.linspace(-1.0, 1.0, T)[:, None]


class Bent(eqx.Module):
    """A gently curved map, as a user would write it."""

    weights: jax.Array

    def __call__(self, state):
        return self.weights @ state + 0.3 * jnp.tanh(self.weights @ state) ** 2


def bent(dtype=jnp.float64):
    return Bent(jax.random.normal(KEY, (N, D), dtype))


MODELS = {
    "poisson": issm.PoissonEmission(bent(), 2.0),
    "gaussian": issm.GaussianEmission(bent(), [[0.5, 0.2, 0.0], [0.2, 0.4, 0.1], [0.0, 0.1, 0.3]]),
    "bernoulli": issm.BernoulliEmission(bent(), input_weights=[[1.0], [0.0], [-1.0]]),
}


@pytest.mark.parametrize("options", [
    dict(num_trials=3, input_dim=1, clamps="mixed", missing=0.2, missing_steps=(2,), shared_inputs=False,
         shared_interventions=False),
    dict(state_dim=3, emission_dim=2, emissions_cov="diagonal", dynamics_cov="singular", initial_cov="zero", clamps="perfect"),
])  # fmt: skip
def test_linear_gaussian_is_exact(options):
    system = random_system(2, **options)
    arguments, keywords = system.data
    actual = issm.posterior(issm.ssm_from_lgssm(system.params), *arguments, **keywords)
    expected = issm.lgssm_smoother(system.params, *arguments, **keywords)
    for name in ("marginal_loglik", "smoothed_means", "smoothed_covariances", "smoothed_cross_covariances"):
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=1e-9, atol=1e-11, err_msg=name)
    np.testing.assert_array_equal(actual.smoothed_means, actual.modes)
    assert bool(np.all(actual.converged))
    assert np.max(actual.num_iters) <= 2  # one step, and one that finds nothing left to do


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_gaussian_around_the_most_probable_path(name):
    model = issm.SSM(LINEAR.initial, LINEAR.dynamics, MODELS[name])
    _, emissions = issm.sample(KEY, model, T, INPUTS, interventions=PLAN)
    emissions = emissions.at[1, 0].set(jnp.nan).at[3].set(jnp.nan)
    result = issm.posterior(model, emissions, INPUTS, interventions=PLAN)
    free = np.flatnonzero(~np.asarray(PLAN.mask))

    @jax.jit
    def log_joint(coordinates):
        states = PLAN.value.ravel().at[free].set(coordinates).reshape(T, D)
        return issm.log_joint(model, states, emissions, INPUTS, interventions=PLAN)

    mode = result.modes.ravel()[free]
    assert bool(result.converged)
    np.testing.assert_allclose(jax.grad(log_joint)(mode), 0.0, atol=1e-9)
    hessian = -np.asarray(jax.hessian(log_joint)(mode))
    cov = np.zeros((T * D, T * D))
    cov[np.ix_(free, free)] = np.linalg.inv(hessian)
    blocks = cov.reshape(T, D, T, D).swapaxes(1, 2)
    steps = np.arange(T)
    np.testing.assert_allclose(result.smoothed_covariances, blocks[steps, steps], rtol=1e-7, atol=1e-11)
    np.testing.assert_allclose(result.smoothed_cross_covariances, blocks[steps[:-1], steps[1:]], rtol=1e-7, atol=1e-11)
    marginal = log_joint(mode) + len(free) / 2 * np.log(2 * np.pi) - np.linalg.slogdet(hessian)[1] / 2
    np.testing.assert_allclose(result.marginal_loglik, marginal, rtol=1e-10)
    third = np.asarray(jax.jacfwd(jax.hessian(log_joint))(mode))
    shift = np.linalg.inv(hessian) @ np.einsum("ijk,jk->i", third, np.linalg.inv(hessian)) / 2
    assert np.abs(shift).max() > 0.01
    np.testing.assert_allclose(result.smoothed_means.ravel()[free] - mode, shift, rtol=1e-7, atol=1e-11)
    for path in (result.smoothed_means, result.modes):
        assert (path[2:4, 0] == 0.7).all()


def test_marginal_likelihood_of_many_counts_is_the_integral():
    """One state, one step: the error of Laplace's approximation falls like one over the information."""
    errors = []
    for exposure in (10.0, 1000.0):
        emission = issm.PoissonEmission(issm.LinearMap([[1.0]]), exposure, link="exp")
        linear = issm.make_lgssm_params([0.2], [0.5], [[0.9]], [0.1], [[1.0]], [0.5])
        model = issm.SSM(linear.initial, linear.dynamics, emission)
        counts = np.array([[np.round(1.5 * exposure)]])
        grid = jnp.linspace(-5.0, 5.0, 200_001)
        at = lambda x, m=model, c=counts: issm.log_joint(m, x[None, None], c)  # noqa: E731
        values = np.asarray(jax.lax.map(at, grid, batch_size=1000))
        integral = np.log(np.exp(values - values.max()).sum() * float(grid[1] - grid[0])) + values.max()
        errors.append(abs(float(issm.posterior(model, counts).marginal_loglik) - integral))
    assert errors[0] < 0.01
    assert errors[1] < errors[0] / 50


def one_step(emission, variance, counts):
    """The posterior of a single state, and mean and standard deviation of the true one from a grid."""
    linear = issm.make_lgssm_params([0.2], [variance], [[0.9]], [0.1], [[1.0]], [0.5])
    model = issm.SSM(linear.initial, linear.dynamics, emission)
    width = 12 * variance**0.5
    grid = np.linspace(-width, width, 100_001)
    at = lambda x: issm.log_joint(model, x[None, None], counts)  # noqa: E731
    values = np.asarray(jax.lax.map(at, jnp.asarray(grid), batch_size=1000))
    weights = np.exp(values - values.max())
    mean = np.average(grid, weights=weights)
    return issm.posterior(model, counts), mean, np.sqrt(np.average((grid - mean) ** 2, weights=weights))


def test_the_error_of_the_mean_is_of_the_second_order():
    """With n times the information the mode is off by a share 1/n, the mean by 1/n² to leading order."""
    modes, means = [], []
    for exposure in (5.0, 500.0):
        emission = issm.PoissonEmission(issm.LinearMap([[1.0]]), exposure, link="exp")
        result, mean, _ = one_step(emission, 0.5, np.array([[np.round(1.5 * exposure)]]))
        modes.append(abs(float(result.modes[0, 0]) - mean))
        means.append(abs(float(result.smoothed_means[0, 0]) - mean))
    assert modes[0] / 150 < modes[1] < modes[0] / 50
    assert means[0] < modes[0] / 5
    assert means[1] < means[0] / 500


@pytest.mark.parametrize("count", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("variance", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("emission", [
    issm.PoissonEmission(issm.LinearMap([[1.0]]), link="exp"), issm.PoissonEmission(issm.LinearMap([[1.0]])),
    issm.NegativeBinomialEmission(issm.LinearMap([[1.0]]), [0.5], link="exp"),
])  # fmt: skip
def test_the_mean_is_never_worse_than_the_mode(emission, variance, count):
    """Also with broad priors and hardly any data, where the expansion does not hold and the shift is cut short."""
    result, mean, sd = one_step(emission, variance, np.array([[count]]))
    mean_off, mode_off = (abs(float(path[0, 0]) - mean) / sd for path in (result.smoothed_means, result.modes))
    assert mean_off < mode_off + 0.01
    shift = float(result.smoothed_means[0, 0] - result.modes[0, 0]) / result.smoothed_covariances[0, 0, 0] ** 0.5
    assert abs(shift) <= 3**0.5 + 1e-9
    if count == 0 and variance == 100 and isinstance(emission, issm.PoissonEmission):
        assert abs(shift) > 1.7  # by 1.9 and 1.8 without the limit
    if variance == 1:
        assert mean_off < 0.02


def test_means_of_paths_are_those_of_a_grid():
    """Three steps, one of two spikes missing in the second, a fourth step clamped; its slope by differences."""
    linear = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.3], [[1.0]], [0.5])
    plan = issm.do({0: 1.0}, num_timesteps=4, state_dim=1, start=3, stop=4)
    spikes = np.array([[1.0, 1.0], [1.0, np.nan], [1.0, 1.0], [0.0, 1.0]])

    def model(scale):
        emission = issm.BernoulliEmission(issm.LinearMap(scale * jnp.array([[1.5], [1.0]])))
        return issm.SSM(linear.initial, linear.dynamics, emission)

    result = issm.posterior(model(1.0), spikes, interventions=plan)
    axis = jnp.linspace(-6.0, 8.0, 57)
    paths = jnp.stack(jnp.meshgrid(axis, axis, axis, jnp.ones(1), indexing="ij"), axis=-1).reshape(-1, 4, 1)
    at = lambda path: issm.log_joint(model(1.0), path, spikes, interventions=plan)  # noqa: E731
    values = np.asarray(jax.jit(lambda paths: jax.lax.map(at, paths, batch_size=10_000))(paths))
    weights = np.exp(values - values.max())
    mean = np.average(np.asarray(paths)[..., 0], axis=0, weights=weights)
    off = lambda path: np.abs(np.asarray(path[:3, 0]) - mean[:3]) / np.sqrt(result.smoothed_covariances[:3, 0, 0])  # noqa: E731
    assert off(result.modes).min() > 0.08
    assert (off(result.smoothed_means) < off(result.modes) / 3).all()
    np.testing.assert_array_equal(result.smoothed_means[3], 1.0)

    middle = lambda scale: issm.posterior(model(scale), spikes, interventions=plan).smoothed_means[1, 0]  # noqa: E731
    difference = (middle(1.001) - middle(0.999)) / 0.002
    np.testing.assert_allclose(jax.jit(jax.grad(middle))(1.0), difference, rtol=1e-5)


def test_steps_are_damped():
    """From the mean of the prior, undamped Newton steps overflow the exponential link."""
    emission = issm.PoissonEmission(issm.LinearMap([[1.0], [-1.0]]), link="exp")
    linear = issm.make_lgssm_params([0.0], [1e4], [[1.0]], [1e4], [[1.0]], [1.0])
    model = issm.SSM(linear.initial, linear.dynamics, emission)
    result = issm.posterior(model, np.array([[3000.0, 0.0], [0.0, 5000.0], [20.0, 0.0]]))
    assert bool(result.converged)
    np.testing.assert_allclose(result.modes[:, 0], np.log([3000.0, 1 / 5000.0, 20.0]), rtol=0.01)


def test_trials_float32_and_a_limit():
    """Each trial is as if alone; single precision agrees to its digits; a fit that was cut short says so."""
    model = issm.SSM(LINEAR.initial, LINEAR.dynamics, MODELS["poisson"])
    counts = np.stack([issm.sample(jax.random.key(k), model, T, INPUTS)[1] for k in range(2)])
    both = issm.posterior(model, counts, INPUTS)
    np.testing.assert_allclose(
        both.smoothed_means[1], issm.posterior(model, counts[1], INPUTS).smoothed_means, rtol=1e-8
    )
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)
    rough = issm.posterior(single, counts, INPUTS)
    assert rough.smoothed_covariances.dtype == jnp.float32
    np.testing.assert_allclose(rough.smoothed_means, both.smoothed_means, atol=2e-4)
    np.testing.assert_allclose(rough.marginal_loglik, both.marginal_loglik, rtol=1e-5)
    assert not issm.posterior(model, counts, INPUTS, num_iters=1).converged.any()


@pytest.mark.parametrize(("options", "argument"), [({"method": "exact"}, "method"), ({"num_iters": 0}, "num_iters")])
def test_bad_options(options, argument):
    model = issm.SSM(LINEAR.initial, LINEAR.dynamics, MODELS["poisson"])
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        issm.posterior(model, np.zeros((T, N)), INPUTS, **options)
