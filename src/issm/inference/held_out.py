"""What the other emissions say about some of them: the kernel of co-smoothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from issm.inference.kalman import marginal_log_prob
from issm.inference.smoother import lgssm_smoother
from issm.interventions import Intervention
from issm.models.fields import apply_weights, is_diagonal, over_time
from issm.models.lgssm import ParamsLGSSM
from issm.models.transitions import emission_offsets
from issm.models.trials import as_trials

MOST_GROUPS = 5


def emission_groups(emission_dim: int) -> Int[np.ndarray, " emission_dim"]:
    """Emission n is in group n modulo 5, or modulo the number of emissions if there are fewer."""
    return np.arange(emission_dim) % min(MOST_GROUPS, emission_dim)


def predict_held_out(
    params: ParamsLGSSM,
    emissions: Any,
    inputs: Any,
    interventions: Intervention | None,
    held_out: Bool[Array, " emission_dim"],
) -> tuple[Float[Array, "*trials"], Float[Array, "*trials num_timesteps emission_dim"]]:
    r"""Log density of some emissions given all others, and the mean of every emission given those others.

    $\log p(y_H \mid y_{-H}) = \log p(y) - \log p(y_{-H})$, and the mean is that of the smoother without $y_H$, with the part of
    the emission noise that correlated noise reveals.
    """
    trials = as_trials(params, emissions, inputs, interventions)
    full = trials.like_user(trials.emissions)
    kept = jnp.where(held_out.reshape((1,) * (full.ndim - 1) + (-1,)), jnp.nan, full)
    posterior = lgssm_smoother(params, kept, inputs, interventions=interventions)
    log_prob = marginal_log_prob(params, full, inputs, interventions=interventions) - posterior.marginal_loglik
    means = posterior.smoothed_means
    in_form = trials.plan.inputs
    if trials.one_sequence:
        return log_prob, _expected(params, kept, means, in_form)
    axes = (None, 0, 0, trials.plan.axes.inputs)
    return log_prob, jax.vmap(_expected, in_axes=axes)(params, kept, means, in_form)


def _expected(params: ParamsLGSSM, kept: Array, means: Array, inputs: Array) -> Array:
    expected = apply_weights(params.emissions.weights, means) + emission_offsets(params, inputs)
    cov = params.emissions.cov
    if is_diagonal(cov):
        return expected
    seen = ~jnp.isnan(kept)
    residual = jnp.where(seen, kept - expected, 0.0)

    def revealed(cov: Array, seen: Array, residual: Array) -> Array:
        both = seen[:, None] & seen[None]
        weights = jnp.linalg.solve(jnp.where(both, cov, jnp.eye(len(seen), dtype=cov.dtype)), residual)
        return jnp.where(seen, 0.0, cov @ jnp.where(seen, weights, 0.0))

    return expected + jax.vmap(revealed)(over_time(cov, kept.shape[0]), seen, residual)
