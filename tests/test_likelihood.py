"""The derivative of the marginal likelihood by Fisher's identity against automatic differentiation of the plain filter."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from issm.inference.dense import dense_moments
from issm.inference.likelihood import log_likelihoods
from issm.models.trials import as_trials

NUM_TRIALS, NUM_TIMESTEPS, STATE_DIM = 3, 5, 2


def make(rng, emission_dim, *, full, missing, shared, varying):
    normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
    factor, emission_factor = normal(STATE_DIM, STATE_DIM), normal(emission_dim, emission_dim)
    fields = {
        "dynamics_weights": 0.5 * normal(STATE_DIM, STATE_DIM),
        "dynamics_cov": factor @ factor.T if full else rng.uniform(0.5, 2, STATE_DIM),
        "emissions_weights": normal(emission_dim, STATE_DIM),
        "emissions_cov": emission_factor @ emission_factor.T + np.eye(emission_dim)
        if full
        else rng.uniform(0.5, 2, emission_dim),
        "dynamics_bias": normal(STATE_DIM),
        "dynamics_input_weights": normal(STATE_DIM, 1),
        "emissions_bias": normal(emission_dim),
        "emissions_input_weights": normal(emission_dim, 1),
    }
    if varying:
        scales = rng.uniform(0.5, 1.0, NUM_TIMESTEPS)
        fields = {name: issm.TimeVarying(np.multiply.outer(scales, value)) for name, value in fields.items()}
    params = issm.make_lgssm_params(initial_mean=normal(STATE_DIM), initial_cov=np.eye(STATE_DIM), **fields)
    leading = () if shared else (NUM_TRIALS,)
    mask = rng.random((*leading, NUM_TIMESTEPS, STATE_DIM)) < 0.3
    if not shared:
        mask[1] = mask[0]  # two trials of one pattern
    clamps = issm.Intervention(mask, normal(*mask.shape), 0.1 * mask)
    emissions = normal(NUM_TRIALS, NUM_TIMESTEPS, emission_dim)
    if missing:
        holes = rng.random(emissions.shape) < 0.2
        holes[1] = holes[0]
        holes[2, 3] = True
        emissions[holes] = np.nan
    return params, as_trials(params, emissions, normal(*leading, NUM_TIMESTEPS, 1), clamps)


CASES = {
    "few emissions": {"emission_dim": 1, "full": True, "missing": True, "shared": False, "varying": False},
    "diagonal, missing": {"emission_dim": 4, "full": False, "missing": True, "shared": False, "varying": False},
    "diagonal, complete, shared": {
        "emission_dim": 4,
        "full": False,
        "missing": False,
        "shared": True,
        "varying": False,
    },
    "full, complete": {"emission_dim": 4, "full": True, "missing": False, "shared": False, "varying": False},
    "everything varies": {"emission_dim": 3, "full": True, "missing": True, "shared": False, "varying": True},
    "full, complete, shared": {"emission_dim": 4, "full": True, "missing": False, "shared": True, "varying": False},
}


def functions(trials, weights):
    """The weighted log-likelihood as a function of all that can be differentiated, by the library and by autodiff."""
    places = lambda t: (t.emissions, t.plan.inputs, t.plan.intervention.value, t.plan.intervention.variance)  # noqa: E731

    def through(loglik):
        return lambda params, *data: (loglik(params, eqx.tree_at(places, trials, data)) * weights).sum()

    plain = through(lambda params, trials: dense_moments(params, trials).logliks.sum(axis=1))
    return through(log_likelihoods), plain, places(trials)


@pytest.mark.parametrize("case", CASES)
def test_gradient_with_respect_to_everything_is_that_of_autodiff(case):
    rng = np.random.default_rng(list(CASES).index(case))
    params, trials = make(rng, **CASES[case])
    ours, plain, data = functions(trials, jnp.asarray(rng.normal(size=NUM_TRIALS)))
    argnums = tuple(range(5))
    actual = jax.jit(jax.grad(ours, argnums))(params, *data)
    expected = jax.jit(jax.grad(plain, argnums))(params, *data)
    for path, value in jax.tree_util.tree_leaves_with_path(expected):
        found = dict(jax.tree_util.tree_leaves_with_path(actual))[path]
        scale = max(float(jnp.abs(value).max()), 1e-12)
        assert float(jnp.abs(found - value).max()) < 1e-11 * scale, jax.tree_util.keystr(path)


def test_forward_mode_and_hessian_are_those_of_autodiff():
    rng = np.random.default_rng(7)
    params, trials = make(rng, **CASES["diagonal, missing"])
    ours, plain, data = functions(trials, jnp.ones(NUM_TRIALS))
    tangent = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
    actual, expected = (jax.jvp(lambda p, f=f: f(p, *data), (params,), (tangent,))[1] for f in (ours, plain))
    np.testing.assert_allclose(actual, expected, rtol=1e-11)
    weights = params.dynamics.weights
    with_weights = lambda f: lambda w: f(eqx.tree_at(lambda p: p.dynamics.weights, params, w), *data)  # noqa: E731
    actual, expected = (jax.jit(jax.hessian(with_weights(f)))(weights) for f in (ours, plain))
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("case", "offset"),
    [(case, offset) for case in ("diagonal, complete, shared", "full, complete, shared") for offset in (0.0, 1e6)],
)
def test_score_of_complete_data(case, offset):
    """Sums give the gradient where they keep their digits; residuals where emissions are far from zero, or R is full."""
    rng = np.random.default_rng(11)
    params, trials = make(rng, **CASES[case])
    trials = eqx.tree_at(lambda t: t.emissions, trials, trials.emissions + offset)
    params = eqx.tree_at(lambda p: p.emissions.bias, params, params.emissions.bias + offset)
    ours, plain, data = functions(trials, jnp.asarray(rng.normal(size=NUM_TRIALS)))
    (loglik, actual), (plain_loglik, expected) = (jax.jit(jax.value_and_grad(f))(params, *data) for f in (ours, plain))
    np.testing.assert_allclose(loglik, plain_loglik, rtol=1e-11 + 1e-15 * offset)
    for (path, found), value in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        scale = max(float(jnp.abs(value).max()), 1e-12)
        assert float(jnp.abs(found - value).max()) < (1e-11 + 1e-15 * offset) * scale, jax.tree_util.keystr(path)
    weights = params.emissions.weights
    with_weights = lambda f: lambda w: f(eqx.tree_at(lambda p: p.emissions.weights, params, w), *data)  # noqa: E731
    actual, expected = (jax.jit(jax.hessian(with_weights(f)))(weights) for f in (ours, plain))
    np.testing.assert_allclose(actual, expected, rtol=1e-9 + 1e-14 * offset, atol=1e-10 + 1e-14 * offset)
