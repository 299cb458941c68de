r"""What Laplace EM learns of nonlinear dynamics: the expected log density of free arrivals, over points of the posterior."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from issm._linalg import psd_cholesky
from issm.fitting.free import DYNAMICS_FLOOR
from issm.models.nonlinear import NonlinearDynamics
from issm.models.trials import Trials


class Arrivals(eqx.Module):
    """Points of every pair of neighbouring states, with its mean and covariance under the posterior.

    Attributes:
        before, after: $x_{t-1}$ and $x_t$ at each point, `(num_trials, num_points, num_timesteps - 1, state_dim)`.
        inputs: Soft inputs of the arrivals, `(num_trials, num_timesteps - 1, input_dim)`.
        free: Whether a state is free at its arrival, `(num_trials, num_timesteps - 1, state_dim)`.
    """

    before: Float[Array, "num_trials num_points num_arrivals state_dim"]
    after: Float[Array, "num_trials num_points num_arrivals state_dim"]
    inputs: Float[Array, "num_trials num_arrivals input_dim"]
    free: Bool[Array, "num_trials num_arrivals state_dim"]

    def squares(self, dynamics: NonlinearDynamics) -> Float[Array, "num_trials num_arrivals state_dim"]:
        r"""$E[(x_t - f(x_{t-1}) - B u_t)^2]$ of free states, zero elsewhere."""
        each = jax.vmap(jax.vmap(jax.vmap(dynamics.map)))
        residuals = self.after - each(self.before) - (self.inputs @ dynamics.input_weights.T)[:, None]
        return jnp.where(self.free, (residuals**2).mean(axis=1), 0.0)

    def log_probs(self, dynamics: NonlinearDynamics) -> Float[Array, " num_trials"]:
        """Expected log density of the free arrivals of every trial, but for a constant."""
        return -(self.squares(dynamics) / dynamics.cov[None, None]).sum(axis=(1, 2)) / 2


def arrivals(means: Array, covs: Array, cross_covs: Array, trials: Trials) -> Arrivals:
    """The points of all trials."""
    num_trials, num_timesteps, state_dim = means.shape
    upper = jnp.concatenate([covs[:, :-1], cross_covs], axis=3)
    lower = jnp.concatenate([jnp.swapaxes(cross_covs, 2, 3), covs[:, 1:]], axis=3)
    both = jnp.concatenate([means[:, :-1], means[:, 1:]], axis=2)
    points = cubature_points(both, jnp.concatenate([upper, lower], axis=2))
    spread = lambda leaf: jnp.broadcast_to(leaf, (num_trials, num_timesteps, leaf.shape[-1]))[:, 1:]  # noqa: E731
    return Arrivals(
        before=points[..., :state_dim],
        after=points[..., state_dim:],
        inputs=spread(trials.plan.inputs),
        free=~spread(trials.plan.intervention.mask),
    )


def cubature_points(means: Array, covs: Array) -> Float[Array, "num_trials num_points num_timesteps dim"]:
    r"""$m_t \pm \sqrt{D}\,L_t e_i$: points with the mean and the covariance of the posterior."""
    dim = means.shape[-1]
    factors = jax.vmap(psd_cholesky)(covs.reshape(-1, dim, dim)).reshape(covs.shape)
    arms = jnp.moveaxis(factors, 3, 1) * jnp.sqrt(jnp.asarray(dim, means.dtype))
    return jnp.concatenate([means[:, None] + arms, means[:, None] - arms], axis=1)


def update_noise(
    dynamics: NonlinearDynamics, points: Arrivals, training: Bool[Array, " num_trials"], moves: Any
) -> NonlinearDynamics:
    """The noise that maximises the expected log density; states that are never free keep theirs."""
    counted = points.free & training[:, None, None]
    count = counted.sum(axis=(0, 1))
    total = jnp.where(counted, points.squares(dynamics), 0.0).sum(axis=(0, 1))
    cov = total / jnp.maximum(count, 1).astype(total.dtype) + DYNAMICS_FLOOR
    return eqx.tree_at(lambda d: d.cov, dynamics, jnp.where(moves & (count > 0), cov, dynamics.cov))
