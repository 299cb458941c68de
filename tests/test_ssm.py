"""The general model against loops in NumPy, SciPy's distributions, finite differences and sums over all counts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import scipy.stats

import issm
from helpers import random_system

KEY = jax.random.key(0)
LINEAR = issm.make_lgssm_params(
    np.array([0.1, -0.2]), np.eye(2), [[0.9, 0.1], [0.0, 0.8]], [[0.3, 0.1], [0.1, 0.2]], np.ones((3, 2)), np.ones(3),
    dynamics_input_weights=[[1.0], [0.5]],
)  # fmt: skip
NETWORK = issm.MLP(KEY, 2, 3, widths=(4,), skip=False)
EXPOSURE = np.array([0.5, 1.0, 2.0])
EMISSIONS = {
    "gaussian": issm.GaussianEmission(NETWORK, [0.2, 0.3, 0.4]),
    "full": issm.GaussianEmission(NETWORK, [[0.5, 0.2, 0.0], [0.2, 0.4, 0.1], [0.0, 0.1, 0.3]]),
    "poisson": issm.PoissonEmission(NETWORK, EXPOSURE),
    "poisson exp": issm.PoissonEmission(NETWORK, 0.7, link="exp"),
    "negative binomial": issm.NegativeBinomialEmission(NETWORK, [2.0, 3.0, 4.0], EXPOSURE),
    "bernoulli": issm.BernoulliEmission(NETWORK, input_weights=[[1.0], [0.0], [-1.0]]),
}


def model_with(emission):
    return issm.SSM(LINEAR.initial, LINEAR.dynamics, emission)


def softplus(x):
    return np.log1p(np.exp(x))


def frozen(name, predictor, n):
    """SciPy's distribution of emission n."""
    rate = EXPOSURE[n] * softplus(predictor)
    if name == "poisson":
        return scipy.stats.poisson(rate)
    if name == "poisson exp":
        return scipy.stats.poisson(0.7 * np.exp(predictor))
    if name == "negative binomial":
        r = np.array([2.0, 3.0, 4.0])[n]
        return scipy.stats.nbinom(r, r / (r + rate))
    return scipy.stats.bernoulli(1 / (1 + np.exp(-predictor)))


COUNTS = ["poisson", "poisson exp", "negative binomial", "bernoulli"]


@pytest.mark.parametrize("name", COUNTS)
def test_discrete_emissions_are_scipys(name):
    """Log probabilities entry by entry; mean, score and information as sums over all values."""
    emission = EMISSIONS[name]
    lowest = -8.0 if name == "negative binomial" else -30.0  # SciPy takes 1 - p, which loses its digits
    predictors = np.array([lowest, -3.0, 0.4])
    values = np.arange(2.0) if name == "bernoulli" else np.arange(200.0)
    step = 1e-5
    for n in range(3):
        row = np.full((len(values), 3), np.nan)
        row[:, n] = values
        at = lambda p, row=row: np.asarray(emission.log_prob(jnp.array(row), jnp.array(np.tile(p, (len(row), 1)))))  # noqa: E731
        distribution = frozen(name, predictors[n], n)
        logpmf = distribution.logpmf(values)
        seen = logpmf > -500  # SciPy loses the rest to underflow
        np.testing.assert_allclose(at(predictors)[seen], logpmf[seen], rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(emission.mean(jnp.array(predictors))[n], distribution.mean(), rtol=1e-9)
        score, information = (
            np.asarray(part)[:, n]
            for part in emission.local_information(jnp.array(row), jnp.array(np.tile(predictors, (len(row), 1))))
        )
        moved = [at(predictors + s * step * np.eye(3)[n]) for s in (1, -1)]
        np.testing.assert_allclose(score, (moved[0] - moved[1]) / (2 * step), rtol=1e-6, atol=1e-8)
        if n:  # at -30 SciPy's probabilities are one and zero
            np.testing.assert_allclose((np.exp(logpmf) * score**2).sum(), information[0], rtol=1e-8)


@pytest.mark.parametrize("name", ["gaussian", "full"])
def test_gaussian_emissions_are_scipys(name):
    """Also with entries missing: the density, score and information of the rest."""
    emission = EMISSIONS[name]
    cov = np.asarray(emission.cov)
    cov = np.diag(cov) if cov.ndim == 1 else cov
    predictors = np.array([0.3, -0.2, 1.0])
    for seen in ([0, 1, 2], [0, 2], [1], []):
        emissions = np.full(3, np.nan)
        emissions[seen] = np.array([0.5, 0.1, -0.4])[seen]
        expected = 0.0
        precision = np.zeros((3, 3))
        if seen:
            expected = scipy.stats.multivariate_normal(predictors[seen], cov[np.ix_(seen, seen)]).logpdf(
                emissions[seen]
            )
            precision[np.ix_(seen, seen)] = np.linalg.inv(cov[np.ix_(seen, seen)])
        arguments = jnp.array(emissions), jnp.array(predictors)
        np.testing.assert_allclose(emission.log_prob(*arguments), expected, rtol=1e-12, atol=1e-14)
        score, information = emission.local_information(*arguments)
        information = np.diag(information) if information.ndim == 1 else information
        np.testing.assert_allclose(information, precision, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(score, precision @ np.nan_to_num(emissions - predictors), rtol=1e-10, atol=1e-14)


def test_log_joint_is_the_sum_over_loops():
    """Perfect and noisy clamps, correlated noise, inputs, missing entries; a full R."""
    system = random_system(
        3, num_trials=3, num_timesteps=6, state_dim=3, emission_dim=2, input_dim=1, clamps="mixed", missing=0.2,
        shared_inputs=False, shared_interventions=False,
    )  # fmt: skip
    model = issm.ssm_from_lgssm(system.params)
    arguments, options = system.data
    states, _ = issm.lgssm_sample(KEY, system.params, 6, system.inputs, interventions=system.interventions)
    actual = issm.log_joint(model, states, *arguments, **options)
    assert (system.mask & (system.variance == 0)).any()
    assert (system.mask & (system.variance > 0)).any()
    field = lambda name: system.at(name, 0).astype(float)  # noqa: E731
    for k in range(3):
        emissions, inputs, mask, value, variance = system.trial(k)
        total = 0.0
        for t in range(6):
            x = np.asarray(states[k, t])
            if t == 0:
                mean, cov = field("initial_mean"), field("initial_cov")
            else:
                drive = field("dynamics_bias") + field("dynamics_input_weights") @ inputs[t]
                mean, cov = field("dynamics_weights") @ np.asarray(states[k, t - 1]) + drive, field("dynamics_cov")
            free = ~mask[t]
            if free.any():
                total += scipy.stats.multivariate_normal(mean[free], cov[np.ix_(free, free)]).logpdf(x[free])
            for i in np.flatnonzero(mask[t] & (variance[t] > 0)):
                total += scipy.stats.norm(value[t, i], np.sqrt(variance[t, i])).logpdf(x[i])
            seen = ~np.isnan(emissions[t])
            mean = (
                field("emissions_weights") @ x + field("emissions_bias") + field("emissions_input_weights") @ inputs[t]
            )
            if seen.any():
                cov = field("emissions_cov")[np.ix_(seen, seen)]
                total += scipy.stats.multivariate_normal(mean[seen], cov).logpdf(emissions[t, seen])
        np.testing.assert_allclose(actual[k], total, rtol=1e-10)
    moved = states + 0.01 * (system.mask & (system.variance == 0))
    assert np.isneginf(issm.log_joint(model, moved, *arguments, **options)).any()


def test_log_joint_of_a_network_is_the_sum_over_loops():
    """A network with a soft input, Poisson counts, one clamp, one missing entry."""
    emission = issm.PoissonEmission(NETWORK, EXPOSURE, input_weights=[[0.5], [0.0], [-1.0]])
    model = model_with(emission)
    inputs = np.array([[0.0], [1.0], [2.0]])
    plan = issm.do({0: 0.5}, num_timesteps=3, state_dim=2, start=1, stop=2)
    states, counts = (np.array(part) for part in issm.sample(KEY, model, 3, inputs, interventions=plan))
    counts[2, 0] = np.nan
    layers = [(np.asarray(w), np.asarray(b)) for w, b in zip(NETWORK.weights, NETWORK.biases, strict=True)]
    cov = np.array([[0.3, 0.1], [0.1, 0.2]])
    total = scipy.stats.multivariate_normal([0.1, -0.2], np.eye(2)).logpdf(states[0])
    for t in range(3):
        if t:
            mean = np.array([[0.9, 0.1], [0.0, 0.8]]) @ states[t - 1] + np.array([1.0, 0.5]) * inputs[t]
            free = [1] if t == 1 else [0, 1]
            total += scipy.stats.multivariate_normal(mean[free], cov[np.ix_(free, free)]).logpdf(states[t, free])
        hidden = np.tanh(layers[0][0] @ states[t] + layers[0][1])
        predictors = layers[1][0] @ hidden + layers[1][1] + np.array([0.5, 0.0, -1.0]) * inputs[t]
        for n in np.flatnonzero(~np.isnan(counts[t])):
            total += scipy.stats.poisson(EXPOSURE[n] * softplus(predictors[n])).logpmf(counts[t, n])
    assert states[1, 0] == 0.5
    np.testing.assert_allclose(issm.log_joint(model, states, counts, inputs, interventions=plan), total, rtol=1e-10)


@pytest.mark.parametrize("name", ["full", "poisson", "negative binomial", "bernoulli"])
def test_draws_have_the_moments_of_the_emission(name):
    """Mean and variance of each emission given its predictor, within five standard errors."""
    emission = EMISSIONS[name]
    predictors = jnp.tile(jnp.array([-1.0, 0.5, 2.0]), (20_000, 1))
    draws = np.asarray(eqx.filter_jit(emission.sample)(KEY, predictors))
    for n in range(3):
        if name == "full":
            expected = scipy.stats.norm(predictors[0, n], np.sqrt(emission.cov[n, n]))
        else:
            expected = frozen(name, float(predictors[0, n]), n)
        mean, variance, _, kurtosis = expected.stats(moments="mvsk")
        assert abs(draws[:, n].mean() - mean) <= 5 * np.sqrt(variance / len(draws))
        assert abs(draws[:, n].var() - variance) <= 5 * variance * np.sqrt((kurtosis + 2) / len(draws))


def test_states_of_a_draw_follow_the_linear_model():
    """States have the prior's moments under clamps, whatever the emission; every trial has noise of its own."""
    model = model_with(EMISSIONS["poisson"])
    plan = issm.do({1: 2.0}, num_timesteps=3, state_dim=2, start=1, stop=2)
    clamps = issm.Intervention(jnp.tile(plan.mask, (20_000, 1, 1)), jnp.tile(plan.value, (20_000, 1, 1)))
    states, counts = issm.sample(KEY, model, 3, np.ones((3, 1)), interventions=clamps)
    expected = issm.interventional_prediction(LINEAR, plan, inputs=np.ones((3, 1))).states
    error = np.asarray(states.mean(axis=0) - expected.mean)
    sd = np.sqrt(np.diagonal(expected.cov, axis1=1, axis2=2) / 20_000)
    assert counts.shape == (20_000, 3, 3)
    assert (np.abs(error) <= 5 * sd + 1e-9).all()
    assert (states[:, 1, 1] == 2.0).all()


def test_an_lgssm_and_back():
    system = random_system(1, num_timesteps=4, input_dim=1)
    there = issm.ssm_from_lgssm(system.params)
    back = issm.ssm_to_lgssm(there)
    assert jax.tree.structure(back) == jax.tree.structure(system.params)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(system.params), strict=True))
    assert (there.state_dim, there.emission_dim, there.input_dim) == (
        system.params.state_dim, system.params.emission_dim, 1,
    )  # fmt: skip


def test_a_users_module_and_float32():
    """Any callable pytree is a map, Equinox's own networks too; the widest dtype wins."""
    network = eqx.nn.MLP(2, 3, 8, 1, key=KEY, dtype=jnp.float32)
    linear = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), LINEAR)
    model = issm.SSM(linear.initial, linear.dynamics, issm.PoissonEmission(network, jnp.float32(1.0)))
    states, counts = issm.sample(KEY, model, 5, np.zeros((5, 1)))
    assert states.dtype == counts.dtype == jnp.float32
    assert np.isfinite(issm.log_joint(model, states, counts, np.zeros((5, 1))))
    assert issm.SSM(LINEAR.initial, linear.dynamics, model.emission).dynamics.weights.dtype == jnp.float64


def test_networks_start_linear():
    network = issm.MLP(KEY, 2, 3, widths=(50, 50), bias=[1.0, 2.0, 3.0])
    points = jax.random.normal(KEY, (5, 2))
    np.testing.assert_allclose(jax.vmap(network)(points), points @ network.skip.T + np.array([[1.0, 2.0, 3.0]]))
    assert np.std(network.weights[1]) == pytest.approx(1 / np.sqrt(50), rel=0.05)


Y = np.zeros((4, 3))
SPIKES = model_with(EMISSIONS["poisson"])
U = np.zeros((4, 1))
BAD = {
    "negative count": (lambda: issm.log_joint(SPIKES, np.zeros((4, 2)), Y - 1, U), "emissions", "below zero"),
    "fractional count": (lambda: issm.log_joint(SPIKES, np.zeros((4, 2)), Y + 0.5, U), "emissions", "not whole"),
    "not binary": (
        lambda: issm.log_joint(model_with(EMISSIONS["bernoulli"]), np.zeros((4, 2)), Y + 2, U), "emissions", "neither 0 nor 1",
    ),
    "network of the wrong width": (lambda: model_with(issm.PoissonEmission(issm.MLP(KEY, 3, 3))), "emission.map", "3 numbers"),
    "module of the wrong width": (
        lambda: model_with(issm.PoissonEmission(lambda x: jnp.ones((4, 3)) @ x)), "emission.map", "fails on one state",
    ),
    "map to a matrix": (lambda: model_with(issm.PoissonEmission(lambda x: jnp.outer(x, x))), "emission.map", "(2, 2)"),
    "variances for other emissions": (lambda: model_with(issm.GaussianEmission(NETWORK, np.ones(2))), "emission.cov", "(2,)"),
    "exposures for other emissions": (
        lambda: model_with(issm.PoissonEmission(NETWORK, np.ones(2))), "emission.exposure", "(2,)",
    ),
    "exposure of zero": (lambda: issm.PoissonEmission(NETWORK, 0.0), "exposure", "not positive"),
    "negative concentration": (lambda: issm.NegativeBinomialEmission(NETWORK, -np.ones(3)), "concentration", "not positive"),
    "negative variance": (lambda: issm.GaussianEmission(NETWORK, -np.ones(3)), "cov", "variance of -1"),
    "unknown link": (lambda: issm.PoissonEmission(NETWORK, link="log"), "link", "'log'"),
    "unknown activation": (lambda: issm.MLP(KEY, 2, 3, activation="sin"), "activation", "'sin'"),
    "no hidden layer": (lambda: issm.MLP(KEY, 2, 3, widths=()), "in_size, widths, out_size", "()"),
    "weights are a vector": (lambda: issm.LinearMap(np.ones(3)), "weights", "shape (3,)"),
    "bias of another length": (lambda: issm.LinearMap(np.ones((3, 2)), np.ones(2)), "bias", "shape (2,)"),
    "emission is a map": (lambda: model_with(NETWORK), "emission", "MLP"),
    "input weights for other emissions": (
        lambda: model_with(issm.BernoulliEmission(NETWORK, np.ones((2, 1)))), "emission.input_weights", "(2, 1)",
    ),
    "no model": (lambda: issm.sample(KEY, LINEAR, 3), "model", "ParamsLGSSM"),
    "no steps": (lambda: issm.sample(KEY, SPIKES, 0), "num_timesteps", "0"),
    "no inputs": (lambda: issm.sample(KEY, SPIKES, 3), "inputs", "None"),
    "states of another length": (lambda: issm.log_joint(SPIKES, np.zeros((3, 2)), Y, U), "states", "shape (3, 2)"),
    "NaN states": (lambda: issm.log_joint(SPIKES, np.full((4, 2), np.nan), Y, U), "states", "NaN"),
    "network to an LGSSM": (lambda: issm.ssm_to_lgssm(SPIKES), "model.emission", "PoissonEmission"),
    "varying emissions": (
        lambda: issm.ssm_from_lgssm(
            issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], issm.TimeVarying(np.ones((3, 1))))
        ), "params.emissions.cov", "TimeVarying",
    ),
}  # fmt: skip


@pytest.fixture
def without_type_checks():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", BAD)
def test_bad_calls_say_what_is_wrong(name):
    call, argument, fragment = BAD[name]
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{argument}: got ")
    assert fragment in message
    assert "xpected" in message
