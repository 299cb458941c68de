"""Variational posteriors against the exact likelihood, dense Gaussians and finite differences."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from helpers import assert_refused, joint_moments, random_system

KEY = jax.random.key(0)
SYSTEM = random_system(
    3,
    num_trials=2,
    num_timesteps=5,
    input_dim=1,
    clamps="mixed",
    missing=0.2,
    shared_interventions=False,
    shared_inputs=False,
)
(EMISSIONS, INPUTS), OPTIONS = SYSTEM.data
MODEL = issm.ssm_from_lgssm(SYSTEM.params)
T, D = 5, 2


def exact_potentials():
    """J = C' R^-1 C and h = C' R^-1 (y - D u - d) over the observed rows, by loops."""
    fields = {name: np.asarray(SYSTEM.fields[name]) for name in SYSTEM.fields}
    precisions, shifts = np.zeros((2, T, D, D)), np.zeros((2, T, D))
    for k in range(2):
        emissions, inputs, *_ = SYSTEM.trial(k)
        for t in range(T):
            seen = ~np.isnan(emissions[t])
            weights = fields["emissions_weights"][seen]
            noise = np.linalg.inv(fields["emissions_cov"][np.ix_(seen, seen)])
            offset = (fields["emissions_input_weights"] @ inputs[t] + fields["emissions_bias"])[seen]
            precisions[k, t] = weights.T @ noise @ weights
            shifts[k, t] = weights.T @ noise @ (emissions[t][seen] - offset)
    return precisions, shifts


PRECISIONS, SHIFTS = exact_potentials()
FREE = issm.FreePotentials(2, T, D)


def bound(recognition, key=KEY, model=MODEL, **options):
    return issm.elbo(key, model, recognition, EMISSIONS, INPUTS, **OPTIONS, **options)


def test_the_bound_is_the_likelihood_where_q_is_the_posterior():
    """No draw matters: exact potentials leave nothing random."""
    exact = FREE.set(PRECISIONS, SHIFTS)
    expected = issm.marginal_log_prob(SYSTEM.params, EMISSIONS, INPUTS, **OPTIONS)
    for seed in range(2):
        np.testing.assert_allclose(bound(exact, jax.random.key(seed)), expected, rtol=1e-9)
    smoothed = issm.lgssm_smoother(SYSTEM.params, EMISSIONS, INPUTS, **OPTIONS)
    ours = issm.posterior(MODEL, EMISSIONS, INPUTS, **OPTIONS, method=exact)
    np.testing.assert_allclose(ours.smoothed_means, smoothed.smoothed_means, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(ours.smoothed_covariances, smoothed.smoothed_covariances, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(
        ours.smoothed_cross_covariances, smoothed.smoothed_cross_covariances, rtol=1e-8, atol=1e-10
    )


NETWORKS = {
    "potentials": issm.PotentialNetwork(KEY, 3, D, widths=(8,), window=1),
    "free": eqx.tree_at(lambda f: f.values, FREE, jax.random.normal(KEY, (2, T, D))),
    "lstm": issm.MeanFieldLSTM(KEY, 3, D, 1, width=6, bidirectional=True),
}


@pytest.fixture(scope="module", params=NETWORKS)
def recognition(request):
    return NETWORKS[request.param]


def test_divergence_and_bound_are_those_of_dense_gaussians(recognition):
    """One trial: q as a stacked Gaussian from the moments, the divergence from the prior's joint covariance by NumPy."""
    result = issm.posterior(MODEL, EMISSIONS, INPUTS, **OPTIONS, method=recognition)
    many = 4000
    bounds = np.asarray(bound(recognition, num_samples=many))
    tempered = np.asarray(bound(recognition, num_samples=many, gamma=0.0))
    exact = np.asarray(issm.marginal_log_prob(SYSTEM.params, EMISSIONS, INPUTS, **OPTIONS))
    assert (bounds <= exact + 1e-6).all()
    for k in range(2):
        emissions, inputs, mask, _, variance = SYSTEM.trial(k)
        n = T * D
        mean, cov = joint_moments(SYSTEM, k)
        free = np.flatnonzero(~(mask & (variance == 0)).ravel())
        prior_mean, prior = mean[:n][free], cov[:n, :n][np.ix_(free, free)]
        means = np.asarray(result.smoothed_means[k]).ravel()[free]
        if isinstance(recognition, issm.MeanFieldLSTM):
            q = np.diag(np.concatenate([np.diag(c) for c in np.asarray(result.smoothed_covariances[k])]))
        else:
            said = jax.tree.map(np.asarray, recognition(
                jnp.asarray(emissions), jnp.asarray(inputs), jax.tree.map(lambda x, k=k: x[k], OPTIONS["interventions"]), jnp.asarray(k)
            ))  # fmt: skip
            precision = np.zeros((n, n))
            for t in range(T):
                precision[t * D : t * D + D, t * D : t * D + D] = said.weights[t].T @ said.weights[t]
            whole = np.zeros((n, n))
            kept = precision[np.ix_(free, free)]
            whole[np.ix_(free, free)] = np.linalg.inv(np.linalg.inv(prior) + kept)
            q = whole
        blocks = q.reshape(T, D, T, D)[np.arange(T), :, np.arange(T)]
        np.testing.assert_allclose(result.smoothed_covariances[k], blocks, rtol=1e-7, atol=1e-10)
        q = q[np.ix_(free, free)]
        inverse, away = np.linalg.inv(prior), means - prior_mean
        log_ratio = np.linalg.slogdet(prior)[1] - np.linalg.slogdet(q)[1]
        divergence = (np.trace(inverse @ q) - len(free) + away @ inverse @ away + log_ratio) / 2
        np.testing.assert_allclose(tempered[k] - bounds[k], divergence, rtol=1e-8)
        expected = 0.0  # E_q[log p(y | x)] of the linear model
        at = lambda name: np.asarray(SYSTEM.fields[name])  # noqa: E731
        for t in range(T):
            seen = ~np.isnan(emissions[t])
            weights = at("emissions_weights")[seen]
            noise = at("emissions_cov")[np.ix_(seen, seen)]
            offset = (at("emissions_input_weights") @ inputs[t] + at("emissions_bias"))[seen]
            residual = emissions[t][seen] - offset - weights @ np.asarray(result.smoothed_means[k, t])
            second = np.outer(residual, residual) + weights @ blocks[t] @ weights.T
            expected -= (np.trace(np.linalg.solve(noise, second)) + np.linalg.slogdet(2 * np.pi * noise)[1]) / 2
        np.testing.assert_allclose(tempered[k], expected, rtol=0.02)


def test_gradient_of_the_bound_is_the_finite_difference():
    arrays, rest = eqx.partition((MODEL, NETWORKS["potentials"]), eqx.is_inexact_array)
    evaluate = jax.jit(jax.value_and_grad(lambda a: (lambda m, r: bound(r, model=m).sum())(*eqx.combine(a, rest))))
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), arrays)
    symmetric = lambda m: (m[0].initial.cov, m[0].dynamics.cov, m[0].emission.cov)  # noqa: E731
    direction = eqx.tree_at(symmetric, direction, tuple((c + c.T) / 20 for c in symmetric(direction)))
    direction = eqx.tree_at(lambda m: (m[1].center, m[1].scale), direction, (jnp.zeros(3), jnp.zeros(3)))  # held fixed
    gradient = evaluate(arrays)[1]
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float((g * d).sum()), gradient, direction)))

    def at(step):
        return float(evaluate(jax.tree.map(lambda x, d: x + step * d, arrays, direction))[0])

    h = 1e-4
    assert slope == pytest.approx((8 * (at(h) - at(-h)) - at(2 * h) + at(-2 * h)) / (12 * h), rel=1e-6)


BAD = {
    "another data set": (lambda: bound(issm.FreePotentials(2, 4, D)), "recognition"),
    "emissions of another size": (lambda: bound(issm.PotentialNetwork(KEY, 4, D)), "recognition"),
    "states of another size": (lambda: bound(issm.MeanFieldLSTM(KEY, 3, 3)), "recognition"),
    "a function": (lambda: bound(lambda y: y), "recognition"),
    "no draws": (lambda: bound(FREE, num_samples=0), "num_samples"),
    "a seed": (lambda: issm.elbo(0, MODEL, FREE, EMISSIONS, INPUTS, **OPTIONS), "key"),
    "potentials of another shape": (lambda: FREE.set(PRECISIONS[:1], SHIFTS), "precisions"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_say_what_is_wrong(name):
    assert_refused(*BAD[name])
