"""Restarts in one batch: each is the fit that its start would give alone, and the best is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
import issm

SYSTEM = helpers.random_system(
    4,
    num_trials=4,
    num_timesteps=15,
    emission_dim=3,
    state_dim=2,
    input_dim=1,
    clamps="perfect",
    shared_interventions=False,
    initial_cov="diagonal",
    dynamics_cov="diagonal",
    emissions_cov="diagonal",
)


def test_keeps_the_best_of_all_starts():
    (emissions, inputs), options = SYSTEM.data
    found = issm.multi_start(jax.random.key(0), emissions, 2, inputs=inputs, **options, num_starts=3, num_iters=20)
    assert found.log_probs.shape == found.num_iters.shape == (3,)
    assert np.isfinite(found.log_probs).all()
    assert float(found.fit.log_probs[-1]) == float(found.log_probs.max())
    assert found.fit.log_probs.shape == (found.fit.num_iters + 1,)
    expected = issm.marginal_log_prob(found.fit.params, emissions, inputs, **options).sum()
    np.testing.assert_allclose(found.log_probs.max(), expected, rtol=1e-9)
    assert float(found.spread) == float(jnp.ptp(found.log_probs))
    assert 1 <= found.num_same <= 3
    assert f"{found.num_same} of 3 fits" in found.reason
    alone = issm.fit_em(found.start.params, emissions, inputs, **options, num_iters=20)
    np.testing.assert_allclose(found.log_probs[0], alone.log_probs[-1], rtol=1e-7)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        (dict(num_starts=0), "num_starts"),
        (dict(num_starts=True), "num_starts"),
        (dict(scale=-1.0), "scale"),
        (dict(num_iters=0), "num_iters"),
    ],
)
def test_bad_calls_name_the_argument(options, argument):
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        issm.multi_start(jax.random.key(0), SYSTEM.emissions, 2, **options)
