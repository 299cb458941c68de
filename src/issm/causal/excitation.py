r"""The excitation of every row of the dynamics, $\sum_{W_i} E[z_t z_t^\top]$ with $z_t = [x_{t-1}; u_t; 1]$.

$W_i$ are the arrivals, t = 1 ... T-1, in which state i was not clamped: row i of $[A, B, b]$ is learned from these alone.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from issm.causal.predict import forward_moments
from issm.inference.moments import Moments
from issm.interventions import Intervention
from issm.models.fields import TimeVarying, as_matrix, is_diagonal, over_time
from issm.models.lgssm import ParamsLGSSM
from issm.models.transitions import lgssm_transitions
from issm.models.trials import Plan, Trials


class StateMoments(eqx.Module):
    """Mean of every state by trial, its covariance by pattern, and how many trials have each pattern."""

    means: Float[Array, "num_trials num_timesteps state_dim"]
    covs: Float[Array, "num_patterns num_timesteps state_dim state_dim"]
    counts: Float[Array, " num_patterns"]


class Weights(eqx.Module):
    """What the arrival in each step counts for each row, by trial and by pattern; zero where the state was clamped."""

    by_trial: Float[Array, "num_trials num_timesteps state_dim"]
    by_pattern: Float[Array, "num_patterns num_timesteps state_dim"]


def smoothed_states(moments: Moments, trials: Trials) -> StateMoments:
    """What the data say about the states."""
    counts = trials.in_patterns.astype(moments.smoothed_covs.dtype)
    return StateMoments(moments.smoothed_means, moments.smoothed_covs, counts)


def predicted_moments(params: ParamsLGSSM, plan: Plan) -> StateMoments:
    """What the model expects of the states under a plan, before any data; the plan has a trial axis."""
    axes = plan.axes
    transitions = jax.vmap(lgssm_transitions, in_axes=(None, axes.inputs, axes.intervention))(
        params, plan.inputs, plan.intervention
    )
    means, covs = jax.vmap(forward_moments)(transitions)
    return StateMoments(means, covs, jnp.ones(means.shape[0], means.dtype))


def clamp_moments(intervention: Intervention) -> StateMoments:
    """The states as the clamps set them; free states rest at zero."""
    values = jnp.where(intervention.mask, intervention.value, 0.0)
    num_trials, num_timesteps, state_dim = values.shape
    covs = jnp.zeros((1, num_timesteps, state_dim, state_dim), values.dtype)
    return StateMoments(values, covs, jnp.full(1, num_trials, values.dtype))


def row_precisions(params: ParamsLGSSM, mask: Array) -> Float[Array, "*trials num_timesteps state_dim"]:
    r"""$(Q_{oo}^{-1})_{ii}$ over the free states o of every arrival; zero where a state is clamped."""
    num_timesteps = mask.shape[-2]
    if is_diagonal(params.dynamics.cov):
        variances = over_time(params.dynamics.cov, num_timesteps)
        return jnp.where(mask, 0.0, 1 / variances[(None,) * (mask.ndim - 2)])
    cov = over_time(as_matrix(params.dynamics.cov), num_timesteps)[(None,) * (mask.ndim - 2)]
    eye = jnp.eye(cov.shape[-1], dtype=cov.dtype)
    free = ~mask[..., :, None] & ~mask[..., None, :]
    factors = jnp.linalg.cholesky(jnp.where(free, cov, eye[(None,) * (free.ndim - 2)]))
    inverse = jax.scipy.linalg.solve_triangular(factors, jnp.broadcast_to(eye, factors.shape), lower=True)
    return jnp.where(mask, 0.0, (inverse**2).sum(axis=-2))


def row_sums(
    moments: StateMoments, weights: Weights, inputs: Float[Array, "*trials num_timesteps input_dim"]
) -> Float[Array, "state_dim regressors regressors"]:
    r"""$\sum_t$ weight$_{t,i}\, E[z_t z_t^\top]$ for every row i, over all arrivals of all trials."""
    before = moments.means[:, :-1]
    inputs = jnp.broadcast_to(inputs, (before.shape[0], *inputs.shape[-2:]))[:, 1:]
    regressors = jnp.concatenate([before, inputs, jnp.ones_like(before[..., :1])], axis=-1)
    num_regressors, state_dim = regressors.shape[-1], before.shape[-1]
    flat = regressors.reshape(-1, num_regressors)

    def row(weights: tuple[Array, Array]) -> Array:
        by_trial, by_pattern = weights
        by_means = flat.T @ (flat * by_trial.reshape(-1, 1))
        by_covs = jnp.einsum("g,gt,gtij->ij", moments.counts, by_pattern, moments.covs[:, :-1])
        return by_means.at[:state_dim, :state_dim].add(by_covs)

    return lax.map(row, (jnp.moveaxis(weights.by_trial[:, 1:], -1, 0), jnp.moveaxis(weights.by_pattern[:, 1:], -1, 0)))


def condition(
    matrices: Float[Array, "rows dim dim"], tolerance: float
) -> tuple[Array, Array, Float[Array, "rows dim dim"]]:
    """Rank and condition of each matrix in units of its own diagonal, and the projector on what it is silent about."""
    variances = jnp.diagonal(matrices, axis1=-2, axis2=-1)
    scale = jnp.where(variances > 0, 1 / jnp.sqrt(jnp.where(variances > 0, variances, 1.0)), 0.0)
    values, vectors = jnp.linalg.eigh(matrices * scale[:, :, None] * scale[:, None, :])
    known = values > tolerance
    silent = jnp.where(known[:, None, :], 0.0, vectors)
    smallest = values[:, 0]
    ratio = jnp.where(known[:, 0], values[:, -1] / jnp.where(known[:, 0], smallest, 1.0), jnp.inf)
    return known.sum(axis=1, dtype=jnp.int32), ratio, silent @ jnp.swapaxes(silent, 1, 2)


def constant_dynamics(params: ParamsLGSSM) -> bool:
    """Whether there is one matrix A to speak about."""
    return not isinstance(params.dynamics.weights, TimeVarying)
