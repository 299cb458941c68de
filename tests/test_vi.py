"""Variational fits: with Gauss-Newton potentials, a network and an LSTM; their options and guards."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from helpers import assert_refused

KEY = jax.random.key(0)
D = 2
PLAN = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[
    issm.do({0: v}, num_timesteps=12, state_dim=D, start=2, stop=6) for v in (1.0, -1.0, 0.5, 1.5)
])  # fmt: skip
LINEAR = issm.make_lgssm_params(
    [0.0, 0.5], [0.2, 0.2], [[0.9, 0.2], [-0.2, 0.9]], [0.02, 0.02], np.ones((3, D)), np.ones(3)
)
TRUTH = issm.SSM(
    LINEAR.initial, LINEAR.dynamics,
    issm.PoissonEmission(issm.LinearMap([[1.0, 0.0], [0.0, -1.0], [1.0, 1.0]], [1.0, 1.0, 0.0]), 3.0),
)  # fmt: skip
COUNTS = issm.sample(KEY, TRUTH, 12, interventions=PLAN)[1]


def fit(recognition, counts=COUNTS, dtype=float, **options):
    counts = np.asarray(counts, dtype)
    start = issm.initialize_ssm(KEY, counts, D, likelihood="poisson", exposure=3.0, widths=(4,))
    options = {"num_rollout": 5, "num_iters": 30, "interventions": PLAN} | options
    return issm.fit_vi(KEY, start, recognition, counts, **options)


def test_fit_with_gauss_newton_potentials():
    """The bound rises to just below Laplace's marginal likelihood of the same model."""
    result = fit(None)
    assert result.recognition is None
    assert np.isfinite(result.log_probs).all()
    assert result.log_probs[-1] > result.log_probs[0]
    laplace = issm.posterior(result.params, COUNTS, interventions=PLAN).marginal_loglik.sum() / COUNTS.size
    np.testing.assert_allclose(result.log_probs[-1], laplace, atol=0.05)
    np.testing.assert_array_equal(result.params.emission.exposure, 3.0)


def test_fit_with_a_network_in_float32_and_batches():
    network = issm.PotentialNetwork(KEY, 3, D, widths=(8,), dtype=jnp.float32)
    result = fit(network, dtype=np.float32, batch_size=2)
    leaves = jax.tree.leaves(eqx.filter(result, eqx.is_inexact_array))
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
    assert np.isfinite(result.log_probs).all()
    network = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), result.recognition)
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), result.params)
    after, before = (issm.elbo(KEY, m, r, COUNTS, interventions=PLAN).sum() for m, r in (
        (model, network), (issm.initialize_ssm(KEY, COUNTS, D, likelihood="poisson", exposure=3.0, widths=(4,)),
                           issm.PotentialNetwork(KEY, 3, D, widths=(8,))),
    ))  # fmt: skip
    assert after > before


def test_fit_with_an_lstm_holds_out_trials():
    held_out = np.array([False, True, False, False])
    result = fit(issm.MeanFieldLSTM(KEY, 3, D, width=4), held_out=held_out)
    assert result.log_probs[-1] > result.log_probs[0]
    assert np.isfinite(result.held_out).all()
    moments = issm.posterior(result.params, COUNTS, interventions=PLAN, method=result.recognition)
    np.testing.assert_array_equal(moments.smoothed_means[:, 2:6, 0], PLAN.value[:, 2:6, 0])
    assert (moments.smoothed_covariances[:, 2:6, 0] == 0).all()


BAD = {
    "a batch too large": (lambda: fit(None, batch_size=9), "batch_size"),
    "a batch with held-out trials": (
        lambda: fit(None, batch_size=2, held_out=np.array([True] + [False] * 3)),
        "batch_size",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_say_what_is_wrong(name):
    assert_refused(*BAD[name])


def test_a_network_alone_learns_the_posterior_of_a_known_model():
    """The model stays as it is, no rollout stage comes first, and q gets near the smoother's Gaussian."""
    network = issm.FreePotentials(4, 12, D)
    how = dict(interventions=PLAN, trainable=False, num_iters=200, num_samples=4, recognition_rate=5e-2)
    result = issm.fit_vi(KEY, TRUTH, network, COUNTS, **how)
    assert all(map(np.array_equal, jax.tree.leaves(result.params), jax.tree.leaves(TRUTH)))
    assert result.rollout_log_probs.shape == (0,)
    found = issm.posterior(TRUTH, COUNTS, interventions=PLAN, method=result.recognition)
    laplace = issm.posterior(TRUTH, COUNTS, interventions=PLAN)
    np.testing.assert_allclose(found.smoothed_means, laplace.smoothed_means, atol=0.1)  # of sds around .3
    np.testing.assert_allclose(found.smoothed_covariances, laplace.smoothed_covariances, atol=0.02)
    with pytest.raises(ValueError, match="trainable: got nothing but False"):
        issm.fit_vi(KEY, TRUTH, None, COUNTS, **how)
